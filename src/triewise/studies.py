"""The commands of studies, which make or read many runs: tables and figures of the papers, and tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from triewise.commandline import (
    INTERRUPTED,
    Changes,
    Json,
    RecipeName,
    Trust,
    app,
    print_json,
    say,
)


@app.command()
def statistics(
    folders: Annotated[list[Path], typer.Argument(help="Run folders and prepared folders.")],
    out: Annotated[Path, typer.Option(help="Folder for the page and the tables.")],
    only: Annotated[
        str,
        typer.Option(help="Names or places, with commas between: prefix-entropy,msl-figure-6; default all."),
    ] = "",
    users: Annotated[int, typer.Option(min=2, help="Test rows that models are run for.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of their drawing.")] = 0,
    export: Annotated[str, typer.Option(help="Files of each: csv, svg, png, with commas between.")] = "csv",
    tokenizer: Annotated[str, typer.Option(help="Of prepared folders; runs have their own.")] = "tiny",
    template: Annotated[str | None, typer.Option(help="Of prepared folders, as in describe.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Tables and figures of both papers from runs and data: what they show here, in numbers, drawings and words."""
    from triewise.app import study
    from triewise.reports import PLACES

    asked, formats = ([word.strip() for word in words.split(",") if word.strip()] for words in (only, export))
    how: dict[str, Any] = {"users": users, "seed": seed, "tokenizer": tokenizer, "template": template}
    how |= {"export": formats, "trust_remote_code": trust_remote_code}
    found = study(folders, out, only=asked, **how)
    if as_json:
        print_json({one.name: {"says": one.sentence, "rows": one.table.to_dicts()} for one in found})
        return
    for one in found:
        say(f"{PLACES[one.name][0]}: {one.sentence}")
    say(f"Page: {out / 'statistics.html'}")


@app.command()
def reproduce(
    table: Annotated[
        str,
        typer.Argument(
            help="ledger: every token loss, tuned alike, against MSL; msl-table-6, igd-table-3, ..."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of all runs; finished ones in it are used again.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Source of all rows: ml-100k, msl:DIR, ...; default the paper's, small and ledger ml-100k."
        ),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="paper: the authors' models; small: what a CPU trains.")
    ] = "paper",
    backbone: Annotated[str | None, typer.Option(help="Language model of all rows that have one.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of each training; default the recipes'.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each row with what was chosen.")] = 3,
    rows: Annotated[str, typer.Option(help="Only these, with commas between; default all.")] = "",
    trials: Annotated[int | None, typer.Option(min=1, help="Values tried of each row; default all.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Use what is in OUT; --no-resume refuses a folder with runs.")
    ] = True,
    changes: Changes = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """A table of many runs: choose on validation, repeat with seeds, rank, compare, beside the paper's numbers."""
    from triewise.app import reproduce_table

    names = [name.strip() for name in rows.split(",") if name.strip()]
    how: dict[str, Any] = {"data": data, "steps": steps, "seeds": seeds, "rows": names, "trials": trials}
    how |= {"scale": scale, "backbone": backbone, "resume": resume}
    how |= {"changes": changes or (), "trust_remote_code": trust_remote_code}
    made = reproduce_table(table, out, **how)
    if as_json:
        print_json(made.as_json() | {"report": str(made.html) if made.html else None})
    else:
        typer.echo(f"{made.text}\nReport: {made.html}" if made.html else made.text)


@app.command()
def tune(
    recipe: RecipeName,
    space: Annotated[Path, typer.Option(help="TOML file of what may change; see docs/tuning.md.")],
    trials: Annotated[
        int, typer.Option(min=1, help="Of each step that does not say; all processes together.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the study.")],
    changes: Changes = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the study in OUT, also beside another process.")
    ] = False,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Choose settings on validation rows with Optuna; writes OUT/best.toml and OUT/trials.html."""
    from triewise.app import tune as tune_with
    from triewise.recipe import load_recipe

    how = {"resume": resume, "trust_remote_code": trust_remote_code}
    made = tune_with(load_recipe(recipe, changes or ()), space, trials, out, **how)
    if as_json:
        print_json(made.as_json())
    else:
        for step in made.steps:
            best = step["best"]
            chosen = (
                ", ".join(f"{key} = {value}" for key, value in best["values"].items()) if best else "none"
            )
            value = f"{step['metric']} {best['value']:.4f}, " if best else ""
            say(f"{step['name']}: {step['trials']} trials, {value}best: {chosen}")
        say(f"{out / 'best.toml'}  {out / 'trials.html'}")
    if made.interrupted:
        say("go on with the same command and --resume", err=True)
        raise typer.Exit(INTERRUPTED)
