r"""Adaptive temperature scaling (ATS) of MSL: a temperature that keeps the probability of targets near a wish.

Shape key: M target positions, E (row, child) pairs, R rows that are looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from triewise.errors import UserError

ROOTS = ("plus", "minus", "exact")
ROWS = ("widest", "root", "all")
SCOPES = ("global", "token")
HALVINGS = 30  # of the clamp, for root = "exact": below the resolution of float32


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
            the most children. ``root``: those at the root of the trie (the released rule); often the same node, but
            on books one below the root is wider, and m is near 1 where a quote opens every title. ``all``: all
            positions, as in the paper, but those of a single valid token, where P is 1 at any temperature.
        scope: ``global``, one temperature for all tokens; ``token``, each token its own, from its own logits
            and its own number of valid tokens (Eq. 11), without smoothing.

    Raises:
        UserError: A setting out of range.

    Source: MSL, arXiv:2504.04178, equations 11 and 12, and its code; ``exact`` is ours. No gradient flows. The
    temperature stays on the device of the logits it was found from, so that no training step waits for it.
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
        self.scope = scope
        self._value: float | Tensor = float(initial)

    @property
    def value(self) -> float:
        """The temperature now, waited for; with ``scope = "token"`` the mean over the decisions seen last."""
        return float(self._value)

    def on(self, device: torch.device) -> Tensor:
        """The temperature now as a tensor () on a device, float64 where it has that, which nothing waits for."""
        if not isinstance(self._value, Tensor) or self._value.device != device:
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self._value = torch.full((), self.value, dtype=dtype, device=device)
        return self._value

    def update(self, positive: Tensor, valid: Tensor, m: float, row: Tensor | None = None) -> Tensor:
        """Take one micro-batch into account.

        Without a row, or with a single valid logit, there is nothing to estimate: the value stays.

        Args:
            positive: Logits (R,) of the targets of the rows looked at.
            valid: Logits (E,) of all valid tokens of these rows, targets included.
            m: Mean number of valid tokens of these rows; ``m * eta`` must be above 1. Not used by
                ``scope = "token"``, where each row has its own.
            row: Row (E,), int64, of each of ``valid``; None: m for each row, one row after the other.

        Returns:
            The new value, as `on` gives it.

        Raises:
            UserError: ``m * eta`` <= 1: a uniform guess already has the wanted probability. Rows that are
                needed and not known.
        """
        if self.scope == "token":
            if len(positive):
                self._value = self.per_token(positive, valid, self._rows(positive, valid, row)).mean()
            return self.on(valid.device)
        if m * self.eta <= 1:
            raise UserError(
                f"adaptive temperature wants m * eta > 1, got m = {m:g} valid tokens and eta = {self.eta}; "
                "raise eta or use a fixed temperature"
            )
        positive, valid = positive.detach().float(), valid.detach().float()
        old = self.on(valid.device)
        if len(positive) and len(valid) > 1:
            variance, mean = torch.var_mean(valid)
            gap, spread = (positive.mean() - mean).to(old.dtype), variance.to(old.dtype)
            if self.root == "exact":
                probability = _probabilities(positive, valid, self._rows(positive, valid, row))
                root = self._bisect(lambda tau: probability(tau).mean(), mean).to(old.dtype)
            else:
                root = self._solve(gap, spread, torch.full_like(gap, math.log(m * self.eta))).clamp(
                    *self.clamp
                )
            new = self.momentum * old + (1 - self.momentum) * root
            self._value = torch.where(gap.isfinite() & spread.isfinite(), new, old)
        return self.on(valid.device)

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
        self._value = float(state["value"])

    def __getstate__(self) -> dict[str, Any]:
        """What other processes are given: no tensor of a device."""
        return vars(self) | {"_value": self.value}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"AdaptiveTemperature(value={self.value:.4g}, {settings})"


def _probabilities(positive: Tensor, valid: Tensor, row: Tensor) -> Callable[[Tensor], Tensor]:
    """P(target) (R,) of each row as a function of its temperature (R,), or of one temperature for all ()."""
    top = valid.new_full((len(positive),), -torch.inf).scatter_reduce(0, row, valid, "amax")
    positive, valid = positive - top, valid - top.index_select(0, row)

    def probability(tau: Tensor) -> Tensor:
        total = torch.zeros_like(positive).index_add(0, row, (valid / of_rows(tau, row)).exp())
        return (positive / tau).exp() / total

    return probability


def of_rows(value: float | Tensor, row: Tensor) -> float | Tensor:
    """A number, or the one of each row at each of its edges."""
    return value.index_select(0, row) if isinstance(value, Tensor) and value.dim() else value
