"""The options of `triewise prepare` that are keys of a recipe's ``[data]``; here, so that `cli` stays readable.

`triewise.settings` describes the keys; it is not imported, so that ``--help`` answers at once.
"""

from __future__ import annotations

import functools
import inspect
from typing import Annotated, Any

import typer

DATA_OPTIONS: dict[str, tuple[Any, str]] = {
    "user_column": (str, "Column of the user; names of columns matter where no known name is there."),
    "item_column": (str, "Column of the item; of several names, with commas, the first that is there."),
    "time_column": (str, "Column of the time."),
    "title_column": (str, "Column of the title."),
    "rating_column": (str, "Column of the rating, for --min-rating."),
    "event_column": (str, "Column of the kind of event, for --events."),
    "interactions_file": (
        str,
        "Name of the file or folder with the interactions, where several may be meant.",
    ),
    "catalogue_file": (str, "Name of the file or folder with the titles."),
    "ties": (
        str,
        "Events of one time: by item (default), by place in the file (also without times), or random.",
    ),
    "bad_rows": (str, "Rows that cannot be read: error (default) or drop."),
    "untitled": (str, "Interactions of items without title: error (default) or drop, before the k-core."),
    "second_titles": (str, "Of several titles of an item: error (default), first, last or most-frequent."),
    "keep_unused": (bool, "Keep items without interactions in the catalogue."),
    "min_rating": (float, "Leave out interactions with a lower rating."),
    "events": (str, "Kinds of event that count, with commas."),
    "min_user": (int, "As --k-core, for users alone."),
    "min_item": (int, "As --k-core, for items alone."),
    "min_history": (int, "Leave out rows with a shorter history."),
    "since": (str, "Leave out interactions before this date."),
    "until": (str, "Leave out interactions from this date on."),
    "pipeline": (str, "Raw reviews by the rules of d3, msl or igd-steam; sets --split, --k-core and so on."),
    "start_year": (str, "--pipeline d3: a year, auto (default: their search) or all."),
    "sample_items": (int, "--pipeline msl: draw so many items; default 100000 of books, else all."),
    "valid_from": (str, "--split dates: first date of the validation rows."),
    "test_from": (str, "--split dates: first date of the test rows."),
}


def with_data_options(command: Any) -> Any:
    """The command with an option for each of `DATA_OPTIONS`; those that are given arrive in ``choices``."""

    @functools.wraps(command)
    def called(**given: Any) -> None:
        choices = {name: given.pop(name) for name in DATA_OPTIONS}
        choices = {name: value for name, value in choices.items() if value not in (None, False)}
        if "events" in choices:
            choices["events"] = tuple(filter(None, map(str.strip, choices["events"].split(","))))
        command(**given, choices=choices)

    own = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if kind is bool else None,
            annotation=Annotated[
                bool if kind is bool else kind | None,
                typer.Option(
                    f"--{name.replace('_', '-')}", help=text, rich_help_panel="What is read, and what counts"
                ),
            ],
        )
        for name, (kind, text) in DATA_OPTIONS.items()
    ]
    parameters = [parameter for parameter in own.parameters.values() if parameter.name != "choices"] + added
    called.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called
