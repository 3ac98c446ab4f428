"""An attack on folders: kills, damaged files, two processes at once, full disks, odd settings.

``python -m tests.attack --seconds 300`` prints how often each thing came out how. Nothing may give another result in
silence, end in a traceback, hang, or leave a folder that the same command (a training: with ``--resume``) does not
take. The same seed attacks in the same order; how far it comes depends on the time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch

from tests.attack_child import HANGS, KILLED, Children, Outcome, call
from tests.worlds import write_msl_folder
from triewise.errors import UserError
from triewise.files import TEMPORARY, file_names, read_json, sha256_file
from triewise.locks import LOCK
from triewise.recipe import dump_recipe, load_recipe, parse_recipe

KINDS = {
    "lm": "[backbone.tiny]\nvocabulary = 280\nwidth = 16\nlayers = 1\nheads = 2\nfeed_forward = 32\n",
    "seq": '[sequential]\nencoder = "sasrec"\nwidth = 8\nblocks = 1\n',
}
RECIPE = """name = "{kind}"
[data]
source = "msl:raw/office"
folder = "data"
max_history = 4
{model}
[training]
supervision = "every"
steps = 3
batch_size = 8
checkpoint_every = 1
evaluate_every = 1
valid_users = 4
log_every = 1
keep_checkpoints = 1
[evaluation]
users = 20
"""
PREPARE = ("prepare", "msl:raw/office", "--out", "data", "--max-history", "4")
BAD = ("another result", "a traceback", "no line", "stuck", "left behind", HANGS)
SHARES = {"damage": 0.25, "kill": 0.4, "pair": 0.2, "full disk": 0.07, "settings": 0.08}


class Bad(Exception):
    """Something that may not be: its kind, and what was seen."""


@dataclass
class Attack:
    """One attack in a folder of its own, which is the working folder.

    Attributes:
        rng: Decides what comes next.
        children: Where commands are killed.
        counts: How often what came out how.
        bad: What may not be, in words.
        wanted: What each command gives in an undamaged folder, by kind and command.
        changes: How many file changes each command makes.
    """

    rng: random.Random
    children: Children = field(default_factory=Children)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    wanted: dict[tuple[str, str], Any] = field(default_factory=dict)
    changes: dict[tuple[str, str], int] = field(default_factory=dict)

    def build(self) -> None:
        """The world that is attacked, under ``whole/``, and what its commands give."""
        Path("whole/raw").mkdir(parents=True)
        with inside("whole"):
            write_msl_folder(Path("raw/office"), n_users=20)
            succeed(call(*PREPARE))
            for kind, model in KINDS.items():
                Path(f"{kind}.toml").write_text(RECIPE.format(kind=kind, model=model), encoding="utf-8")
                succeed(
                    call(
                        "train",
                        f"{kind}.toml",
                        "--out",
                        f"half-{kind}",
                        "--set",
                        "training.time_limit_s=1e-9",
                    )
                )
                succeed(call("train", f"{kind}.toml", "--out", kind))
                succeed(call("evaluate", kind))
                succeed(call("report", kind))
                users = pl.read_parquet("data/test.parquet").select("user_id", ids="history")
                ids = pl.read_parquet("data/catalog.parquet")["item_id"].to_list()
                rows = ({"user_id": user, "ids": [ids[i] for i in items]} for user, items in users.rows())
                text = "\n".join([*map(json.dumps, rows), "no user"])
                Path("users.jsonl").write_text(text, encoding="utf-8")
                succeed(call(*COMMANDS["batch"](kind)))
                for file in ("manifest.json", PARTS[-1]):
                    Path(f"begun-{kind}", file).unlink()
        for kind in KINDS:
            for name in COMMANDS:
                with self.fresh():
                    self.wanted[kind, name] = self.result(kind, name, self.succeeds(name, kind))
            for name in WRITES:
                with self.fresh():
                    found = succeed(self.children.start(*COMMANDS[name](kind)).wait())
                    self.changes[kind, name] = found.changes

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """A copy of the world as the working folder."""
        shutil.rmtree("copy", ignore_errors=True)
        shutil.copytree("whole", "copy", symlinks=True)
        with inside("copy"):
            yield

    def succeeds(self, name: str, kind: str, *more: str) -> Outcome:
        """A command that has to succeed."""
        return succeed(call(*COMMANDS[name](kind), *more))

    def result(self, kind: str, name: str, outcome: Outcome) -> Any:
        """What a command decided, for comparison."""
        if name == "recommend":
            return json.loads(outcome.out)["recommendations"]
        if name == "batch":
            return {file: sha256_file(Path(f"begun-{kind}", file)) for file in PARTS}
        if name == "report":
            return re.sub(r"ranked in [\d.]+", "", Path(kind, "report.html").read_text(encoding="utf-8"))
        if name in ("evaluate", "beam"):
            metrics = read_json(Path(kind, "metrics.json"))
            return {k: v for k, v in metrics.items() if k != "timing"}
        if name == "prepare":
            return {file: sha256_file(Path("data", file)) for file in file_names(Path("data"))}
        folder = Path(f"half-{kind}" if name == "resume" else kind)
        return {file: sha256_file(folder / "model" / file) for file in file_names(folder / "model")}

    def judge(self, kind: str, name: str, outcome: Outcome) -> str:
        """How a command in a damaged folder came out; Bad where that may not be."""
        if outcome.trace:
            raise Bad(HANGS if outcome.trace == HANGS else "a traceback", outcome.trace)
        if outcome.code == 0:
            if self.result(kind, name, outcome) != self.wanted[kind, name]:
                raise Bad("another result", outcome.out[-300:])
            return "the same result"
        if not outcome.told:
            raise Bad("no line", f"{outcome.code} {outcome.err[-300:]}")
        return "refused"

    # ------------------------------------------------------------------ damage
    def damage(self) -> str:
        """A file of the world is another one: one bit, cut short, other JSON, or gone; then a command that reads it."""
        kind, name = self.rng.choice(list(KINDS)), self.rng.choice(list(READS))
        with self.fresh():
            files = [
                file for place in READS[name](kind) for file in sorted(Path().glob(place)) if file.is_file()
            ]
            file = self.rng.choice(files)
            how = self.rng.choice(["flip"] * 4 + ["cut", "empty", "shape", "gone", "noise"])
            damaged(file, how, self.rng)
            self.now = f"{how} {file}, then {name}"
            # What a person is shown afterwards decides nothing: a card, a drawn report.
            return self.judge(kind, name, call(*COMMANDS[name](kind)))

    # ------------------------------------------------------------------ kills
    def kill(self) -> str:
        """A command is killed before one of its file changes; then the same command has to do its work."""
        kind, name = self.rng.choice(list(KINDS)), self.rng.choice(list(WRITES))
        n = self.rng.randint(1, self.changes[kind, name])
        self.now = f"{name} of {kind} killed before change {n} of {self.changes[kind, name]}"
        with self.fresh():
            found = self.children.start(*COMMANDS[name](kind), kill_at=n).wait()
            if found.code not in (KILLED, 0):
                raise Bad("a traceback" if found.trace else "no line", found.trace or found.err)
            self.look(kind, name)
            self.again(kind, name)
        return "the same result"

    def look(self, kind: str, name: str) -> None:
        """Whoever looks into the folder sees the result before or that after, or a line."""
        for command in ("report", "recommend") if name not in ("prepare", "resume") else ():
            found = call(*COMMANDS[command](kind))
            if found.trace:
                raise Bad("a traceback", found.trace)
            if found.code and not found.told:
                raise Bad("no line", found.err)
        found = call("verify", {"prepare": "data", "resume": f"half-{kind}"}.get(name, kind))
        if found.trace or found.code not in (0, 2):
            raise Bad("a traceback", found.trace)

    def again(self, kind: str, name: str) -> None:
        """The same command does its work, the folder is whole, and nothing is left of what was killed."""
        found = call(*COMMANDS[name](kind))
        if found.code and name in ("train", "overwrite") and "--resume" in found.err:
            found = call(*COMMANDS["train"](kind), "--resume")
        if found.trace:
            raise Bad("a traceback", found.trace)
        if found.code:
            raise Bad("stuck", found.err[-400:])
        if self.result(kind, name, found) != self.wanted[kind, name]:
            raise Bad("another result", found.err[-400:])
        place = {"prepare": "data", "resume": f"half-{kind}", "train": f"new-{kind}"}.get(name, kind)
        seen = call("verify", place)
        if seen.code:
            raise Bad("stuck", seen.out[-600:] + seen.err[-200:] + seen.trace)
        left = [p for p in Path().rglob("*") if p.name.startswith(TEMPORARY) or p.name.endswith(LOCK)]
        if left:
            raise Bad("left behind", str(left))

    # ------------------------------------------------------------------ two at once
    def pair(self) -> str:
        """Two commands at the same time in one folder: each does its work or says who is there before it."""
        kind = self.rng.choice(list(KINDS))
        names = [self.rng.choice(list(WRITES)) for _ in range(2)]
        n, delay = self.rng.randint(1, self.changes[kind, names[0]]), self.rng.choice([None, 0, 0.05, 0.2])
        self.now = f"{names[1]} of {kind} begins before change {n} of {names[0]}, which goes on "
        self.now += "after it" if delay is None else f"after {delay} s"
        with self.fresh():
            first = self.children.start(*COMMANDS[names[0]](kind), stop_at=n)
            first.reach()
            second = self.children.start(*COMMANDS[names[1]](kind))
            found = [] if delay is not None else [second.wait()]
            time.sleep(delay or 0)
            first.go()
            found = [first.wait(), *(found or [second.wait()])]
            for outcome in found:
                if outcome.trace:
                    raise Bad(HANGS if outcome.trace == HANGS else "a traceback", outcome.trace)
                if outcome.code and not outcome.told:
                    raise Bad("no line", outcome.err)
            if all(outcome.code for outcome in found):
                raise Bad("stuck", " ".join(outcome.err[-200:] for outcome in found))
            for name, outcome in zip(names, found, strict=True):
                ended = outcome.code == 0 and name in ("train", "resume", "overwrite")
                if ended and self.result(kind, name, outcome) != self.wanted[kind, name]:
                    raise Bad("another result", name)
            for name in sorted(names, key=WRITES.index):
                if name == "report" and "overwrite" in names:  # of a run with other times
                    succeed(call("evaluate", kind))
                    succeed(call("report", kind))
                else:
                    self.again(kind, name)
        return "one was told" if any(outcome.code for outcome in found) else "both did"

    # ------------------------------------------------------------------ full disk
    def full_disk(self) -> str:
        """No file may grow beyond some size: one line, and with room the same command does its work."""
        kind, name = self.rng.choice(list(KINDS)), self.rng.choice(list(WRITES))
        limit = int(10 ** self.rng.uniform(1.5, 5))
        self.now = f"{name} of {kind} with room for {limit} bytes a file"
        with self.fresh():
            found = self.children.start(*COMMANDS[name](kind), limit=limit).wait()
            if found.trace:
                raise Bad(HANGS if found.trace == HANGS else "a traceback", found.trace)
            if found.code and not (found.told and "no space left" in found.err):
                raise Bad("no line", found.err)
            if name in ("evaluate", "report") and call("report", kind, "--out", "x.html").code:
                raise Bad("stuck", "the evaluation before is gone")
            self.again(kind, name)
        return "refused" if found.code else "the same result"

    # ------------------------------------------------------------------ settings
    def settings(self) -> str:
        """A recipe with an odd value is refused in one line, or reads its own dump."""
        kind = self.rng.choice(list(KINDS))
        text = Path("whole", f"{kind}.toml").read_text(encoding="utf-8")
        key, value = self.rng.choice(keys()), self.rng.choice(ODD)
        self.now = f"{key}={value[:60]!r}"
        try:
            if self.rng.random() < 0.3:
                at = self.rng.randrange(len(text))
                text = text[:at] + self.rng.choice(ODD)[:20] + text[at + self.rng.randrange(3) :]
                Path("fuzz.toml").write_text(text, encoding="utf-8", errors="surrogatepass")
                self.now = f"recipe with {text[max(at - 10, 0) : at + 20]!r}"
                recipe = load_recipe("fuzz.toml")
            else:
                recipe = load_recipe(f"whole/{kind}.toml", [f"{key}={value}"])
        except UserError as error:
            if "\n" in str(error):
                raise Bad("no line", str(error)) from None
            return "refused"
        except Exception as error:
            raise Bad("a traceback", repr(error)[:300]) from None
        if parse_recipe(tomllib.loads(dump_recipe(recipe)), "dump") != recipe:
            raise Bad("another result", "the dump is another recipe")
        return "taken"

    # ------------------------------------------------------------------ all
    def go(self, seconds: float) -> None:
        """Attack for a time, each way for its share."""
        ways: dict[str, Callable[[], str]] = {
            **{"damage": self.damage, "kill": self.kill, "pair": self.pair},
            **{"full disk": self.full_disk, "settings": self.settings},
        }
        spent, started = dict.fromkeys(ways, 0.0), time.monotonic()
        while time.monotonic() - started < seconds:
            way = min(ways, key=lambda name: spent[name] / SHARES[name])
            begun = time.monotonic()
            place = os.getcwd()
            try:
                self.counts[way, ways[way]()] += 1
            except Bad as bad:
                self.counts[way, bad.args[0]] += 1
                self.bad.append(f"{bad.args[0]}: {self.now}: {bad.args[1][-1500:]}")
                print(self.bad[-1], file=sys.stderr, flush=True)
            finally:
                os.chdir(place)
            spent[way] += time.monotonic() - begun

    @property
    def table(self) -> str:
        """How often what came out how."""
        return "\n".join(f"{way:<10} {how:<16} {n:6,}" for (way, how), n in sorted(self.counts.items()))


COMMANDS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "prepare": lambda kind: PREPARE,
    "train": lambda kind: ("train", f"{kind}.toml", "--out", f"new-{kind}"),
    "resume": lambda kind: ("train", f"{kind}.toml", "--out", f"half-{kind}", "--resume"),
    "overwrite": lambda kind: ("train", f"{kind}.toml", "--out", kind, "--overwrite"),
    "evaluate": lambda kind: ("evaluate", kind),
    "report": lambda kind: ("report", kind),
    "batch": lambda kind: (
        *("batch", kind, "--input", "users.jsonl", "--out", f"begun-{kind}", "--rows", "12", "--resume"),
        *("--workers", "1", "-k", "3"),
    ),
    "recommend": lambda kind: ("recommend", kind, "--history", "Red", "-k", "5", "--json"),
}
_OF_A_RUN = (
    "{0}/run.json {0}/recipe.toml {0}/recommender.json {0}/trie.npz {0}/catalog.parquet {0}/model/**/*"
)
_LEARNED = "half-{0}/checkpoint-*/* half-{0}/run.json half-{0}/recipe.toml half-{0}/log.jsonl data/*"
READS: dict[str, Callable[[str], list[str]]] = {  # what a command reads
    "recommend": lambda kind: _OF_A_RUN.format(kind).split(),
    "evaluate": lambda kind: [*_OF_A_RUN.format(kind).split(), "data/*"],
    "report": lambda kind: [
        *_OF_A_RUN.format(kind).split(),
        *(f"{kind}/{name}" for name in ("metrics.json", "predictions.parquet", "log.jsonl")),
        "data/*",
    ],
    "resume": lambda kind: _LEARNED.format(kind).split(),
    "train": lambda kind: ["data/*"],
    "batch": lambda kind: [*_OF_A_RUN.format(kind).split(), f"begun-{kind}/*"],
}
WRITES = ("prepare", "train", "resume", "overwrite", "evaluate", "report", "batch")
PARTS = ("part-000000.parquet", "part-000001.parquet")  # of a batch
SHAPES = (
    "[]",
    "null",
    "{}",
    "3",
    '"x"',
    "[" * 100_000,
    '{"a": ' + "1" * 5000 + "}",
    '{"format": 1}',
    "{",
    "",
)
ODD = (
    *(
        "",
        "x",
        "-1",
        "0",
        "1",
        "1e400",
        "inf",
        "-inf",
        "nan",
        "1" * 5000,
        "[" * 3000,
        "{}",
        "[]",
        "[1, 2]",
        "true",
    ),
    *(
        "null",
        "'a\u007fb'",
        '"\\u202e"',
        "\ud800",
        "9223372036854775808",
        "1e-400",
        "../../x",
        "/etc/passwd",
        "NaN",
    ),
    *(
        "a=b=c",
        '"""',
        "0x10",
        "1_000",
        "1979-05-27",
        "4294967296",
        "-0.0",
        '"trie"',
        "'vocabulary'",
        "\u2028",
        "é",
    ),
)


def keys() -> list[str]:
    """Keys of recipes, and some that are none."""
    from triewise.recipe import Recipe

    found = ["name", "title", "seed", "nothing", "training.nothing", "data", "", ".", "a.b.c.d"]
    for section, about in Recipe.model_fields.items():
        inner = getattr(about.annotation, "model_fields", {})
        found += [f"{section}.{key}" for key in inner]
    return found


def damaged(file: Path, how: str, rng: random.Random) -> None:
    """Make a file another one."""
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "empty" or not content:
        file.write_bytes(b"")
    elif how == "cut":
        file.write_bytes(content[: rng.randrange(len(content))])
    elif how == "shape":
        file.write_text(rng.choice(SHAPES), encoding="utf-8")
    elif how == "noise":
        start = rng.randrange(len(content))
        content[start:] = rng.randbytes(len(content) - start)
        file.write_bytes(content)
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


def succeed(outcome: Outcome) -> Outcome:
    """The same; an error where the command did not succeed."""
    assert outcome.code == 0, outcome
    return outcome


@contextlib.contextmanager
def inside(folder: str) -> Iterator[None]:
    """A block with another working folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def attack(seconds: float, seed: int = 0) -> Attack:
    """Build a world in an empty folder, in memory where it can be (there a sync costs nothing), and attack it."""
    torch.set_num_threads(1)
    made = Attack(random.Random(seed))
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder, inside(folder):
        made.build()
        made.go(seconds)
    return made


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = attack(given.seconds, given.seed)
    print(found.table)
    raise SystemExit(bool(found.bad))


if __name__ == "__main__":
    main()
