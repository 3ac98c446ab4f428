"""Micro-batches that are built ahead: by workers beside the process that trains, into memory a GPU copies from.

Workers are processes. What they build does not depend on their number: a micro-batch follows from its window numbers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset

from triewise.errors import UserError, first_line

if TYPE_CHECKING:
    from triewise.training.objective import MicroBatches

AT_MOST = 4  # workers where nobody says: one builds 64 rows in 17 ms


def default_workers(device: torch.device) -> int:
    """How many workers there are where nobody says: none on a CPU, whose cores compute, or where Python starts anew.

    A worker that is no copy of this process would run the user's script again.
    """
    if device.type != "cuda" or _method() != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(0, min(AT_MOST, cores - 1))


class Ahead(DataLoader[dict[str, Any]]):
    """Micro-batches one after the other, each once.

    Args:
        batches: What is built.
        device: Where they are copied to; for CUDA they lie in pinned memory.
        workers: Processes that build them; 0: this one, when one is asked for.
    """

    def __init__(self, batches: MicroBatches, device: torch.device, workers: int) -> None:
        workers = min(workers, len(batches))
        super().__init__(
            _Told(batches) if workers else batches,
            batch_size=None,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            # Its own generator: the loader must not draw from the one that dropout uses.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals if workers else None,
            multiprocessing_context=_method() if workers else None,
        )
        self.dropped = batches.examples.prompts.dropped
        self._running: Any = None

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        # Else tokenizers warns in each copy of a process in which it ran in several threads.
        said = "TOKENIZERS_PARALLELISM" in os.environ
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            self._running = super().__iter__()
        finally:
            if not said:
                del os.environ["TOKENIZERS_PARALLELISM"]
        for item in self._running:
            if "error" in item:
                raise item["error"]
            titles, prompts = item.pop("dropped", (0, 0))
            self.dropped.titles += titles
            self.dropped.prompts += prompts
            yield item

    def close(self) -> None:
        """End the workers, whatever they are at."""
        if self.num_workers and self._running is not None:
            self._running._shutdown_workers()
            for worker in self._running._workers:
                if worker.is_alive():
                    worker.kill()
        self._running = None


class _Told(Dataset[dict[str, Any]]):
    """Micro-batches with what else a worker knows: how many titles their prompts lost, or what the user must change."""

    def __init__(self, batches: MicroBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        dropped = self.batches.examples.prompts.dropped
        titles, prompts = dropped.titles, dropped.prompts
        try:
            item = self.batches[index]
        except UserError as error:
            return {"error": error}
        return item | {"dropped": (dropped.titles - titles, dropped.prompts - prompts)}


@contextlib.contextmanager
def all_workers_alive() -> Iterator[None]:
    """A block that cannot go on when a worker has ended by itself.

    Raises:
        UserError: One has.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that builds batches has ended: {first_line(error)}; most likely memory was short: free some, "
            "and go on from the last checkpoint with --resume"
        ) from None


def _method() -> str:
    """How workers are started: as copies of this process where that is safe, which needs no second start of Python."""
    methods = multiprocessing.get_all_start_methods()
    return "fork" if "fork" in methods and hasattr(os, "sched_getaffinity") else "spawn"


def _leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM are for the process that trains: it finishes its step, for which it needs batches."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
