"""What a folder is, and whether it is whole: each part is compared with the hash it was written with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from triewise.app.folders import BEFORE, StartedRun, trained_data
from triewise.data import RELEASES, is_whole, load_dataset
from triewise.errors import UserError
from triewise.files import check_files, read_json, read_record
from triewise.ranking import METRICS, load_evaluation
from triewise.recipe import run_recipe
from triewise.recommenders import MANIFEST, check_saved
from triewise.serving import JOB, parts_of_batch
from triewise.training import BEST, TEACHER, Teacher, best_weights, read_log, read_state, resumable

Check = tuple[str, Callable[[], Any]]


@dataclass(frozen=True)
class Verified:
    """What a folder is.

    Attributes:
        kind: Prepared data, a run and how far it is, a recommender, a teacher, a batch, or the cache.
        parts: What is wrong with each part; empty where it is whole.
    """

    kind: str
    parts: dict[str, str]

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not any(self.parts.values())


def verify(folder: Path | str) -> Verified:
    """Look at a folder that triewise wrote, and change nothing.

    Raises:
        UserError: It is none of them.
    """
    folder = Path(folder)
    if (folder / "run.json").is_file():
        return _verified(_run(folder), _parts_of_run(folder))
    if (folder / "dataset.json").is_file():
        return _verified("prepared data", [("data", lambda: load_dataset(folder))])
    if (folder / TEACHER).is_file():
        return _verified("a teacher", [("rankings and item vectors", lambda: Teacher.load(folder))])
    if (folder / MANIFEST).is_file():
        return _verified("a recommender", [("recommender", lambda: check_saved(folder))])
    if (folder / JOB).is_file():
        return _verified("a batch", parts_of_batch(folder))
    cached = list(_parts_of_cache(folder))
    if cached:
        return _verified("the cache", cached)
    raise UserError(
        f"wanted prepared data, a run, a recommender, a teacher, a batch or the cache, but {folder} is none of "
        "them; check the path"
    )


def _verified(kind: str, checks: Iterator[Check] | list[Check]) -> Verified:
    return Verified(kind, {name: _problem(check) for name, check in checks})


def _problem(check: Callable[[], Any]) -> str:
    """What a check complains of; whatever is raised while a file is read says that it is damaged."""
    try:
        check()
    except Exception as error:
        return str(error) or type(error).__name__
    return ""


def _run(run: Path) -> str:
    """How far a run is; where its record cannot be read, that is for its parts to say."""
    try:
        status = read_json(run / "run.json").get("status", "unknown")
    except (UserError, AttributeError):
        status = "unknown"
    evaluated = status in ("trained", "stopped") and (run / METRICS).is_file()
    return f"a run, {status}" + (" and evaluated" if evaluated else "")


def _parts_of_run(run: Path) -> Iterator[Check]:
    yield "run.json", lambda: read_json(run / "run.json")
    yield "recipe", lambda: (read_record(run, ("recipe.toml",)), run_recipe(run))
    if (run / "log.jsonl").is_file():
        yield "log", lambda: read_log(run)
    yield "data", lambda: trained_data(run, read_json(run / "run.json", StartedRun))
    if (run / MANIFEST).is_file() or _run(run).startswith(("a run, trained", "a run, stopped")):
        yield "files of run.json", lambda: read_record(run)
        yield "recommender", lambda: check_saved(run)
    if (run / METRICS).is_file():
        yield "evaluation", lambda: load_evaluation(run)
    for checkpoint in resumable(run):
        yield checkpoint.name, partial(read_state, checkpoint)
    if (run / BEST).is_dir():
        yield "best weights", lambda: best_weights(run)
    if (run / BEFORE).is_dir():
        yield "the run before", lambda: _check_before(run / BEFORE)


def _check_before(run: Path) -> None:
    wrong = [text for text in verify(run).parts.values() if text]
    if wrong:
        raise UserError(wrong[0])


def _parts_of_cache(folder: Path) -> Iterator[Check]:
    for name in RELEASES:
        if (folder / name).is_dir():
            yield name, partial(_check_release, folder, name)
    for origin in sorted(folder.glob("models/*/origin.json")):
        yield origin.parent.name, partial(_check_converted, origin)


def _check_converted(origin: Path) -> None:
    check_files(
        origin.parent, read_json(origin).get("files"), f"remove {origin.parent} to have it made again"
    )


def _check_release(folder: Path, name: str) -> None:
    if not is_whole(folder / name, RELEASES[name]):
        raise UserError(f"the cached {name} in {folder} is damaged; remove it to have it made again")
