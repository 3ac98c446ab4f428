"""Stopping a training run and going on: whole checkpoints, random states, the log up to a step, signals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field

from triewise.errors import UserError, reading
from triewise.files import (
    TEMPORARY,
    Hashed,
    Shape,
    atomic_folder,
    check_files,
    file_hashes,
    read_json,
    read_json_lines,
    read_record,
    remove,
    write_json,
    write_text,
)
from triewise.models import save_trained
from triewise.training import processes

LOG, BEST, STATE, WEIGHTS, BEST_WEIGHTS, SHARDS = (
    "log.jsonl",
    "best",
    "state.json",
    "weights.safetensors",
    "best.safetensors",
    "shards",
)
BEST_FACTS = "best.json"
ADVICE = "remove that folder to go on from the checkpoint before, or start anew with --overwrite"


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """The whole checkpoints of a run folder with their steps, oldest first."""
    named = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in out.glob("checkpoint-*")]
    return sorted((int(m[1]), path) for m, path in named if m and (path / STATE).is_file())


def resume_point(out: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; what a killed run, or without ``resume`` any earlier one, left is removed."""
    out.mkdir(parents=True, exist_ok=True)
    whole = checkpoints(out)
    for name in ("checkpoint-*", f"{BEST}*"):
        for path in out.glob(f"{TEMPORARY}*{name}"):
            shutil.rmtree(path)
    if resume and whole:
        return whole[-1][1]
    for path in [*(path for _, path in whole), out / BEST]:
        remove(path)
    (out / LOG).unlink(missing_ok=True)
    return None


class _Row(Shape):
    step: int
    loss: float | None = None
    loss_positive_gain: float | None = None
    loss_zero_gain: float | None = None
    temperature: float | None = None
    w: float | None = None
    valid: dict[str, float] = Field({})


def read_log(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``log.jsonl``; of an ended run those its ``run.json`` tells of, compared with their hash."""
    log = run / LOG
    if not log.is_file():
        raise UserError(f"wanted {log}, which is missing; restore it or train again")
    rows = read_json_lines(log, _Row)
    known = read_record(run, ()).get("log") if (run / "run.json").is_file() else None
    if known is None:
        return rows
    content = log.read_bytes()[: known["bytes"]]
    if hashlib.sha256(content).hexdigest() != known["sha256"]:
        raise UserError(
            f"{log} is not the file that was written (its sha256 differs); restore it or train again"
        )
    return rows[: content.count(b"\n")]


def cut_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the rows after a step, and a last line that was cut short; the rows that stay."""
    rows = read_json_lines(path, _Row, cut=True) if path.is_file() else []
    rows = [row for row in rows if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def link(source: Path, target: Path) -> None:
    """A second name for a file that is never changed in place; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def load_state(path: Path, take: Callable[[Any], None]) -> None:
    """Give ``take`` what ``torch.save`` wrote.

    Raises:
        UserError: The file is damaged, or what is in it cannot be taken.
    """
    with reading(path):
        take(torch.load(path, map_location="cpu", weights_only=True))


def random_state(device: torch.device) -> dict[str, Any]:
    """All random numbers that training may draw, in types that ``torch.load(weights_only=True)`` reads."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "cpu": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(*_which(device))
    return state


def random_file(process: int) -> str:
    """Name of the random state of a process in a checkpoint."""
    return f"rng-{process}.pt" if process else "rng.pt"


def seed_others(seed: int, step: int) -> None:
    """Dropout of its own for each process but the first, where no checkpoint has one for it."""
    if not processes.is_first():
        drawn = np.random.SeedSequence([seed, processes.rank(), step])
        torch.manual_seed(int(drawn.generate_state(1)[0]))


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue where `random_state` was taken."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], *_which(device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What a module of a device asks for, to know which of several is meant; of ``mps`` there is one."""
    return () if device.type == "mps" else (device,)


@contextlib.contextmanager
def signals_set(asked: threading.Event) -> Iterator[None]:
    """Let a first Ctrl-C or SIGTERM set ``asked``; then the handlers of before are back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield  # Python takes signals in the main thread only
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def ask(number: int, frame: Any) -> None:
        asked.set()
        put_back()

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in numbers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        put_back()


def keep_best(model: Any, out: Path, best: dict[str, Any]) -> None:
    """Put the weights as they are, and what makes them the best, into ``best/`` of a run folder."""
    with atomic_folder(out / BEST) as folder:
        save_trained(model, folder / WEIGHTS)
        write_json(folder / BEST_FACTS, best | {"sha256": file_hashes(folder)}, sealed=True)


def best_weights(out: Path) -> Path:
    """The weights that `keep_best` wrote; UserError where they are others."""
    check_files(out / BEST, read_json(out / BEST / BEST_FACTS, Hashed).get("sha256"), ADVICE)
    return out / BEST / WEIGHTS


def resumable(out: Path) -> list[Path]:
    """The folders of the whole checkpoints, oldest first."""
    return [path for _, path in checkpoints(out)]


def read_state(checkpoint: Path, shape: type[Hashed] = Hashed) -> dict[str, Any]:
    """What ``state.json`` of a checkpoint says; UserError where a file of it is not the one that was written."""
    state: dict[str, Any] = read_json(checkpoint / STATE, shape)
    check_files(checkpoint, state.pop("sha256", None), ADVICE)
    return state


def restore_folder(
    out: Path, checkpoint: Path, best: dict[str, Any] | None, step: int
) -> list[dict[str, Any]]:
    """Best weights and log of a run folder as they were at a checkpoint; the rows of the log."""
    if best is not None:
        with atomic_folder(out / BEST) as folder:
            link(checkpoint / BEST_WEIGHTS, folder / WEIGHTS)
            write_json(folder / BEST_FACTS, best | {"sha256": file_hashes(folder)}, sealed=True)
    return cut_log(out / LOG, step)
