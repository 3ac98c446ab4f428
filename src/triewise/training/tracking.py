"""Losses and validations of a run for the trackers that ``training.report_to`` names, and for nobody else.

A tracker is asked for by name and imported then; environment variables of trackers change nothing before. It is told
the hyper-parameters once, and each row of ``log.jsonl`` as it is written, by the first process alone.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from triewise.errors import UserError, first_line
from triewise.files import read_json, write_json
from triewise.progress import note

PROJECT = "triewise"
IDS = "tracking.json"  # in a run folder: what trackers call the run, for when it goes on
Tell = Callable[[int, dict[str, float]], None]


@contextlib.contextmanager
def tracked(
    names: Sequence[str],
    out: Path,
    title: str,
    facts: Mapping[str, Any],
    watch: Callable[[Mapping[str, Any]], str | None] | None = None,
    step: int = 0,
) -> Iterator[Callable[[Mapping[str, Any]], str | None] | None]:
    """Trackers of a run, for as long as its steps last; what it gives is told each row of the log.

    Args:
        names: Some of `TRACKERS`; none: ``watch`` is given as it is.
        out: The run folder.
        title: What the run is called.
        facts: Hyper-parameters; tables become keys with dots.
        watch: Told each row too; what it says is passed on.
        step: Steps that were done before; later ones are told again.

    A tracker that fails later is told no more: a training outlives it.

    Raises:
        UserError: The package of a tracker is not installed.
    """
    if not names:
        yield watch
        return
    known: dict[str, str] = read_json(out / IDS) if (out / IDS).is_file() else {}
    with contextlib.ExitStack() as held:
        flat, name = dict(_flat(facts)), title or out.name
        trackers = [(n, TRACKERS[n](_package(n), out, name, flat, known, step)) for n in names]
        tells = [held.enter_context(_outlived(n, tracker)) for n, tracker in trackers]
        if known:
            write_json(out / IDS, known)

        def tell(row: Mapping[str, Any]) -> str | None:
            numbers = {k: float(v) for k, v in _flat(row) if isinstance(v, int | float) and k != "step"}
            for each in tells:
                each(int(row["step"]), numbers)
            return None if watch is None else watch(row)

        yield tell


@contextlib.contextmanager
def _outlived(name: str, tracker: contextlib.AbstractContextManager[Tell]) -> Iterator[Tell]:
    """A tracker whose failures after its start, such as a server that went away, are said once and stop nothing."""
    tell, alive = tracker.__enter__(), True

    @contextlib.contextmanager
    def surviving() -> Iterator[None]:
        nonlocal alive
        try:
            yield
        except Exception as error:
            if alive:
                note(f"warning: {name} fails and is told no more: {first_line(error)}")
            alive = False

    def told(step: int, numbers: dict[str, float]) -> None:
        with surviving():
            if alive:
                tell(step, numbers)

    ended: tuple[Any, Any, Any] = (None, None, None)
    try:
        yield told
    except BaseException:
        ended = sys.exc_info()
        raise
    finally:
        with surviving():
            tracker.__exit__(*ended)


def _package(name: str) -> Any:
    module, package = ("torch.utils.tensorboard", name) if name == "tensorboard" else (name, name)
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"training.report_to = ['{name}'] needs the package {package}; run: pip install {package}"
        ) from None


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values of nested tables under keys with dots."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@contextlib.contextmanager
def _tensorboard(
    package: Any, out: Path, title: str, facts: dict[str, Any], known: dict[str, str], step: int
) -> Iterator[Tell]:
    """Event files in ``OUT/tensorboard``; the hyper-parameters are a text, as its own page of them wants results."""
    with package.SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) as writer:
        lines = [f"| {key} | `{value}` |" for key, value in facts.items()]
        writer.add_text("settings", "\n".join(["| key | value |", "|---|---|", *lines]), 0)

        def tell(step: int, numbers: dict[str, float]) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key.replace(".", "/"), value, step)
            writer.flush()

        yield tell


@contextlib.contextmanager
def _service(
    package: Any, out: Path, title: str, facts: dict[str, Any], known: dict[str, str], step: int
) -> Iterator[Tell]:
    """Weights & Biases, and Trackio, which has its interface."""
    ours = package.__name__
    if ours == "wandb":
        how = {"name": title, "resume": "allow", "dir": str(out)} | (
            {"id": known[ours]} if ours in known else {}
        )
    else:  # it knows runs by name: of a new one a name that another run has is left to it
        how = {"name": known.get(ours, title), "resume": "allow" if ours in known else "never"}
    run = package.init(project=PROJECT, config=facts, **how)
    known[ours] = str(run.id if ours == "wandb" else run.name)
    try:
        yield lambda step, numbers: package.log(numbers, step=step)
    finally:
        package.finish()


@contextlib.contextmanager
def _mlflow(
    package: Any, out: Path, title: str, facts: dict[str, Any], known: dict[str, str], step: int
) -> Iterator[Tell]:
    package.set_experiment(PROJECT)
    going_on = {"run_id": known["mlflow"]} if "mlflow" in known else {"run_name": title}
    with package.start_run(**going_on) as run:
        if "mlflow" not in known:
            known["mlflow"] = str(run.info.run_id)
            package.log_params(facts)
        # Of the characters in names it knows no "@".
        yield lambda step, numbers: package.log_metrics(
            {key.replace("@", "_at_"): value for key, value in numbers.items()}, step=step
        )


TRACKERS = {"tensorboard": _tensorboard, "trackio": _service, "wandb": _service, "mlflow": _mlflow}
