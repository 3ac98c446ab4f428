"""What frozen layers give for each window, on disk: later epochs run the layers above them alone.

``states/`` in a run folder holds a file of vectors, window behind window in the order in which they were first seen,
and an index with a key: the hash of the frozen weights, of all that batches depend on, and the shape. States of another
key are not read. The folder is removed when a run has ended; one that goes on finds what it had at its last checkpoint.

Shape key: B rows, L tokens, D width, M target positions, W windows.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from triewise.errors import UserError
from triewise.files import atomic_path, remove
from triewise.models import Reached, body, head_weight, layers_of, rope_switch

if TYPE_CHECKING:
    from triewise.settings import TrainingSettings
    from triewise.training.examples import Examples

FOLDER, DATA, INDEX = "states", "states.bin", "index.npz"
_PROBE = 12  # tokens on which it is tried whether states can be kept


def kept_states(
    model: Any, examples: Examples, settings: TrainingSettings, out: Path, alone: bool = True
) -> KeptStates | None:
    """Where the states of ``settings.freeze`` layers are kept; None where there are none, or none would be read again.

    Args:
        model: A causal LM whose first layers are frozen, see `models.depth.freeze_first`.
        examples: What is learned from.
        settings: Budget and optimiser.
        out: The run folder.
        alone: Whether one process trains.

    Raises:
        UserError: States that are not always the same or do not stand for the layers, several processes, or a disk
            that is too small.
    """
    seen_once = settings.steps * settings.batch_size <= len(examples)
    if not (settings.freeze and settings.keep_states) or seen_once:
        return None
    layers = list(layers_of(model)[: settings.freeze])
    _check(model, layers, alone)
    device, width = head_weight(model).device, int(body(model)(_ids(model)).last_hidden_state.shape[-1])
    tokens = int(examples.size.sum()) + len(examples) * len(examples.prompts.encode([]))
    size, free = tokens * width * 4, shutil.disk_usage(_there(out)).free
    if size > free:
        raise UserError(
            f"the states of frozen layers would take {size / 1e9:.1f} GB, and {out} has {free / 1e9:.1f} GB free; set "
            "training.keep_states = false"
        )
    digest = hashlib.sha256(f"{examples.fingerprint()} {settings.freeze} {width} {device.type}".encode())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    return KeptStates(model, layers, out / FOLDER, digest.hexdigest(), len(examples), width)


def _there(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def _ids(model: Any) -> Tensor:
    weight = head_weight(model)
    return torch.linspace(0.1, 0.9, _PROBE, device=weight.device).mul(weight.shape[0]).long()[None]


@torch.no_grad()
def _check(model: Any, layers: list[Any], alone: bool) -> None:
    """Refuse layers whose output is drawn, or is not all that the layers above them get."""
    reason, was = None, model.training
    if not alone:
        reason = "several processes"
    elif rope_switch(model) is not None:
        reason = "positions that depend on the longest row"
    else:
        ids = _ids(model)
        with torch.random.fork_rng():
            runs = [(_below(model.train(), layers, ids)[0]) for _ in range(2)]
        model.eval()
        whole = body(model)(input_ids=ids, use_cache=False).last_hidden_state
        states, shape = _below(model, layers, ids)
        with _instead(layers, states, shape):
            above = body(model)(input_ids=ids, use_cache=False).last_hidden_state
        if not torch.equal(*runs):
            reason = "dropout below"
        elif not torch.allclose(whole, above, atol=1e-5 * float(whole.abs().max())):
            reason = f"more than states between the layers of {type(model).__name__}"
    model.train(was)
    if reason:
        raise UserError(
            f"wanted frozen layers whose states can be kept, got {reason}; set training.keep_states = false"
        )


def _below(model: Any, layers: list[Any], ids: Tensor) -> tuple[Tensor, int | None]:
    """States (B, L, D) after the last of some layers; and of how many things its output is a tuple, None: of none."""
    given: list[Any] = []

    def stop(module: Any, arguments: Any, output: Any) -> None:
        given.append(output)
        raise Reached

    hook = layers[-1].register_forward_hook(stop)
    try:
        with torch.no_grad(), contextlib.suppress(Reached):
            body(model)(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    [output] = given
    return (output, None) if isinstance(output, Tensor) else (output[0], len(output))


@contextlib.contextmanager
def _instead(layers: list[Any], states: Tensor, shape: int | None) -> Iterator[None]:
    """Let layers compute nothing meanwhile, and the last of them give ``states``."""

    def give(hidden: Tensor) -> Any:
        return hidden if shape is None else (hidden, *[None] * (shape - 1))

    def passing(*arguments: Any, **named: Any) -> Any:
        return give(arguments[0] if arguments else named["hidden_states"])

    for layer in layers:
        layer.forward = passing
    layers[-1].forward = lambda *arguments, **named: give(states)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class KeptStates:
    """The states of windows that were seen.

    Args:
        model: A causal LM.
        layers: Its frozen layers.
        folder: Where the files are; what is there of another key is removed.
        key: Hex SHA-256 of all that states depend on.
        n_windows: Number of windows.
        width: Of a state.
    """

    def __init__(
        self, model: Any, layers: list[Any], folder: Path, key: str, n_windows: int, width: int
    ) -> None:
        self.model, self.layers, self.folder, self.key = model, layers, folder, key
        self.width = width
        self.start = np.full(n_windows, -1, dtype=np.int64)  # in bytes; -1: not seen
        self.end = 0
        self.computed = 0  # rows that went through the frozen layers
        self.shape: int | None = None
        self.file: Any = None

    def __enter__(self) -> KeptStates:
        """Open the files, as the last checkpoint left them or empty."""
        index = self.folder / INDEX
        if index.is_file():
            with np.load(index) as known:
                same = str(known["key"]) == self.key and (self.folder / DATA).stat().st_size >= int(
                    known["end"]
                )
                if same:
                    self.start, self.end = known["start"], int(known["end"])
                    self.shape = int(known["shape"]) if int(known["shape"]) else None
        if not self.end:
            remove(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = (self.folder / DATA).open("r+b" if self.end else "w+b")
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file; `ended` removes the folder."""
        self.file.close()

    def save(self) -> None:
        """Write the index, after what it speaks of."""
        self.file.flush()
        with atomic_path(self.folder / INDEX) as temporary, temporary.open("wb") as file:
            shape = self.shape or 0
            np.savez(
                file, key=np.array(self.key), start=self.start, end=np.array(self.end), shape=np.array(shape)
            )

    def ended(self) -> None:
        """Remove the files of a run that has come to its end."""
        remove(self.folder)

    @contextlib.contextmanager
    def instead(self, window: Tensor, ids: Tensor, position: Tensor) -> Iterator[None]:
        """The model with what its frozen layers give for some rows in their place.

        Args:
            window: Numbers of the windows, int64 (B,).
            ids: int64 (B, L).
            position: Into the flattened ids, int64 (M,): what stands behind the last one of a row is not needed.
        """
        row, column = np.divmod(position.numpy(force=True), ids.shape[1])
        needed = np.zeros(len(ids), dtype=np.int64)
        np.maximum.at(needed, row, column + 1)
        numbers = window.numpy(force=True)
        new = np.flatnonzero((self.start[numbers] < 0) & (needed > 0))
        if len(new):
            at = torch.from_numpy(new).to(ids.device)
            states, self.shape = _below(self.model, self.layers, ids[at, : int(needed[new].max())])
            self.computed += len(new)
            for place, state in zip(new, states.float().cpu().numpy(), strict=True):
                self.file.seek(self.end)
                self.start[numbers[place]] = self.end
                self.end += self.file.write(np.ascontiguousarray(state[: needed[place]]).data)
        width = self.width
        rows = np.zeros((*ids.shape, width), dtype=np.float32)
        for place in np.flatnonzero(needed):
            self.file.seek(int(self.start[numbers[place]]))
            found = self.file.read(int(needed[place]) * width * 4)
            rows[place, : needed[place]] = np.frombuffer(found, dtype=np.float32).reshape(-1, width)
        kind = head_weight(self.model).dtype
        with _instead(self.layers, torch.from_numpy(rows).to(ids.device, kind), self.shape):
            yield
