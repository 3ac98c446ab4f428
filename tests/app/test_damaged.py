"""Damaged files of a run: one line that names the file and exit status 2, whatever is done with the run."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from tests.worlds import write_msl_folder
from triewise.cli import main
from triewise.errors import UserError, reading
from triewise.files import read_json, write_json

SHAPES = {
    "lm": "[backbone.tiny]\nvocabulary = 300\nwidth = 16\nlayers = 1\nheads = 2\nfeed_forward = 32",
    "sequential": '[sequential]\nencoder = "sasrec"\nwidth = 16\nblocks = 1',
}
RECIPE = """
name = "{name}"
{shape}
[data]
source = "msl:{raw}"
folder = "{data}"
[training]
supervision = "every"
steps = 4
checkpoint_every = 2
evaluate_every = 4
"""


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str]:
    """Exit status and stderr of one command; an exception that leaves it is a traceback for the user."""
    monkeypatch.setattr("sys.argv", ["triewise", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each kind, trained and evaluated, in one folder."""
    folder = tmp_path_factory.mktemp("damaged")
    raw = write_msl_folder(folder / "office")
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in SHAPES.items():
            recipe = folder / f"{name}.toml"
            values = {
                "name": name,
                "shape": shape,
                "raw": raw.as_posix(),
                "data": (folder / "data").as_posix(),
            }
            recipe.write_text(RECIPE.format(**values), encoding="utf-8")
            patch.setattr("sys.argv", ["triewise", "run", str(recipe), "--out", str(folder / name)])
            with pytest.raises(SystemExit, match="0"):
                main()
    return folder


@pytest.fixture
def runs(world: Path, tmp_path: Path) -> Path:
    """A copy to damage; its data stay where they are."""
    for name in SHAPES:
        shutil.copytree(world / name, tmp_path / name)
    return tmp_path


def commands(folder: Path) -> dict[str, list[object]]:
    return {
        "evaluate": ["evaluate", folder],
        "report": ["report", folder],
        "recommend": ["recommend", folder, "--history", "Red"],
        "resume": ["train", folder / "recipe.toml", "--out", folder, "--resume"],
    }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def written(text: str | bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(text.encode() if isinstance(text, str) else text) and None


def without_keys(path: Path) -> None:
    """Every key but a few is misspelt."""
    path.write_text(json.dumps({f"{k}x": v for k, v in read_json(path).items()}), encoding="utf-8")


WRONG_JSON = {
    "another shape": written("[]"),
    "null": written("null"),
    "misspelt": without_keys,
    "deep": written("[" * 100_000),
    "a long number": written('{"status": ' + "9" * 5000 + "}"),
    "no UTF-8": written(b'{"\xff": 1}'),
    "cut": cut,
}


@pytest.mark.parametrize("damage", WRONG_JSON)
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("sequential/run.json", "evaluate"),
        ("sequential/run.json", "resume"),
        ("sequential/recommender.json", "recommend"),
        ("sequential/model/config.json", "recommend"),
        ("sequential/metrics.json", "report"),
        ("lm/recommender.json", "evaluate"),
        ("lm/model/config.json", "recommend"),
        ("lm/model/tokenizer.json", "recommend"),
        ("sequential/checkpoint-4/state.json", "resume"),
        ("lm/checkpoint-4/state.json", "resume"),
    ],
)
def test_json_of_another_shape(runs: Path, file: str, command: str, damage: str, capsys, monkeypatch) -> None:
    WRONG_JSON[damage](runs / file)
    folder = runs / Path(file).parts[0]
    status, errors = run(capsys, monkeypatch, *commands(folder)[command])
    assert status == 2, errors
    line = errors.splitlines()[-1]
    assert line.startswith("error: ")
    assert Path(file).name in line or "tokenizer" in line or "model" in line
    assert len(line) < 1500


def foreign_zip(path: Path) -> None:
    """A zip file that asks for a later version of the format."""
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 6 : place + 8] = (99).to_bytes(2, "little")
    path.write_bytes(data)


def huge_array(path: Path) -> None:
    """A small file that announces an array of 12 GB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<i4", "fortran_order": False, "shape": (3_000_000_000,)}
    )
    with zipfile.ZipFile(path, "w") as file:
        for name in ("format", "child_ptr", "token"):
            file.writestr(f"{name}.npy", header.getvalue())


def other_weights(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({name: torch.zeros(3) for name in load_file(path)}, path)


def null_titles(path: Path) -> None:
    pl.read_parquet(path).with_columns(title=pl.lit(None, dtype=pl.String)).write_parquet(path)


def other_columns(path: Path) -> None:
    pl.DataFrame({"a": [1]}).write_parquet(path)


EMPTY = written(b"")


@pytest.mark.parametrize(
    ("file", "damage", "command"),
    [
        ("lm/trie.npz", foreign_zip, "recommend"),
        ("lm/trie.npz", huge_array, "recommend"),
        ("lm/trie.npz", EMPTY, "recommend"),
        ("lm/catalog.parquet", cut, "recommend"),
        ("sequential/catalog.parquet", null_titles, "recommend"),
        ("sequential/catalog.parquet", other_columns, "evaluate"),
        ("sequential/README.md", written(b"\xff\xfe"), "recommend"),
        ("sequential/model/model.safetensors", cut, "recommend"),
        ("sequential/model/model.safetensors", EMPTY, "evaluate"),
        ("sequential/model/model.safetensors", other_weights, "recommend"),
        ("sequential/predictions.parquet", cut, "report"),
        ("sequential/predictions.parquet", other_columns, "report"),
        ("sequential/log.jsonl", written('{"step": 1}\n{"st\n{"step": 2}\n'), "report"),
        ("sequential/log.jsonl", written('{"step": 1}\n{"st\n{"step": 2}\n'), "resume"),
        ("sequential/log.jsonl", written(b"\xff\n"), "report"),
        ("sequential/log.jsonl", written("[]\n"), "report"),
        ("sequential/log.jsonl", written('{"step": "one"}\n'), "report"),
        ("sequential/log.jsonl", written('{"step": 1, "loss": NaN}\n'), "report"),
        ("sequential/log.jsonl", written("[" * 100_000 + "\n"), "report"),
        ("lm/model/model.safetensors", cut, "recommend"),
        ("lm/recipe.toml", written("x = " + "[" * 5000), "recommend"),
        ("lm/recipe.toml", written("x = " + "9" * 5000), "recommend"),
        ("lm/recipe.toml", written('evaluation = 3\nname = "x"'), "evaluate"),
    ],
)
def test_files_that_are_cut_or_of_another_kind(
    runs: Path, file: str, damage: Callable[[Path], None], command: str, capsys, monkeypatch
) -> None:
    damage(runs / file)
    status, errors = run(capsys, monkeypatch, *commands(runs / Path(file).parts[0])[command])
    assert status == 2, errors
    line = errors.splitlines()[-1]
    assert line.startswith("error: ")
    assert Path(file).name in line or f"{Path(file).parts[0]}/model" in line


@pytest.mark.parametrize("file", ["optimizer.pt", "rng.pt", "scheduler.pt", "weights.safetensors"])
@pytest.mark.parametrize("damage", [cut, EMPTY, written(b"\x80\x04junk")])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_damaged_checkpoint(
    runs: Path, kind: str, file: str, damage: Callable[[Path], None], capsys, monkeypatch
) -> None:
    folder = runs / kind
    if not (folder / "checkpoint-2" / file).is_file():
        pytest.skip("this kind has no such file")
    shutil.rmtree(folder / "checkpoint-4")
    damage(folder / "checkpoint-2" / file)
    status, errors = run(capsys, monkeypatch, *commands(folder)["resume"])
    assert status == 2, errors
    assert file in errors.splitlines()[-1] or "checkpoint-2" in errors.splitlines()[-1]


def test_a_predictions_file_of_another_evaluation(runs: Path, capsys, monkeypatch) -> None:
    metrics = read_json(runs / "sequential" / "metrics.json")
    write_json(runs / "sequential" / "metrics.json", metrics | {"n_users": 7})
    status, errors = run(capsys, monkeypatch, "report", runs / "sequential")
    assert (status, "40 rows, metrics.json is of 7" in errors) == (2, True)
    write_json(runs / "sequential" / "metrics.json", metrics)
    path = runs / "sequential" / "predictions.parquet"
    frame = pl.read_parquet(path)
    frame.with_columns(rank=pl.lit(None, dtype=pl.Int32)).write_parquet(path)
    status, errors = run(capsys, monkeypatch, "report", runs / "sequential")
    assert status == 2
    assert "predictions.parquet" in errors


def forget_hashes(folder: Path) -> None:
    """A folder that vouches for nothing, as one from before files were hashed, or one that is meant to deceive."""
    for file in (folder / name for name in ("run.json", "recommender.json", "metrics.json")):
        if file.is_file():
            write_json(
                file, {k: v for k, v in read_json(file).items() if k not in ("files", "log", "sha256")}
            )


def test_a_model_of_another_number_of_items(runs: Path, capsys, monkeypatch) -> None:
    forget_hashes(runs / "sequential")
    config = runs / "sequential" / "model" / "config.json"
    write_json(config, read_json(config) | {"n_items": 10**15})
    status, errors = run(capsys, monkeypatch, "recommend", runs / "sequential", "--history", "Red")
    assert (status, "config.json is damaged" in errors, "12 in the catalogue" in errors) == (2, True, True)
    catalog = runs / "sequential" / "catalog.parquet"
    pl.read_parquet(catalog).with_columns(train_targets=pl.lit(-1, dtype=pl.Int32)).write_parquet(catalog)
    status, errors = run(capsys, monkeypatch, "recommend", runs / "sequential", "--history", "Red")
    assert (status, "catalog.parquet is damaged" in errors) == (2, True)


def test_what_is_a_damaged_file_and_what_a_fault_of_ours(tmp_path: Path) -> None:
    for error in (KeyError("x"), RecursionError(), MemoryError(), EOFError(), IndexError("y")):
        with pytest.raises(UserError, match="a file is damaged"), reading("a file"):
            raise error
    with pytest.raises(PermissionError), reading("a file"):
        raise PermissionError(13, "Permission denied", "a file")
    with pytest.raises(KeyboardInterrupt), reading("a file"):
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="^as it is$"), reading("a file"):
        raise UserError("as it is")


def test_a_fault_of_ours_stays_a_traceback(runs: Path, monkeypatch) -> None:
    def fails(*args: object, **how: object) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr("triewise.app.compare.comparisons", fails)
    monkeypatch.setattr("sys.argv", ["triewise", "report", str(runs / "sequential")])
    with pytest.raises(KeyError, match="a fault of ours"):
        main()
