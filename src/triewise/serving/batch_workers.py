"""Who makes the parts of a batch: this process, processes beside it, or the actors of a Ray cluster.

Each engine yields the numbers of parts as they are done. A worker that dies loses nothing that is written, and its part
is made again.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from triewise.errors import UserError
from triewise.progress import note
from triewise.serving.batch_parts import Task, make_part

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

    from triewise.recommenders import SavedRecommender

ENGINES = ("local", "ray")
TRIES = 3  # of a part whose workers die
DEVICES = "CUDA_VISIBLE_DEVICES"  # of a process; read when torch first asks for a GPU


def default_workers() -> int:
    """One a GPU, else one a core that this process may use: each computes on one thread."""
    allowed = getattr(os, "sched_getaffinity", None)
    return n_devices() or (len(allowed(0)) if allowed else os.cpu_count() or 1)


def n_devices() -> int:
    """GPUs that this process may use."""
    import torch

    return torch.cuda.device_count()


def made_parts(task: Task, parts: Sequence[int], engine: str, workers: int) -> Iterator[int]:
    """Make parts, and yield each that is done.

    Raises:
        UserError: An unknown engine, no Ray, a part whose workers die, or what `make_part` says.
    """
    if engine not in ENGINES:
        raise UserError(f"wanted an engine among {', '.join(ENGINES)}, got {engine!r}")
    if engine == "ray":
        return _by_ray(task, parts, workers)
    return _here(task, parts) if workers == 1 else _beside(task, parts, workers)


def _here(task: Task, parts: Sequence[int]) -> Iterator[int]:
    """In this process."""
    recommender = task.loaded()
    for part in parts:
        make_part(task, recommender, part)
        yield part


# ---------------------------------------------------------------- processes beside this one
@dataclass
class _Worker:
    """A process, the line to it, and the part that it makes; None: there is none left for it."""

    process: SpawnProcess
    line: Connection
    part: int | None = None

    def give(self, waiting: deque[int]) -> None:
        """Have it make the next part."""
        self.part = waiting.popleft() if waiting else None
        if self.part is not None:
            with contextlib.suppress(OSError):  # it died meanwhile, which is seen where it should answer
                self.line.send(self.part)


def _beside(task: Task, parts: Sequence[int], workers: int) -> Iterator[int]:
    """In processes of their own; a part whose process died is made by another one."""
    waiting, deaths = deque(parts), Counter[int]()
    crew = [_hired(task, n) for n in range(min(workers, len(parts)))]
    try:
        for worker in crew:
            worker.give(waiting)
        while lines := [worker.line for worker in crew if worker.part is not None]:
            for line in wait(lines):
                n, worker = next((n, w) for n, w in enumerate(crew) if w.line is line)
                part = worker.part
                assert part is not None
                try:
                    mistake, fault = worker.line.recv()
                except (EOFError, OSError):
                    waiting.appendleft(part)
                    deaths[part] += 1
                    _look(worker, part, deaths[part])
                    crew[n] = worker = _hired(task, n)
                    worker.give(waiting)
                    continue
                if mistake or fault:
                    raise (
                        UserError(mistake) if mistake else RuntimeError(f"in a worker of the batch:\n{fault}")
                    )
                worker.give(waiting)
                yield part
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()


def _look(worker: _Worker, part: int, times: int) -> None:
    """Say that a worker died; UserError where its part has ended too many."""
    worker.process.join()
    code = worker.process.exitcode
    if times >= TRIES:
        raise UserError(
            f"part {part} has ended {times} workers (the last with status {code}): is there enough memory? Go on with "
            "--resume and fewer --workers"
        )
    note(f"a worker ended with status {code}; its part {part} is made again")


def _hired(task: Task, n: int) -> _Worker:
    """A process that waits for parts."""
    context = multiprocessing.get_context("spawn")
    line, theirs = context.Pipe()
    device = n % (n_devices() or n + 1)  # more workers than GPUs take turns
    process = context.Process(target=_serve, args=(theirs, task, device), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, line)


def _serve(line: Connection, task: Task, n: int) -> None:
    """Make the parts that come along a line, and say after each what went wrong: a mistake, a fault or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asked decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ[DEVICES] = _device_of(n, os.environ.get(DEVICES))
    recommender: SavedRecommender | None = None
    with contextlib.suppress(EOFError):
        while True:
            part = line.recv()
            try:
                recommender = recommender or task.loaded()
                make_part(task, recommender, part)
            except UserError as error:
                line.send((str(error), None))
            except Exception:
                line.send((None, traceback.format_exc()))
            else:
                line.send((None, None))


def _device_of(n: int, devices: str | None) -> str:
    """The GPU of a worker, of those that its parent may use; they take turns where there are fewer.

    >>> _device_of(3, "2,5"), _device_of(1, None)
    ('5', '1')
    """
    known = (devices or "").split(",")
    return known[n % len(known)] if devices else str(n)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ---------------------------------------------------------------- Ray
class RayWorker:
    """One actor of Ray Data: a recommender on a device of its own."""

    def __init__(self, task: Task) -> None:
        self.task, self.recommender = task, task.loaded()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make the parts of a block."""
        for part in batch["part"].tolist():
            make_part(self.task, self.recommender, part)
        return batch


def _by_ray(task: Task, parts: Sequence[int], workers: int) -> Iterator[int]:
    """By Ray Data, on the cluster that RAY_ADDRESS names, or on this machine.

    It hands out parts as actors are free, and starts an actor that died again; what it does twice is there already.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "engine 'ray' needs Ray: pip install 'triewise[ray]', or take --engine local"
        ) from None
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    made = rows.map_batches(
        RayWorker,
        fn_constructor_args=(task,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(parts))),
        num_cpus=1,
        num_gpus=1 if n_devices() else 0,
    )
    try:
        for row in made.iter_rows():
            yield int(row["part"])
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise UserError(str(error.cause)) from None
        raise
