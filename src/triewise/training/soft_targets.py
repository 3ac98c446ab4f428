r"""Soft targets: at each decision of the true title a teacher says how likely each continuation is.

A teacher gives probabilities of all titles. Its mass below a child over its mass below the node is what it thinks of
the child: along the trie that is the teacher itself, told token by token. D3's assistant says the same at decoding.

Shape key: M target positions, E children of all their nodes, S target titles, I items, V vocabulary, W windows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.arrays import Ragged, offsets_of, ranges
from triewise.errors import UserError
from triewise.training.losses import Columns, edge_logits, on_device
from triewise.training.objective import MicroBatches, Objective, TitleLoss, TokenLosses
from triewise.training.temperature import of_rows

if TYPE_CHECKING:
    from triewise.tokens import DeviceTrie, Trie
    from triewise.training.examples import Batch, Examples

FORMS = ("cross-entropy", "likelihood")
Teacher = Callable[[Ragged, NDArray[np.int64]], NDArray[np.floating]]
"""Rows of items (B) and how many leading items of each are context to log-probabilities (S, I) of the titles: one row
for each other item, given the items before it in its row; -inf at all but one of the items of equal titles."""


def soft_parts(
    objective: Objective,
    alpha: float,
    form: str,
    soft: Tensor,
    logits: Tensor,
    target: Tensor,
    node: Tensor,
    trie: Trie | DeviceTrie,
    weight: Tensor | None = None,
    n_edges: int | None = None,
    columns: Columns | None = None,
    first: Tensor | None = None,
) -> TokenLosses:
    r"""The loss of each token with a soft target, with the support, temperature and weights of ``objective``.

    With :math:`y = (1 - \alpha) e_{target} + \alpha q` over the children z of the node and p of the objective,

    .. math:: \ell = -\sum_z y_z \log p_z \quad \text{(cross-entropy)}, \qquad
              \ell = -\log \sum_z y_z p_z \quad \text{(likelihood)}

    Where the objective multiplies its loss by the temperature, so it does here.

    Args:
        objective: Without ``expand_negatives``.
        alpha: Weight of the teacher, in [0, 1]; at 0 the loss is the objective's.
        form: ``cross-entropy`` or ``likelihood``.
        soft: float32 (E,), q of the children of each node of ``node``, as `child_edges` orders them.
        logits: As of `Objective.parts`, and so are the next six.
        target: Target token ids (M,).
        node: Trie node before each target (M,).
        trie: The trie of all items.
        weight: Token weights (M,).
        n_edges: Number of children of all nodes.
        columns: The tokens of the columns of ``logits``.
        first: int64 (M,), where the children of each node begin in ``soft``, if that has more than these.

    Returns:
        ``loss``; ``contribution`` and ``nll`` are the objective's.

    Source: likelihood is TCA4Rec (arXiv:2601.18457); its code has alpha .1. Cross-entropy is ours.
    """
    parts = objective.parts(logits, target, node, trie, weight, n_edges, columns)
    if not alpha:
        return parts
    row, _, z_E, z_M = edge_logits(logits, target, node, trie, n_edges, columns)
    if first is not None:
        n_M = on_device(trie, logits.device).n_children.index_select(0, node)
        shift_M = first - (n_M.cumsum(0) - n_M)
        at = torch.arange(len(row), device=row.device) + shift_M.index_select(0, row)
        soft = soft.index_select(0, at)
    tau = objective.tau_of(z_M, z_E, row)
    added = _added(form, alpha, soft, (z_E - z_M.index_select(0, row)) / of_rows(tau, row), row, len(node))
    if objective.support == "trie":
        added = added * tau
    return parts._replace(loss=parts.loss + (added if weight is None else weight * added))


def _added(form: str, alpha: float, soft: Tensor, above: Tensor, row: Tensor, n_rows: int) -> Tensor:
    """What a soft target adds to the nll (M,), from how far each child's logit lies above the target's (E,)."""
    if form == "cross-entropy":
        return -alpha * above.new_zeros(n_rows).index_add(0, row, soft * above)
    # The largest of those that count, the target among them where it has a weight of its own, is taken out first.
    top = above.new_full((n_rows,), 0.0 if alpha < 1 else -torch.inf)
    top = top.scatter_reduce(0, row, above.detach().where(soft > 0, -torch.inf), "amax")
    inside = (above - top.index_select(0, row)).clamp(max=0).exp()
    total = ((1 - alpha) * (-top).exp()).index_add(0, row, alpha * soft * inside)
    return -(top + total.log())


def child_shares(
    trie: Trie,
    node: NDArray[np.int64],
    title: NDArray[np.int64],
    log_p: NDArray[np.floating],
    temperature: float = 1.0,
) -> NDArray[np.float32]:
    """What a teacher thinks of the children of nodes.

    Args:
        trie: The trie of all items.
        node: (M,), no leaves.
        title: (M,), row of ``log_p`` of each node.
        log_p: (S, I) log-probabilities of titles; -inf: none.
        temperature: Divides them, > 0, before they are probabilities again.

    Returns:
        (E,) mass below each child over the mass below its node, children in the order of the trie; where the teacher
        has no mass below a node, equal shares.
    """
    if not len(node):
        return np.zeros(0, np.float32)
    n_M, lo, hi = trie.n_children[node], trie.item_lo, trie.item_hi
    edges = ranges(trie.child_ptr[node].astype(np.int64), n_M)
    child, row = edges.at, edges.row
    items = ranges(lo[child].astype(np.int64), (hi - lo)[child].astype(np.int64))
    scaled = log_p[title[row][items.row], trie.item_order[items.at]].astype(np.float64) / temperature
    first, first_M = offsets_of((hi - lo)[child])[:-1], offsets_of(n_M)[:-1]
    # The largest of each node is taken out first: far from the best titles every probability would be 0.
    top_M = np.maximum.reduceat(np.maximum.reduceat(scaled, first), first_M)
    top_M = np.where(np.isfinite(top_M), top_M, 0)
    mass_E = np.add.reduceat(np.exp(scaled - top_M[row][items.row]), first)
    mass_M = np.add.reduceat(mass_E, first_M)
    shares = np.where(mass_M[row] > 0, mass_E / np.where(mass_M > 0, mass_M, 1)[row], 1 / n_M[row])
    return shares.astype(np.float32)


@dataclass(frozen=True)
class SoftTargets:
    """An objective whose targets a teacher softens.

    Attributes:
        objective: Of which loss; without ``expand_negatives``.
        teacher: What gives the probabilities of all titles.
        alpha: Weight of the teacher, in [0, 1].
        temperature: Of the teacher's distribution over titles, > 0.
        form: ``cross-entropy`` or ``likelihood``; see `soft_parts`.
        key: What names the teacher, for the settings of a run: a hash of its weights.

    Raises:
        UserError: A number out of range, an unknown form, or ``expand_negatives``.
    """

    objective: Objective
    teacher: Teacher
    alpha: float = 0.5
    temperature: float = 1.0
    form: str = "cross-entropy"
    key: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 <= self.alpha <= 1:
            raise UserError(f"wanted alpha of soft targets in [0, 1], got {self.alpha}")
        if not self.temperature > 0:
            raise UserError(f"wanted a temperature of the teacher > 0, got {self.temperature}")
        if self.form not in FORMS:
            raise UserError(f"wanted a form of soft targets among {', '.join(FORMS)}, got {self.form!r}")
        if self.objective.expand_negatives:
            raise UserError(
                "soft targets need probabilities of the valid tokens: set expand_negatives = False"
            )

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        names = ("alpha", "temperature", "form", "key")
        return self.objective.settings() | {"soft_targets": {name: getattr(self, name) for name in names}}

    def divisor(self, total: Tensor) -> Tensor:
        """That of the objective."""
        return self.objective.divisor(total)

    def module(self, model: Any, trie: Trie) -> TitleLoss:
        """See `objective.Learned`."""
        return SoftLoss(model, self, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> MicroBatches:
        """See `objective.Learned`."""
        return SoftBatches(examples, self, rows, packing)


class SoftLoss(TitleLoss):
    """A causal LM and `SoftTargets` as one module."""

    per_target = ("first_edge",)

    def __init__(self, model: Any, learned: SoftTargets, trie: Trie) -> None:
        super().__init__(model, learned.objective, trie)
        self.alpha, self.form = learned.alpha, learned.form

    def score(self, batch: Mapping[str, Any]) -> Callable[..., TokenLosses]:
        """`soft_parts`, which reads ``soft`` (E,) of the batch and ``first_edge`` (M,), its ``first``."""
        return functools.partial(soft_parts, self.objective, self.alpha, self.form, batch["soft"])


class SoftBatches(MicroBatches):
    """Micro-batches in a given order, with what the teacher thinks at every target that is kept."""

    asks_a_model = True

    def __init__(
        self, examples: Examples, learned: SoftTargets, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        super().__init__(examples, learned.objective, rows, packing)
        self.learned = learned

    def more(self, rows: NDArray[np.int64], batch: Batch, keep: Any) -> dict[str, Any]:
        """``soft`` and ``first_edge`` of `SoftLoss.score`."""
        windows, trie = self.examples.windows, self.examples.trie
        log_p = self.learned.teacher(windows.items.take(rows), windows.n_context[rows].astype(np.int64))
        node, title = batch.node[keep], batch.title[keep]
        soft = child_shares(trie, node, title, log_p, self.learned.temperature)
        return {"soft": soft, "first_edge": offsets_of(trie.n_children[node])[:-1]}
