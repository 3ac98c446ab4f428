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
