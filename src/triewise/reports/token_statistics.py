"""Statistics of tokens and of decoding: what they cost and decide, in training and when titles are ranked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from triewise.reports.figures import Dot, dot_panel, series_panel
from triewise.reports.statistics import (
    Statistic,
    StudiedData,
    StudiedRun,
    colours,
    number,
    points,
    spread,
    times,
    verdict,
)
from triewise.reports.tidy import (
    by_alpha,
    change,
    gain_bins,
    gradient_weights,
    group_losses,
    intervals,
    logged_parts,
    prefix_change,
    prefix_entropy,
    rank_correlation,
    zero_gain_tokens,
)

if TYPE_CHECKING:
    from triewise.arrays import Float64

Runs = Sequence[StudiedRun]
Data = Sequence[StudiedData]


def zero_gain(runs: Runs, data: Data) -> Statistic | None:
    """IGD, Table 1."""
    frames, said = [], []
    for one in data:
        table = zero_gain_tokens(one.trie, one.counts)
        frames.append(named(table, data=one.name))
        n, share = int(table["tokens"].sum()), float(table["share"][0])
        said.append(f"{100 * share:.1f}\xa0% of the {n:,} target tokens of {one.name} gain nothing")
    return statistic("zero-gain", frames, said)


def valid_tokens(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Table 4."""
    names, said, frames = ("users", "items", "interactions", "density", "AVT"), [], []
    for one in data:
        frames.append(named(pl.DataFrame({n: [one.facts[n]] for n in names}, strict=False), data=one.name))
        root = int(one.trie.n_children[0])
        said.append(
            f"on average {one.facts['AVT']:.1f} tokens may stand where a target token of {one.name} stands: "
            f"{root:,} at the first, {100 * one.facts['forced_share']:.1f}\xa0% of the tokens are forced"
        )
    return statistic("valid-tokens", frames, said)


def token_losses(runs: Runs, data: Data) -> Statistic | None:
    """IGD, Figures 2, 5 and 7."""
    frames, said = [], []
    lines: dict[str, dict[str, Float64]] = {}
    for run in runs:
        table = group_losses(run.log)
        ends = {g: points(table.filter(group=g), "step", "loss") for g in ("positive gain", "zero gain")}
        if any(len(line) < 2 for line in ends.values()):
            continue
        frames.append(named(table, run=run.name))
        (a, b), (c, d) = ((float(line[0, 1]), float(line[-1, 1])) for line in ends.values())
        idle = f"that of zero-gain tokens from {number(c)} to {number(d)}"
        if c == d == 0:
            idle = "zero-gain tokens cost nothing, since nothing else is valid there"
        said.append(
            f"in the first epoch of {run.name} the loss of deciding tokens goes from {number(a)} to "
            f"{number(b)} nats, {idle}"
        )
        for group, line in ends.items():
            lines.setdefault(group, {})[run.name] = line
    panels = [
        series_panel(f"Loss of {group} tokens, nats", "step", of, _colour(runs))
        for group, of in lines.items()
    ]
    return statistic("token-losses", frames, said, panels)


def prefixes_by_alpha(runs: Runs, data: Data) -> Statistic | None:
    """IGD, Figures 3, 6 and 8."""
    frames, said, lines, panels = [], [], {}, list[str]()
    for run in _studied(runs, "prefixes"):
        known = run.measured["prefixes"]
        of_alpha = {
            alpha: part for (alpha,), part in known.sort("alpha").group_by("alpha", maintain_order=True)
        }
        tables = {alpha: prefix_entropy(part) for alpha, part in of_alpha.items()}
        frames += [named(table, run=run.name, alpha=alpha) for alpha, table in tables.items()]
        means = [(alpha, *table.row(0, named=True).values()) for alpha, table in tables.items()]
        lines[run.name] = np.array(
            [(alpha, d, low, high) for alpha, _, _, _, d, low, high, _ in means], float
        )
        first, last = min(tables), max(tables)
        (_, _, _, _, d, low, high, n), moved = means[0], prefix_change(of_alpha[last], of_alpha[first])
        word = verdict(low, high, "less decided than", "more decided than", "about as decided as")
        moves = verdict(*moved[1:], "raises", "lowers", "does not settle whether it changes")
        said.append(
            f"titles that {run.name} recommends to {n} users are {word} the true ones at the same step: "
            f"{number(d, '+')} nats {spread(low, high, '+')}; alpha {last:g} {moves} that, "
            f"{number(moved[0], '+')} {spread(*moved[1:], '+')}"
        )
        if not panels:
            by = {
                f"alpha {a:g}": points(t.filter(pl.col("step") > 0), "step", "difference")
                for a, t in tables.items()
            }
            panels.append(
                series_panel(f"{run.name} at each step, nats", "step of the title", by, colours(list(by)))
            )
    panels.insert(0, series_panel("Prefix entropy, predictions − truth, nats", "alpha", lines, _colour(runs)))
    return statistic("prefix-entropy", frames, said, panels)


def gain_probability(runs: Runs, data: Data) -> Statistic | None:
    """IGD, Figure 4."""
    frames, said, lines = [], [], {}
    for run in _studied(runs, "tokens"):
        tokens = run.measured["tokens"]
        table, some = gain_bins(tokens), tokens.filter(pl.col("gain") > 0)
        frames.append(named(table, run=run.name))
        drawn = table.filter(pl.col("gain") > 0).with_columns(pl.col("gain").log10())
        lines[run.name] = points(drawn, "gain", "log_p", "low", "high")
        r, low, high = rank_correlation(*(some[c].to_numpy() for c in ("row", "gain", "log_p")))
        more = verdict(low, high, "more", "less", "neither more nor less clearly")
        idle = tokens.filter(pl.col("gain") == 0)
        zero = (
            f", and its {idle.height:,} zero-gain tokens have {number(_mean(idle['log_p']))} nats on average"
        )
        said.append(
            f"the more a target token gains, the {more} probable {run.name} holds it: rank correlation "
            f"{number(r, '+')} {spread(low, high, '+')} over {some.height:,} tokens{zero if idle.height else ''}"
        )
    panel = series_panel(
        "Log-probability of target tokens, nats", "log10 of the gain in nats", lines, _colour(runs)
    )
    return statistic("gain-probability", frames, said, [panel])


def repetition(runs: Runs, data: Data) -> Statistic | None:
    """IGD, Table 7."""
    frames, said = [], []
    lines: dict[str, dict[str, Float64]] = {"repetition": {}, "entropy": {}}
    for run in _studied(runs, "decoding"):
        clauses = []
        for measure, unit in (("repetition", ""), ("entropy", " bits")):
            of = by_alpha(run.measured["decoding"], measure)
            table = intervals(of)
            frames.append(named(table, run=run.name, measure=measure))
            lines[measure][run.name] = points(table, "alpha", "value", "low", "high")
            first, last = min(of), max(of)
            moved, low, high = change(of[last], of[first])
            what = (
                "the share of a user's first ten that begin alike"
                if measure == "repetition"
                else "the entropy of their scores"
            )
            clauses.append(
                f"{what} goes from {number(_mean(of[first]))} to {number(_mean(of[last]))}{unit} (change "
                f"{number(moved, '+')}, 95\xa0% interval {number(low, '+')} to "
                f"{number(high, '+')})"
            )
        said.append(f"from alpha {first:g} to {last:g} of {run.name}, {' and '.join(clauses)}")
    titles = {"repetition": "First-word repetition", "entropy": "Item-score entropy, bits"}
    panels = [series_panel(titles[m], "alpha", of, _colour(runs)) for m, of in lines.items()]
    return statistic("repetition", frames, said, panels)


def alphas(runs: Runs, data: Data) -> Statistic | None:
    """IGD, Table 3 and appendix H: weights in training (w_t) and in decoding (w_d), together and alone."""
    frames, said, lines = [], [], {}
    for run in _studied(runs, "decoding"):
        weights, settings = run.recipe.objective.weight, run.recipe.objective
        known = run.measured["decoding"]
        for metric in ("HR@10", "NDCG@10"):
            of = by_alpha(known, metric)
            table = intervals(of)
            trained = f"{weights}, beta {settings.beta:g}" if weights.startswith("igd") else "no"
            frames.append(named(table, run=run.name, w_t=trained, metric=metric))
        lines[run.name] = points(table, "alpha", "value", "low", "high")
        best = max(of, key=lambda alpha: (_mean(of[alpha]), -alpha))
        gained, low, high = change(of[best], of[0.0])
        n, zero = len(of[0.0]), number(_mean(of[0.0]))
        if best == 0:
            said.append(
                f"no alpha above 0 ranks the {n} users of {run.name} better than 0 does (NDCG@10 {zero})"
            )
            continue
        word = verdict(
            low, high, "though it was chosen on these very users", "", "which these users do not settle"
        )
        said.append(
            f"alpha {best:g} is best for {n} users of {run.name}: NDCG@10 {number(_mean(of[best]))} against {zero} at "
            f"0, {word} (difference {number(gained, '+')}, 95\xa0% interval "
            f"{number(low, '+')} to {number(high, '+')})"
        )
    panel = series_panel("NDCG@10", "alpha", lines, _colour(runs))
    return statistic("alpha", frames, said, [panel])


def both_parts(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Figures 3 and 4: over the training where that was logged, else of the trained model."""
    frames, said = [], []
    lines: dict[tuple[str, str], dict[str, Float64]] = {}
    for run in runs:
        table = logged_parts(run.log)
        if table.height < 4 and "parts" in run.measured:
            table = run.measured["parts"].select(pl.lit(run.steps).alias("step"), pl.all())
        if not table.height:
            continue
        frames.append(named(table, run=run.name))
        end = table.filter(pl.col("step") == table["step"].max())
        (a, x), (b, y) = (end.filter(part=part).row(0)[2:] for part in ("invalid", "choice"))
        ratio = x / max(y, 1e-12)
        what = "both alike" if 0.5 <= ratio <= 2 else "mostly the first" if ratio > 2 else "mostly the second"
        said.append(
            f"after {end['step'][0]:,} steps of {run.name} invalid tokens cost {number(a)} and the choice among valid "
            f"ones {number(b)} nats a token; the gradient of the first is {times(ratio)} times that of the second, so "
            f"a step of the language-modelling loss serves {what}"
        )
        for part in ("invalid", "choice"):
            for column in ("loss", "gradient_norm"):
                of = points(table.filter(part=part), "step", column)
                lines.setdefault((part, column), {})[run.name] = of
    drawn = _parts_drawn(lines, _colour(runs)) if lines else []
    return statistic("lml-parts", frames, said, drawn)


def _parts_drawn(
    lines: Mapping[tuple[str, str], Mapping[str, Float64]], colour: Mapping[str, str]
) -> list[str]:
    """Curves over the steps; where nothing but the end is known, dots."""
    parts = {"invalid": "invalid tokens", "choice": "the choice"}
    titles = {"loss": "Nats of {}", "gradient_norm": "Gradient norm of {}"}
    called = {(part, column): titles[column].format(parts[part]) for part, column in lines}
    if any(len(line) > 1 for of in lines.values() for line in of.values()):
        return [series_panel(called[key], "step", of, colour) for key, of in lines.items()]
    dots: dict[str, dict[str, list[Dot]]] = {column: {} for column in titles}
    for (part, column), of in lines.items():
        dots[column][called[part, column]] = [
            (n, colour[n], float(line[0, 1]), None) for n, line in of.items()
        ]
    return [dot_panel(groups) for groups in dots.values()]


def weights(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Figure 5."""
    frames, said, lines = [], [], {}
    for run in runs:
        table = gradient_weights(run.log)
        if table.height < 2:
            continue
        frames.append(named(table, run=run.name))
        lines[run.name] = points(table, "step", "w")
        first, last = table.row(0, named=True), table.row(-1, named=True)
        said.append(
            f"the weight of a decision's gradient goes from {number(first['w'])} to {number(last['w'])} in "
            f"{last['step']:,} steps of {run.name}, at temperature {last['temperature']:.3g}"
        )
    panel = series_panel("Gradient weight w = 1 − P(target)", "step", lines, _colour(runs))
    return statistic("gradient-weight", frames, said, [panel])


def logits(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Figure 8."""
    frames, said, lines = [], [], {}
    for run in _studied(runs, "logits"):
        table = run.measured["logits"]
        frames.append(named(table, run=run.name))
        lines[run.name] = points(table, "z", "density")
        lines["Gaussian"] = points(table, "z", "gaussian")
        distance, n = float(table["distance"][0]), int(table["logits"][0])
        tail, expected = (points(table.filter(pl.col("z") > 3), c).sum() for c in ("density", "gaussian"))
        said.append(
            f"the distribution function of {n:,} valid tokens' logits under {run.name} is at most {number(distance)} "
            f"away from a Gaussian's, and logits above 3 deviations are {times(tail / expected)} times as frequent"
        )
    panel = series_panel(
        "Density of logits", "deviations from the decision's mean", lines, _colour(runs) | {"Gaussian": "c5"}
    )
    return statistic("logits", frames, said, [panel])


def _studied(runs: Runs, kind: str) -> list[StudiedRun]:
    return [run for run in runs if kind in run.measured and run.measured[kind].height]


def _colour(runs: Runs) -> dict[str, str]:
    return colours([run.name for run in runs])


def named(table: pl.DataFrame, **of: Any) -> pl.DataFrame:
    """A table with what it is of in front."""
    return table.select(*(pl.lit(value).alias(name) for name, value in of.items()), pl.all())


def statistic(
    name: str, frames: Sequence[pl.DataFrame], said: Sequence[str], panels: Sequence[str] = ()
) -> Statistic | None:
    """Nothing where there are no numbers."""
    if not frames:
        return None
    text = ". ".join(s[0].upper() + s[1:] for s in said) + "."
    return Statistic(name, pl.concat(frames, how="diagonal_relaxed"), text, tuple(p for p in panels if p))


def _mean(values: Any) -> float:
    return float(values.mean())
