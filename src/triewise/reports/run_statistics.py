"""Statistics of whole runs: how accurate they are against temperature, weight, time and seed; and the trie's cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from triewise.ranking import interval, paired_interval
from triewise.reports.figures import series_panel
from triewise.reports.statistics import (
    Statistic,
    StudiedRun,
    colours,
    number,
    points,
    spread,
    times,
    verdict,
)
from triewise.reports.token_statistics import (
    Data,
    Runs,
    alphas,
    both_parts,
    gain_probability,
    logits,
    prefixes_by_alpha,
    repetition,
    statistic,
    token_losses,
    valid_tokens,
    weights,
    zero_gain,
)

if TYPE_CHECKING:
    from triewise.ranking import Evaluation
    from triewise.recipe import Recipe

METRIC = "NDCG@10"
UNIFORM = "uniform"
CHOSEN_HERE = " (chosen on these very users)"
IGD = {"igd": "IGD", "igd-linear": "IGD's linear weights"}
# How a run was ranked: those that differ here are no repeats of each other.
RANKED = ("split", "exclude", "search", "support", "alpha", "length_penalty", "assistant")


def temperature(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Figure 6: runs of the masked softmax with several temperatures."""
    rows = list[tuple[Any, ...]]()
    for run in _alike(_writers(runs)):
        how, tau = run.recipe.objective, run.recipe.objective.temperature
        if how.support == "trie" and how.weight == UNIFORM and not how.expand_negatives:
            logged = (row["temperature"] for row in reversed(run.log) if "temperature" in row)
            at = next(logged, how.adaptive.initial) if tau == "adaptive" else tau
            rows.append((run.name, "adaptive" if tau == "adaptive" else "fixed", float(at), *_result(run)))
    names = ["run", "kind", "temperature", "value", "low", "high", "users"]
    table = pl.DataFrame(rows, names, orient="row")
    if len({at for _, kind, at, *_ in rows if kind == "fixed"}) < 2:
        return None
    fixed, ats = (table.filter(pl.col("kind") == kind) for kind in ("fixed", "adaptive"))
    lines = {"fixed": points(fixed, "temperature", "value", "low", "high")}
    if ats.height:
        lines["adaptive"] = points(ats, "temperature", "value", "low", "high")
    best = fixed.row(int(fixed["value"].arg_max() or 0), named=True)
    said = [
        f"of {fixed.height} fixed temperatures {best['temperature']:g} is best: {METRIC} "
        f"{number(best['value'])} {spread(best['low'], best['high'])}"
    ]
    one = fixed.filter(pl.col("temperature") == 1)
    if one.height and best["temperature"] != 1:
        called = f"{best['temperature']:g}{CHOSEN_HERE}"
        said.append(_against(runs, best["run"], one["run"][0], "temperature 1", called))
    if ats.height:
        said.append(
            f"the adaptive temperature ends at {ats['temperature'][0]:.2f} with {number(ats['value'][0])}"
        )
    return statistic(
        "temperature", [table], said, [series_panel(METRIC, "temperature", lines, colours(list(lines)))]
    )


def beta(runs: Runs, data: Data) -> Statistic | None:
    """IGD, Table 8 and appendix H: the weight of zero-gain tokens, and weights linear in the gain (appendix G)."""
    rows = list[tuple[Any, ...]]()
    for run in _writers(runs):
        how = run.recipe.objective
        if how.weight == UNIFORM or (how.weight in IGD and how.measure == "information"):
            at = 1.0 if how.weight == UNIFORM else how.beta
            rows.append((run.name, how.support, how.weight, at, *_result(run)))
    names = ["run", "support", "weight", "beta", "value", "low", "high", "users"]
    table = pl.DataFrame(rows, names, orient="row")
    if len({weight == UNIFORM for _, _, weight, *_ in rows}) < 2:
        return None
    weighed = table.filter(pl.col("weight") != UNIFORM)
    lines, said = {}, []
    for (support, weight), part in weighed.group_by("support", "weight", maintain_order=True):
        plain = table.filter((pl.col("weight") == UNIFORM) & (pl.col("support") == support))
        name = f"{weight}, {support}"
        lines[name] = points(pl.concat([part, plain.head(1)]), "beta", "value", "low", "high")
        best = part.row(int(part["value"].arg_max() or 0), named=True)
        called = f"{IGD[str(weight)]} with beta {best['beta']:g}{CHOSEN_HERE if part.height > 1 else ''}"
        if plain.height:
            what = f"{plain['run'][0]}, which weighs all tokens alike"
            said.append(_against(runs, best["run"], plain["run"][0], what, called))
        else:
            said.append(
                f"{called} reaches {METRIC} {number(best['value'])}; no run of {support} support weighs all tokens "
                "alike"
            )
    return statistic("beta", [table], said, [series_panel(METRIC, "beta", lines, colours(list(lines)))])


def accuracy_time(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Figure 7."""
    judged = [run for run in _alike(_judged(runs)) if run.seconds > 0]
    if len(judged) < 2:
        return None
    rows = [(run.name, run.seconds, run.steps, *_result(run)) for run in judged]
    names = ["run", "seconds", "steps", "value", "low", "high", "users"]
    table = pl.DataFrame(rows, names, orient="row")
    lines = {
        run.name: points(table.filter(run=run.name), "seconds", "value", "low", "high") for run in judged
    }
    best, fastest = table.sort("value").row(-1, named=True), table.sort("seconds").row(0, named=True)
    said = (
        f"the most accurate is {best['run']} ({METRIC} {number(best['value'])}) after {best['seconds']:,.0f} s of "
        "training"
    )
    if best["run"] == fastest["run"]:
        said += ", and the fastest to train"
    else:
        said += (
            f"; {fastest['run']} trains in {fastest['seconds']:,.0f} s, "
            f"{times(best['seconds'] / fastest['seconds'])} times as fast, and has {number(fastest['value'])}"
        )
    order = [run.name for run in runs]
    return statistic(
        "accuracy-time", [table], [said], [series_panel(METRIC, "seconds of training", lines, colours(order))]
    )


def seeds(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Table 3: runs that differ in nothing but the seed."""
    rows, said = [], []
    for repeats in _repeated(runs, RANKED):
        group = list({run.recipe.seed: run for run in reversed(repeats)}.values())
        if len(group) < 2:
            continue
        each = np.array([run.evaluation.metrics[METRIC] for run in group if run.evaluation is not None])
        mean, deviation = float(each.mean()), float(each.std(ddof=1))
        name, relative = group[0].recipe.title or group[0].recipe.name, deviation / max(mean, 1e-12)
        rows.append((name, METRIC, len(each), mean, deviation, relative))
        said.append(
            f"{METRIC} of {name} deviates by {100 * relative:.1f}\xa0% of its mean {number(mean)} over {len(each)} "
            "seeds"
        )
    if not rows:
        return None
    names = ["run", "metric", "seeds", "mean", "deviation", "relative_deviation"]
    return statistic("seeds", [pl.DataFrame(rows, names, orient="row")], said)


def ablation(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Table 6: what the loss is made of, against the language-modelling loss."""
    known = [(of, run) for run in _writers(runs) if (of := variant(run.recipe)) is not None]
    plain = next((run for of, run in known if of == "LML"), None)
    if plain is None or len({of for of, _ in known}) < 2:
        return None
    rows, said = [], []
    for of, run in known:
        assert run.evaluation is not None and plain.evaluation is not None
        value, low, high, n = _result(run)
        a, b = run.evaluation.per_user(METRIC), plain.evaluation.per_user(METRIC)
        row: list[Any] = [of, run.name, value, low, high, None, None, None, n]
        if run is not plain and _comparable(run.evaluation, plain.evaluation):
            difference, (down, up) = float((a - b).mean()), paired_interval(a, b)
            row[5:8] = [difference, down, up]
            word = verdict(down, up, "above", "below", "not clearly apart from")
            said.append(f"{of} is {word} LML: {METRIC} {number(difference, '+')} {spread(down, up, '+')}")
        rows.append(tuple(row))
    names = [
        "variant",
        "run",
        "value",
        "low",
        "high",
        "difference",
        "difference_low",
        "difference_high",
        "users",
    ]
    return statistic("ablation", [pl.DataFrame(rows, names, orient="row", infer_schema_length=None)], said)


def variant(recipe: Recipe) -> str | None:
    """The row of MSL's Table 6 that a recipe is; None for weights and losses that it does not have."""
    how = recipe.objective
    if how.weight != UNIFORM or not _by_tokens(recipe):
        return None
    kind = "MSL" if how.support == "trie" else "LML"
    if how.expand_negatives:
        return f"{kind} + alpha"
    if how.temperature == "adaptive":
        return f"{kind} + ATS"
    return kind if how.temperature == 1 else f"{kind} + tau"


def trie_time(runs: Runs, data: Data) -> Statistic | None:
    """MSL, Table 7."""
    rows = [
        (one.name, one.trie.n_items, one.trie.n_nodes, what, seconds)
        for one in data
        for what, seconds in one.seconds.items()
    ]
    if not rows:
        return None
    table = pl.DataFrame(rows, ["data", "items", "nodes", "part", "seconds"], orient="row")
    longest = max(
        (run for run in runs if run.recipe.sequential is None), key=lambda run: run.seconds, default=None
    )
    said = []
    for one in data:
        total = sum(one.seconds.values())
        parts = " and ".join(f"{what} {seconds:.3f} s" for what, seconds in one.seconds.items())
        of = (
            f", {100 * total / longest.seconds:.2g}\xa0% of what {longest.name} trained"
            if longest and longest.seconds
            else ""
        )
        said.append(f"for the {one.trie.n_items:,} titles of {one.name}: {parts}{of}")
    return statistic("trie-time", [table], said)


MADE: dict[str, Callable[[Runs, Data], Statistic | None]] = {
    "zero-gain": zero_gain,
    "token-losses": token_losses,
    "prefix-entropy": prefixes_by_alpha,
    "gain-probability": gain_probability,
    "repetition": repetition,
    "alpha": alphas,
    "beta": beta,
    "lml-parts": both_parts,
    "gradient-weight": weights,
    "temperature": temperature,
    "accuracy-time": accuracy_time,
    "logits": logits,
    "seeds": seeds,
    "valid-tokens": valid_tokens,
    "ablation": ablation,
    "trie-time": trie_time,
}


def make_statistics(names: Sequence[str], runs: Runs, data: Data = ()) -> tuple[Statistic, ...]:
    """Those of some statistics that runs and data give.

    Args:
        names: Keys of `PLACES`.
        runs: Their names are distinct.
        data: Likewise.
    """
    return tuple(found for name in names if (found := MADE[name](runs, data)) is not None)


def _judged(runs: Runs) -> list[StudiedRun]:
    return [run for run in runs if run.evaluation is not None]


def _alike(judged: Sequence[StudiedRun]) -> list[StudiedRun]:
    """Those of some evaluated runs that ranked the same rows as the first."""
    of = [run.evaluation for run in judged if run.evaluation is not None]
    return [run for run, evaluation in zip(judged, of, strict=True) if _comparable(evaluation, of[0])]


def _comparable(a: Evaluation, b: Evaluation) -> bool:
    """Whether two rankings are of the same rows, with the same items left out."""
    judged = all(a.metrics.get(key) == b.metrics.get(key) for key in ("split", "exclude", "allow"))
    return judged and np.array_equal(a.target, b.target)


def _repeated(runs: Runs, ranked: Sequence[str] = ()) -> list[list[StudiedRun]]:
    """Evaluated runs by recipe, seed and name left aside, and by some of what their rankings were made with."""
    groups: dict[str, list[StudiedRun]] = {}
    for run in _judged(runs):
        how = {} if run.evaluation is None else run.evaluation.metrics
        recipe = run.recipe.model_dump_json(exclude={"seed", "name", "title", "evaluation"})
        key = f"{recipe} {[how.get(name) for name in ranked]}"
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def _writers(runs: Runs) -> list[StudiedRun]:
    """Evaluated runs that write titles and learn by token losses alone, of each recipe the first."""
    first = [run for run, *_ in _repeated(runs)]
    return [run for run in first if run.recipe.identifier.kind == "title" and _by_tokens(run.recipe)]


def _by_tokens(recipe: Recipe) -> bool:
    """Whether a language model learns by weighed token losses and by nothing else."""
    return not (recipe.sequential or recipe.hybrid or any(on for _, on in recipe.objective.objectives))


def _result(run: StudiedRun) -> tuple[float, float, float, int]:
    assert run.evaluation is not None
    values = run.evaluation.per_user(METRIC)
    return float(values.mean()), *interval(values), len(values)


def _against(runs: Runs, name: str, other: str, what: str, called: str = "") -> str:
    """One run against another, user by user, in words."""
    of = {run.name: run.evaluation for run in _judged(runs)}
    a, b = of[name], of[other]
    assert a is not None and b is not None
    if not _comparable(a, b):
        return f"{called or name} and {what} were evaluated on different rows, or with other items left out"
    x, y = a.per_user(METRIC), b.per_user(METRIC)
    low, high = paired_interval(x, y)
    word = verdict(low, high, "above", "below", "not clearly apart from")
    return f"{called or name} is {word} {what}: {METRIC} {number(float((x - y).mean()), '+')} {spread(low, high, '+')}"
