"""One part of a batch: read, ranked and written by whichever process, with the same bytes.

A part is ranked in calls of `TOGETHER` users, on one thread, with nothing left from the part before. Its file carries
what the manifest says of its rows, so a part that is there is done.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triewise.errors import UserError, reading
from triewise.files import Shape, atomic_path, parquet_metadata, scan
from triewise.serving.answers import Answer, answer
from triewise.serving.batch_input import Source, read_part

if TYPE_CHECKING:
    import polars as pl

    from triewise.arrays import Int32
    from triewise.data import Catalog
    from triewise.recommenders import SavedRecommender

KEY = "triewise"  # of what a part says of itself, in its Parquet metadata
TOGETHER = 256  # users of one call; it decides the last bit of a score
NAMED = 100  # bad rows and unknown names that are told one by one


class PartFacts(Shape):
    """What a part says of itself: the job it is of, its rows, and what was wrong with some of them."""

    job: str
    users: int
    n_bad: int
    bad: list[tuple[int, str]]
    n_unknown: int
    unknown: list[str]
    sha256: str  # of all this and the rows


@dataclass(frozen=True)
class Task:
    """All that a process needs to make any part.

    Attributes:
        run: Folder of the recommender, from the root.
        out: Where parts are written, from the root.
        source: The users.
        k: Titles for each.
        search: Another search than the recommender's own, or None.
        keep_history: Whether titles of a history may be returned.
        allow: A text file of the only ids that may be returned, or None.
        trust_remote_code: Execute code that comes with the language model.
        job: Hex SHA-256 of what decides the bytes of parts.
    """

    run: Path
    out: Path
    source: Source
    k: int
    search: str | None
    keep_history: bool
    allow: Path | None
    trust_remote_code: bool
    job: str

    def loaded(self) -> SavedRecommender:
        """The recommender, for one process."""
        from triewise.recommenders import load

        recommender = load(self.run, trust_remote_code=self.trust_remote_code)
        return recommender if self.search is None else recommender.with_settings(search=self.search)

    def file(self, part: int) -> Path:
        """Where a part is."""
        return self.out / f"part-{part:06d}.parquet"

    def write(self, part: int, frame: pl.DataFrame, facts: dict[str, Any]) -> None:
        """Write the file of a part, unless its bytes are there."""
        file, content = self.file(part), io.BytesIO()
        frame.write_parquet(content, metadata={KEY: json.dumps(facts, sort_keys=True)})
        if not file.is_file() or file.read_bytes() != content.getvalue():
            with atomic_path(file) as temporary:
                temporary.write_bytes(content.getvalue())

    def facts(self, part: int, look: bool = False) -> PartFacts | None:
        """What a part says of itself; None where it is not there.

        Args:
            part: Its number.
            look: Whether to compare its rows with what was written.

        Raises:
            UserError: It is damaged, or of another batch.
        """
        file = self.file(part)
        if not file.is_file():
            return None
        found, frame = part_facts(file, look)
        if found.job != self.job:
            raise UserError(f"{file} is of another batch than this one; choose another --out, or remove it")
        if (
            frame is not None
        ):  # what stands beside the rows, such as the least value of a column, is right again
            self.write(part, frame, found.model_dump(mode="json"))
        return found


def part_facts(file: Path, look: bool) -> tuple[PartFacts, pl.DataFrame | None]:
    """What the file of a part says of itself; and its rows, compared with what was written, where one is to look.

    Raises:
        UserError: It is damaged.
    """
    with reading(file):
        found = PartFacts.model_validate_json(parquet_metadata(file)[KEY])
        frame = scan(file).collect() if look else None
        if frame is not None and _digest(frame, found.model_dump(mode="json")) != found.sha256:
            raise ValueError("its rows are others than were written")
    return found, frame


def make_part(task: Task, recommender: SavedRecommender, part: int) -> None:
    """Rank the users of a part and write its file, unless it is there."""
    import polars as pl

    if task.facts(part) is not None:
        return
    users = read_part(task.source, part)
    allow = None if task.allow is None else _allowed(task.allow, recommender.catalog)
    how: dict[str, Any] = {"by": task.source.by, "keep_history": task.keep_history, "allow": allow}
    answers: list[Answer] = []
    with on_one_thread():
        for first in range(0, len(users.history), TOGETHER):
            _forget(recommender)
            histories = users.history[first : first + TOGETHER]
            answers += answer(recommender, histories, task.k, **how).of_each
    best = [one.recommendations for one in answers]
    columns = {
        "user_id": pl.Series(users.user_id, dtype=pl.String),
        "items": pl.Series([[r.item_id for r in row] for row in best], dtype=pl.List(pl.String)),
        "titles": pl.Series([[r.title for r in row] for row in best], dtype=pl.List(pl.String)),
        "scores": pl.Series([[r.score for r in row] for row in best], dtype=pl.List(pl.Float32)),
        "certified": pl.Series([one.certified for one in answers], dtype=pl.Boolean),
    }
    unknown = [name for one in answers for name in one.unknown]
    facts = {"job": task.job, "users": len(best), "n_bad": len(users.bad), "n_unknown": len(unknown)}
    facts |= {"bad": users.bad[:NAMED], "unknown": unknown[:NAMED]}
    frame = pl.DataFrame(columns)
    facts["sha256"] = _digest(frame, facts)
    task.write(part, frame, facts)


@lru_cache(maxsize=1)
def _allowed(file: Path, catalog: Catalog) -> Int32:
    """Items that may be returned; read once, not for each part."""
    from triewise.data import allowed_items

    return allowed_items(file, catalog)


def _digest(frame: pl.DataFrame, facts: dict[str, Any]) -> str:
    """Hex SHA-256 of a part's rows and of what it says of them."""
    said = {name: value for name, value in facts.items() if name != "sha256"}
    return hashlib.sha256(
        json.dumps([said, frame.to_dict(as_series=False)], sort_keys=True).encode()
    ).hexdigest()


def _forget(recommender: SavedRecommender) -> None:
    """Drop what earlier calls left in engines: a shared instruction that is there already is not run, bit by bit."""
    for one in (recommender, getattr(recommender, "assistant", None)):
        engine = getattr(one, "engine", None)
        if engine is not None:
            engine.forget()


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """A block in which torch computes on one thread: how many there are decides the order of sums."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
