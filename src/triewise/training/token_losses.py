r"""Losses that look at what beams would drop, or at the stage of the run: BEAR, APAO, front-greater.

Each is an `Objective` with something added, so support, temperature and normaliser are chosen there as for any other.

Shape key: M target positions, E children of all their nodes, S target titles of a micro-batch, D depths, T tokens of
all titles end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.training import processes
from triewise.training.losses import Columns, edge_logits, on_device, trie_nll
from triewise.training.objective import MicroBatches, Objective, TitleLoss, TokenLosses

if TYPE_CHECKING:
    from triewise.tokens import DeviceTrie, Trie
    from triewise.training.examples import Batch, Examples


@dataclass(frozen=True)
class _Extended:
    """What `objective.Learned` asks for and all of these answer alike."""

    objective: Objective

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "objective" and f.repr}
        return self.objective.settings() | {type(self).__name__.lower(): own}

    def divisor(self, total: Tensor) -> Tensor:
        """That of the objective."""
        return self.objective.divisor(total)


@dataclass(frozen=True)
class Bear(_Extended):
    r"""BEAR: beams keep a title only if each of its tokens is among the best of its step.

    With p the probability of the target among the valid tokens, q the ``width``-th largest one, and
    :math:`m = (\ln p - \ln q) / \xi`,

    .. math:: \ell = -\ln p + \lambda \, \sigma(-m) \quad \text{(described)}, \qquad
              \ell = -(1 + \lambda \, \sigma(m)) \ln p \quad \text{(coded)}

    The two pull in opposite directions: what the text adds is large for tokens that beams would drop, the weight of the
    code for those that are safe. Described: 0 is added where there are fewer than ``width`` children, so nothing can be
    dropped; the gradient reaches q too. Coded: q is then that of the least child; the weight has no gradient, and the
    weights of the decisions of a micro-batch, over all processes, are scaled so that their sum stays.

    Attributes:
        objective: Of trie support, without ``expand_negatives``.
        form: ``described`` or ``coded``.
        strength: Lambda, >= 0; at 0 the loss is the objective's.
        xi: Nats over which the sigmoid goes from one side to the other, > 0.
        width: Beams, >= 1.

    Source: BEAR, arXiv:2601.22925, and its code, which has xi 2.75, lambda .25, 10 beams.
    """

    form: Literal["described", "coded"] = "described"
    strength: float = 0.25
    xi: float = 2.75
    width: int = 10

    def module(self, model: Any, trie: Trie) -> TitleLoss:
        """See `objective.Learned`."""
        return BearLoss(model, self, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> MicroBatches:
        """See `objective.Learned`."""
        return MicroBatches(examples, self.objective, rows, packing)

    def parts(
        self,
        logits: Tensor,
        target: Tensor,
        node: Tensor,
        trie: Trie | DeviceTrie,
        weight: Tensor | None = None,
        n_edges: int | None = None,
        columns: Columns | None = None,
    ) -> TokenLosses:
        """The loss of each token; arguments as of `Objective.parts`, whose ``contribution`` and ``nll`` stay."""
        parts = self.objective.parts(logits, target, node, trie, weight, n_edges, columns)
        if not self.strength:
            return parts
        n_M = on_device(trie, logits.device).n_children.index_select(0, node)
        row, _, z_E, z_M = edge_logits(logits, target, node, trie, n_edges, columns)
        rival = z_E.index_select(0, ranked_edge(z_E.detach(), row, n_M, self.width))
        margin = (z_M - rival) / self.objective.tau_of(z_M, z_E, row) / self.xi
        weight = torch.ones_like(parts.nll) if weight is None else weight
        if self.form == "described":
            dropped = torch.sigmoid(-margin) * (n_M >= self.width)
            return parts._replace(loss=parts.loss + self.strength * weight * dropped)
        more = 1 + self.strength * torch.sigmoid(margin.detach())
        base = weight * (n_M > 1)
        before, after = _over_processes(torch.stack([base.sum(), (base * more).sum()]))
        return parts._replace(loss=parts.loss * more * (before / torch.where(after > 0, after, 1.0)))


class BearLoss(TitleLoss):
    """A causal LM and `Bear` as one module."""

    def __init__(self, model: Any, learned: Bear, trie: Trie) -> None:
        super().__init__(model, learned.objective, trie)
        self.bear = learned

    def score(self, batch: Mapping[str, Any]) -> Callable[..., TokenLosses]:
        """`Bear.parts`."""
        return self.bear.parts


def ranked_edge(z_E: Tensor, row: Tensor, n_M: Tensor, place: int) -> Tensor:
    """Which of the edges (E,) has the ``place``-th largest value of each row, or the least where it has fewer: (M,)."""
    order = z_E.argsort(descending=True, stable=True)
    order = order.index_select(0, row.index_select(0, order).argsort(stable=True))
    return order.index_select(0, n_M.cumsum(0) - n_M + n_M.clamp(max=place) - 1)


@dataclass(frozen=True)
class Apao(_Extended):
    r"""APAO: all beginnings of a title shall be likely, those most that are least.

    To the loss is added, per title, beta times a weighted mean over depths t of

    .. math:: L_t = -\frac{1}{t \tau} \sum_{s \le t} \ln p_s \quad \text{(pointwise)}, \qquad
              L_t = -\frac{1}{t} \ln \mathrm{softmax}\big(\tfrac{1}{\tau} \sum_{s \le t} \ln p_s\big) \quad
              \text{(pairwise)}

    where the softmax is over all beginnings of that depth. A depth is a token of the title that is learned: a decision
    in trie support. The last one is left out. A depth weighs :math:`\bar L_t e^{\eta \bar L_t}`, where the mean,
    without gradient, is over the titles of a micro-batch, of all processes, that go so deep. A title counts as many
    times as it adds to the normaliser.

    No negatives are sampled. At depth 1 the others are the children of the root. Below, in trie support and with tau 1,
    the probabilities of all beginnings of a depth sum to 1, so the softmax is the product itself: **pairwise with all
    negatives is pointwise**. Elsewhere it would need the whole tree of every prompt, and is refused.

    Attributes:
        objective: Any without ``expand_negatives``; for ``pairwise`` with another ``levels`` than 1, of trie support.
        form: ``pointwise`` or ``pairwise``.
        strength: Beta, >= 0; at 0 the loss is the objective's.
        levels: Depths that count, from the first one; 0: all.
        temperature: Tau of beginnings, > 0; 1 for ``pairwise`` with another ``levels`` than 1.
        eta: How much more the worst depth weighs, >= 0.

    Source: APAO, arXiv:2603.02730, and its code: sampled negatives scaled up to the number of prefixes, beta .1, tau 1,
    eta 0, titles of equal length, for which both weigh alike.
    """

    form: Literal["pointwise", "pairwise"] = "pointwise"
    strength: float = 0.1
    levels: int = 0
    temperature: float = 1.0
    eta: float = 0.0

    @property
    def sums_to_one(self) -> bool:
        """Whether the probabilities of all beginnings of a depth do."""
        return self.objective.support == "trie" and self.temperature == 1

    @property
    def at_root(self) -> bool:
        """Whether the softmax over the children of the root is computed."""
        return self.form == "pairwise" and not self.sums_to_one

    def module(self, model: Any, trie: Trie) -> TitleLoss:
        """See `objective.Learned`."""
        return ApaoLoss(model, self, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> MicroBatches:
        """See `objective.Learned`."""
        return ApaoBatches(examples, self, rows, packing)

    def root_parts(
        self,
        logits: Tensor,
        target: Tensor,
        node: Tensor,
        trie: Trie | DeviceTrie,
        weight: Tensor | None,
        n_edges: int | None,
        columns: Columns | None,
        opens: Tensor,
    ) -> TokenLosses:
        """`Objective.parts`, and the pairwise loss at titles' first tokens, times ``opens`` (M,)."""
        parts = self.objective.parts(logits, target, node, trie, weight, n_edges, columns)
        row, _, z_E, z_M = edge_logits(logits.detach(), target, node, trie, n_edges, columns)
        tau = self.objective.tau_of(z_M, z_E, row) * self.temperature
        nll = trie_nll(logits, target, node, trie, tau, n_edges, columns=columns)
        return parts._replace(loss=parts.loss + self.strength * opens * nll)

    def of_titles(self, nll: Tensor, cell: Tensor, used: Tensor, size: Tensor) -> Tensor:
        """What is added for all titles together, a scalar.

        Args:
            nll: (M,) of the targets, with their gradient.
            cell: int64 (M,), ``title * D + depth - 1`` of each target.
            used: float32 (S, D), 1 where a depth of a title counts, else 0.
            size: float32 (S,), what each title adds to the normaliser.
        """
        n_depths = used.shape[1]
        depth = torch.arange(1, n_depths + 1, device=nll.device)
        each = nll.new_zeros(used.numel()).index_add(0, cell, nll).view_as(used)
        loss = each.cumsum(1) / (depth * self.temperature)
        sums = torch.cat([(loss.detach() * used).sum(0), used.sum(0)])
        total, n = _over_processes(sums).view(2, n_depths)
        mean = total / n.clamp(min=1)
        weight = used * mean * (self.eta * mean).exp()
        of_all = weight.sum(1)
        added: Tensor = size / torch.where(of_all > 0, of_all, 1.0) * (weight * loss).sum(1)
        return added.sum() * self.strength


class ApaoLoss(TitleLoss):
    """A causal LM and `Apao` as one module."""

    def __init__(self, model: Any, learned: Apao, trie: Trie) -> None:
        super().__init__(model, learned.objective, trie)
        self.apao = learned
        self.per_target = ("opens",) if learned.at_root else ()

    def score(self, batch: Mapping[str, Any]) -> Callable[..., TokenLosses]:
        """`Apao.root_parts` where it is needed."""
        return self.apao.root_parts if self.apao.at_root else self.objective.parts

    def added(self, batch: Mapping[str, Any], nll: Tensor) -> Tensor | float:
        """`Apao.of_titles` where that is meant."""
        return (
            0.0
            if self.apao.at_root
            else self.apao.of_titles(nll, *(batch[n] for n in ("cell", "used", "size")))
        )


class ApaoBatches(MicroBatches):
    """Micro-batches in a given order, with which title each target is of, and how deep it lies."""

    def __init__(
        self, examples: Examples, learned: Apao, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        super().__init__(examples, learned.objective, rows, packing)
        self.apao = learned

    def more(self, rows: NDArray[np.int64], batch: Batch, keep: Any) -> dict[str, Any]:
        """``opens`` of `Apao.root_parts`; ``cell``, ``used`` and ``size`` of `Apao.of_titles`."""
        trie = self.examples.trie
        adds = self.objective.contribution(
            torch.from_numpy(batch.weight), torch.from_numpy(trie.branching[batch.node])
        ).numpy()
        title, first, row, n = np.unique(
            batch.title[keep], return_index=True, return_inverse=True, return_counts=True
        )
        size = np.bincount(batch.title, adds)[title].astype(np.float32)
        place, deepest = np.arange(len(row)) - first[row], int(trie.depth.max())
        last = np.minimum(n - 1, self.apao.levels or deepest)
        used = (np.arange(deepest) < last[:, None]).astype(np.float32)
        if self.apao.at_root:
            return {"opens": np.where(place == 0, (size * (last > 0))[row], 0).astype(np.float32)}
        return {"cell": row * deepest + place, "used": used, "size": size}


@dataclass(frozen=True)
class FrontGreater(_Extended):
    r"""Front-greater learning: token weights that go from one set to another while the run goes on.

    At step s of the first ``length`` ones a token weighs ``(1 - s / length) front + s / length late``; from then on
    ``late``.

    Attributes:
        objective: Of which loss; the weights of the examples are not used.
        front: (T,) weights at the beginning, as of `tokens.front_weights`.
        late: (T,) weights at the end.
        steps: Of the whole run.
        accumulation: Micro-batches of a step.
        curriculum: Share of the run after which the weights are ``late``; 0: all along.

    Source: arXiv:2601.17787 and its code ``combine``: 100,000 steps to plain likelihood plus .4 of the frequency
    weighting. Its variant with learned shares of the three is not here.
    """

    front: NDArray[np.floating] = field(repr=False)
    late: NDArray[np.floating] = field(repr=False)
    steps: int = 1
    accumulation: int = 1
    curriculum: float = 1.0

    def module(self, model: Any, trie: Trie) -> TitleLoss:
        """See `objective.Learned`."""
        return TitleLoss(model, self.objective, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> MicroBatches:
        """See `objective.Learned`; ``rows`` are the last ones of the run, so a resumed run goes on in it."""
        return FrontBatches(examples, self, rows, packing)

    def weight(self, step: int, place: NDArray[np.int64]) -> NDArray[np.float32]:
        """Of some title tokens (M,) at a step, from 0."""
        length = self.curriculum * self.steps
        share = min(step / length, 1.0) if length else 1.0
        mixed = (1 - share) * self.front[place] + share * self.late[place]
        return np.asarray(mixed, dtype=np.float32)


class FrontBatches(MicroBatches):
    """Micro-batches in a given order, each with the weights of its step."""

    def __init__(
        self, examples: Examples, learned: FrontGreater, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        super().__init__(examples, learned.objective, rows, packing)
        self.learned = learned

    def batch(self, index: int) -> Batch:
        """One micro-batch."""
        batch, learned = super().batch(index), self.learned
        step = learned.steps - (len(self.rows) - index - 1) // learned.accumulation - 1
        return replace(batch, weight=learned.weight(step, batch.place))


def _over_processes(sums: Tensor) -> Tensor:
    """Sums (n,) over what all processes have."""
    return processes.concatenate(sums).view(-1, len(sums)).sum(0)
