"""The prefix tree as nested dicts, and its sums by looking at every item: slow and obviously right."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum, log


class DictTrie:
    """A node is a dict from token to node; a leaf is an empty dict."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = sequences
        self.root: dict = {}
        for sequence in sequences:
            node = self.root
            for token in sequence:
                node = node.setdefault(token, {})

    def node(self, prefix: Sequence[int]) -> dict:
        node = self.root
        for token in prefix:
            node = node[token]
        return node

    def prefixes(self) -> list[tuple[int, ...]]:
        """Every prefix, breadth first, siblings by token; the position in the list is the node's number."""
        found, level = [], [()]
        while level:
            found += level
            level = [(*prefix, token) for prefix in level for token in sorted(self.node(prefix))]
        return found

    def items_under(self, prefix: tuple[int, ...]) -> list[int]:
        return [i for i, s in enumerate(self.sequences) if tuple(s[: len(prefix)]) == prefix]

    def subtree_sum(self, values: Sequence[float]) -> list[float]:
        return [fsum(values[i] for i in self.items_under(prefix)) for prefix in self.prefixes()]

    def entropy(self, counts: Sequence[int], prefix: tuple[int, ...]) -> float:
        """The sum of -p ln p over the titles under a prefix, equal titles merged."""
        titles = {tuple(self.sequences[i]) for i in self.items_under(prefix)}
        masses = [sum(counts[i] for i in self.items_under(title)) for title in titles]
        return fsum(-m / sum(counts) * log(m / sum(counts)) for m in masses if m > 0)

    def gain(self, counts: Sequence[int]) -> list[float]:
        prefixes = self.prefixes()
        return [0.0] + [self.entropy(counts, p[:-1]) - self.entropy(counts, p) for p in prefixes[1:]]

    def zero_gain(self, counts: Sequence[int]) -> list[bool]:
        mass = {p: sum(counts[i] for i in self.items_under(p)) for p in self.prefixes()}
        return [not p or mass[p] == mass[p[:-1]] for p in self.prefixes()]

    def measured(self, counts: Sequence[int], measure: str) -> list[float]:
        """What the token into each prefix decides, from the titles under its parent one by one; -1 without counts."""
        found, total = [0.0], sum(counts)
        for prefix in self.prefixes()[1:]:
            above, below = self._masses(counts, prefix[:-1]), self._masses(counts, prefix)
            n, m = sum(above.values()), sum(below.values())
            if n == m:
                found.append(0.0)
            elif measure == "gini":
                rest = [c / total for title, c in above.items() if title not in below]
                found.append(fsum(p * (1 - p) for p in rest))
            elif measure == "chi-squared":
                expected = {title: c * m / n for title, c in above.items()}  # the token's row of the table
                row = fsum((below.get(t, 0) - e) ** 2 / e for t, e in expected.items()) if m else n
                found.append(row / total)
            elif measure == "conditional-entropy":
                found.append(self._renormalised(above) - self._renormalised(below))
            else:
                gain = fsum(-c / total * log(c / total) for title, c in above.items() if title not in below)
                tokens = {
                    p: sum(self._masses(counts, p).values())
                    for p in self.prefixes()
                    if p[:-1] == prefix[:-1] and p
                }
                split = fsum(-c / n * log(c / n) for c in tokens.values() if c)
                found.append(gain / split if split else 0.0)
        return found

    def _masses(self, counts: Sequence[int], prefix: Sequence[int]) -> dict[tuple[int, ...], int]:
        """Counts of the titles under a prefix that have some."""
        titles = {tuple(self.sequences[i]) for i in self.items_under(tuple(prefix))}
        masses = {t: sum(counts[i] for i in self.items_under(t)) for t in titles}
        return {t: m for t, m in masses.items() if m}

    @staticmethod
    def _renormalised(masses: dict[tuple[int, ...], int]) -> float:
        n = sum(masses.values())
        return fsum(-m / n * log(m / n) for m in masses.values())
