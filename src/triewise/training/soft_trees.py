r"""Soft targets over the tree: at every decision that matters to the teacher, not along the true title alone.

By the chain rule the divergence of two distributions over the catalogue is a sum over the decisions n of the tree,

.. math:: KL(Q \| P) = \sum_n Q(n) \sum_{z \in \mathcal{C}(n)} q(z \mid n) \log \frac{q(z \mid n)}{p(z \mid n)},

with Q(n) the teacher's mass below n and q(z | n) its share below the child z. The decisions that hold most mass stand
behind the prompt as further rows, which packed run it once. Of the others those of the true title stand for all, as if
it were drawn from Q: with a share near 0 that is the loss along the path, with 1 the exact divergence.

Shape key: M target positions, K decisions of the tree, E children of those, S target titles, I items.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.arrays import ranges
from triewise.errors import UserError
from triewise.training.examples import Batch
from triewise.training.losses import Columns, edge_logits
from triewise.training.objective import MicroBatches, Objective, TitleLoss, TokenLosses
from triewise.training.soft_targets import SoftTargets, child_shares

if TYPE_CHECKING:
    from triewise.arrays import Float64, Int64
    from triewise.tokens import DeviceTrie, Trie
    from triewise.training.examples import Examples

OF_THE_TREE = -1  # `Batch.place` of a decision that is looked at and is no token of a target


def heavy_decisions(
    trie: Trie, log_p: NDArray[np.floating], share: float, temperature: float = 1.0
) -> tuple[Int64, Int64, Float64]:
    """The fewest decisions that hold a share of the mass that a teacher has at all decisions together.

    Args:
        trie: The trie of all items.
        log_p: (S, I) log-probabilities of titles, nats; -inf: none.
        share: In (0, 1]; at 1 all decisions with any mass.
        temperature: Divides ``log_p``, > 0, before they are probabilities again.

    Returns:
        Row of ``log_p``, int64 (K,), ascending; node, int64 (K,), depth-first within a row; mass below it, (K,).
    """
    scaled = log_p.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))[:, trie.item_order]
    ends = np.cumsum(p / p.sum(1, keepdims=True), axis=1)
    before = np.concatenate([np.zeros((len(p), 1)), ends], axis=1)
    # Depth-first: nodes in the order of their first items, of one first item the upper node first.
    node = np.flatnonzero(trie.branching)
    node = node[np.lexsort((trie.depth[node], trie.item_lo[node]))]
    mass = before[:, trie.item_hi[node]] - before[:, trie.item_lo[node]]
    by_mass = np.argsort(-mass, axis=1, kind="stable")
    sorted_mass = np.take_along_axis(mass, by_mass, axis=1)
    held = sorted_mass.cumsum(1) - sorted_mass
    chosen = (
        (held < share * sorted_mass.sum(1, keepdims=True)) if share < 1 else np.ones_like(mass, dtype=bool)
    )
    keep = np.zeros_like(chosen)
    np.put_along_axis(keep, by_mass, chosen & (sorted_mass > 0), axis=1)
    title, at = np.nonzero(keep)
    return title, node[at].astype(np.int64), mass[title, at]


def tree_parts(
    objective: Objective,
    alpha: float,
    soft: Tensor,
    mass: Tensor,
    logits: Tensor,
    target: Tensor,
    node: Tensor,
    trie: Trie | DeviceTrie,
    weight: Tensor,
    n_edges: int,
    columns: Columns | None = None,
) -> TokenLosses:
    r"""(1 - alpha) times the loss of each true token, and alpha times the divergence at each decision of the tree.

    With an objective of temperature tau both distributions' divergence is multiplied by it, as its own loss is.

    Args:
        objective: In trie support, with one temperature for all tokens.
        alpha: Weight of the teacher, in [0, 1].
        soft: float32 (E,), the teacher's shares of the children of the last K of ``node``.
        mass: float32 (K,), its mass below each of them.
        logits: (M + K, V) or (M + K, C), and so are the next four; the first M are those of true tokens.
        target: Target token ids; those of the last K are not read.
        node: Trie node before each target.
        trie: The trie of all items.
        weight: Token weights; those of the last K are not read.
        n_edges: Number of children of all nodes.
        columns: The tokens of the columns of ``logits``.

    Returns:
        ``loss`` (M + K,); ``contribution`` and ``nll`` (M,) are those of the objective.
    """
    n = len(node) - len(mass)
    true = (logits[:n], target[:n], node[:n], trie, weight[:n], n_edges - len(soft), columns)
    parts = objective.parts(*true)
    row, _, z_E, z_K = edge_logits(logits[n:], target[n:], node[n:], trie, len(soft), columns)
    tau = objective.tau_of(z_K, z_E, row)
    z_E = z_E / tau
    top = z_E.new_full((len(mass),), -torch.inf).scatter_reduce(0, row, z_E.detach(), "amax")
    above = z_E - top.index_select(0, row)
    total = z_E.new_zeros(len(mass)).index_add(0, row, above.exp()).log()
    apart = torch.special.xlogy(soft, soft) - soft * (above - total.index_select(0, row))
    divergence = z_E.new_zeros(len(mass)).index_add(0, row, apart)
    return parts._replace(loss=torch.cat([(1 - alpha) * parts.loss, alpha * tau * mass * divergence]))


@dataclass(frozen=True)
class TreeTargets(SoftTargets):
    """An objective whose targets a teacher softens, over the tree.

    Attributes:
        share: Of the mass that the teacher has at all decisions, which the fewest hold that are learned whatever the
            true title; 1: all of them, and the divergence is the exact one over the catalogue.

    Raises:
        UserError: As `SoftTargets`; a share out of range; or another support, form or temperature than a divergence
            over the catalogue has.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise UserError(f"wanted a share of the teacher's mass in (0, 1], got {self.share}")
        ats = getattr(self.objective.temperature, "scope", "global")
        if self.objective.support != "trie" or self.form != "cross-entropy" or ats == "token":
            raise UserError(
                "soft targets over the tree are a divergence over the catalogue: wanted support 'trie', form "
                f"'cross-entropy' and one temperature, got {self.objective.support!r}, {self.form!r} and {ats!r}"
            )

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        return super().settings() | {"scope": "tree", "share": self.share}

    def module(self, model: Any, trie: Trie) -> TitleLoss:
        """See `objective.Learned`; without any weight of the teacher it is the objective's."""
        return TreeLoss(model, self, trie) if self.alpha else self.objective.module(model, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> MicroBatches:
        """See `objective.Learned`."""
        if not self.alpha:
            return self.objective.batches(examples, rows, packing)
        return TreeBatches(examples, self, rows, packing)


class TreeLoss(TitleLoss):
    """A causal LM and `TreeTargets` as one module."""

    many_rows = True

    def __init__(self, model: Any, learned: TreeTargets, trie: Trie) -> None:
        super().__init__(model, learned.objective, trie)
        self.alpha = learned.alpha

    def score(self, batch: Mapping[str, Any]) -> Callable[..., TokenLosses]:
        """`tree_parts`, which reads ``soft`` (E,) and ``mass`` (K,) of the batch."""
        return functools.partial(tree_parts, self.objective, self.alpha, batch["soft"], batch["mass"])


@dataclass(frozen=True)
class TreeBatch(Batch):
    """A micro-batch, and behind its M targets the K decisions of the tree, with weight 0 and the place -1.

    Attributes:
        mass: float32 (K,), the teacher's mass below each decision.
        soft: float32 (E,), its shares of their children.
    """

    mass: NDArray[np.float32]
    soft: NDArray[np.float32]


class TreeBatches(MicroBatches):
    """Micro-batches in a given order; each window once more for every path of the tree that its teacher thinks of."""

    asks_a_model = True

    def __init__(
        self, examples: Examples, learned: TreeTargets, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        super().__init__(examples, learned.objective, rows, packing)
        self.learned = learned

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Arguments of `TreeLoss.forward`, what the micro-batch adds to the normaliser, and its counts."""
        item = super().__getitem__(index)
        if self.objective.is_adaptive:  # a temperature looks at true titles alone
            look = item["look"]
            look = look[look < len(item["node"]) - len(item["mass"])]
            of_them = self.examples.trie.n_children[item["node"][look].numpy()]
            item |= {"look": look, "n_looked": int(of_them.sum())}
        return item

    def batch(self, index: int) -> TreeBatch:
        """Windows, and behind them a row for each path of a tree, which ends with a child of its last decision."""
        rows, examples = self.rows[index], self.examples
        plain, trie, windows = examples.batch(rows), examples.trie, examples.windows
        teach = self.learned.teacher
        log_p = teach(windows.items.take(rows), windows.n_context[rows].astype(np.int64))
        how = self.learned.temperature
        title, node, mass = heavy_decisions(trie, log_p, self.learned.share, how)
        if self.learned.share < 1:
            title, node, mass = self._with_path(plain, title, node, mass)
        width, (root_of, column_of) = plain.input_ids.shape[1], self._roots(plain)
        # In depth-first order a decision above others is on the path of the next one: only the last have a row.
        below = (title[1:] == title[:-1]) & (trie.item_lo[node[1:]] < trie.item_hi[node[:-1]])
        end = np.flatnonzero(~np.append(below, False))
        row = np.searchsorted(end, np.arange(len(node)))
        n_new, column = trie.depth[node[end]].astype(np.int64) + 1, column_of[title[end]]
        titles, first_item = examples.prompts.title_tokens, trie.item_order[trie.item_lo[node]]
        more = np.zeros((len(end), max(width, int((column + 1 + n_new).max(initial=0)))), np.int64)
        more[:, :width] = plain.input_ids[root_of[title[end]]]
        more[np.arange(more.shape[1]) > column[:, None]] = 0
        path, place = ranges(titles.offsets[first_item[end]], n_new), ranges(column + 1, n_new)
        more[place.row, place.at] = titles.values[path.at]
        ids = np.zeros((len(plain.input_ids) + len(more), more.shape[1]), np.int64)
        ids[: len(plain.input_ids), :width], ids[len(plain.input_ids) :] = plain.input_ids, more
        line, at = np.divmod(plain.position, width)
        position = (len(plain.input_ids) + row) * ids.shape[1] + column_of[title] + trie.depth[node]
        blank = np.zeros(len(node), np.int64)
        behind = {
            "target": titles.values[titles.offsets[first_item] + trie.depth[node]],
            "node": node,
            "title": title,
            "place": blank + OF_THE_TREE,
            "weight": blank,
            "zero_gain": blank,
        }
        joined = {
            name: np.append(getattr(plain, name), array.astype(getattr(plain, name).dtype))
            for name, array in behind.items()
        }
        joined |= {"input_ids": ids, "position": np.append(line * ids.shape[1] + at, position)}
        soft = child_shares(trie, node, title, log_p, how)
        whole = {part.name: getattr(plain, part.name) for part in fields(plain)} | joined
        return TreeBatch(**whole, mass=mass.astype(np.float32), soft=soft)

    def drawn(self, batch: Batch) -> NDArray[np.bool_]:
        """The decisions of the tree."""
        of_the_tree: NDArray[np.bool_] = batch.place == OF_THE_TREE
        return of_the_tree

    def more(self, rows: NDArray[np.int64], batch: Batch, keep: Any) -> dict[str, Any]:
        """``soft`` and ``mass`` of `tree_parts`; what is logged is of true tokens alone."""
        assert isinstance(batch, TreeBatch)
        true = keep[~self.drawn(batch)[keep]]
        logged = {
            "decision": self.examples.trie.branching[batch.node[true]],
            "zero_gain": batch.zero_gain[true],
        }
        return logged | {"soft": batch.soft, "mass": batch.mass}

    def _with_path(
        self, batch: Batch, title: Int64, node: Int64, mass: Float64
    ) -> tuple[Int64, Int64, Float64]:
        """Decisions, and those of the true titles that are not among them with mass 1, depth-first."""
        trie = self.examples.trie
        known = np.isin(batch.title * trie.n_nodes + batch.node, title * trie.n_nodes + node)
        more = trie.branching[batch.node] & ~known
        title, node = np.append(title, batch.title[more]), np.append(node, batch.node[more])
        order = np.lexsort((trie.depth[node], trie.item_lo[node], title))
        return title[order], node[order], np.append(mass, np.ones(int(more.sum())))[order]

    def _roots(self, batch: Batch) -> tuple[Int64, Int64]:
        """Row and column (S,) at which the first token of each target title is predicted."""
        row, column = np.divmod(batch.position[batch.node == 0], batch.input_ids.shape[1])
        return row, column
