"""The commands. Results go to stdout, progress to stderr; a user's mistake is one line and exit status 2.

Heavy imports stay inside the commands, so that ``--help`` and a typing error answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from triewise.commandline import (
    INTERRUPTED,
    Allow,
    Changes,
    Json,
    KeepHistory,
    Overwrite,
    RecipeName,
    Resume,
    Run,
    Search,
    Trust,
    app,
    console,
    main as main,
    print_json,
    say,
    without_collections,
)
from triewise.options import with_data_options
from triewise.plain import clean
from triewise.progress import note


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="60 seconds: few steps, 100 users.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of all trainings.")] = 0,
    as_json: Json = False,
) -> None:
    """The main job on real data: MovieLens 100K, MSL, LML, SASRec, MSL taught by it, codes, a report (10 minutes)."""
    from triewise.app import run_demo
    from triewise.reports import print_examples, print_rows

    result = run_demo(out, quick=quick, seed=seed)
    if as_json:
        print_json(result.as_json())
        return
    terminal = console()
    print_rows(result.report.rows, result.report.comparisons, terminal)
    print_examples(result.report.examples, terminal)
    missing = [f"Left out, for lack of time: {', '.join(result.left_out)}."] if result.left_out else []
    for line in (*result.report.notes, *missing):
        terminal.print(clean(line), markup=False, highlight=False)
    terminal.print(
        f"\nReport: {clean(result.html)} ({result.seconds:.0f} s)",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
@with_data_options
def prepare(
    source: Annotated[
        str,
        typer.Argument(
            help="ml-100k | ml-1m | KIND:DIR: csv, amazon, steam, codes, movielens, recbole, msl, d3"
        ),
    ],
    out: Annotated[Path, typer.Option(help="The prepared folder.")],
    max_history: Annotated[
        int | None, typer.Option(min=1, help="Titles of a history that are kept in a row; default 20.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="leave-one-out (default), time-windows, time-growing or dates; msl: and d3: are split already."
        ),
    ] = None,
    k_core: Annotated[
        int | None,
        typer.Option(min=0, help="Leave out users and items with fewer interactions; default none."),
    ] = None,
    clean: Annotated[
        str, typer.Option(help="Titles: none, all, or steps of mojibake+html+tags+control+nfc+space.")
    ] = "none",
    as_json: Json = False,
    *,
    choices: dict[str, Any],
) -> None:
    """Bring raw interactions or a published split into one format."""
    from triewise.app import what_was_prepared
    from triewise.data import prepare as prepare_data
    from triewise.reports import print_facts

    settings = {"max_history": max_history, "clean": clean, "k_core": k_core, "split": split, **choices}
    made = prepare_data(source, out, **settings)
    print_json(made.info) if as_json else print_facts(what_was_prepared(made), console())


@app.command()
def fetch(
    category: Annotated[str, typer.Argument(help="Of Amazon 2023, for example Musical_Instruments.")],
    out: Annotated[Path, typer.Option(help="Folder for its files, which amazon:DIR reads.")],
) -> None:
    """Download the interactions and the metadata of an Amazon category; run it again to go on where it stopped."""
    from triewise.data import fetch_category

    folder = fetch_category(category, out)
    typer.echo(f"triewise prepare amazon:{folder} --out data/{category}")


@app.command()
def describe(
    folder: Annotated[Path, typer.Argument(help="A prepared folder.")],
    tokenizer: Annotated[
        str, typer.Option(help="tiny, smollm2-135m, smollm2-135m-q4, a hub id or a local folder.")
    ] = "tiny",
    template: Annotated[
        str | None, typer.Option(help="plain, msl, d3 or d3-reworded; default plain for tiny, else msl.")
    ] = None,
    identifier: Annotated[
        list[Path] | None, typer.Option(help="A file of codes, or a run with codes, to compare with titles.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Users, items, density, cold targets; tokens, forced share, zero-gain share, valid tokens (AVT)."""
    from triewise.app import describe_data
    from triewise.reports import print_facts

    numbers = describe_data(folder, tokenizer, template, identifier or ())
    print_json(numbers) if as_json else print_facts(numbers, console())


@app.command()
def train(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="The run folder.")],
    changes: Changes = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Train a recipe."""
    from triewise.app import train_run
    from triewise.files import read_json
    from triewise.recipe import load_recipe
    from triewise.training import processes

    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "trust_remote_code": trust_remote_code}
    result = train_run(load_recipe(recipe, changes or ()), out, **how)
    if not processes.finish():
        raise typer.Exit(INTERRUPTED if result.stopped == "interrupted" else 0)
    if as_json:
        print_json(read_json(out / "run.json"))
    else:
        say(f"{out}: {result.steps_done} steps in {result.seconds:.0f} s, ended by {result.stopped}")
    if result.stopped == "interrupted":
        say(f"go on with: triewise train {out / 'recipe.toml'} --resume --out {out}", err=True)
        raise typer.Exit(INTERRUPTED)


@app.command()
def evaluate(
    run: Run,
    split: Annotated[str | None, typer.Option(help="test or valid; default the recipe's.")] = None,
    search: Search = None,
    against: Annotated[Path | None, typer.Option(help="Another evaluated run: paired intervals.")] = None,
    changes: Changes = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Rank the catalogue for every row of a split; writes metrics.json and predictions.parquet."""
    from triewise.app import changed_evaluation, comparisons, evaluate_run, row
    from triewise.ranking import load_evaluation
    from triewise.reports import print_rows

    settings = changed_evaluation(run, changes or (), split=split, search=search)
    others = [load_evaluation(against)] if against else []
    evaluations = [evaluate_run(run, settings, trust_remote_code=trust_remote_code), *others]
    differences = comparisons(evaluations)
    if as_json:
        print_json(
            evaluations[0].metrics | ({"against": [vars(c) for c in differences]} if differences else {})
        )
    else:
        print_rows(tuple(row(e) for e in evaluations), differences, console())


@app.command()
def teach(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder of the teacher; one that was begun is gone on with.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Items of a ranking.")] = 10,
    search: Search = None,
    changes: Changes = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Rank the training rows with a run and write that with its item vectors, for enhance.teacher of a recipe."""
    from triewise.app import changed_evaluation, teach as teach_with

    settings = changed_evaluation(run, changes or (), search=search)
    facts = teach_with(run, out, settings, k, trust_remote_code=trust_remote_code)
    print_json(facts) if as_json else say(f"{out}: the best {k} items of {facts['rows']} training rows")


@app.command()
def reason(
    recipe: RecipeName,
    out: Annotated[
        Path, typer.Option(help="Folder of the chains of thought; what is there already is kept.")
    ],
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Have a model explain training rows of a recipe, for its enhance.chains (LLM-CF)."""
    from triewise.app import reason as reason_with
    from triewise.recipe import load_recipe

    facts = reason_with(load_recipe(recipe, changes or ()), out)
    print_json(facts) if as_json else typer.echo(
        f"{out}: {facts['chains']} chains of thought, {facts['by_template']} of them by the template"
    )


@app.command()
def run(
    recipe: RecipeName,
    out: Annotated[Path | None, typer.Option(help="The run folder; default runs/NAME.")] = None,
    changes: Changes = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Prepare, train, evaluate, report: one recipe from raw data to report.html."""
    from triewise.app import evaluate_run, report_runs, train_run
    from triewise.files import read_json
    from triewise.recipe import load_recipe
    from triewise.reports import print_rows
    from triewise.training import processes

    loaded = load_recipe(recipe, changes or ())
    folder = out or Path("runs") / loaded.name
    trust = trust_remote_code
    result = train_run(loaded, folder, resume=resume, overwrite=overwrite, trust_remote_code=trust)
    if not processes.finish():
        raise typer.Exit(INTERRUPTED if result.stopped == "interrupted" else 0)
    if result.stopped == "interrupted":
        say(f"go on with: triewise run {folder / 'recipe.toml'} --resume --out {folder}", err=True)
        raise typer.Exit(INTERRUPTED)
    evaluate_run(folder, trust_remote_code=trust)
    report = report_runs([folder], folder / "report.html", trust_remote_code=trust)
    if as_json:
        print_json(read_json(folder / "metrics.json"))
    else:
        print_rows(report.rows, report.comparisons, console())
        say(f"Report: {folder / 'report.html'}")


@app.command()
def recommend(
    run: Run,
    history: Annotated[
        list[str] | None, typer.Option("--history", help="A title, oldest first (repeatable).")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of titles.")] = 10,
    keep_history: KeepHistory = False,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="A title that may not be returned (repeatable).")
    ] = None,
    allow: Allow = None,
    search: Search = None,
    explain: Annotated[bool, typer.Option("--explain", help="Mark the tokens that decided.")] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """The most probable next titles after a history."""
    from triewise import load
    from triewise.data import allowed_items

    with without_collections():
        recommender = load(run, trust_remote_code=trust_remote_code)
    from triewise.reports import print_recommendations
    from triewise.serving import answer

    recommender = recommender if search is None else recommender.with_settings(search=search)
    answers = answer(
        recommender,
        [history or ()],
        k,
        exclude=exclude or (),
        keep_history=keep_history,
        allow=None if allow is None else allowed_items(allow, recommender.catalog),
        explain=explain,
        strict=True,
    )
    if not answers.of_each[0].recommendations:
        note("no title is left to recommend: all that may be returned are excluded or in the history")
    if as_json:
        print_json(answers.of_each[0].as_json() | {"counters": answers.counters})
    else:
        recommended = answers.of_each[0].recommendations
        print_recommendations([(r.title, r.score, r.explanation) for r in recommended], console())


@app.command()
def batch(
    run: Run,
    source: Annotated[
        Path,
        typer.Option(
            "--input", help=".parquet or .jsonl with user_id and titles or ids: lists, oldest first."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of part-*.parquet and, last, manifest.json.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Titles for each user.")] = 10,
    engine: Annotated[str, typer.Option(help="local (processes) or ray (a Ray cluster).")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes or actors; default one a GPU, else one a core.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the input that become one part.")] = 4096,
    resume: Annotated[bool, typer.Option("--resume", help="Make only the parts that are not there.")] = False,
    keep_history: KeepHistory = False,
    allow: Allow = None,
    search: Search = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """The most probable next titles for every user of a file."""
    from triewise.serving import recommend_file

    how: dict[str, Any] = {"search": search, "keep_history": keep_history, "allow": allow, "engine": engine}
    how |= {"workers": workers, "rows": rows, "resume": resume, "trust_remote_code": trust_remote_code}
    done = recommend_file(run, source, out, k, **how)
    if done["bad_rows"]["count"]:
        first = done["bad_rows"]["named"][0]
        note(
            f"{done['bad_rows']['count']} rows are no users: row {first['row']}: {first['problem']}; see manifest.json"
        )
    if done["unknown"]["count"]:
        note(
            f"{done['unknown']['count']} unknown {done['column']}, such as {done['unknown']['named'][0]!r}, "
            "were left out"
        )
    if as_json:
        print_json({name: value for name, value in done.items() if name != "sha256"})
    else:
        say(f"{out}: {done['users']} users in {len(done['sha256'])} parts")


@app.command()
def serve(
    run: Run,
    host: Annotated[str, typer.Option(help="Address; the default is reached from here alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option("--api-key-file", help="File of keys, one a line; who asks must have one.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Users that are decoded together.")] = 32,
    wait_ms: Annotated[float, typer.Option(min=0, help="Milliseconds to wait for others.")] = 2.0,
    queue: Annotated[int, typer.Option(min=1, help="Users that may wait; more are sent away.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is given up.")] = 30.0,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 1 << 20,
    max_k: Annotated[int, typer.Option(min=1, help="Titles for one history.")] = 1000,
    items: Annotated[
        list[str] | None,
        typer.Option("--items", help="NAME=FILE of raw ids, a set for exclude and allow (repeatable)."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", help="Another name under which it is asked, without a key (repeatable)."
        ),
    ] = None,
    search: Search = None,
    log_titles: Annotated[bool, typer.Option("--log-titles", help="Log histories too.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Answer over HTTP: recommendations, scores, a catalogue that changes, a page; extra: serve."""
    from triewise import load
    from triewise.serving import Limits, named_sets, serve as answer_requests

    with without_collections():
        recommender = load(run, trust_remote_code=trust_remote_code)
    limits = Limits(max_batch, wait_ms, queue, timeout, max_body, max_k)
    answer_requests(
        recommender if search is None else recommender.with_settings(search=search),
        name=run.resolve().name,
        host=host,
        port=port,
        allow_hosts=allow_host or (),
        api_keys=api_keys,
        limits=limits,
        sets=named_sets(items or (), recommender.catalog),
        catalogue=run / "catalogue",
        log_titles=log_titles,
    )


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Evaluated run folders; the first is compared with the others.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML file; default report.html in the first run's folder.")
    ] = None,
    anonymous: Annotated[
        bool, typer.Option("--anonymous", help="Number the users that are shown, to send the page on.")
    ] = False,
    users: Annotated[
        int | None, typer.Option(min=0, help="Users to look up in it; default 40, 12 of a large model.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """One self-contained HTML file about one or more runs."""
    from triewise.app import report_runs

    html = out or runs[0] / "report.html"
    report_runs(runs, html, trust_remote_code=trust_remote_code, anonymous=anonymous, users=users)
    print_json({"report": str(html)}) if as_json else say(html)


@app.command()
def verify(
    folder: Annotated[
        Path,
        typer.Argument(help="A run, prepared data, a saved recommender, a teacher, a batch or the cache."),
    ],
    as_json: Json = False,
) -> None:
    """Say what a folder is and compare its files with what was written; status 2 where they differ."""
    from triewise.app import verify as look_at
    from triewise.reports import print_facts

    found = look_at(folder)
    if as_json:
        print_json({"folder": str(folder), "kind": found.kind, "whole": found.whole, "parts": found.parts})
    else:
        shown = {name: problem or "whole" for name, problem in found.parts.items()}
        print_facts({str(folder): found.kind} | shown, console())
    if not found.whole:
        raise typer.Exit(2)


from triewise import studies as studies  # noqa: E402  (its commands stand behind these)
