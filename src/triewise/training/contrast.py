r"""CFT: what a title gains from the history, learned beside the title itself.

The counterfactual pass runs the same model on a prompt without history (`Prompts.without_history`). The
difference of both logits is the effect of the history, and it is trained to predict the target too.

Shape key: M target positions, V vocabulary, B windows of a micro-batch, L tokens, U different target titles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.errors import UserError
from triewise.training.objective import MicroBatches, Objective, TitleLoss, TokenLosses, lengths, title_sums

if TYPE_CHECKING:
    from triewise.tokens import Trie
    from triewise.training.examples import Examples


def contrast_parts(
    objective: Objective, strength: float, logits: Tensor, without: Tensor, *rest: Any
) -> TokenLosses:
    r"""The loss of CFT per token, with the support, temperature and weights of ``objective``.

    .. math:: \ell_m = w_m \, \mathrm{nll}(f_m, y_m) + \lambda \, w_m \, \mathrm{nll}(f_m - f^0_m, y_m)

    Differences of log-probabilities over the vocabulary would give the same: a softmax does not see what is
    added to all logits. Both passes carry gradient.

    Args:
        objective: Support and temperature of both terms; no adaptive temperature.
        strength: Lambda, >= 0.
        logits: Next-token logits with the history (M, V), any float dtype.
        without: Those of the same tokens without the history (M, V).
        rest: Target and what follows, as of `Objective.parts`.

    Returns:
        ``loss`` of both terms; ``contribution`` and ``nll`` of the first, so that the divisor is the sum of the
        weights and lambda = 0 is the objective itself.

    Source: the code of CFT and of IGD, which agree; the formula of the CFT paper was not read.
    """
    factual = objective.parts(logits, *rest)
    effect = logits.float() - without.float()
    contrast = objective.parts(effect, *rest)
    return factual._replace(loss=factual.loss + strength * contrast.loss)


@dataclass(frozen=True)
class Contrast:
    """CFT: an objective, and the same on what the history adds.

    Attributes:
        objective: Of both terms. Its authors' is Pos: vocabulary support and position weights.
        strength: Lambda, > 0.
        without_history: Which prompt stands in the second pass; see `Prompts.without_history`.

    Raises:
        UserError: A strength that is not > 0, or an adaptive temperature.
    """

    objective: Objective
    strength: float
    without_history: str = "no-input"

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.strength > 0:
            raise UserError(
                f"wanted a strength of the contrast > 0, got {self.strength}; or train without it"
            )
        if self.objective.is_adaptive:
            raise UserError(
                "a contrast needs a fixed temperature: an adaptive one is found for the logits with history, "
                "not for differences; give a number"
            )

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        contrast = {"strength": self.strength, "without_history": self.without_history}
        return self.objective.settings() | {"contrast": contrast}

    def divisor(self, total: Tensor) -> Tensor:
        """That of the objective."""
        return self.objective.divisor(total)

    def module(self, model: Any, trie: Trie) -> ContrastLoss:
        """See `objective.Learned`."""
        return ContrastLoss(model, self, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> ContrastBatches:
        """See `objective.Learned`."""
        return ContrastBatches(examples, self, rows, packing)


class ContrastLoss(TitleLoss):
    """A causal LM and a `Contrast` as one module.

    The second pass runs each different target title of the micro-batch once; where dropout is on, both passes
    have their own.
    """

    def __init__(self, model: Any, contrast: Contrast, trie: Trie) -> None:
        super().__init__(model, contrast.objective, trie)
        self.strength = contrast.strength

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Sum of the weighted losses of both terms; ``sums`` are those of the first.

        Args:
            batch: Arguments of `TitleLoss.forward`; ``alone_input_ids`` (U, L), int64, the target titles behind the
                prompt without history, and their ``alone_length`` (U,); ``alone_position`` (M,), int64, the place of
                each target in the flattened ``alone_input_ids``.
        """
        score = functools.partial(contrast_parts, self.objective, self.strength)
        alone = {name: batch[f"alone_{name}"] for name in ("input_ids", "position", "length")}
        loss, nll = self.losses(batch, score, alone)
        return {"loss": loss.sum(), "sums": title_sums(nll.detach(), batch["zero_gain"], batch["decision"])}


class ContrastBatches(MicroBatches):
    """Micro-batches in a given order; their titles once more without history, never packed."""

    def __init__(
        self, examples: Examples, contrast: Contrast, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        super().__init__(examples, contrast.objective, rows, packing)
        self.prompt = examples.prompts.without_history(contrast.without_history)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Arguments of `ContrastLoss.forward`, what the micro-batch adds to the normaliser, and its counts."""
        item = super().__getitem__(index)
        alone = self.examples.without_history(self.rows[index], self.prompt)
        kept = np.ones(len(alone.node), dtype=np.bool_)
        if self.objective.support == "trie":
            kept = self.examples.trie.branching[alone.node]
        counts = item["counts"] | {
            "tokens": item["counts"]["tokens"] + alone.n_tokens,
            "places": item["counts"]["places"] + alone.input_ids.size,
        }
        second = {
            "alone_input_ids": alone.input_ids,
            "alone_position": alone.position[kept],
            "alone_length": lengths(alone.input_ids, alone.position),
        }
        return item | {name: torch.from_numpy(array) for name, array in second.items()} | {"counts": counts}
