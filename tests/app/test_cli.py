"""The commands: raw files to a report, JSON on stdout alone, and one line for a user's mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.model_families import tokenizer
from tests.worlds import write_msl_folder
from triewise.cli import app, main


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: object
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command."""
    monkeypatch.setattr("sys.argv", ["triewise", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        main()
    output = capsys.readouterr()
    return int(stop.value.code or 0), output.out, output.err


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msl_folder(tmp_path_factory.mktemp("cli") / "office")


def test_describe_says_what_a_tokenizer_does_to_titles(tmp_path: Path, capsys, monkeypatch) -> None:
    prepared, uncased = tmp_path / "prepared", tmp_path / "uncased"
    raw = write_msl_folder(tmp_path / "office")
    names = raw / "id2name4Rec.json"
    titles = json.loads(names.read_text(encoding="utf-8")) | {"1": "Silver River", "2": "silver RIVER"}
    names.write_text(json.dumps(titles), encoding="utf-8")
    tokenizer("words").save_pretrained(uncased)
    assert run(capsys, monkeypatch, "prepare", f"msl:{raw}", "--out", prepared)[0] == 0
    _, output, errors = run(
        capsys, monkeypatch, "describe", prepared, "--json", "--tokenizer", uncased, "--template", "plain"
    )
    assert json.loads(output)["shared_titles"] >= 2
    assert "titles share their tokens with another title: " in errors
    assert "titles contain tokens the tokenizer does not know: " in errors
    assert "are not read back: 'Sun' comes back as 'sun'" in errors
    _, output, errors = run(capsys, monkeypatch, "describe", prepared, "--json")
    assert (json.loads(output)["shared_titles"], errors) == (0, "")


RECIPE = """
name = "small"
[data]
source = "msl:{raw}"
folder = "{prepared}"
[backbone.tiny]
vocabulary = 300
width = 16
layers = 1
heads = 2
feed_forward = 32
[training]
supervision = "every"
steps = 5
learning_rate = 1e-2
"""


def test_from_raw_files_to_a_report(raw: Path, capsys, monkeypatch) -> None:
    prepared, out = raw.parent / "prepared", raw.parent / "run"
    status, output, _ = run(capsys, monkeypatch, "prepare", f"msl:{raw}", "--out", prepared, "--json")
    assert status == 0
    assert json.loads(output)["counts"]["items"] == 12
    status, output, _ = run(capsys, monkeypatch, "describe", prepared, "--json")
    facts = json.loads(output)
    assert (status, facts["items"], facts["test_rows"]) == (0, 12, 40)
    assert 0 < facts["forced_share"] < 1
    assert "forced" in run(capsys, monkeypatch, "describe", prepared)[1]

    recipe = raw.parent / "small.toml"
    recipe.write_text(RECIPE.format(raw=raw.as_posix(), prepared=prepared.as_posix()), encoding="utf-8")
    status, output, errors = run(capsys, monkeypatch, "train", recipe, "--out", out, "--set", "seed=3")
    assert (status, "5 steps" in output, "5/5 steps" in errors) == (0, True, True)
    status, output, _ = run(capsys, monkeypatch, "evaluate", out, "--set", "evaluation.users=9", "--json")
    assert (status, json.loads(output)["n_users"]) == (0, 9)
    status, output, _ = run(capsys, monkeypatch, "evaluate", out)
    assert (status, "HR@10" in output, "\x1b" in output) == (0, True, False)
    status, output, _ = run(capsys, monkeypatch, "evaluate", out, "--against", out, "--json")
    assert json.loads(output)["against"][0]["difference"] == 0

    status, output, _ = run(capsys, monkeypatch, "recommend", out, "--history", "Red Dawn", "-k", 3, "--json")
    found = json.loads(output)
    assert len(found["recommendations"]) == 3
    assert "Red Dawn" not in [line["title"] for line in found["recommendations"]]
    assert found["certified"] is True
    stock = raw.parent / "stock.txt"
    stock.write_text("3\n4\n5\n", encoding="utf-8")  # Blue Moon, Blue, Green Mile
    words = ["--allow", stock, "--exclude", "Blue", "--search", "beam", "--json"]
    status, output, _ = run(capsys, monkeypatch, "recommend", out, "--history", "Red Dawn", *words)
    titles = {line["title"] for line in json.loads(output)["recommendations"]}
    assert (status, titles) == (0, {"Blue Moon", "Green Mile"})
    status, output, _ = run(capsys, monkeypatch, "report", out)
    assert Path(output.strip()).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_run_does_everything(raw: Path, capsys, monkeypatch) -> None:
    recipe = raw.parent / "whole.toml"
    prepared = raw.parent / "prepared-too"
    recipe.write_text(RECIPE.format(raw=raw.as_posix(), prepared=prepared.as_posix()), encoding="utf-8")
    status, output, _ = run(capsys, monkeypatch, "run", recipe, "--out", raw.parent / "whole", "--json")
    assert (status, json.loads(output)["split"]) == (0, "test")
    assert (raw.parent / "whole" / "report.html").is_file()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["evaluate", "nowhere"], "wanted a run folder, but nowhere has no run.json"),
        (["recommend", "nowhere", "--history", "x"], "nowhere is no folder"),
        (["train", "nothing.toml", "--out", "x"], "wanted a recipe file or one of"),
        (["train", "demo/msl", "--out", "x", "--set", "training.stepz=3"], "did you mean 'training.steps'"),
        (["prepare", "amazon:books", "--out", "x"], "wanted the folder books"),
        (["prepare", "nonsense", "--out", "x"], "ml-100k"),
        (["describe", "nowhere"], "nowhere"),
        (["report", "nowhere"], "has no run.json"),
        (["train", "demo/msl"], "Missing option '--out'"),
        (["train", "demo/msl", "--out", "x", "--stepz", "3"], "No such option: --stepz"),
        (["nonsense"], "No such command 'nonsense'"),
        (["prepare", "ml-100k", "--out", "x", "--max-history", "0"], "max-history"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    words: list[str], line: str, capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output, errors = run(capsys, monkeypatch, *words)
    assert (status, output) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert line in errors
    assert not list(tmp_path.iterdir())


def test_help_names_every_command(capsys, monkeypatch) -> None:
    _, output, _ = run(capsys, monkeypatch, "--help")
    for command in (
        "demo",
        "prepare",
        "describe",
        "train",
        "evaluate",
        "teach",
        "run",
        "recommend",
        "report",
    ):
        assert command in output
    for command in app.registered_commands:
        assert "[" not in (command.callback.__doc__ or "")  # would be taken for markup, and left out
