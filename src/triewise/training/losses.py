r"""Token losses and what they are made of: support x temperature x weight x normaliser.

The *support* of the softmax is the whole vocabulary (language-modelling loss, LML) or the valid next tokens,
which are the children of the trie node before the target (masked softmax loss, MSL). Nothing here stores a
mask: a ragged gather reads the logits of the children. Everything is in nats, float32, with the maximum
subtracted.

Shape key: M target positions, V vocabulary, N trie nodes, E (row, child) pairs of M positions, R reference
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triewise.errors import UserError
from triewise.tokens import DeviceTrie, Trie
from triewise.training import processes
from triewise.training.temperature import (
    AdaptiveTemperature,
    _of_rows,
)

SUPPORTS = ("trie", "vocabulary")
NORMALISERS = ("weights", "decisions", "sum")


class Columns(NamedTuple):
    """Which tokens the columns of logits belong to, where they are not the whole vocabulary.

    Attributes:
        token: int64 (C,), ascending, distinct.
        n_vocabulary: Size V of the vocabulary they are from.
    """

    token: Tensor
    n_vocabulary: int


def trie_nll(
    logits: Tensor,
    target: Tensor,
    node: Tensor,
    trie: Trie | DeviceTrie,
    temperature: float | Tensor = 1.0,
    n_edges: int | None = None,
    expand_negatives: bool = False,
    columns: Columns | None = None,
) -> Tensor:
    r"""Negative log-likelihood of each target token among its valid continuations.

    .. math:: \ell_m = -z_{m,y_m}/\tau + \log \sum_{v \in \mathcal{C}(n_m)} a_{m,v} \exp(z_{m,v}/\tau)

    where :math:`\mathcal{C}(n)` are the tokens on the edges that leave trie node :math:`n`, and a is 1 or, with
    ``expand_negatives``, :math:`V / |\mathcal{C}(n_m)|` for all of them but the target.

    Args:
        logits: Next-token logits (M, V), any float dtype.
        target: Target token ids (M,), int64; each continues its node (``Trie.walk`` has checked that: a check
            here would stop a GPU at every step).
        node: Trie node before each target (M,), int64; no leaf.
        trie: The trie of all items.
        temperature: Divides the logits, > 0; tau of the paper. The loss is *not* multiplied by it. A tensor
            (M,) has one for each target.
        n_edges: Number of children of all nodes of ``node`` together, where it is known; spares a GPU one
            stop.
        expand_negatives: Let the valid tokens other than the target weigh as much as a whole vocabulary (MSL
            + alpha).
        columns: The tokens of the columns of ``logits``, then (M, C); they must hold all children of all
            nodes of ``node`` (``Trie.continuations``). None: column v is token v.

    Returns:
        float32 (M,), nats, >= 0. Exactly 0, with zero gradient, where only one continuation is valid.

    Raises:
        UserError: ``temperature`` is a number <= 0.

    Source: MSL, arXiv:2504.04178. The authors' code stores a (T, V) mask per example and does not subtract
    the maximum; it has no MSL + alpha.

    >>> trie = Trie.from_sequences([[7, 2], [9, 2]])
    >>> logits = torch.zeros(1, 10)
    >>> logits[0, 5] = 50.0  # token 5 continues no title here
    >>> trie_nll(logits, torch.tensor([7]), torch.tensor([0]), trie).exp()
    tensor([2.])
    """
    if not isinstance(temperature, Tensor):
        _check_temperature(temperature)
    trie = _on(trie, logits.device)
    edge_row, edge_token = _edges(node, trie, n_edges)
    z_E, z_M = _gather(logits, target, edge_row, edge_token, columns)
    z_E, z_M = z_E / _of_rows(temperature, edge_row), z_M / temperature
    if expand_negatives:
        n_vocabulary = logits.shape[1] if columns is None else columns.n_vocabulary
        log_a_M = (n_vocabulary / trie.n_children.index_select(0, node)).log()
        negative_E = edge_token != target.index_select(0, edge_row)
        z_E = z_E + log_a_M.index_select(0, edge_row) * negative_E
    top_M, rest_M = _log_sum_exp(z_E, edge_row, len(node))
    return (top_M - z_M) + rest_M  # in this order small losses of large logits keep their digits


def vocabulary_nll(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Negative log-likelihood of each target token among all tokens: cross-entropy, unreduced.

    Args:
        logits: Next-token logits (M, V), any float dtype.
        target: Target token ids (M,), int64.
        temperature: Divides the logits, > 0.

    Returns:
        float32 (M,), nats, >= 0.

    Raises:
        UserError: ``temperature`` <= 0.
    """
    _check_temperature(temperature)
    return torch.nn.functional.cross_entropy(logits.float() / temperature, target, reduction="none")


class LmlParts(NamedTuple):
    """The two parts of the language-modelling loss per token, float32 (M,), nats; their sum is the loss."""

    invalid: Tensor
    choice: Tensor


def lml_parts(
    logits: Tensor, target: Tensor, node: Tensor, trie: Trie | DeviceTrie, n_edges: int | None = None
) -> LmlParts:
    r"""What the language-modelling loss pays for invalid tokens, and what for the wrong valid ones.

    .. math::
        \mathrm{invalid} = -\log \frac{\sum_{v \in \mathcal{C}(n)} e^{z_v}}{\sum_{v \in V} e^{z_v}}, \qquad
        \mathrm{choice} = -\log \frac{e^{z_y}}{\sum_{v \in \mathcal{C}(n)} e^{z_v}}

    Args:
        logits: Next-token logits (M, V), any float dtype.
        target: Target token ids (M,), int64.
        node: Trie node before each target (M,), int64.
        trie: The trie of all items.
        n_edges: As in `trie_nll`.

    Returns:
        ``invalid``, >= 0 but for rounding, not 0 for forced tokens; ``choice`` is `trie_nll` at temperature 1.

    Source: MSL, arXiv:2504.04178, Section 3 and Figure 3.
    """
    edge_row, edge_token = _edges(node, _on(trie, logits.device), n_edges)
    z_E, z_M = _gather(logits, target, edge_row, edge_token)
    top_M, rest_M = _log_sum_exp(z_E, edge_row, len(node))
    return LmlParts((logits.float() - top_M[:, None]).logsumexp(1) - rest_M, (top_M - z_M) + rest_M)


def gradient_weight(nll: Tensor) -> Tensor:
    """The factor ``1 - P(target)`` that every token's gradient carries (w of MSL), from its loss in nats."""
    return -torch.expm1(-nll)


class Parts(NamedTuple):
    """Per token, float32 (M,): the weighted loss, what it adds to the normaliser, the plain nll in nats."""

    loss: Tensor
    contribution: Tensor
    nll: Tensor


@dataclass(frozen=True)
class Objective:
    """A training loss put together from choices.

    Attributes:
        support: ``trie`` (MSL) or ``vocabulary`` (LML): which tokens the softmax runs over.
        temperature: A number > 0, or an `AdaptiveTemperature` (trie support only). In trie support the loss
            is multiplied by it, as in the paper: ``sum -tau log softmax(z / tau)``, each token by its own where
            it has one; in vocabulary support it is not, as in the authors' LML + tau.
        normaliser: What the sum of weighted losses is divided by. ``weights``: the sum of the weights of all
            target tokens (LML, IGD); ``decisions``: the same over tokens with more than one valid choice (the
            released MSL with ATS); ``sum``: 1.
        expand_negatives: MSL + alpha, trie support only; see `trie_nll`. An adaptive temperature is found
            without it.

    Raises:
        UserError: An unknown choice, a temperature <= 0, or an adaptive one or ``expand_negatives`` without
            trie support.
    """

    support: str = "trie"
    temperature: float | AdaptiveTemperature = 1.0
    normaliser: str = "weights"
    expand_negatives: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        for name, known in (("support", SUPPORTS), ("normaliser", NORMALISERS)):
            if getattr(self, name) not in known:
                raise UserError(f"wanted {name} among {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.is_adaptive:
            _check_temperature(self.tau)
        elif self.support != "trie":
            raise UserError(
                f"an adaptive temperature needs trie support, got {self.support!r}; give a number instead"
            )
        if self.expand_negatives and self.support != "trie":
            raise UserError(f"expand_negatives needs trie support, got {self.support!r}; set it to False")

    @property
    def is_adaptive(self) -> bool:
        """Whether the temperature changes while training."""
        return isinstance(self.temperature, AdaptiveTemperature)

    @property
    def tau(self) -> float:
        """The temperature now; see ``value`` of an adaptive one."""
        t = self.temperature
        return t.value if isinstance(t, AdaptiveTemperature) else float(t)

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        t = self.temperature
        temperature = t.settings() if isinstance(t, AdaptiveTemperature) else t
        return {
            "support": self.support,
            "temperature": temperature,
            "normaliser": self.normaliser,
            "expand_negatives": self.expand_negatives,
        }

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        node: Tensor,
        trie: Trie | DeviceTrie,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The normalised loss of one batch, a scalar; see `parts` for the arguments.

        It changes nothing: an adaptive temperature moves by `observe` alone.
        """
        parts = self.parts(logits, target, node, trie, weight)
        return parts.loss.sum() / self.divisor(parts.contribution.sum())

    def parts(
        self,
        logits: Tensor,
        target: Tensor,
        node: Tensor,
        trie: Trie | DeviceTrie,
        weight: Tensor | None = None,
        n_edges: int | None = None,
        columns: Columns | None = None,
    ) -> Parts:
        """Losses of single tokens, for callers that normalise over more than one batch.

        Args:
            logits: Next-token logits (M, V).
            target: Target token ids (M,), int64.
            node: Trie node before each target (M,), int64.
            trie: The trie of all items.
            weight: Token weights (M,) >= 0; None: 1.
            n_edges: As in `trie_nll`.
            columns: As in `trie_nll`; trie support only.
        """
        device_trie = _on(trie, logits.device)
        weight = torch.ones_like(target, dtype=torch.float32) if weight is None else weight.float()
        contribution = self.contribution(weight, device_trie.n_children[node] > 1)
        if self.support == "vocabulary":
            nll = vocabulary_nll(logits, target, self.tau)
            return Parts(weight * nll, contribution, nll)
        tau = self._temperature(logits, target, node, device_trie, n_edges, columns)
        nll = trie_nll(logits, target, node, device_trie, tau, n_edges, self.expand_negatives, columns)
        return Parts(weight * nll * tau, contribution, nll)

    def _temperature(
        self,
        logits: Tensor,
        target: Tensor,
        node: Tensor,
        trie: DeviceTrie,
        n_edges: int | None,
        columns: Columns | None,
    ) -> float | Tensor:
        """The temperature of all tokens, or one for each (M,)."""
        t = self.temperature
        if not isinstance(t, AdaptiveTemperature) or t.scope == "global":
            return self.tau
        row, token = _edges(node, trie, n_edges)
        valid, positive = _gather(logits.detach(), target, row, token, columns)
        return t.per_token(positive, valid, row)

    def contribution(self, weight: Tensor, decision: Tensor) -> Tensor:
        """What each token adds to the normaliser (M,); ``decision``: whether several tokens are valid."""
        return weight * decision if self.normaliser == "decisions" else weight

    def divisor(self, total: Tensor) -> Tensor:
        """The divisor for a sum of contributions; 1 where nothing contributes: the loss is 0, not NaN."""
        return torch.where(total > 0, total, 1.0) if self.normaliser != "sum" else torch.ones_like(total)

    @torch.no_grad()
    def observe(
        self, logits: Tensor, target: Tensor, node: Tensor, trie: Trie, columns: Columns | None = None
    ) -> None:
        """Let an adaptive temperature see one micro-batch of a training forward; arguments as in `parts`.

        In several processes, each of which has to call it, the rows of all are seen as one micro-batch, process
        after process: one update, and the same value everywhere.
        """
        ats = self.temperature
        if not isinstance(ats, AdaptiveTemperature):
            return
        device_trie = trie.to(logits.device)
        if ats.rows == "all" or ats.scope == "token":
            look = (device_trie.n_children.index_select(0, node) > 1).nonzero()[:, 0]
            n_edges = None
        else:
            reference, m = (0, int(trie.n_children[0])) if ats.rows == "root" else widest_node(trie)
            look = (node == reference).nonzero()[:, 0]
            n_edges = m * len(look)
        row, token = _edges(node[look], device_trie, n_edges)
        positive = processes.concatenate(logits[look, _place(target[look], columns)].float())
        valid = processes.concatenate(logits[look[row], _place(token, columns)].float())
        if n_edges is not None:
            ats.update(positive, valid, m)
            return
        n_valid = processes.concatenate(device_trie.n_children.index_select(0, node[look]))
        if len(positive):
            row = torch.arange(len(positive), device=valid.device)
            row = row.repeat_interleave(n_valid, output_size=len(valid))
            ats.update(positive, valid, len(valid) / len(positive), row)


def widest_node(trie: Trie) -> tuple[int, int]:
    """The node with the most children (lowest id on ties) and their number."""
    node = int(np.argmax(trie.n_children))
    return node, int(trie.n_children[node])


def _on(trie: Trie | DeviceTrie, device: Any) -> DeviceTrie:
    return trie.to(device) if isinstance(trie, Trie) else trie


def _edges(node: Tensor, trie: DeviceTrie, n_edges: int | None) -> tuple[Tensor, Tensor]:
    """Row of ``node`` and token of every child, row by row: two int64 tensors (E,)."""
    n_M = trie.n_children.index_select(0, node)
    row_E = torch.repeat_interleave(n_M, output_size=n_edges)
    shift_M = trie.child_ptr.index_select(0, node) - (n_M.cumsum(0) - n_M)
    child_E = torch.arange(len(row_E), device=node.device) + shift_M.index_select(0, row_E)
    return row_E, trie.token.index_select(0, child_E)


def _place(token: Tensor, columns: Columns | None) -> Tensor:
    """The column of each token."""
    return token if columns is None else torch.searchsorted(columns.token, token)


def _gather(
    logits: Tensor, target: Tensor, edge_row: Tensor, edge_token: Tensor, columns: Columns | None = None
) -> tuple[Tensor, Tensor]:
    """Logits of the children of all rows (E,) and of the targets (M,), float32."""
    # One gather for both: each one costs a zero-filled (M, V) gradient in the backward pass.
    first = torch.arange(len(target), device=target.device) * logits.shape[1]
    flat = torch.cat(
        [first.index_select(0, edge_row) + _place(edge_token, columns), first + _place(target, columns)]
    )
    z = logits.reshape(-1).index_select(0, flat).float()
    return z[: len(edge_row)], z[len(edge_row) :]


def _log_sum_exp(z_E: Tensor, row: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row of a ragged array as two summands (n_rows,): the maximum, detached, and the rest."""
    top = z_E.new_full((n_rows,), -torch.inf).scatter_reduce(0, row, z_E.detach(), "amax")
    total = z_E.new_zeros(n_rows).index_add(0, row, (z_E - top.index_select(0, row)).exp())
    return top, total.log()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"wanted a temperature > 0, got {temperature}; 1 leaves the logits as they are")
