"""Statistics of both papers of runs and prepared data: measured, gathered, drawn on one page, and exported.

What needs a model is measured once on some users and kept in the run's folder ``statistics``, from where reports take
it too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from triewise.app.folders import consented, data_of, open_run, titles_of, trained_data, where_writable
from triewise.errors import UserError, reading
from triewise.files import (
    Shape,
    atomic_folder,
    atomic_path,
    read_json,
    scan,
    sha256_file,
    write_json,
    write_text,
)
from triewise.ranking import METRICS, evaluate, load_evaluation, metrics_from_rank
from triewise.recommenders import GenerativeRecommender, load
from triewise.reports import (
    PLACES,
    Report,
    Statistic,
    StudiedData,
    StudiedRun,
    describe,
    first_word_repetition,
    item_score_entropy,
    logit_density,
    make_statistics,
    prefixes,
    standalone,
    to_png,
    without_folders,
    write_report,
)
from triewise.tokens import Trie, zero_gain
from triewise.training import (
    Examples,
    MicroBatches,
    Objective,
    TitleLoss,
    edge_logits,
    lml_parts,
    make_windows,
    measure_parts,
    read_log,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from triewise.arrays import Int64
    from triewise.data import Split
    from triewise.recipe import Recipe
    from triewise.tokens import Prompts

Tables = dict[str, pl.DataFrame]

PAGE = "statistics.html"
FORMATS = ("csv", "svg", "png")
# Of these a report has tables and curves already; the trie's time is another one each time.
IN_REPORT = tuple(
    name
    for name in PLACES
    if name not in ("zero-gain", "valid-tokens", "token-losses", "gradient-weight", "seeds", "trie-time")
)
OF_DATA = ("zero-gain", "valid-tokens", "trie-time")
OF_MODELS = ("prefix-entropy", "gain-probability", "repetition", "alpha", "lml-parts", "logits")
FOLDER, RECORD = "statistics", "measured.json"
FORMAT = 1  # of the tables in it
KINDS = ("decoding", "prefixes", "tokens", "logits", "parts")
ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4)  # the grid of IGD
AT_ONCE = 8  # rows of a forward
MANY = 20  # valid tokens of a decision whose logits have a distribution worth a look


class _Measured(Shape):
    format: int = 0
    of: str
    users: int
    seed: int


def study(
    folders: Sequence[Path],
    out: Path,
    *,
    only: Sequence[str] = (),
    users: int = 100,
    seed: int = 0,
    export: Sequence[str] = ("csv",),
    tokenizer: str = "tiny",
    template: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Statistic, ...]:
    """Tables and figures of both papers, of runs and prepared data: ``statistics.html``, and a file of each.

    Args:
        folders: Run folders and prepared folders. Runs without evaluation give what needs none.
        out: Where to.
        only: Names of `PLACES`, or places in the papers such as ``igd-figure-4``; none: all that can be made.
        users: Test rows on which models are run; see `measure`.
        seed: Of their drawing.
        export: ``csv``, ``svg``, ``png``.
        tokenizer: Of prepared folders, as `load_backbone` takes a name; runs have their own.
        template: Of prepared folders; see `describe_data`.
        trust_remote_code: Execute code that comes with language models.

    Raises:
        UserError: A folder that is neither, a name or a format that there is not, nothing that the folders can give, or
            PNG without the package for it.
    """
    names = _names(only)
    _check_formats(export)
    runs = [folder for folder in folders if (folder / "run.json").is_file()]
    prepared = [folder for folder in folders if folder not in runs]
    for folder in prepared:
        if not (folder / "dataset.json").is_file():
            raise UserError(
                f"wanted a run or a prepared folder, but {folder} is neither; give one that triewise wrote"
            )
    studied = studied_runs(runs)
    for i, (run, folder) in enumerate(zip(studied, runs, strict=True)):
        logged = {"lml-parts"} if any("loss_invalid" in row for row in run.log) else set[str]()
        if run.recipe.sequential is None and set(names) & (set(OF_MODELS) - logged):
            tables = measure(folder, users, seed, trust=trust_remote_code)
            studied[i] = replace(run, measured=tables)
    data = list[StudiedData]()
    if set(names) & set(OF_DATA):
        data = [_prepared(folder, tokenizer, template) for folder in prepared]
        data += _of_runs(runs, studied, trust_remote_code)
    found = make_statistics(names, studied, data)
    if not found:
        raise UserError(
            f"wanted folders that give {', '.join(names)}, got none; docs/statistics.md says what each needs"
        )
    measured_on = [run.measured["decoding"]["row"].n_unique() for run in studied if run.measured]
    _write(out, found, folders, export, max(measured_on, default=0))
    return found


def studied_runs(runs: Sequence[Path], names: Sequence[str] = ()) -> list[StudiedRun]:
    """Runs with what is stored of them; named as given, else by title, and by folder too where titles are alike."""
    found = []
    for run in runs:
        recipe, record = open_run(run)
        found.append(
            StudiedRun(
                recipe.title or recipe.name,
                recipe,
                read_log(run),
                record["timing"]["seconds"],
                record["training"]["steps"],
                load_evaluation(run) if (run / METRICS).is_file() else None,
                measured(run),
            )
        )
    names = names or distinct([run.name for run in found], runs)
    return [replace(run, name=name) for run, name in zip(found, names, strict=True)]


def distinct(titles: Sequence[str], runs: Sequence[Path]) -> list[str]:
    """Titles of runs, with the folder's name where two are alike."""
    return [t if titles.count(t) == 1 else f"{t} ({run.name})" for t, run in zip(titles, runs, strict=True)]


def _check_formats(export: Sequence[str]) -> None:
    for format in export:
        if format not in FORMATS:
            raise UserError(
                f"wanted --export among {', '.join(FORMATS)}, got {format!r}; separate them with commas"
            )
    if "png" in export:
        to_png(standalone('<svg viewBox="0 0 1 1"></svg>'))  # it complains before anything is computed


def _names(only: Sequence[str]) -> list[str]:
    """Names of `PLACES` that are asked for, in its order."""
    of_place = {place: name for name, (_, places) in PLACES.items() for place in places}
    for name in only:
        if name not in PLACES and name not in of_place:
            raise UserError(
                f"wanted a statistic among {', '.join(PLACES)}, or a place such as igd-figure-4, got {name!r}"
            )
    wanted = {name for place in only for name in (place, *(n for n, (_, p) in PLACES.items() if place in p))}
    return [name for name in PLACES if name in wanted or not only]


def _prepared(folder: Path, tokenizer: str, template: str | None) -> StudiedData:
    """A prepared folder as a tokenizer reads it."""
    start = time.perf_counter()
    dataset, prompts, _, counts = titles_of(folder, tokenizer, template)
    seconds = {"reading and tokenizing": time.perf_counter() - start}
    trie, seconds["building the trie"] = _built(prompts)
    return StudiedData(folder.name, describe(dataset, prompts, trie, counts), trie, counts, seconds)


def _of_runs(runs: Sequence[Path], studied: Sequence[StudiedRun], trust: bool) -> list[StudiedData]:
    """The data of runs that write titles, once for each trie and counts."""
    found: dict[tuple[str, ...], StudiedData] = {}
    for folder, run in zip(runs, studied, strict=True):
        if run.recipe.sequential is not None:
            continue
        record = open_run(folder)[1]
        key = tuple(record["hashes"].get(part, "") for part in ("data", "trie", "counts"))
        if key in found:
            continue
        recommender = load(folder, assistant=False, trust_remote_code=consented(run.recipe, trust, folder))
        assert isinstance(recommender, GenerativeRecommender)
        trie, seconds = _built(recommender.prompts)
        dataset = data_of(folder, record)
        facts = recommender.title_figures(dataset)["facts"]
        source = without_folders(dataset.info["source"])
        name = (
            f"{source}, {run.name}" if any(one.name.startswith(source) for one in found.values()) else source
        )
        found[key] = StudiedData(name, facts, trie, recommender.counts, {"building the trie": seconds})
    return list(found.values())


def _built(prompts: Prompts) -> tuple[Trie, float]:
    """The trie of some titles, and the least of three times that building it took, in seconds."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
        best = min(best, time.perf_counter() - start)
    return trie, best


def _write(
    out: Path, found: Sequence[Statistic], folders: Sequence[Path], export: Sequence[str], users: int
) -> None:
    of = f"Of {', '.join(folder.name for folder in folders)}."
    how = f" Models were run for {users} users of the test split." if users else ""
    title = "Statistics of MSL and IGD"
    write_report(
        out / PAGE,
        Report(title, f"{of}{how} Intervals: 95\xa0% bootstrap over users.", statistics=tuple(found)),
    )
    for one in found:
        if "csv" in export:
            write_text(out / f"{one.name}.csv", one.table.write_csv())
        for i, panel in enumerate(one.panels, 1):
            name = f"{one.name}-{i}" if len(one.panels) > 1 else one.name
            drawing = standalone(panel)
            if "svg" in export:
                write_text(out / f"{name}.svg", drawing)
            if "png" in export:
                with atomic_path(out / f"{name}.png") as path:
                    path.write_bytes(to_png(drawing))


def measure(run: Path, users: int, seed: int, *, trust: bool = False) -> Tables:
    """What was measured of a run that writes titles, measured now where it was not, or otherwise.

    Args:
        run: Its folder, where the tables are kept.
        users: Rows of the test split that are drawn; all of them where there are fewer.
        seed: Of the drawing.
        trust: Execute code that comes with the language model.

    Returns:
        ``decoding``: ``alpha``, ``row``, metrics at 10, ``repetition`` and ``entropy`` of the first ten.
        ``prefixes``: ``alpha``, and the columns of `prefixes`. ``tokens``: ``row``, ``step``, ``gain``, ``valid`` and
        ``log_p`` (of the softmax that the run was trained with) of each target token. ``logits``: see `logit_density`.
        ``parts``: ``part``, ``loss``, ``gradient_norm`` of the trained model.

    Raises:
        UserError: Fewer than two rows are asked for or there, changed data, or code that is not granted.
    """
    recipe, record = open_run(run)
    dataset = trained_data(run, record)
    if min(users, dataset.test.n_rows) < 2:
        raise UserError(
            f"wanted at least 2 users to measure on, got {min(users, dataset.test.n_rows)}; give more"
        )
    asked = {"format": FORMAT, "of": sha256_file(run / "run.json"), "users": users, "seed": seed}
    if (run / FOLDER / RECORD).is_file() and read_json(run / FOLDER / RECORD, _Measured) == asked:
        return measured(run)
    drawn = np.random.default_rng(seed).permutation(dataset.test.n_rows)[:users]
    split = dataset.test.take(np.sort(drawn))
    recommender = load(run, assistant=False, trust_remote_code=consented(recipe, trust, run))
    assert isinstance(recommender, GenerativeRecommender)
    tables = _decoding(recommender, recipe, split) | _tokens(recommender, recipe.objective.support, split)
    if "lora" in recommender.backbone.origin:
        recommender = load(run, assistant=False, merge_adapter=False, trust_remote_code=trust)
        assert isinstance(recommender, GenerativeRecommender)
    tables["parts"] = _parts(recommender, split)
    with where_writable(run, "what was measured"), atomic_folder(run / FOLDER) as place:
        for kind, table in tables.items():
            table.write_parquet(place / f"{kind}.parquet")
        write_json(place / RECORD, asked)
    return tables


def measured(run: Path) -> Tables:
    """What was measured of a run as it is now; nothing where that was not done since it was trained."""
    place = run / FOLDER
    if not (place / RECORD).is_file():
        return {}
    known = read_json(place / RECORD, _Measured)
    if (known["format"], known["of"]) != (FORMAT, sha256_file(run / "run.json")):
        return {}
    tables = {}
    for kind in KINDS:
        with reading(place / f"{kind}.parquet"):
            tables[kind] = scan(place / f"{kind}.parquet").collect()
    return tables


def _decoding(recommender: GenerativeRecommender, recipe: Recipe, split: Split) -> Tables:
    settings, trie, counts = recipe.evaluation, recommender.trie, recommender.counts
    asked = {"search": "catalogue"} if settings.search == "grounding" else {}
    ranks = recommender.configured(settings).with_settings(assistant=None, **asked)
    how: dict[str, Any] = {"depth": ranks.depth(10), "exclude": settings.exclude}
    of_users, of_steps = [], []
    for alpha in ALPHAS:
        found = evaluate(ranks.with_settings(alpha=alpha), split, name=f"alpha {alpha:g}", **how)
        columns = {
            "row": np.arange(split.n_rows),
            **metrics_from_rank(found.rank, [10]),
            "repetition": first_word_repetition(trie, found.items),
            "entropy": item_score_entropy(found.scores),
        }
        at = pl.lit(alpha).alias("alpha")
        of_users.append(pl.DataFrame(columns).select(at, pl.all()))
        of_steps.append(prefixes(trie, counts, found.items, split.target).select(at, pl.all()))
    return {"decoding": pl.concat(of_users), "prefixes": pl.concat(of_steps)}


def _batches(recommender: GenerativeRecommender, split: Split) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A few rows at a time: their numbers for each target token (M,), and the arguments of `TitleLoss`."""
    prompts, trie = recommender.prompts, recommender.trie
    windows = make_windows(split, "last", prompts)
    examples = Examples(windows, prompts, trie, None, zero_gain(trie, recommender.counts))
    device = next(recommender.backbone.model.parameters()).device
    for start in range(0, len(windows), AT_ONCE):
        rows = np.arange(start, min(start + AT_ONCE, len(windows)))[None]
        made = MicroBatches(examples, Objective(support="vocabulary"), rows)
        of = rows[0][made.batch(0).title]
        yield of, {k: v.to(device) if hasattr(v, "to") else v for k, v in made[0].items()}


def _tokens(recommender: GenerativeRecommender, support: str, split: Split) -> Tables:
    import torch

    trie, model = recommender.trie, recommender.backbone.model
    module, frames, standard = TitleLoss(model, Objective(support="vocabulary"), trie), [], []
    many = min(MANY, trie.n_children.max())
    with torch.inference_mode():
        for row, batch in _batches(recommender, split):
            logits, target, node = module.logits(batch).float(), batch["target"], batch["node"]
            parts = lml_parts(logits, target, node, trie)
            log_p = -(parts.choice if support == "trie" else parts.choice + parts.invalid)
            edge, _, z, _ = (part.cpu().numpy() for part in edge_logits(logits, target, node, trie))
            above = node.cpu().numpy()
            valid = trie.n_children[above]
            columns = {
                "row": row,
                "step": trie.depth[above] + 1,
                "gain": recommender.gain[_child(trie, above, target.cpu().numpy())],
                "valid": valid,
                "log_p": log_p.cpu().double().numpy() + 0.0,
            }
            frames.append(pl.DataFrame(columns))
            mean = np.bincount(edge, z) / valid
            spread = np.sqrt(np.bincount(edge, (z - mean[edge]) ** 2) / valid)
            often = (valid >= many) & (spread > 0)
            standard.append(((z - mean[edge]) / np.where(often, spread, 1)[edge])[often[edge]])
    return {"tokens": pl.concat(frames), "logits": logit_density(np.concatenate(standard))}


def _child(trie: Trie, node: Int64, token: Int64) -> Int64:
    """The child of each node (M,) that a token leads to."""
    keys = trie.parent[1:].astype(np.int64) * (int(trie.token.max()) + 1) + trie.token[1:]
    found: Int64 = 1 + np.searchsorted(keys, node * (int(trie.token.max()) + 1) + token)
    return found


def _parts(recommender: GenerativeRecommender, split: Split) -> pl.DataFrame:
    """Both parts of the language-modelling loss of the model as it is, and the norms of their gradients."""
    model = recommender.backbone.model
    recommender.backbone.unfreeze()
    module = TitleLoss(model, Objective(support="vocabulary"), recommender.trie)
    found = measure_parts(module, [batch for _, batch in _batches(recommender, split)])
    model.requires_grad_(False)
    rows = [(part, found[f"loss_{part}"], found[f"grad_norm_{part}"]) for part in ("invalid", "choice")]
    return pl.DataFrame(rows, ["part", "loss", "gradient_norm"], orient="row")
