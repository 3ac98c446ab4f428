"""Several processes that train one model: who is who, and what they tell each other.

`torchrun` or ``accelerate launch`` starts them; one process alone passes through every function here unchanged.
What Python decides on (numbers, flags, objects) travels over gloo between CPUs, so that no step waits for a
device; tensors travel over the backend of their device.

Shape key: P processes, S micro-batches, B windows of one, M values of this process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.settings import TrainingSettings

T = TypeVar("T")
# One process prepares data and validates while the others wait; one that has died is noticed at once.
PATIENCE = timedelta(hours=2)
# What the launcher's FSDP has to be, and what to do where it is not.
_FSDP = {
    "VERSION": ("2", "add --fsdp_version 2"),
    "OFFLOAD_PARAMS": ("false", "launch without --fsdp_offload_params"),
    "ACTIVATION_CHECKPOINTING": ("false", "set training.gradient_checkpointing = true instead"),
}
_launched_with_fsdp = False


def start() -> None:
    """Meet the other processes, where `torchrun` or ``accelerate launch`` started several.

    Raises:
        UserError: ``accelerate launch`` wants DeepSpeed, or FSDP as it is not done here; what a launcher sets is no
            number, or not all there.
    """
    global _launched_with_fsdp
    if _asked_for("DEEPSPEED"):
        raise UserError("wanted DDP or FSDP2, got DeepSpeed; launch with --use_fsdp --fsdp_version 2 instead")
    if _asked_for("FSDP"):
        for name, (wanted, advice) in _FSDP.items():
            got = os.environ.get(f"FSDP_{name}", "1" if name == "VERSION" else wanted).lower()
            if got != wanted:
                raise UserError(f"wanted FSDP_{name} = {wanted}, got {got}; {advice}")
        # From here on it is ours: transformers would load, and accelerate wrap, in another way.
        del os.environ["ACCELERATE_USE_FSDP"]
        _launched_with_fsdp = True
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not os.environ.get(name, "0").isdigit():
            raise UserError(
                f"wanted {name} to be a number as torchrun sets it, got {os.environ[name]!r}; unset it for one process"
            )
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if absent:
        raise UserError(
            f"wanted {absent[0]} beside WORLD_SIZE = {os.environ['WORLD_SIZE']}, as torchrun sets it; start with "
            "torchrun, or unset WORLD_SIZE for one process"
        )
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group(backend, timeout=PATIENCE)


def _asked_for(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"


def finish() -> bool:
    """Go on alone; whether this process is the first one, which does what is left."""
    first = is_first()
    if count() > 1:
        dist.destroy_process_group()
    return first


def count() -> int:
    """Number of processes, P; 1 before `start`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def sharded() -> bool:
    """Whether each process trains with a part of the weights (FSDP2), not with all of them."""
    return _launched_with_fsdp and count() > 1


def is_first() -> bool:
    """Whether this process writes, prints and validates."""
    return rank() == 0


def share(settings: TrainingSettings) -> int:
    """Rows of one micro-batch in each process.

    Raises:
        UserError: They cannot be dealt out evenly.
    """
    rows, rest = divmod(settings.batch_size, settings.accumulation * count())
    if rest:
        raise UserError(
            f"wanted a batch_size that is a multiple of accumulation * processes, got {settings.batch_size} and "
            f"{settings.accumulation} * {count()}; change one of them"
        )
    return rows


def part(rows: NDArray[Any]) -> NDArray[Any]:
    """What this process takes of micro-batches that run at the same time: the columns of its turn.

    Args:
        rows: Window numbers (S, B) of all processes, B a multiple of P.

    Returns:
        (S, B / P); side by side, those of all processes are ``rows``.
    """
    size = rows.shape[1] // count()
    return rows[:, rank() * size :][:, :size]


def gather(numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of each process, as many of each, in float64: a list a process."""
    ours = torch.tensor(numbers, dtype=torch.float64)
    if count() == 1:
        return [ours.tolist()]
    found = [torch.empty_like(ours) for _ in range(count())]
    dist.all_gather(found, ours)
    return [one.tolist() for one in found]


def gather_objects(value: T) -> list[T]:
    """A picklable value of each process."""
    found: list[Any] = [value] * count()
    if count() > 1:
        dist.all_gather_object(found, value)
    return found


def concatenate(values: Tensor) -> Tensor:
    """The values (M,) of all processes end to end, process after process; M may differ, the dtype not."""
    if count() == 1:
        return values
    sizes = [int(n) for (n,) in gather([len(values)])]
    padded = values.new_zeros(max(sizes))
    padded[: len(values)] = values
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return torch.cat([one[:n] for one, n in zip(found, sizes, strict=True)])


def add_up(tensors: Sequence[Tensor]) -> None:
    """Put the sum over all processes in the place of each tensor."""
    if count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def on_first(call: Callable[[], T]) -> T:
    """What the first process gets from ``call``, in every process; the others wait.

    Raises:
        UserError: Or an OSError, as in the first process; RuntimeError in the others for any other error there.
    """
    if count() == 1:
        return call()
    outcome: list[Any] = [None, None]  # what it gave, and what the others raise
    raised: Exception | None = None
    if is_first():
        try:
            outcome[0] = call()
        except Exception as error:
            raised = error
            outcome[1] = error if isinstance(error, UserError | OSError) else RuntimeError(repr(error))
    dist.broadcast_object_list(outcome, src=0)
    if raised is not None or outcome[1] is not None:
        raise raised or outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def first_then_others(make: Callable[[], T]) -> T:
    """What ``make`` gives in each process; the first one is done before the others begin, and fills caches."""
    found: list[T] = []
    on_first(lambda: found.append(make()))
    return found[0] if found else make()


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that cannot go on when one of the processes has died.

    Raises:
        UserError: Another process cannot be reached.
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            "cannot reach the other processes: one of them has ended; see its own message, then go on from the last "
            "checkpoint with --resume"
        ) from None
