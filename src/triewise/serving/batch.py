"""Recommendations for a file of users: sharded Parquet out, resumable, each part exactly once, a manifest last.

The file is cut into parts of equally many rows (`batch_input`), whose files have the same bytes whoever makes them
(`batch_parts`), which is up to an engine (`batch_workers`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triewise.errors import UserError
from triewise.files import Hashed, Shape, check_files, read_json, sha256_file, write_json
from triewise.locks import one_writer, strangers
from triewise.progress import note, progress
from triewise.recommenders import MANIFEST as RECOMMENDER
from triewise.serving.batch_input import cut
from triewise.serving.batch_parts import NAMED, TOGETHER, Task, part_facts
from triewise.serving.batch_workers import default_workers, made_parts, n_devices

if TYPE_CHECKING:
    from triewise.serving.batch_parts import PartFacts

FORMAT = 1
JOB, MANIFEST = "job.json", "manifest.json"  # what was begun, and what was done
ROWS_OF_A_PART = 4096
AGAIN = "remove it and manifest.json, and go on with --resume"


class _Job(Shape):
    job: dict[str, Any]


class _Done(_Job, Hashed):
    pass


def recommend_file(
    run: Path | str,
    source: Path | str,
    out: Path | str,
    k: int = 10,
    *,
    search: str | None = None,
    keep_history: bool = False,
    allow: Path | None = None,
    engine: str = "local",
    workers: int | None = None,
    rows: int = ROWS_OF_A_PART,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write the best titles for every user of a file; parts that are there are not made again.

    Args:
        run: A run folder, or one of ``save_pretrained``.
        source: ``.parquet`` or ``.jsonl`` with ``user_id`` and ``titles`` or ``ids``: lists, oldest first.
        out: Folder of ``part-*.parquet`` (user_id, items, titles, scores, certified) and ``manifest.json``.
        k: Titles for each user.
        search: Another search than the run's own.
        keep_history: Whether titles of a history may be returned.
        allow: Text file of the only raw ids that may be returned, one a line.
        engine: ``local``: processes on this machine; ``ray``: actors of a Ray cluster, to which ``run``, ``source`` and
            ``out`` are known under the same names.
        workers: Processes or actors; None: one a GPU, else one a core.
        rows: Of a part; decides, with the input, what is in which file.
        resume: Whether to go on with what ``out`` holds.
        trust_remote_code: Execute code that comes with its language model.

    Returns:
        The content of ``manifest.json``.

    Raises:
        UserError: No recommender, no users, ``out`` holds something else or a batch of other settings, or there is no
            space left.
    """
    run, out, source = (Path(path).resolve() for path in (run, out, source))
    if not (run / RECOMMENDER).is_file():
        raise UserError(
            f"wanted a run folder with a trained recommender, but {run} has no {RECOMMENDER}; train one"
        )
    for name, value in (("k", k), ("rows", rows), ("workers", workers)):
        if value is not None and value < 1:
            raise UserError(f"wanted {name} of at least 1, got {value}")
    users = cut(source, rows)
    allow = allow and allow.resolve()
    job = _job(run, source, rows, allow, k=k, search=search, keep_history=keep_history)
    digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()
    task = Task(run, out, users, k, search, keep_history, allow, trust_remote_code, digest)
    with one_writer(out):
        done = _begun(out, job, resume)
        if done is not None:
            return done
        write_json(out / JOB, {"job": job}, sealed=True)
        return _made(task, job, engine, workers or default_workers())


def parts_of_batch(out: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and check of each part of a batch, done or begun; a check raises `UserError` where its part is damaged."""
    done = (out / MANIFEST).is_file()
    yield JOB, lambda: read_json(out / JOB, _Job)
    if done:
        yield MANIFEST, lambda: check_files(out, read_json(out / MANIFEST, _Done)["sha256"], AGAIN)
    for file in sorted(out.glob("part-*.parquet")):
        yield file.name, partial(part_facts, file, look=True)


def _job(run: Path, source: Path, rows: int, allow: Path | None, **settings: Any) -> dict[str, Any]:
    """All that decides the bytes of the parts, as JSON values."""
    files = {"recommender": run / RECOMMENDER, "input": source, "allow": allow}
    hashes = {name: None if file is None else sha256_file(file) for name, file in files.items()}
    fixed = {"rows_of_a_part": rows, "together": TOGETHER, "device": "cuda" if n_devices() else "cpu"}
    return {"format": FORMAT, **hashes, **settings, **fixed}


def _begun(out: Path, job: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The manifest of the same batch where it is done; UserError where the folder is for something else."""
    file = next((out / name for name in (MANIFEST, JOB) if (out / name).is_file()), None)
    if file is None:
        if strangers(out):
            raise UserError(
                f"wanted a new folder for the batch, but {out} holds something else; choose another --out"
            )
        return None
    if not resume:
        raise UserError(f"{out} holds a batch already; go on with --resume, or choose another --out")
    before: dict[str, Any] = read_json(file, _Done if file.name == MANIFEST else _Job)
    other = [name for name in job if before["job"].get(name) != job[name]]
    if other:
        raise UserError(
            f"{out} holds a batch with another {other[0]} ({before['job'].get(other[0])}, now {job[other[0]]}); give "
            "the same, or choose another --out"
        )
    if file.name != MANIFEST:
        return None
    check_files(out, before["sha256"], AGAIN)
    return before


def _made(task: Task, job: dict[str, Any], engine: str, workers: int) -> dict[str, Any]:
    """Make the parts that are not there, then the manifest."""
    source, started = task.source, time.monotonic()
    parts = [part for part in range(source.n_parts) if task.facts(part, look=True) is None]
    size = [min(source.rows, source.n_rows - part * source.rows) for part in range(source.n_parts)]
    if len(parts) < source.n_parts:
        note(f"{source.n_parts - len(parts)} of {source.n_parts} parts are there already")
    ranked = sum(size[part] for part in parts)
    with progress("recommending", ranked, "users") as advance:
        for part in made_parts(task, parts, engine, workers) if parts else ():
            advance(size[part])
    seconds = time.monotonic() - started
    facts = [_of(task, part) for part in range(source.n_parts)]
    bad = [row for one in facts for row in one.bad]
    unknown = list(dict.fromkeys(name for one in facts for name in one.unknown))
    manifest = {
        "job": job,
        "run": str(task.run),
        "input": str(source.path),
        "column": source.column,
        "rows": source.n_rows,
        "users": sum(one.users for one in facts),
        "bad_rows": {
            "count": sum(one.n_bad for one in facts),
            "named": [{"row": row, "problem": problem} for row, problem in bad[:NAMED]],
        },
        "unknown": {"count": sum(one.n_unknown for one in facts), "named": unknown[:NAMED]},
        "timing": {"seconds": seconds, "users": ranked, "engine": engine, "workers": workers},
        "sha256": {task.file(part).name: sha256_file(task.file(part)) for part in range(source.n_parts)},
    }
    write_json(task.out / MANIFEST, manifest, sealed=True)
    return manifest


def _of(task: Task, part: int) -> PartFacts:
    found = task.facts(part)
    assert found is not None
    return found
