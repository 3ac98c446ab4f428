"""From text alone to text with item vectors: LLaRA's curriculum, over whatever loss is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.training.objective import MicroBatches

if TYPE_CHECKING:
    from triewise.models import SlotIds
    from triewise.tokens import Trie
    from triewise.training.examples import Examples
    from triewise.training.objective import Learned, Objective, TitleLoss


def are_hybrid(uniform: NDArray[np.float64], length: float) -> NDArray[np.bool_]:
    """Which of the micro-batches 1, 2, ... have item vectors: those whose uniform draw is below c / length.

    Source: the code of LLaRA, where c goes on above the length.
    """
    return uniform < np.arange(1, len(uniform) + 1) / length


@dataclass(frozen=True)
class Curriculum:
    """What is learned, with micro-batches of text alone that grow rare.

    In such a micro-batch a placeholder stands at every slot, so projections get no gradient, not even a zero: an
    optimiser leaves them alone unless another micro-batch of the step has slots.

    Attributes:
        learned: The loss.
        slots: Which ids are slots.
        n_batches: Micro-batches of the whole run.
        length: From this one on all are hybrid, >= 1.
        seed: Of the draws.
    """

    learned: Learned
    slots: SlotIds
    n_batches: int
    length: int
    seed: int

    @property
    def objective(self) -> Objective:
        """That of the loss."""
        return self.learned.objective

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        return self.learned.settings() | {"curriculum": self.length}

    def divisor(self, total: Tensor) -> Tensor:
        """That of the loss."""
        return self.learned.divisor(total)

    def module(self, model: Any, trie: Trie) -> TitleLoss:
        """That of the loss."""
        return self.learned.module(model, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> MicroBatches:
        """Those of the loss; ``rows`` are the last ones of the run, so every resumed run draws the same."""
        drawn = np.random.default_rng([self.seed, 2]).random(self.n_batches)
        hybrid = are_hybrid(drawn, self.length)[self.n_batches - len(rows) :]
        return _TextFirst(self.learned.batches(examples, rows, packing), hybrid, self.slots)


class _TextFirst(MicroBatches):
    """Micro-batches, some of which have placeholders at their slots."""

    def __init__(self, batches: MicroBatches, hybrid: NDArray[np.bool_], slots: SlotIds) -> None:
        super().__init__(batches.examples, batches.objective, batches.rows, batches.packing)
        self.batches, self.hybrid, self.slots = batches, hybrid, slots
        self.asks_a_model = batches.asks_a_model

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.batches[index]
        if self.hybrid[index]:
            return item
        nothing = torch.tensor(self.slots.placeholder)
        names = {"input_ids", "prefix_ids"} & item.keys()
        return item | {n: torch.where(item[n] >= self.slots.first, nothing, item[n]) for n in names}
