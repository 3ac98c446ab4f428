r"""Stage 1 of A-LLMRec: vectors of items and of their titles brought to one code, while both stay readable.

An auto-encoder of items, ``z = sigmoid(W_1 e)``, ``e' = W_2 z``, and one of texts, ``q`` and ``s'``, are trained
together with the text encoder; item vectors e and states u of the sequential model are frozen. Codes z of all items are
what the language model reads afterwards.

Shape key: B rows, I items, W windows, d width of items, t of texts, c of codes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from triewise.files import atomic_path
from triewise.progress import progress
from triewise.training import processes

if TYPE_CHECKING:
    from triewise.models import SequentialModel, TitleEncoder
    from triewise.settings import AlignmentSettings
    from triewise.training.windows import Windows

AT_ONCE = 256  # histories that are encoded together


class AutoEncoder(nn.Module):
    """A vector (B, d) to a code (B, c) in (0, 1), and back."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, code), nn.Linear(code, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Code and vector again."""
        code = self.down(x).sigmoid()
        return code, self.up(code)


class AlignmentLosses(NamedTuple):
    """Scalars; ``total`` is what is lowered."""

    total: Tensor
    recommendation: Tensor
    matching: Tensor
    items: Tensor
    texts: Tensor


def alignment_losses(
    codes: tuple[AutoEncoder, AutoEncoder],
    state: Tensor,
    items: tuple[Tensor, Tensor],
    texts: tuple[Tensor, Tensor],
    weights: tuple[float, float] = (0.5, 0.2),
) -> AlignmentLosses:
    r"""The four losses of the alignment.

    Recommendation: ``BCE(mean_d(u e'_+), 1) + BCE(mean_d(u e'_-), 0)``, a mean over the dimensions where others have
    a sum. Matching: ``MSE(z, q)``, both sides with gradient. Reconstructions: ``MSE(e', e)``, and ``MSE(s', s)`` with
    s held constant as the target. Each is that of the item bought next plus that of another one.

    Args:
        codes: The auto-encoders of items and of texts.
        state: u (B, d), the sequential model at the end of a history.
        items: Vectors (B, d) of the next item and of a sampled one.
        texts: Vectors (B, t) of their titles.
        weights: Of the two reconstructions.

    Source: A-LLMRec, arXiv:2404.11343, and its code.
    """
    of_items, of_texts = codes
    recommendation = matching = item_loss = text_loss = state.new_zeros(())
    for sign, e, s in zip((-1, 1), items, texts, strict=True):
        (z, e_again), (q, s_again) = of_items(e), of_texts(s)
        recommendation = recommendation + F.softplus(sign * (state * e_again).mean(1)).mean()
        matching = matching + F.mse_loss(z, q)
        item_loss = item_loss + F.mse_loss(e_again, e)
        text_loss = text_loss + F.mse_loss(s_again, s.detach())
    total = recommendation + matching + weights[0] * item_loss + weights[1] * text_loss
    return AlignmentLosses(total, recommendation, matching, item_loss, text_loss)


def align(
    encoder: SequentialModel,
    titles: TitleEncoder,
    windows: Windows,
    settings: AlignmentSettings,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Codes (I, c) of all items, float32, on the CPU; the global random numbers stay as they are.

    Args:
        encoder: Frozen; its item vectors and its states are read.
        titles: Trained along.
        windows: Each with one target.
        settings: Budget, sizes and weights.
        seed: Of initial weights, dropout, order and negatives.
        device: Where it is done.
    """
    rng, n_items = np.random.default_rng([seed, 3]), encoder.n_items
    target = windows.items.values[windows.items.offsets[1:] - 1].astype(np.int64)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        encoder, titles = encoder.to(device), titles.to(device).train()
        table, states = encoder.items.weight[1:-1].detach(), _states(encoder, windows)
        codes = [AutoEncoder(width, settings.width).to(device) for width in (table.shape[1], titles.width)]
        trained = [p for module in (*codes, titles) for p in module.parameters()]
        optimizer = torch.optim.Adam(trained, lr=settings.learning_rate, betas=(0.9, 0.98))
        with progress("alignment of items and titles", settings.steps, "steps") as advance:
            for _ in range(settings.steps):
                row = rng.integers(len(target), size=settings.batch_size)
                other = rng.integers(n_items - 1, size=len(row))
                other += other >= target[row]
                pair = [torch.from_numpy(items).to(device) for items in (target[row], other)]
                losses = alignment_losses(
                    (codes[0], codes[1]),
                    states[torch.from_numpy(row).to(device)],
                    (table[pair[0]], table[pair[1]]),
                    (titles(pair[0]), titles(pair[1])),
                    (settings.item_weight, settings.text_weight),
                )
                optimizer.zero_grad()
                losses.total.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                advance(1)
        with torch.no_grad():
            found: Tensor = codes[0](table)[0].cpu()
    return found


def kept_alignment(
    path: Path,
    encoder: SequentialModel,
    titles: TitleEncoder,
    windows: Windows,
    settings: AlignmentSettings,
    seed: int,
    device: torch.device,
) -> Tensor:
    """`align` from a file, or done by the first process and written there; a file of other inputs is replaced."""
    digest = hashlib.sha256(f"{settings.model_dump_json()} {seed}".encode())
    for array in (windows.items.values, windows.items.offsets):
        digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    for tensor in (*encoder.state_dict().values(), *titles.buffers()):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    key = digest.hexdigest()

    def read() -> Tensor | None:
        try:
            with safe_open(path, "pt") as file:
                codes: Tensor = file.get_tensor("codes")
                return codes if file.metadata() == {"key": key, "sha256": _digest(codes)} else None
        except (OSError, SafetensorError):
            return None

    def make() -> Tensor:
        codes = align(encoder, titles, windows, settings, seed, device)
        with atomic_path(path) as temporary:
            save_file({"codes": codes}, temporary, metadata={"key": key, "sha256": _digest(codes)})
        return codes

    def read_or_make() -> Tensor:
        kept = read()
        return make() if kept is None else kept

    return processes.on_first(read_or_make)


def _digest(codes: Tensor) -> str:
    return hashlib.sha256(codes.cpu().contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def _states(encoder: SequentialModel, windows: Windows) -> Tensor:
    """U (W, d) after the history of each window."""
    found = []
    for start in range(0, len(windows), AT_ONCE):
        rows = windows.items[start : start + AT_ONCE]
        found.append(encoder.states_after([row[:-1].tolist() for row in rows]))
    return torch.cat(found)
