"""What the log of a training says of its steps: sums over micro-batches, and both parts of LML on request."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triewise.training import processes
from triewise.training.checkpoints import random_state, set_random_state
from triewise.training.losses import lml_parts

if TYPE_CHECKING:
    from triewise.training.objective import TitleLoss

PARTS = ("loss_invalid", "loss_choice", "grad_norm_invalid", "grad_norm_choice")


def measure_parts(module: TitleLoss, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Both parts of the language-modelling loss over some micro-batches, and the norms of their gradients.

    Each part is a mean over all target tokens, unweighted, at temperature 1; its gradient is that of the mean
    with respect to all trained parameters. One part after the other has the place of the step's gradients, which are
    not there yet, and draws the same random numbers. No gradient is kept and no temperature moves. Costs two
    forward and two backward passes, and no memory beyond a step's.

    Args:
        module: The model, in the mode to measure it in.
        batches: Of a `MicroBatches` of vocabulary support, on the module's device.

    Returns:
        A number for each name of ``PARTS``: nats, and nats per unit of weight; of the batches of all
        processes. MSL, Figure 3.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    state, losses, norms = random_state(device), torch.zeros(2, device=device), []
    for i in range(2):
        set_random_state(state, device)
        for batch in batches:
            logits = module.logits(batch)
            parts = lml_parts(logits, batch["target"], batch["node"], module.trie, batch["n_edges"])
            loss = parts[i].sum()
            loss.backward()  # type: ignore[no-untyped-call]
            losses[i] += loss.detach()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        processes.add_up(gradients)
        norms.append(nn.utils.get_total_norm(gradients))
        for p in parameters:
            p.grad = None
    processes.add_up([losses])
    tokens = sum(len(batch["target"]) for batch in batches)
    n_tokens = int(sum(theirs for (theirs,) in processes.gather([tokens])))
    values = torch.cat([losses, torch.stack(norms)]) / n_tokens
    return dict(zip(PARTS, values.tolist(), strict=True))


@dataclass
class Meter:
    """Sums since the last row of the log; they stay on the device, so that no step waits for them."""

    sums: Tensor  # (4,): loss, then the three of TitleLoss
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def add(self, loss: Tensor, sums: Tensor, counts: dict[str, int]) -> None:
        """Take in a micro-batch."""
        self.sums += torch.cat([loss.detach()[None], sums])
        self.counts.update(counts)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave a block out of the training time."""
        self.seconds += time.monotonic() - self.since
        try:
            yield
        finally:
            self.since = time.monotonic()

    def row(self) -> dict[str, float | None]:
        """Means since the last row, over all processes; then it starts anew.

        ``tokens_per_place`` are tokens of rows for each position that went through the body: below 1 where rows are
        padded, above 1 where what they share runs once.
        """
        with self.pause():
            n, (loss, zero, positive, w) = self.totals()
        values = {
            "loss": loss / n["steps"],
            "loss_zero_gain": zero / n["zero_gain"] if n["zero_gain"] else None,
            "loss_positive_gain": positive / n["positive_gain"] if n["positive_gain"] else None,
            "w": w / n["decisions"] if n["decisions"] else None,
            "tokens_per_place": n["tokens"] / n["places"] if n["places"] else None,
            "tokens_per_second": n["tokens"] / max(self.seconds, 1e-9),
        }
        self.sums.zero_()
        self.counts, self.seconds = Counter(), 0.0
        return values

    def totals(self) -> tuple[Counter[str], list[float]]:
        """Counts and sums of all processes; every one of them counts each step, the first one for all."""
        ours = self.counts if processes.is_first() else Counter({**self.counts, "steps": 0})
        everyones = processes.gather_objects((ours, self.sums.tolist()))
        counts = sum((theirs for theirs, _ in everyones), Counter[str]())
        return counts, [sum(values) for values in zip(*(sums for _, sums in everyones), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The sums of all processes as JSON values."""
        counts, sums = self.totals()
        return {"sums": sums, "counts": dict(counts), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.sums.copy_(torch.tensor(state["sums"]))
        self.counts, self.seconds = Counter(state["counts"]), state["seconds"]
