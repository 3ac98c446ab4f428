r"""Token losses and what they are made of: support x temperature x weight x normaliser.

The *support* of the softmax is the whole vocabulary (language-modelling loss, LML) or the valid next tokens,
which are the children of the trie node before the target (masked softmax loss, MSL). Nothing here stores a
mask: a ragged gather reads the logits of the children. Everything is in nats, float32, with the maximum
subtracted.

Shape key: M target positions, V vocabulary, N trie nodes, E (row, child) pairs of M positions, R reference
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trierec.errors import UserError
from trierec.trie import DeviceTrie, Trie

SUPPORTS = ("trie", "vocabulary")
NORMALISERS = ("weights", "decisions", "sum")


def trie_nll(
    logits: Tensor,
    target: Tensor,
    node: Tensor,
    trie: Trie | DeviceTrie,
    temperature: float = 1.0,
    n_edges: int | None = None,
) -> Tensor:
    r"""Negative log-likelihood of each target token among its valid continuations.

    .. math:: \ell_m = -z_{m,y_m}/\tau + \log \sum_{v \in \mathcal{C}(n_m)} \exp(z_{m,v}/\tau)

    where :math:`\mathcal{C}(n)` are the tokens on the edges that leave trie node :math:`n`.

    Args:
        logits: Next-token logits (M, V), any float dtype.
        target: Target token ids (M,), int64; each continues its node (``Trie.walk`` has checked that: a check
            here would stop a GPU at every step).
        node: Trie node before each target (M,), int64; no leaf.
        trie: The trie of all items.
        temperature: Divides the logits, > 0; tau of the paper. The loss is *not* multiplied by it.
        n_edges: Number of children of all nodes of ``node`` together, where it is known; spares a GPU one
            stop.

    Returns:
        float32 (M,), nats, >= 0. Exactly 0, with zero gradient, where only one continuation is valid.

    Raises:
        UserError: ``temperature`` <= 0.

    Source: MSL, arXiv:2504.04178. The authors' code stores a (T, V) mask per example and does not subtract
    the maximum.

    >>> trie = Trie.from_sequences([[7, 2], [9, 2]])
    >>> logits = torch.zeros(1, 10)
    >>> logits[0, 5] = 50.0  # token 5 continues no title here
    >>> trie_nll(logits, torch.tensor([7]), torch.tensor([0]), trie).exp()
    tensor([2.])
    """
    _check_temperature(temperature)
    edge_row, edge_token = _edges(node, _on(trie, logits.device), n_edges)
    # One gather for children and targets: each one costs a zero-filled (M, V) gradient in the backward pass.
    first = torch.arange(len(node), device=node.device) * logits.shape[1]
    flat = torch.cat([first.index_select(0, edge_row) + edge_token, first + target])
    z = logits.reshape(-1).index_select(0, flat).float() / temperature
    z_E, z_M = z[: len(edge_row)], z[len(edge_row) :]
    top_M = z_E.new_full((len(node),), -torch.inf).scatter_reduce(0, edge_row, z_E.detach(), "amax")
    sum_M = z_E.new_zeros(len(node)).index_add(0, edge_row, (z_E - top_M.index_select(0, edge_row)).exp())
    return top_M + sum_M.log() - z_M


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


def gradient_weight(nll: Tensor) -> Tensor:
    """The factor ``1 - P(target)`` that every token's gradient carries (w of MSL), from its loss in nats."""
    return -torch.expm1(-nll)


class AdaptiveTemperature:
    r"""Adaptive temperature scaling (ATS): a running temperature that keeps P(target) near ``eta``.

    With Gaussian logits of the valid tokens, ``P = eta`` means
    :math:`C \tau^2 - d \tau + \sigma^2 / 2 = 0`, with :math:`C = \ln(m \eta)`, m valid tokens, d the mean
    logit of the targets minus that of all valid tokens, and :math:`\sigma^2` the variance of the latter. The
    root is clamped and smoothed: ``value = momentum * value + (1 - momentum) * root``.

    Args:
        eta: Wanted probability of the target.
        initial: Temperature before the first update.
        momentum: Weight of the old value; 0 takes each root as it is.
        clamp: Range of the root.
        root: ``plus``, the larger root (the authors' code), or ``minus`` (the paper's text).
        rows: Which positions are looked at; ``widest``: those at the trie node with the most children. It
            equals the released rule (the root) where the root is the widest node; elsewhere that rule has no
            row or m near 1.

    Attributes:
        value: The temperature now.

    Raises:
        UserError: A setting out of range.

    Source: MSL, arXiv:2504.04178, equations 11 and 12, and its code. Values are plain numbers: no gradient
    flows.
    """

    def __init__(
        self,
        eta: float = 0.25,
        initial: float = 1.5,
        momentum: float = 0.95,
        clamp: tuple[float, float] = (1.5, 5.0),
        root: str = "plus",
        rows: str = "widest",
    ) -> None:
        if rows in ("all", "root"):
            raise UserError(f"wanted rows = 'widest', got {rows!r}, which is not there yet; use 'widest'")
        for name, value, known in (("root", root, ("plus", "minus")), ("rows", rows, ("widest",))):
            if value not in known:
                raise UserError(f"wanted {name} among {', '.join(known)}, got {value!r}; choose one of them")
        if not (eta > 0 and initial > 0 and 0 <= momentum <= 1 and 0 < clamp[0] <= clamp[1]):
            raise UserError(
                "wanted eta > 0, initial > 0, momentum in [0, 1] and 0 < clamp[0] <= clamp[1], got "
                f"eta={eta}, initial={initial}, momentum={momentum}, clamp={clamp}"
            )
        self.eta, self.momentum, self.clamp, self.root, self.rows = eta, momentum, clamp, root, rows
        self.value = float(initial)

    def update(self, positive: Tensor, valid: Tensor, m: float) -> float:
        """Take one micro-batch into account.

        Without a reference row, or with a single valid logit, there is nothing to estimate: the value stays.

        Args:
            positive: Logits (R,) of the targets of the reference rows.
            valid: Logits (E,) of all valid tokens of these rows, targets included.
            m: Number of valid tokens of one reference row; ``m * eta`` must be above 1.

        Returns:
            The new value.

        Raises:
            UserError: ``m * eta`` <= 1: a uniform guess already has the wanted probability.
        """
        if m * self.eta <= 1:
            raise UserError(
                f"adaptive temperature wants m * eta > 1, got m = {m} valid tokens and eta = {self.eta}; "
                "raise eta or use a fixed temperature"
            )
        if len(positive) and len(valid) > 1:
            variance, mean = torch.var_mean(valid.detach().float())
            gap, spread = torch.stack([positive.detach().float().mean() - mean, variance]).tolist()
            if math.isfinite(gap) and math.isfinite(spread):
                root = min(max(self.solve(gap, spread, m), self.clamp[0]), self.clamp[1])
                self.value = self.momentum * self.value + (1 - self.momentum) * root
        return self.value

    def solve(self, gap: float, variance: float, m: float) -> float:
        """The chosen root, before clamping; a negative discriminant counts as 0.

        Args:
            gap: Mean logit of the targets minus mean logit of the valid tokens.
            variance: Unbiased variance of the logits of the valid tokens.
            m: Number of valid tokens.
        """
        c = math.log(m * self.eta)
        spread = math.sqrt(max(gap * gap - 2 * c * variance, 0.0))
        return (gap + (spread if self.root == "plus" else -spread)) / (2 * c)

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        return {name: getattr(self, name) for name in ("eta", "momentum", "clamp", "root", "rows")}

    def state_dict(self) -> dict[str, float]:
        """What training changes."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take over what `state_dict` gave."""
        self.value = float(state["value"])

    def __repr__(self) -> str:
        """The settings and the value now."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"AdaptiveTemperature(value={self.value:.4g}, {settings})"


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
            is multiplied by it, as in the paper: ``sum -tau log softmax(z / tau)``; in vocabulary support
            it is not, as in the authors' LML + tau.
        normaliser: What the sum of weighted losses is divided by. ``weights``: the sum of the weights of all
            target tokens (LML, IGD); ``decisions``: the same over tokens with more than one valid choice (the
            released MSL with ATS); ``sum``: 1.

    Raises:
        UserError: An unknown choice, a temperature <= 0, or an adaptive one without trie support.
    """

    support: str = "trie"
    temperature: float | AdaptiveTemperature = 1.0
    normaliser: str = "weights"

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

    @property
    def is_adaptive(self) -> bool:
        """Whether the temperature changes while training."""
        return isinstance(self.temperature, AdaptiveTemperature)

    @property
    def tau(self) -> float:
        """The temperature now."""
        t = self.temperature
        return t.value if isinstance(t, AdaptiveTemperature) else float(t)

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
    ) -> Parts:
        """Losses of single tokens, for callers that normalise over more than one batch.

        Args:
            logits: Next-token logits (M, V).
            target: Target token ids (M,), int64.
            node: Trie node before each target (M,), int64.
            trie: The trie of all items.
            weight: Token weights (M,) >= 0; None: 1.
            n_edges: As in `trie_nll`.
        """
        device_trie = _on(trie, logits.device)
        weight = torch.ones_like(target, dtype=torch.float32) if weight is None else weight.float()
        contribution = self.contribution(weight, device_trie.n_children[node] > 1)
        if self.support == "vocabulary":
            nll = vocabulary_nll(logits, target, self.tau)
            return Parts(weight * nll, contribution, nll)
        nll = trie_nll(logits, target, node, device_trie, self.tau, n_edges)
        return Parts(weight * nll * self.tau, contribution, nll)

    def contribution(self, weight: Tensor, decision: Tensor) -> Tensor:
        """What each token adds to the normaliser (M,); ``decision``: whether several tokens are valid."""
        return weight * decision if self.normaliser == "decisions" else weight

    def divisor(self, total: Tensor) -> Tensor:
        """The divisor for a sum of contributions; 1 where nothing contributes: the loss is 0, not NaN."""
        return torch.where(total > 0, total, 1.0) if self.normaliser != "sum" else torch.ones_like(total)

    @torch.no_grad()
    def observe(self, logits: Tensor, target: Tensor, node: Tensor, trie: Trie) -> None:
        """Let an adaptive temperature see one micro-batch of a training forward; arguments as in `parts`."""
        if not isinstance(self.temperature, AdaptiveTemperature):
            return
        reference, m = widest_node(trie)
        first = int(trie.child_ptr[reference])
        token = trie.to(logits.device).token[first : first + m]
        row = (node == reference).nonzero()
        self.temperature.update(logits[row[:, 0], target[row[:, 0]]], logits[row, token].flatten(), m)


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


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"wanted a temperature > 0, got {temperature}; 1 leaves the logits as they are")
