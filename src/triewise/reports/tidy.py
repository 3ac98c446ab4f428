"""Statistics of both papers as tidy Polars tables: a row for each number, and columns that say of what it is.

They come from arrays and logs alone; what a model has to be run for is measured elsewhere and handed in. Entropies and
losses are in nats, but for the item-score entropy, which its paper has in bits. Intervals are 95 % bootstrap intervals
over users.

Shape key: N nodes, I items, B users, K ranked items, T steps of a title, E valid tokens of decisions, M target tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from triewise.arrays import within
from triewise.ranking import interval, paired_interval
from triewise.tokens import Trie, gain_entropy, zero_gain

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from triewise.arrays import Float64, Int64, Ints

Log = Sequence[Mapping[str, Any]]
GROUPS = {"zero gain": "loss_zero_gain", "positive gain": "loss_positive_gain"}
PARTS = ("invalid", "choice")  # of the language-modelling loss
WIDTH, REACH = 0.25, 4.0  # of a bin of logits, and how far bins reach, in standard deviations
RESAMPLES = 1000


def zero_gain_tokens(trie: Trie, counts: ArrayLike) -> pl.DataFrame:
    """Target tokens that gain nothing and those that do, titles weighed by counts (IGD, Table 1).

    Args:
        trie: The trie of the catalogue.
        counts: Integers (I,), how often each item is a training target.

    Returns:
        Rows ``group``, ``tokens``, ``share``.
    """
    mass, idle = trie.subtree_count(counts)[1:], zero_gain(trie, counts)[1:]
    tokens = np.array([mass[idle].sum(), mass[~idle].sum()])
    return pl.DataFrame({"group": list(GROUPS), "tokens": tokens, "share": tokens / tokens.sum()})


def group_losses(log: Log) -> pl.DataFrame:
    """Losses of both token groups over the first epoch (IGD, Figures 2, 5 and 7).

    Args:
        log: Rows of ``log.jsonl``.

    Returns:
        Rows ``step``, ``epoch``, ``group``, ``loss``; a loss is the mean since the row before it.
    """
    rows = [
        (int(row["step"]), float(row["epoch"]), group, float(row[key]))
        for row in log
        for group, key in GROUPS.items()
        if row.get(key) is not None and row.get("epoch", math.inf) <= 1
    ]
    return pl.DataFrame(rows, ["step", "epoch", "group", "loss"], orient="row")


def logged_parts(log: Log) -> pl.DataFrame:
    """Both parts of the language-modelling loss and their gradient norms over the training (MSL, Figures 3 and 4).

    Args:
        log: Rows of ``log.jsonl`` of a run with ``training.log_parts``.

    Returns:
        Rows ``step``, ``part``, ``loss``, ``gradient_norm``; no row where they were not logged.
    """
    rows = [
        (int(row["step"]), part, float(row[f"loss_{part}"]), float(row[f"grad_norm_{part}"]))
        for row in log
        for part in PARTS
        if f"loss_{part}" in row
    ]
    return pl.DataFrame(rows, ["step", "part", "loss", "gradient_norm"], orient="row")


def gradient_weights(log: Log) -> pl.DataFrame:
    """The weight w = 1 - P(target) of the decisions' gradients over the training (MSL, Figure 5).

    Returns:
        Rows ``step``, ``w``, ``temperature``.
    """
    rows = [
        (int(row["step"]), float(row["w"]), float(row.get("temperature", 1.0)))
        for row in log
        if row.get("w") is not None
    ]
    return pl.DataFrame(rows, ["step", "w", "temperature"], orient="row")


def prefixes(trie: Trie, counts: ArrayLike, items: Ints, target: Ints) -> pl.DataFrame:
    """Entropy left under each prefix of what is recommended, and of what was taken next.

    Args:
        trie: The trie of the catalogue.
        counts: Integers (I,) as of `gain_entropy`.
        items: Recommended items (B, K), -1 padded.
        target: True next items (B,).

    Returns:
        Rows ``row`` of a user, ``step`` from 1, ``predicted``, the mean over those of the user's recommendations that
        have the step, and ``truth``; steps that only one of both has are left out.
    """
    after, offsets = trie.paths_after()
    length = np.diff(offsets)
    entropy_IT = np.full((trie.n_items + 1, int(length.max())), np.nan)  # the last row is of no item
    item = np.repeat(np.arange(trie.n_items), length)
    entropy_IT[item, within(length)] = gain_entropy(trie, counts)[after]
    each_BKT = entropy_IT[np.asarray(items, dtype=np.int64)]
    n_BT, truth_BT = np.isfinite(each_BKT).sum(1), entropy_IT[target]
    total_BT = np.where(np.isfinite(each_BKT), each_BKT, 0).sum(1)
    row, step = np.nonzero((n_BT > 0) & np.isfinite(truth_BT))
    predicted = total_BT[row, step] / n_BT[row, step]
    return pl.DataFrame({"row": row, "step": step + 1, "predicted": predicted, "truth": truth_BT[row, step]})


def prefix_entropy(found: pl.DataFrame) -> pl.DataFrame:
    """Prefix entropy of predictions minus truth at each step (IGD, Figures 3, 6 and 8); positive: less decided.

    The paper does not say how steps and lengths are averaged. Here a step's users are those of whom a prediction and
    the truth have it.

    Args:
        found: Rows of `prefixes`.

    Returns:
        Rows ``step`` (0: the mean over a user's steps), ``predicted``, ``truth``, ``difference``, its interval ``low``
        and ``high``, and ``users``.
    """
    of_user = found.group_by("row").agg(pl.col("predicted", "truth").mean()).sort("row")
    steps = [part for _, part in found.sort("step", "row").group_by("step", maintain_order=True)]
    rows = []
    for step, part in enumerate([of_user, *steps]):
        predicted, truth = part["predicted"].to_numpy(), part["truth"].to_numpy()
        means = (float(v.mean()) for v in (predicted, truth, predicted - truth))
        rows.append((step, *means, *interval(predicted - truth), part.height))
    names = ["step", "predicted", "truth", "difference", "low", "high", "users"]
    return pl.DataFrame(rows, names, orient="row")


def first_word_repetition(trie: Trie, items: Ints) -> Float64:
    """Share of each user's recommended titles that begin as most of them do (IGD, Table 7).

    A beginning is the first token that another could stand for: of titles in quotes the one after the quote.

    Args:
        trie: The trie of the catalogue.
        items: Recommended items (B, K), -1 padded; one at least of each user.

    Returns:
        (B,) in (0, 1].
    """
    before, offsets = trie.paths()
    first = np.array(
        [
            next((j for j in range(a, b - 1) if trie.branching[before[j]]), b - 1)
            for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
        ]
    )
    beginning_I = trie.paths_after()[0][first]
    shares = []
    for row in np.asarray(items):
        listed = beginning_I[row[row >= 0]]
        shares.append(np.unique(listed, return_counts=True)[1].max() / len(listed))
    return np.array(shares, dtype=np.float64)


def item_score_entropy(scores: ArrayLike) -> Float64:
    """Entropy of each user's recommended titles after a softmax of their scores, in bits (IGD, Table 7).

    Args:
        scores: (B, K), -inf padded.

    Returns:
        (B,) in [0, log2 K].
    """
    z = np.asarray(scores, dtype=np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    entropy: Float64 = -(p * np.log2(np.where(p > 0, p, 1))).sum(1) + 0.0
    return entropy


def gain_bins(tokens: pl.DataFrame) -> pl.DataFrame:
    """Log-probability of target tokens by what they gain (IGD, Figure 4).

    Args:
        tokens: A row for each target token: ``row`` of its user, ``gain`` and ``log_p``, nats.

    Returns:
        Rows ``from`` and ``to`` of the gain (half orders of magnitude; both 0: no gain), mean ``gain``, mean ``log_p``
        with ``low`` and ``high``, and ``tokens``. The mean of ``log_p`` is over users of their means.
    """
    half = (pl.col("gain").log10() * 2).floor()
    binned = tokens.with_columns(half=pl.when(pl.col("gain") > 0).then(half)).sort(
        "half", "row", nulls_last=False
    )
    rows = []
    for (at,), part in binned.group_by("half", maintain_order=True):
        mean = part.group_by("row", maintain_order=True).agg(pl.col("log_p").mean())["log_p"].to_numpy()
        ends = (0.0, 0.0) if at is None else (10 ** (float(str(at)) / 2), 10 ** ((float(str(at)) + 1) / 2))
        gain = float(part["gain"].to_numpy().mean())
        rows.append((*ends, gain, float(mean.mean()), *interval(mean), part.height))
    return pl.DataFrame(rows, ["from", "to", "gain", "log_p", "low", "high", "tokens"], orient="row")


def rank_correlation(row: Int64, x: Float64, y: Float64) -> tuple[float, float, float]:
    """Spearman's correlation of two numbers of tokens, and its 95 % bootstrap interval over the users ``row`` (M,).

    Ranks are those among all tokens, ties shared, and are not taken anew in a resample.
    """
    a, b = (pl.Series(v).rank("average").to_numpy() for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    user = np.unique(row, return_inverse=True)[1]
    n_B, *sums = (np.bincount(user, v) for v in (np.ones_like(a), a, b, a * a, b * b, a * b))
    rng = np.random.default_rng(0)
    times = rng.multinomial(len(n_B), np.full(len(n_B), 1 / len(n_B)), size=RESAMPLES)
    values = []
    for weight in (np.ones((1, len(n_B))), times):
        n, sa, sb, saa, sbb, sab = (weight @ of for of in (n_B, *sums))
        spread = np.sqrt(np.maximum((saa - sa**2 / n) * (sbb - sb**2 / n), 0))
        values.append(np.divide(sab - sa * sb / n, spread, out=np.zeros_like(n), where=spread > 0))
    low, high = np.quantile(values[1], (0.025, 0.975))
    return float(values[0][0]), float(low), float(high)


def logit_density(z: Float64) -> pl.DataFrame:
    """Valid tokens' logits, brought to mean 0 and deviation 1 in each decision, against a Gaussian (MSL, Figure 8).

    Args:
        z: Standardised logits (E,).

    Returns:
        Rows ``z`` (middle of a bin), ``density`` and ``gaussian`` (mean density of the bin), and, alike in all rows,
        ``distance``, the largest difference between both distribution functions (Kolmogorov-Smirnov), and ``logits``.
    """
    edges = np.arange(-REACH, REACH + WIDTH / 2, WIDTH)
    normal = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in edges])
    ordered = np.sort(np.asarray(z, dtype=np.float64))
    expected = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in ordered])
    place = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(float(np.abs(expected - place[1:]).max()), float(np.abs(expected - place[:-1]).max()))
    return pl.DataFrame(
        {
            "z": (edges[:-1] + edges[1:]) / 2,
            "density": np.histogram(ordered, edges)[0] / (len(ordered) * WIDTH),
            "gaussian": np.diff(normal) / WIDTH,
            "distance": distance,
            "logits": len(ordered),
        }
    )


def by_alpha(table: pl.DataFrame, column: str) -> dict[float, Float64]:
    """(B,) values of a column at each alpha, users in the same order."""
    parts = table.sort("alpha", "row").group_by("alpha", maintain_order=True)
    return {float(str(alpha)): part[column].to_numpy().astype(np.float64) for (alpha,), part in parts}


def intervals(of: Mapping[float, Float64]) -> pl.DataFrame:
    """Means at each alpha with their intervals: rows ``alpha``, ``value``, ``low``, ``high``, ``users``."""
    rows = [(alpha, float(v.mean()), *interval(v), len(v)) for alpha, v in of.items()]
    return pl.DataFrame(rows, ["alpha", "value", "low", "high", "users"], orient="row")


def change(a: Float64, b: Float64) -> tuple[float, float, float]:
    """Mean of ``a - b`` over the same users, and its interval."""
    return float((a - b).mean()), *paired_interval(a, b)


def prefix_change(a: pl.DataFrame, b: pl.DataFrame) -> tuple[float, float, float]:
    """Change of the prefix entropy from b to a, over users of both, and its interval."""
    each = [
        part.group_by("row").agg(value=(pl.col("predicted") - pl.col("truth")).mean()).sort("row")
        for part in (a, b)
    ]
    both = each[0].join(each[1], on="row", suffix="_before")
    x, y = (both[name].to_numpy() for name in ("value", "value_before"))
    return change(x, y)
