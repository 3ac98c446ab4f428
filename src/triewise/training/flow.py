r"""Flower: the model draws titles itself, and each shall be as frequent as its reward.

A title that was drawn passes the prefixes :math:`s_0, ..., s_n` of its n tokens, and at each it could stop. Where
:math:`P(s_t\,stop) \propto R(s_t)`, the ratio of both is the same all along the path, and so is

.. math:: A_t = \sum_{k \le t} \log P(y_k \mid s_{k-1}) + \log P(stop \mid s_t) - \log R(s_t).

Sub-trajectory balance (lambda 1) is the sum over all pairs i < j of :math:`(A_j - A_i)^2`: its authors' sum of the
steps' differences from i to j. The reward says how often a title stands in histories, and how much one user likes it.

Shape key: M target positions, T drawn titles, S prefixes of one, N trie nodes, I items, G titles, B windows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.arrays import Bool, Float64, Int64, within
from triewise.errors import UserError
from triewise.training import processes
from triewise.training.losses import Columns, column_of
from triewise.training.objective import MicroBatches, Objective, TitleLoss, TokenLosses, title_sums

if TYPE_CHECKING:
    from triewise.objectives import FlowSettings
    from triewise.settings import TrainingSettings
    from triewise.tokens import Trie
    from triewise.training.examples import Batch, Examples
    from triewise.training.soft_targets import Teacher

OUTSIDE = -15.0  # log-reward where histories have nothing, as the authors' code
NOTHING = -1
Sample = Callable[[Sequence[list[int]], Float64], NDArray[np.int32]]
"""Prompts (B) and numbers in [0, 1) that decide (B, tokens of the longest title) to items drawn along the trie (B,)."""


def history_prior(trie: Trie, counts: NDArray[np.integer[Any]]) -> Float64:
    """Log q of the edge into each node, nats: the share of the histories' titles below a node that goes on there.

    Where a path leaves the histories the edge has `OUTSIDE`, and below it all children are alike.

    Args:
        trie: The trie of all items.
        counts: (I,) how often each item stands in the history lists of training rows.

    Returns:
        float64 (N,); 0 at the root.

    Source: the code of Flower, in which a title of no history has no path.

    >>> from triewise.tokens import Trie
    >>> prior = history_prior(Trie.from_sequences([[7, 0], [7, 8, 0], [9, 0]]), np.array([2, 1, 1]))
    >>> np.exp(prior).round(3).tolist()
    [1.0, 0.75, 0.25, 0.667, 0.333, 1.0, 1.0]
    """
    mass, above = trie.subtree_count(counts), np.maximum(trie.parent, 0)
    with np.errstate(divide="ignore"):
        share = np.log(mass) - np.log(np.maximum(mass[above], 1))
    nothing = np.where(mass[above] > 0, OUTSIDE, -np.log(np.maximum(trie.n_children[above], 1)))
    log_q = np.where(mass > 0, share, nothing)
    log_q[0] = 0
    return log_q


def personal_terms(settings: FlowSettings, p: Float64) -> tuple[Float64, Float64]:
    """What a user's liking makes of log q of a token: ``a log q + b``, for each title.

    ``div``: a = 1 / S with S = (p - mean) / (max - min) + 1. ``add``: b = lam log(s + 1e-20) with
    s = (p - min) / (max - min). ``logp``: a = 1 and b = 0.

    Args:
        settings: Which reward.
        p: (B, G) probabilities of the titles.

    Returns:
        a and b, (B, G).
    """
    spread = np.ptp(p, axis=1, keepdims=True)
    spread = np.where(spread > 0, spread, 1)
    a, b = np.ones_like(p), np.zeros_like(p)
    if settings.reward == "div":
        a = 1 / ((p - p.mean(1, keepdims=True)) / spread + 1)
    elif settings.reward == "add":
        b = settings.lam * np.log((p - p.min(1, keepdims=True)) / spread + 1e-20)
    return a, b


def state_rewards(
    log_q: Float64, log_stop: Float64, scored: Bool, length: Int64, a: Float64, b: Float64
) -> Float64:
    """Log R of the prefixes of titles, all end to end.

    Args:
        log_q: (M,) of the token that leads to each prefix; 0 for the empty one.
        log_stop: (M,) log q of stopping there, where that is scored.
        scored: (M,) whether stopping there is a title; elsewhere its log-reward is `OUTSIDE`.
        length: (T,) prefixes of each title.
        a: (M,) of `personal_terms`, of the title by which each prefix is scaled.
        b: (M,) the same.
    """
    t, path = within(length), np.cumsum(log_q)
    path = path - np.repeat(path[np.cumsum(length) - length], length)
    log_r: Float64 = a * path + b * t + np.where(scored, a * log_stop + b, OUTSIDE)
    return log_r


def balance(log_pf: Tensor, log_stop: Tensor, log_r: Tensor, n_prefixes: Tensor) -> Tensor:
    """Sum over all sub-trajectories of their squared imbalance, see the module; a scalar.

    Args:
        log_pf: (T, S) log-probability of the token that was taken at each prefix; that of the last prefix is not read.
        log_stop: (T, S) log-probability of stopping there.
        log_r: (T, S) log-reward of stopping there.
        n_prefixes: int64 (T,); what is behind so many is not read.
    """
    there = torch.arange(log_pf.shape[1], device=log_pf.device) < n_prefixes[:, None]
    apart = (log_pf.cumsum(1) - log_pf + log_stop - log_r).where(there, 0)
    # Over all pairs the squared differences of n numbers sum to n times their squared distances from the mean.
    mean = apart.sum(1, keepdim=True) / n_prefixes[:, None]
    return (n_prefixes[:, None] * (apart - mean).square().where(there, 0)).sum()


def flow_parts(
    objective: Objective,
    stop: int,
    logits: Tensor,
    target: Tensor,
    node: Tensor,
    trie: Any,
    weight: Tensor | None,
    n_edges: int | None,
    columns: Columns | None,
    ends: Tensor,
) -> TokenLosses:
    """The objective's loss of each token, and what the balance needs of it.

    Args:
        objective: At temperature 1. Its support says what probabilities are among: all tokens, or the valid ones *and*
            the terminator, which is valid at the end of a title alone.
        stop: The terminator.
        logits: As of `Objective.parts`, and so are the next six.
        target: Target token ids (M,).
        node: Trie node before each target (M,).
        trie: The trie of all items.
        weight: Token weights (M,).
        n_edges: Number of children of all nodes.
        columns: The tokens of the columns of ``logits``.
        ends: bool (M,), whether a title ends before the target.

    Returns:
        ``loss`` (M, 3): that of the objective, log-probability of the target, and of the terminator in its place.
    """
    parts = objective.parts(logits, target, node, trie, weight, n_edges, columns)
    both = torch.stack([target, torch.full_like(target, stop)], 1)
    z = logits.gather(1, column_of(both, columns)).to(parts.nll.dtype)
    total = z[:, 0] + parts.nll
    if objective.support == "trie":
        total = torch.where(ends, total, torch.logaddexp(total, z[:, 1]))
    return parts._replace(loss=torch.stack([parts.loss, z[:, 0] - total, z[:, 1] - total], 1))


@dataclass(frozen=True, eq=False)
class Flow:
    """An objective, and the balance of what the model draws itself.

    Attributes:
        objective: Of the true titles; at temperature 1.
        reward: Weight of the objective, and what the balance is towards.
        training: Steps and micro-batches of the run: a draw depends on seed, step and window.
        prior: float64 (N,), of `history_prior`.
        sample: What draws, from the weights of the moment.
        scores: What knows how likely a user takes each title; None for reward ``logp``.
        seed: Of the draws.
        key: What names the scores, for the settings of a run: a hash of their weights.
    """

    objective: Objective
    reward: FlowSettings
    training: TrainingSettings
    prior: Float64
    sample: Sample
    scores: Teacher | None = None
    seed: int = 0
    key: str = ""

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        prior = hashlib.sha256(self.prior.astype("<f8").tobytes()).hexdigest()
        known = self.reward.model_dump(exclude={"scores"}) | {"prior": prior, "key": self.key}
        return self.objective.settings() | {"flow": known}

    def divisor(self, total: Tensor) -> Tensor:
        """That of the objective."""
        return self.objective.divisor(total)

    def module(self, model: Any, trie: Trie) -> FlowLoss:
        """See `objective.Learned`.

        Raises:
            UserError: Weights are sharded: what draws has none of them whole.
        """
        if processes.sharded():
            raise UserError("objective.flow draws from whole weights, got FSDP; launch without --use_fsdp")
        return FlowLoss(model, self, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> FlowBatches:
        """See `objective.Learned`."""
        return FlowBatches(examples, self, rows, packing)


class FlowLoss(TitleLoss):
    """A causal LM and a `Flow` as one module."""

    per_target = ("ends",)

    def __init__(self, model: Any, flow: Flow, trie: Trie) -> None:
        super().__init__(model, flow.objective, trie)
        self.strength, self.stop = flow.reward.strength, int(trie.token[trie.leaf[0]])

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Sum of the weighted losses, and the balance on the scale of that sum; ``sums`` are those of true targets.

        Args:
            batch: Arguments of `TitleLoss.forward`; ``ends`` (M,) of `flow_parts`; ``true``, int64, which of the M are
                of true titles; ``place`` (T, S), int64, which of the M stand behind each prefix of a drawn title;
                ``log_r`` (T, S) and ``n_prefixes`` (T,) of `balance`; ``pair_weight``, the step's divisor over the
                pairs of prefixes of all its drawn titles.
        """
        per_token, nll = self.losses(batch, functools.partial(flow_parts, self.objective, self.stop))
        loss, log_pf, log_stop = per_token.unbind(1)
        taken, stopped = (x[batch["place"]] for x in (log_pf, log_stop))
        apart = balance(taken, stopped, batch["log_r"], batch["n_prefixes"]) * batch["pair_weight"]
        groups = (x[batch["true"]] for x in (nll.detach(), batch["zero_gain"], batch["decision"]))
        total = self.strength * loss.sum() + (1 - self.strength) * apart
        return {"loss": total, "sums": title_sums(*groups)}


class FlowBatches(MicroBatches):
    """Micro-batches in a given order; each window once more with a title that the model draws in place of its last.

    Packed, both run their prompt once. ``rows`` are the last micro-batches of the run, so every resumed run draws the
    same.
    """

    asks_a_model = True

    def __init__(
        self, examples: Examples, flow: Flow, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        super().__init__(examples, flow.objective, rows, packing)
        self.flow, trie = flow, examples.trie
        self.leaf_below = np.full(trie.n_nodes, NOTHING)  # of each node at which a title ends
        self.leaf_below[trie.parent[trie.leaf]] = trie.leaf

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Arguments of `FlowLoss.forward`, what the micro-batch adds to both normalisers, and its counts."""
        item = super().__getitem__(index)
        n = item["n_prefixes"]
        return item | {"pairs": float((n * (n - 1) // 2).sum())}

    def batch(self, index: int) -> Batch:
        """Each window, and behind it the same with a title that is drawn."""
        rows, settings, examples = self.rows[index], self.flow.training, self.examples
        step = (settings.steps * settings.accumulation - len(self.rows) + index) // settings.accumulation
        longest = int(examples.trie.depth.max())
        drawn = (np.random.default_rng([self.flow.seed, 3, step, w]).random(longest) for w in rows.tolist())
        prompts = [examples.prompts.encode(row[:-1].tolist()) for row in examples.windows.items.take(rows)]
        items = self.flow.sample(prompts, np.array(list(drawn)))
        batch = examples.with_rejected(items[:, None], rows).batch(np.arange(2 * len(rows)))
        return replace(batch, weight=batch.weight * ~self.drawn(batch))

    def drawn(self, batch: Batch) -> Bool:
        """Targets of every other row."""
        odd: Bool = batch.position // batch.input_ids.shape[1] % 2 == 1
        return odd

    def more(self, rows: NDArray[np.int64], batch: Batch, keep: Any) -> dict[str, Any]:
        """What `FlowLoss.forward` has more than `TitleLoss.forward`, but for ``pair_weight``."""
        is_drawn = self.drawn(batch)[keep]
        drawn, node = np.flatnonzero(is_drawn), batch.node[keep]
        first = np.flatnonzero(node[drawn] == 0)
        n_prefixes = np.diff(np.append(first, len(drawn)))
        t = np.arange(n_prefixes.max(initial=0))
        there = t < n_prefixes[:, None]
        log_r = np.zeros(there.shape, np.float32)
        log_r[there] = self._rewards(rows, node[drawn], n_prefixes)
        return {
            "ends": self.leaf_below[node] != NOTHING,
            "true": np.flatnonzero(~is_drawn),
            "place": drawn[np.where(there, first[:, None] + t, 0)],
            "log_r": log_r,
            "n_prefixes": n_prefixes,
        }

    def _rewards(self, rows: NDArray[np.int64], node: Int64, n_prefixes: Int64) -> Float64:
        """`state_rewards` (M,) of the prefixes that drawn titles pass, each of which is a node; a title a window."""
        trie, prior, coded = self.examples.trie, self.flow.prior, self.flow.reward.prefixes == "coded"
        leaf, end = self.leaf_below[node], np.cumsum(n_prefixes) - 1
        scored = leaf != NOTHING
        if coded:  # only the drawn title's own end counts, and all its prefixes are scaled by it
            scored = np.isin(np.arange(len(node)), end)
        log_stop, a, b = prior[leaf], np.ones(len(node)), np.zeros(len(node))
        if self.flow.scores is not None:
            items = self.examples.windows.items.take(rows)
            log_p = self.flow.scores(items, items.lengths - 1)
            ends, at = np.unique(trie.leaf, return_inverse=True)
            p = np.zeros((len(rows), len(ends)))
            np.add.at(p.T, at, np.exp(log_p).T)  # titles may share a leaf
            terms = personal_terms(self.flow.reward, p)
            column = np.zeros(trie.n_nodes, np.int64)
            column[ends] = np.arange(len(ends))
            of = np.repeat(leaf[end], n_prefixes) if coded else leaf
            row = np.repeat(np.arange(len(rows)), n_prefixes)
            own = coded | scored
            a, b = (np.where(own, term[row, column[of]], x) for term, x in zip(terms, (a, b), strict=True))
        return state_rewards(prior[node], log_stop, scored, n_prefixes, a, b)
