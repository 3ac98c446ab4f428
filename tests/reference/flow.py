"""Flower as its equations are written: all sub-trajectories one by one, rewards counted from lists of titles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Title = tuple[int, ...]  # tokens without the terminator


def sub_trajectories(log_pf: Sequence[Any], log_stop: Sequence[Any], log_r: Sequence[Any]) -> list[Any]:
    """The squared sum of steps from i to j, for all prefixes i < j of one title; numbers or tensors."""
    n = len(log_r) - 1
    delta = [log_r[t] + log_pf[t] + log_stop[t + 1] - log_r[t + 1] - log_stop[t] for t in range(n)]
    return [sum(delta[i:j]) ** 2 for i in range(n) for j in range(i + 1, n + 1)]


class Rewards:
    """Rewards of prefixes for one user.

    Args:
        catalogue: All titles.
        histories: Titles of all history lists end to end.
        p: Probability of each title for the user; None for reward ``logp``.
        reward: ``div``, ``add`` or ``logp``.
        lam: Of ``add``.
        coded: As the authors' code, else each prefix has one reward.
    """

    def __init__(
        self,
        catalogue: Sequence[Title],
        histories: Sequence[Title],
        p: dict[Title, float] | None,
        reward: str,
        lam: float = 1.0,
        coded: bool = False,
    ) -> None:
        self.catalogue, self.histories, self.p = set(catalogue), histories, p
        self.reward, self.lam, self.coded = reward, lam, coded

    def _under(self, prefix: Title) -> int:
        return sum(title[: len(prefix)] == prefix for title in self.histories)

    def _continuations(self, prefix: Title) -> int:
        longer = {title[len(prefix)] for title in self.catalogue if title[: len(prefix)] == prefix != title}
        return len(longer) + (prefix in self.catalogue)

    def log_q(self, prefix: Title, token: int | None) -> float:
        """Of a token behind a prefix; None: of the terminator."""
        above = self._under(prefix)
        below = self.histories.count(prefix) if token is None else self._under((*prefix, token))
        if below:
            return math.log(below / above)
        return -15.0 if above else -math.log(self._continuations(prefix))

    def scaled(self, log_q: float, title: Title | None) -> float:
        """What one user makes of it for a title; None: for no title yet."""
        if self.p is None or title is None:
            return log_q
        least, most = min(self.p.values()), max(self.p.values())
        if self.reward == "div":
            return log_q / ((self.p[title] - sum(self.p.values()) / len(self.p)) / (most - least) + 1)
        return log_q + self.lam * math.log((self.p[title] - least) / (most - least) + 1e-20)

    def of_prefix(self, prefix: Title, title: Title) -> float:
        """Log-reward of stopping at a prefix on the way to a title."""
        ends = prefix == title if self.coded else prefix in self.catalogue
        by = title if self.coded else prefix if ends else None
        path = sum(self.scaled(self.log_q(prefix[:t], prefix[t]), by) for t in range(len(prefix)))
        return path + (self.scaled(self.log_q(prefix, None), by) if ends else -15.0)

    def of_path(self, title: Title) -> list[float]:
        """Those of all prefixes of a title, the empty one first."""
        return [self.of_prefix(title[:t], title) for t in range(len(title) + 1)]

    def shares(self) -> dict[Title, float]:
        """How often each title should be drawn."""
        reward = {title: math.exp(self.of_prefix(title, title)) for title in self.catalogue}
        return {title: r / sum(reward.values()) for title, r in reward.items()}
