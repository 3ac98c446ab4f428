"""Statistics of both papers by loops over users, titles and tokens: slow and obviously right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import exp, fsum, log2
from statistics import NormalDist, fmean

from tests.reference.trie import DictTrie

Titles = Sequence[Sequence[int]]


def zero_gain_tokens(titles: Titles, counts: Sequence[int]) -> dict[str, int]:
    """Every target of the training is written token by token; a token gains nothing if no target leaves its parent."""
    found = Counter({"zero gain": 0, "positive gain": 0})
    for title, count in zip(titles, counts, strict=True):
        for t in range(len(title)):
            before = sum(c for s, c in zip(titles, counts, strict=True) if s[:t] == title[:t])
            after = sum(c for s, c in zip(titles, counts, strict=True) if s[: t + 1] == title[: t + 1])
            found["zero gain" if before == after else "positive gain"] += count
    return dict(found)


def prefix_entropies(
    titles: Titles, counts: Sequence[int], items: Sequence[Sequence[int]], target: Sequence[int]
) -> list[tuple[int, int, float, float]]:
    """User, step, mean entropy of the predictions' prefixes of that length, entropy of the truth's."""
    trie, rows = DictTrie(titles), []
    for user, (listed, true) in enumerate(zip(items, target, strict=True)):
        for step in range(1, len(titles[true]) + 1):
            prefixes = [tuple(titles[i][:step]) for i in listed if i >= 0 and len(titles[i]) >= step]
            if prefixes:
                predicted = fmean(trie.entropy(counts, prefix) for prefix in prefixes)
                rows.append((user, step, predicted, trie.entropy(counts, tuple(titles[true][:step]))))
    return rows


def first_word_repetition(titles: Titles, items: Sequence[int]) -> float:
    """The first token of a title that is not common to all titles stands for its first word."""
    shared = 0
    while all(len(t) > shared + 1 for t in titles) and len({t[shared] for t in titles}) == 1:
        shared += 1
    first = [titles[i][shared] for i in items if i >= 0]
    return Counter(first).most_common(1)[0][1] / len(first)


def item_score_entropy(scores: Sequence[float], base: float = 2.0) -> float:
    """Softmax and entropy written out."""
    masses = [exp(s) for s in scores]
    shares = [m / fsum(masses) for m in masses]
    return -fsum(p * log2(p) for p in shares if p > 0) / log2(base)


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation of mid-ranks."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < w for v in values) + (sum(v == w for v in values) + 1) / 2 for w in values]

    a, b = ranks(x), ranks(y)
    ma, mb = fmean(a), fmean(b)
    cov = fsum((p - ma) * (q - mb) for p, q in zip(a, b, strict=True))
    return float(cov / (fsum((p - ma) ** 2 for p in a) * fsum((q - mb) ** 2 for q in b)) ** 0.5)


def distance_from_gaussian(z: Sequence[float]) -> float:
    """The largest gap between the share of values up to a value (or below it) and a Gaussian's."""
    normal = NormalDist()
    gaps = [
        abs(share / len(z) - normal.cdf(v))
        for v in z
        for share in (sum(w <= v for w in z), sum(w < v for w in z))
    ]
    return max(gaps)
