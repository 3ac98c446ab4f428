"""What a call may not do to the machine or its user: code of others, paths, escapes, numbers without bounds."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import triewise
from tests import worlds
from tests.app.test_damaged import RECIPE, SHAPES, forget_hashes, run
from triewise.app import evaluate_run, report_runs, train_run
from triewise.app.bounds import check_sizes
from triewise.app.compare import _shareable
from triewise.app.folders import data_of, way
from triewise.arrays import check_memory, memory_here
from triewise.cache import cache_folder
from triewise.cli import main
from triewise.data.catalog import allowed_items
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.plain import clean, json_line
from triewise.progress import is_first_process
from triewise.recipe import Recipe, _keys, dump_recipe, load_recipe
from triewise.training import processes

EVIL = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import Qwen2Config, Qwen2ForCausalLM

class EvilConfig(Qwen2Config):
    model_type = "evil"

class EvilModel(Qwen2ForCausalLM):
    config_class = EvilConfig
"""


@pytest.fixture
def recipes(tmp_path: Path) -> dict[str, Path]:
    """A recipe of each kind, of four steps on twelve titles."""
    raw, found = worlds.write_msl_folder(tmp_path / "office"), {}
    for name, shape in SHAPES.items():
        found[name] = tmp_path / f"{name}.toml"
        data = (tmp_path / "data").as_posix()
        text = RECIPE.format(name=name, shape=shape, raw=raw.as_posix(), data=data)
        found[name].write_text(text, encoding="utf-8")
    return found


# ---------------------------------------------------------------- code that comes with a model
def make_evil(folder: Path, marker: Path) -> None:
    """The model of a run folder brings code, and its recipe says that it may run."""
    config = read_json(folder / "model" / "config.json")
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"},
    }
    write_json(folder / "model" / "config.json", config)
    forget_hashes(folder)
    (folder / "model" / "evil.py").write_text(EVIL.format(marker=str(marker)), encoding="utf-8")
    recipe = folder / "recipe.toml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("trust_remote_code = false", "trust_remote_code = true"), encoding="utf-8")


def test_a_run_folder_grants_nothing(recipes: dict[str, Path], tmp_path: Path, capsys, monkeypatch) -> None:
    folder, marker = tmp_path / "run", tmp_path / "marker"
    assert run(capsys, monkeypatch, "run", recipes["lm"], "--out", folder)[0] == 0
    make_evil(folder, marker)
    for words in (
        ["evaluate"],
        ["report"],
        ["recommend", "--history", "Red"],
        ["teach", "--out", tmp_path / "t"],
    ):
        status, errors = run(capsys, monkeypatch, words[0], folder, *words[1:])
        assert (status, marker.exists()) == (2, False), words
        assert "--trust-remote-code" in errors.splitlines()[-1]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run(capsys, monkeypatch, "recommend", folder, "--history", "Red", "--trust-remote-code")
    assert marker.exists(), "with the flag it runs"


def test_a_recipe_asks_and_the_flag_grants(
    recipes: dict[str, Path], tmp_path: Path, capsys, monkeypatch
) -> None:
    words = ["train", recipes["lm"], "--out", tmp_path / "run", "--set", "backbone.trust_remote_code=true"]
    status, errors = run(capsys, monkeypatch, *words)
    assert (status, "the recipe lm asks to run code that comes with 'tiny'; add --trust" in errors) == (
        2,
        True,
    )
    assert not (tmp_path / "run").exists()
    assert run(capsys, monkeypatch, *words, "--trust-remote-code")[0] == 0


def test_an_assistant_or_a_teacher_grants_nothing(recipes: dict[str, Path], tmp_path: Path) -> None:
    helper, student = tmp_path / "helper", load_recipe(recipes["lm"])
    train_run(student, helper)
    make_evil(helper, tmp_path / "marker")
    softened = load_recipe(recipes["lm"], [f"objective.soft_targets={helper}"])
    with pytest.raises(UserError, match="helper asks to run code"):
        train_run(softened, tmp_path / "soft")
    train_run(student, tmp_path / "run")
    assisted = load_recipe(
        recipes["lm"], [f"evaluation.assistant={helper}", "evaluation.assistant_weight=0.5"]
    )
    with pytest.raises(UserError, match="helper asks to run code"):
        evaluate_run(tmp_path / "run", assisted.evaluation)
    assert not (tmp_path / "marker").exists()


# ---------------------------------------------------------------- names and text
@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a/b", "a\\b", "a b", ".x", "x" * 61, "a\n", "\x1b"]
)
def test_a_name_is_one_part_of_a_path(name: str) -> None:
    with pytest.raises(UserError, match="name must be at most 60 letters"):
        load_recipe("demo/msl", [f"name={json.dumps(name)}"])


def test_names_of_any_alphabet() -> None:
    assert load_recipe("demo/msl", ['name="büro-漢字_1.2"']).name == "büro-漢字_1.2"


@pytest.mark.parametrize("evil", ["\x1b]0;PWNED\x07", "\x9b31m", "\x7f", "a\u202eb", "\u2066x\u2069", "x\ry"])
def test_what_others_wrote_is_cleaned(evil: str, tmp_path: Path, capsys, monkeypatch) -> None:
    assert clean(evil) == "".join(
        " " if c == "\r" else "\ufffd" if ord(c) > 126 or ord(c) < 32 else c for c in evil
    )
    assert json.loads(json_line({"title": evil})) == {"title": evil}
    assert not set(json_line([evil])) & set(evil) - set(string.ascii_letters + string.digits + '[]";\r')
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "items.csv").write_text(f'item_id,"{evil}"\n1,x\n', encoding="utf-8", newline="")
    (folder / "ratings.csv").write_text(f'user_id,item_id,"{evil}"\n1,1,1\n', encoding="utf-8", newline="")
    for words in (
        ["prepare", f"csv:{folder}", "--out", tmp_path / "out"],
        ["evaluate", f"x{evil}"],
        ["train", evil],
    ):
        status, errors = run(capsys, monkeypatch, *words)
        assert status == 2
        assert not set(errors) & set("\x1b\x07\x9b\x7f\u202e\u2066\u2069\r")


def test_words_that_are_no_utf8(capsys, monkeypatch) -> None:
    status, errors = run(capsys, monkeypatch, "train", "demo/msl", "--out", "a\udcffb")
    assert (status, errors) == (
        2,
        "error: wanted UTF-8 on the command line, got 'a\\udcffb'; rename that file or correct the word\n",
    )


@pytest.mark.parametrize("title", ["a\x7fb", 'q"\\', "\x00\x1f", "\u2028\x85", "\U0001f3ac"])
def test_a_recipe_is_read_as_it_was_written(title: str, tmp_path: Path) -> None:
    recipe = load_recipe(
        "demo/msl", [f"title={json.dumps(title, ensure_ascii=False)}".replace("\x7f", "\\u007f")]
    )
    assert recipe.title == title
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(tmp_path / "recipe.toml") == recipe


def test_a_recipe_that_would_be_read_as_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for written in ("1", "[" * 9):
        monkeypatch.setattr("triewise.recipe._toml", lambda value, text=written: text)
        with pytest.raises(UserError, match="the recipe msl would not be read as it is written"):
            dump_recipe(load_recipe("demo/msl"))


# ---------------------------------------------------------------- settings
VALUES = [
    *("0", "1", "-1", "1e400", "nan", "inf", "-inf", "true", "[]", "{}", "1.5", "0.0", "1e-320", "-0.0"),
    *(
        "[" * 3000,
        "[" * 90 + "]" * 90,
        "9" * 5000,
        "0x" + "f" * 5000,
        "1" + "0" * 22,
        "4294967296",
        "x" * 100_000,
    ),
    *('"a\\u007fb"', '""', "'../x'", "/abs", "a\x1b[31m", "a\udcffb", "'\u202e'", "1979-05-27", "07:32:00"),
    *("{a=1}", "[1,[2,[3]]]", '"""x\ny"""', "msl", "'sasrec'", "\x00", "[inf,1]", "[1.0,5.0]", '"\\ud83d"'),
]


def test_any_setting_is_taken_or_refused_in_one_line() -> None:
    """3,000 combinations of keys and values, drawn with a seed."""
    rng, keys, taken = random.Random(17), _keys(Recipe), 0
    letters = string.printable + "é\udcff\x7f"
    for _ in range(3000):
        changes = []
        for _ in range(rng.choice([1, 1, 1, 2])):
            word = "".join(rng.choice(letters + ".=") for _ in range(rng.randrange(12)))
            value = "".join(rng.choice(letters + "[]{}\"'") for _ in range(rng.randrange(20)))
            key = rng.choice(keys) if rng.random() < 0.9 else word
            changes.append(f"{key}={rng.choice(VALUES) if rng.random() < 0.8 else value}")
        try:
            recipe = load_recipe(rng.choice(["demo/msl", "demo/sasrec"]), changes)
            dump_recipe(recipe)
            taken += 1
        except UserError as error:
            assert len(str(error).splitlines()) == 1 or "\n" in repr(changes), changes
            assert len(str(error)) < 1500
    assert taken > 30


def test_any_recipe_file_is_taken_or_refused(tmp_path: Path) -> None:
    """500 recipe files with a few bytes changed, drawn with a seed."""
    rng, file = random.Random(17), tmp_path / "recipe.toml"
    text = dump_recipe(load_recipe("demo/msl")).encode()
    pieces = [
        b"[",
        b"{",
        b"=",
        b"\n",
        b"\x00",
        b"\xff",
        b'"',
        b"9" * 5000,
        b"[" * 2000,
        b"nan",
        b"-",
        b"e999",
        b"[[a]]",
    ]
    for _ in range(500):
        changed = bytearray(text)
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(changed))
            changed[place : place + rng.randrange(3)] = rng.choice(pieces)
        file.write_bytes(changed)
        try:
            dump_recipe(load_recipe(file))
        except UserError:
            continue


def test_lists_in_lists_are_no_value() -> None:
    with pytest.raises(UserError, match=r"wanted a value in --set, got lists in lists: 'seed=\[\[\["):
        load_recipe("demo/msl", ["seed=" + "[" * 5000])


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize(
    ("kind", "change", "line"),
    [
        ("lm", "seed=4294967296", "seed: Input should be less than or equal to 4294967295"),
        ("lm", "training.steps=1000000000000", "less than or equal to 2147483647"),
        (
            "lm",
            "training.steps=2147483647",
            "training.steps = 2147483647 times training.batch_size = 16 would take",
        ),
        (
            "lm",
            "training.batch_size=1000000000",
            "times training.batch_size = 1000000000 would take at least 32 GB",
        ),
        (
            "lm",
            "evaluation.beams=1000000000",
            "evaluation.beams: Input should be less than or equal to 1000000",
        ),
        (
            "lm",
            "backbone.lora.rank=1000000",
            "backbone.lora.rank: Input should be less than or equal to 8192",
        ),
        ("lm", "backbone.tiny.width=1000000000", "backbone.tiny with width = 1000000000, layers = 1"),
        ("lm", "backbone.tiny.heads=1000", "width // heads must be even and above 0, got 16 and 1000"),
        ("lm", "backbone.tiny.vocabulary=2000000000", "less than or equal to 1000000"),
        ("lm", "backbone.device=meta", "got 'meta': it computes nothing"),
        ("lm", "evaluation.allow=nowhere.txt", "wanted a file of item ids in nowhere.txt"),
        (
            "lm",
            "training.learning_rate=1e400",
            "training.learning_rate: Input should be a finite number, got inf",
        ),
        ("lm", "objective.adaptive.clamp=[1.0,inf]", "should be a finite number"),
        ("sequential", "seed=18446744073709551616", "seed: Input should be less than or equal to 4294967295"),
        (
            "sequential",
            "sequential.width=1000000000",
            "sequential.width = 1000000000, blocks = 1 and data.max_history",
        ),
        ("sequential", "sequential.device=meta", "got 'meta': it computes nothing"),
    ],
)
def test_numbers_are_refused_before_the_work(
    recipes: dict[str, Path], tmp_path: Path, kind: str, change: str, line: str, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 17)  # 17 GB
    status, errors = run(
        capsys, monkeypatch, "train", recipes[kind], "--out", tmp_path / "run", "--set", change
    )
    assert (status, line in errors.splitlines()[-1]) == (2, True), errors
    assert not (tmp_path / "run" / "run.json").exists()


def test_negatives_take_memory(recipes: dict[str, Path]) -> None:
    recipe = load_recipe(recipes["sequential"], ["sequential.loss=bce", "sequential.negatives=2000000000"])
    with pytest.raises(UserError, match="rows with sequential.negatives = 2000000000 would take at least"):
        check_sizes(recipe, 12)


def test_memory_that_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr("triewise.arrays.memory_here", lambda: memory_here(Path("nowhere")))
    check_memory(1e12, "a terabyte")
    with pytest.raises(UserError, match="a lot would take at least 1e\\+04 GB"):
        check_memory(1e13, "a lot")


GROUPS = {
    "version 2": ("0::/a/job\n", {"a/memory.max": "70000\n", "a/job/memory.max": "max\n"}, 70000),
    "version 2 of a container": ("0::/\n", {"memory.max": "60000\n"}, 60000),
    "version 1": ("4:cpu,memory:/a\n1:cpu:/\n", {"memory/a/memory.limit_in_bytes": "50000\n"}, 50000),
    "version 1 of a container": (
        "4:memory:/docker/0\n0::/\n",
        {"memory/memory.limit_in_bytes": "40000\n"},
        40000,
    ),
    "no limit": ("4:memory:/\n0::/\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"}, 1 << 34),
    "no groups": ("", {}, 1 << 34),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_limit_of_a_container_counts(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 1 << 17)  # 17 GB
    ours, files, limit = GROUPS[name]
    for path, content in {
        "proc/self/cgroup": ours,
        **{f"sys/fs/cgroup/{k}": v for k, v in files.items()},
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(content, encoding="utf-8")
    assert memory_here(tmp_path) == limit


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rate", ["1e25", "1e30"])
def test_what_diverges_is_never_a_checkpoint(
    recipes: dict[str, Path], tmp_path: Path, kind: str, rate: str, capsys, monkeypatch
) -> None:
    words = ["--set", f"training.learning_rate={rate}", "--set", "training.checkpoint_every=1"]
    words += ["--set", "training.evaluate_every=0", "--set", "training.warmup_steps=0"]
    status, errors = run(capsys, monkeypatch, "train", recipes[kind], "--out", tmp_path / "run", *words)
    assert status == 2
    assert "lower the learning rate" in errors.splitlines()[-1]
    from safetensors.torch import load_file

    for file in (tmp_path / "run").glob("checkpoint-*/weights.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_weights_that_are_not_finite_are_not_kept(
    recipes: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    from triewise.training.item_fit import _Steps

    one = _Steps.one

    def spoil(self: Any, index: Any) -> None:
        one(self, index)
        if self.state.step == 1:
            with torch.no_grad():
                self.model.bias[0] = torch.nan

    monkeypatch.setattr(_Steps, "one", spoil)
    with pytest.raises(UserError, match="weights are not finite after step 2; lower the learning rate"):
        train_run(load_recipe(recipes["sequential"]), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_more_items_than_there_are(recipes: dict[str, Path], tmp_path: Path, capsys, monkeypatch) -> None:
    folder = tmp_path / "run"
    assert (
        run(
            capsys,
            monkeypatch,
            "run",
            recipes["sequential"],
            "--out",
            folder,
            "--set",
            "evaluation.k=2147483647",
        )[0]
        == 0
    )
    assert run(capsys, monkeypatch, "recommend", folder, "--history", "Red", "-k", 10**15)[0] == 0
    with pytest.raises(UserError, match="the best 1000000000000000 items of 1 users would take at least"):
        triewise.load(folder).recommend([[0]], 10**15)
    status, errors = run(capsys, monkeypatch, "teach", folder, "--out", tmp_path / "t", "-k", 10**15)
    assert (status, "items of 160 rows would take" in errors or "would take at least" in errors) == (2, True)
    catalog = triewise.load(folder).catalog
    words = [word for title in dict.fromkeys(catalog.title) for word in ("--exclude", title)]
    status, errors = run(capsys, monkeypatch, "recommend", folder, "--history", "Red", *words)
    assert (status, "no title is left to recommend" in errors) == (0, True)


def test_ids_of_an_allow_list_stand_as_they_are(tmp_path: Path) -> None:
    from triewise.data import Catalog

    ids = (" 1", "a\u2028b", "c\x85d", "e\x0bf", "2")
    catalog, file = Catalog.from_titles(ids, ids), tmp_path / "allow.txt"
    file.write_bytes("\r\n".join([*ids, "", "  2  "]).encode())
    assert allowed_items(file, catalog).tolist() == [0, 1, 2, 3, 4, 4]


# ---------------------------------------------------------------- what is shown and shared
def test_a_report_names_no_path_and_says_that_it_shows_users(
    recipes: dict[str, Path], tmp_path: Path, capsys, monkeypatch
) -> None:
    folder = tmp_path / "run"
    assert run(capsys, monkeypatch, "run", recipes["lm"], "--out", folder)[0] == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert str(tmp_path) not in page
    assert "triewise run lm.toml --out run" in page
    assert "with their ids and histories" in page
    assert run(capsys, monkeypatch, "report", folder, "--anonymous", "--out", tmp_path / "a.html")[0] == 0
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "with their ids and histories" not in page
    assert "<h3>User 1 <span>" in page


def test_a_command_that_is_shared() -> None:
    assert _shareable("triewise train '/home/a b/x.toml' --set data.folder=/data/x") == (
        "triewise train x.toml --set data.folder=x"
    )
    assert _shareable("triewise train it's --out /home/me/x") == "triewise train 'it'\"'\"'s' --out x"


def test_a_sequential_model_scores_given_items(recipes: dict[str, Path], tmp_path: Path) -> None:
    train_run(load_recipe(recipes["sequential"]), tmp_path / "run")
    recommender = triewise.load(tmp_path / "run")
    all_items = np.arange(recommender.catalog.n_items)
    scores = recommender.score([[0, 1], []], [all_items, [3]])
    ranking = recommender.recommend([[0, 1]], None)
    np.testing.assert_allclose(scores[0, ranking.items[0]], ranking.scores[0], atol=1e-6)
    assert scores[1, 0] == pytest.approx(recommender.score([[]], [[3]])[0, 0])
    assert (scores[1, 1:] == -np.inf).all()
    with pytest.raises(UserError, match="wanted candidates lists for 1 users, got 2"):
        recommender.score([[0]], [[1], [2]])
    with pytest.raises(UserError):
        recommender.score([[0]], [[99]])


def test_data_that_were_moved_with_their_run(recipes: dict[str, Path], tmp_path: Path) -> None:
    project = tmp_path / "project"
    recipe = load_recipe(recipes["sequential"], [f"data.folder={project / 'data'}"])
    train_run(recipe, project / "runs" / "a")
    record = read_json(project / "runs" / "a" / "run.json")
    assert record["data"]["relative"] == "../../data"
    project.rename(tmp_path / "moved")
    evaluate_run(tmp_path / "moved" / "runs" / "a")
    report_runs([tmp_path / "moved" / "runs" / "a"], tmp_path / "report.html")
    (tmp_path / "moved" / "data").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="the data of .* is neither in .*moved.data nor in .*project.data"):
        evaluate_run(tmp_path / "moved" / "runs" / "a")
    (tmp_path / "elsewhere").rename(project)
    record["data"] |= {"folder": str(project)}
    assert data_of(tmp_path / "moved" / "runs" / "a", record).folder == project
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(os.path, "relpath", lambda *_: (_ for _ in ()).throw(ValueError("another drive")))
        assert way(project, project) is None


# ---------------------------------------------------------------- the environment
def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*args: object, **how: object) -> str:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("platformdirs.user_cache_dir", fails)
    monkeypatch.delenv("TRIEWISE_CACHE", raising=False)
    with pytest.raises(UserError, match="knows no home folder .*; set TRIEWISE_CACHE to one"):
        cache_folder()
    monkeypatch.setenv("TRIEWISE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_odd_numbers_of_processes(recipes: dict[str, Path], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert is_first_process()
    status, errors = run(capsys, monkeypatch, "train", recipes["lm"], "--out", tmp_path / "run")
    assert (status, errors) == (
        2,
        "error: wanted WORLD_SIZE to be a number as torchrun sets it, got 'x'; unset it for one process\n",
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="wanted RANK beside WORLD_SIZE = 2, as torchrun sets it"):
        processes.start()


def test_a_source_tree_that_is_not_installed(tmp_path: Path) -> None:
    source = Path(triewise.__file__).parents[1]
    code = "from triewise.app.folders import versions; print(versions()['triewise'])"
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("stop", [KeyboardInterrupt, EOFError])
def test_an_interrupt_says_so(stop: type[BaseException], capsys, monkeypatch) -> None:
    def fails(*args: object, **how: object) -> None:
        raise stop

    monkeypatch.setattr("triewise.app.report_runs", fails)
    monkeypatch.setattr("sys.argv", ["triewise", "report", "x"])
    if stop is EOFError:
        with pytest.raises(EOFError):
            main()
        return
    with pytest.raises(SystemExit, match="130"):
        main()
    assert capsys.readouterr().err == "interrupted\n"
