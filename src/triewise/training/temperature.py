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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triewise import processes
from triewise.errors import UserError
from triewise.trie import DeviceTrie, Trie

SUPPORTS = ("trie", "vocabulary")
NORMALISERS = ("weights", "decisions", "sum")
ROOTS = ("plus", "minus", "exact")
ROWS = ("widest", "root", "all")
SCOPES = ("global", "token")
HALVINGS = 30  # of the clamp, for root = "exact": below the resolution of float32


class Columns(NamedTuple):
    """Which tokens the columns of logits belong to, where they are not the whole vocabulary.

    Attributes:
        token: int64 (C,), ascending, distinct.
        n_vocabulary: Size V of the vocabulary they are from.
    """

    token: Tensor
    n_vocabulary: int


def head_rows(weight: Tensor, tokens: Tensor) -> Tensor:
    """Rows (C, D) of a head (V, D) that belong to some tokens (C,), int64, distinct: an ``index_select``.

    On a CPU the gradient of a trained head is not filled with zeros: the system hands out zeroed memory, and only
    what the rows touch is written. A tied head gains less: the gradient of the embedding is added to its own.
    """
    if weight.requires_grad and type(weight) in (Tensor, torch.nn.Parameter) and weight.device.type == "cpu":
        rows: Tensor = _HeadRows.apply(weight, tokens)  # type: ignore[no-untyped-call]
        return rows
    return weight.index_select(0, tokens)


class _HeadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return weight.index_select(0, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        # torch.zeros writes its zeros; those of numpy are pages that nobody has touched.
        zeros = np.zeros(math.prod(ctx.shape) * gradient.element_size(), dtype=np.uint8)
        whole = torch.from_numpy(zeros).view(gradient.dtype).view(ctx.shape)
        return whole.index_copy_(0, tokens, gradient), None


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


class AdaptiveTemperature:
    r"""Adaptive temperature scaling (ATS): a temperature that keeps P(target) near ``eta``.

    With Gaussian logits of the valid tokens, ``P = eta`` means
    :math:`C \tau^2 - d \tau + \sigma^2 / 2 = 0`, with :math:`C = \ln(m \eta)`, m valid tokens, d the mean
    logit of the targets minus that of all valid tokens, and :math:`\sigma^2` the variance of the latter. The
    root is clamped; with ``scope = "global"`` it is smoothed too:
    ``value = momentum * value + (1 - momentum) * root``.

    Args:
        eta: Wanted probability of the target.
        initial: Temperature before the first update.
        momentum: Weight of the old value; 0 takes each root as it is. Not used by ``scope = "token"``.
        clamp: Range of the root.
        root: ``plus``, the larger root (the authors' code); ``minus``, the smaller one (the paper's text);
            ``exact``, no Gaussian: bisection, within the clamp, of the mean of P over the rows looked at. Where
            both ends of the clamp lie on one side of ``eta``, the end whose mean is nearer to it.
        rows: Which positions are looked at with ``scope = "global"``. ``widest``: those at the trie node with
            the most children. ``root``: those at the root of the trie (the released rule); equal where the
            root is the widest node, elsewhere m is near 1. ``all``: all positions, as in the paper, but those
            of a single valid token, where P is 1 at any temperature.
        scope: ``global``, one temperature for all tokens; ``token``, each token its own, from its own logits
            and its own number of valid tokens (Eq. 11), without smoothing.

    Attributes:
        value: The temperature now; with ``scope = "token"`` the mean over the decisions seen last.

    Raises:
        UserError: A setting out of range.

    Source: MSL, arXiv:2504.04178, equations 11 and 12, and its code; ``exact`` is ours. Values are plain
    numbers: no gradient flows.
    """

    def __init__(
        self,
        eta: float = 0.25,
        initial: float = 1.5,
        momentum: float = 0.95,
        clamp: tuple[float, float] = (1.5, 5.0),
        root: str = "plus",
        rows: str = "widest",
        scope: str = "global",
    ) -> None:
        for name, value, known in (("root", root, ROOTS), ("rows", rows, ROWS), ("scope", scope, SCOPES)):
            if value not in known:
                raise UserError(f"wanted {name} among {', '.join(known)}, got {value!r}; choose one of them")
        if not (eta > 0 and initial > 0 and 0 <= momentum <= 1 and 0 < clamp[0] <= clamp[1]):
            raise UserError(
                "wanted eta > 0, initial > 0, momentum in [0, 1] and 0 < clamp[0] <= clamp[1], got "
                f"eta={eta}, initial={initial}, momentum={momentum}, clamp={clamp}"
            )
        self.eta, self.momentum, self.clamp, self.root, self.rows = eta, momentum, clamp, root, rows
        self.scope, self.value = scope, float(initial)

    def update(self, positive: Tensor, valid: Tensor, m: float, row: Tensor | None = None) -> float:
        """Take one micro-batch into account.

        Without a row, or with a single valid logit, there is nothing to estimate: the value stays.

        Args:
            positive: Logits (R,) of the targets of the rows looked at.
            valid: Logits (E,) of all valid tokens of these rows, targets included.
            m: Mean number of valid tokens of these rows; ``m * eta`` must be above 1. Not used by
                ``scope = "token"``, where each row has its own.
            row: Row (E,), int64, of each of ``valid``; None: m for each row, one row after the other.

        Returns:
            The new value.

        Raises:
            UserError: ``m * eta`` <= 1: a uniform guess already has the wanted probability. Rows that are
                needed and not known.
        """
        if self.scope == "token":
            if len(positive):
                self.value = float(self.per_token(positive, valid, self._rows(positive, valid, row)).mean())
            return self.value
        if m * self.eta <= 1:
            raise UserError(
                f"adaptive temperature wants m * eta > 1, got m = {m:g} valid tokens and eta = {self.eta}; "
                "raise eta or use a fixed temperature"
            )
        positive, valid = positive.detach().float(), valid.detach().float()
        if len(positive) and len(valid) > 1:
            variance, mean = torch.var_mean(valid)
            gap, spread = torch.stack([positive.mean() - mean, variance]).tolist()
            if math.isfinite(gap) and math.isfinite(spread):
                if self.root == "exact":
                    probability = _probabilities(positive, valid, self._rows(positive, valid, row))
                    root = float(self._bisect(lambda tau: probability(tau).mean(), mean))
                else:
                    root = min(max(self.solve(gap, spread, m), self.clamp[0]), self.clamp[1])
                self.value = self.momentum * self.value + (1 - self.momentum) * root
        return self.value

    @torch.no_grad()
    def per_token(self, positive: Tensor, valid: Tensor, row: Tensor) -> Tensor:
        """The temperature of each token by itself (Eq. 11); changes nothing.

        Args:
            positive: Logits (M,) of the targets.
            valid: Logits (E,) of all valid tokens, targets included.
            row: Which of the M each of ``valid`` belongs to (E,), int64.

        Returns:
            float32 (M,), in the clamp. Where a uniform guess already has the wanted probability, because few
            tokens are valid, C is <= 0 and the root is its limit for C -> 0 from above: with a target above the
            mean ``plus`` is the upper end and ``minus`` variance / 2d; below the mean both are the lower end.
        """
        positive, valid = positive.float(), valid.float()
        if self.root == "exact":
            return self._bisect(_probabilities(positive, valid, row), positive)
        n = torch.zeros_like(positive).index_add(0, row, torch.ones_like(valid))
        mean = torch.zeros_like(positive).index_add(0, row, valid) / n
        square = (valid - mean.index_select(0, row)) ** 2
        variance = torch.zeros_like(positive).index_add(0, row, square) / (n - 1).clamp(min=1)
        return self._solve(positive - mean, variance, (n * self.eta).log()).clamp(*self.clamp)

    def solve(self, gap: float, variance: float, m: float) -> float:
        """The chosen root, ``plus`` or ``minus``, before clamping; a negative discriminant counts as 0.

        Args:
            gap: Mean logit of the targets minus mean logit of the valid tokens.
            variance: Unbiased variance of the logits of the valid tokens.
            m: Number of valid tokens.

        Returns:
            The root, >= 0; minus infinity where no temperature can do, because ``gap`` <= 0.
        """
        numbers = torch.tensor([gap, variance, math.log(m * self.eta)], dtype=torch.float64)
        return float(self._solve(*numbers))

    def _solve(self, gap: Tensor, variance: Tensor, c: Tensor) -> Tensor:
        c = c.clamp(min=0)
        square = gap * gap - 2 * c * variance
        spread = square.clamp(min=0).sqrt()
        if self.root == "plus":
            root = (gap + spread) / (2 * c)
        else:  # the same as (gap - spread) / 2c, and still right for c near 0
            root = torch.where(square > 0, variance / (gap + spread), gap / (2 * c))
        return torch.where(gap > 0, root, -torch.inf)

    def _bisect(self, probability: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """Where in the clamp a probability crosses eta; else the end that is nearer to it. As ``like`` in shape."""
        low, high = (torch.full_like(like, end) for end in self.clamp)
        at_low, at_high = probability(low) - self.eta, probability(high) - self.eta
        nearer = torch.where(at_low.abs() <= at_high.abs(), low, high)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            before = (probability(middle) > self.eta) == (at_low > 0)  # the crossing is above the middle
            low, high = torch.where(before, middle, low), torch.where(before, high, middle)
        return torch.where((at_low > 0) != (at_high > 0), (low + high) / 2, nearer)

    def _rows(self, positive: Tensor, valid: Tensor, row: Tensor | None) -> Tensor:
        if row is not None:
            return row
        m, rest = divmod(len(valid), len(positive))
        if rest:
            raise UserError(
                f"wanted the row of each valid logit, got {len(valid)} logits for {len(positive)} targets and "
                "no rows; give row"
            )
        return torch.arange(len(positive), device=valid.device).repeat_interleave(m)

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        names = ("eta", "momentum", "clamp", "root", "rows", "scope")
        return {name: getattr(self, name) for name in names}

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


def _probabilities(positive: Tensor, valid: Tensor, row: Tensor) -> Callable[[Tensor], Tensor]:
    """P(target) (R,) of each row as a function of its temperature (R,), or of one temperature for all ()."""
    top = valid.new_full((len(positive),), -torch.inf).scatter_reduce(0, row, valid, "amax")
    positive, valid = positive - top, valid - top.index_select(0, row)

    def probability(tau: Tensor) -> Tensor:
        total = torch.zeros_like(positive).index_add(0, row, (valid / _of_rows(tau, row)).exp())
        return (positive / tau).exp() / total

    return probability


def _of_rows(value: float | Tensor, row: Tensor) -> float | Tensor:
    """A number, or the one of each row at each of its edges."""
    return value.index_select(0, row) if isinstance(value, Tensor) and value.dim() else value


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise UserError(f"wanted a temperature > 0, got {temperature}; 1 leaves the logits as they are")
