"""A run as a teacher: its rankings of the training rows and its item vectors as files, for a student to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from triewise.app.enhance import teacher_hashes
from triewise.app.folders import open_run
from triewise.app.runs import recommender_of
from triewise.arrays import check_memory
from triewise.errors import UserError
from triewise.files import atomic_path, file_hashes, read_json, sha256_file, write_json
from triewise.locks import one_writer, strangers
from triewise.progress import progress
from triewise.training import TEACHER, VECTORS, TeacherFile, part_path, write_part

if TYPE_CHECKING:
    from triewise.arrays import Float32, Int32
    from triewise.ranking import ItemLists
    from triewise.recipe import Recipe
    from triewise.recommenders import SavedRecommender
    from triewise.settings import EvaluationSettings

FORMAT = 1
ROWS_OF_A_PART = 512


def teach(
    run: Path | str,
    out: Path | str,
    settings: EvaluationSettings,
    k: int = 10,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write what a run says of the training rows of its data; a call that was stopped half way goes on.

    Each part of the rankings is a file that is whole or absent. ``teacher.json`` ties them to the run, the data, the
    catalogue and the rows.

    Args:
        run: The run folder.
        out: Folder of the teacher; a new one, or one that the same call began.
        settings: How the run ranks, as ``[evaluation]`` of its recipe.
        k: Items of a ranking.
        trust_remote_code: Execute code that comes with its language model.

    Returns:
        The content of ``teacher.json``.

    Raises:
        UserError: No run, its data changed, or ``out`` holds the rankings of another teacher.
    """
    run, out = Path(run), Path(out)
    recipe = open_run(run)[0]
    if out.exists() and not out.is_dir():
        raise UserError(f"wanted a folder for the teacher, but {out} is a file; choose another --out")
    with one_writer(out):
        return _teach(run, recipe, out, settings, k, trust_remote_code)


def _teach(
    run: Path, recipe: Recipe, out: Path, settings: EvaluationSettings, k: int, trust_remote_code: bool
) -> dict[str, Any]:
    dataset, recommender, _ = recommender_of(run, settings, trust_remote_code)
    n_rows = dataset.train.n_rows
    facts: dict[str, Any] = {
        "format": FORMAT,
        "run": str(run),
        "trained_on": recipe.training.rows,
        "k": k,
        "rows": n_rows,
        "rows_of_a_part": ROWS_OF_A_PART,
        "settings": recommender.used | {"exclude": settings.exclude},
        "hashes": teacher_hashes(dataset) | {"run": sha256_file(run / "run.json")},
    }
    if _begun(out, facts) == "taught":
        return facts | {"status": "taught"}
    write_json(out / TEACHER, facts | {"status": "teaching"}, sealed=True)
    exclude = None if settings.exclude == "none" else "history"
    with progress(f"ranking the training rows of {run.name}", n_rows, "rows") as advance:
        for row in range(0, n_rows, ROWS_OF_A_PART):
            history = list(dataset.train.part(row, row + ROWS_OF_A_PART).history)
            if not part_path(out, row).is_file():
                write_part(out, row, *_ranked(recommender, history, k, exclude))
            advance(len(history))
    if not (out / VECTORS).is_file():
        with atomic_path(out / VECTORS) as temporary, temporary.open("wb") as file:
            np.save(file, recommender.item_vectors())
    hashes = {name: sha256 for name, sha256 in file_hashes(out).items() if name != TEACHER}
    write_json(out / TEACHER, facts | {"status": "taught", "sha256": hashes}, sealed=True)
    return facts | {"status": "taught"}


def _begun(out: Path, facts: dict[str, Any]) -> str | None:
    """How far the same call came before; UserError where the folder is something else."""
    if not (out / TEACHER).is_file():
        if strangers(out):
            raise UserError(
                f"wanted a new folder for the teacher, but {out} holds something else; choose another --out"
            )
        return None
    before = read_json(out / TEACHER, TeacherFile)
    other = [name for name, value in facts.items() if name != "run" and before.get(name) != value]
    if other:
        raise UserError(
            f"{out} holds a teacher with other {other[0]} than this one; choose another --out, or remove it"
        )
    status: str = before["status"]
    return status


def _ranked(
    recommender: SavedRecommender, history: ItemLists, k: int, exclude: str | None
) -> tuple[Int32, Float32]:
    """The best k items (n, K) after each history, and how far they are behind the first; -1 and infinity for none."""
    check_memory(8.0 * len(history) * k, f"the best {k} items of {len(history)} rows")
    items = np.full((len(history), k), -1, dtype=np.int32)
    distances = np.full((len(history), k), np.inf, dtype=np.float32)
    asked = np.array([len(row) > 0 for row in history], dtype=bool)
    if asked.any():
        ranking = recommender.recommend([row for row in history if len(row)], k, exclude)
        behind = ranking.scores[:, :1] - np.where(ranking.items < 0, -np.inf, ranking.scores)
        items[asked], distances[asked] = ranking.items, np.where(ranking.items < 0, np.inf, behind)
    return items, distances
