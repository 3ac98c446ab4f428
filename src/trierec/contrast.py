r"""CFT: what a title gains from the history, learned beside the title itself.

The counterfactual pass runs the same model on a prompt without history (`Prompts.without_history`). The
difference of both logits is the effect of the history, and it is trained to predict the target too.

Shape key: M target positions, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from trierec.losses import Objective, Parts
from trierec.trie import DeviceTrie, Trie


def contrast_parts(
    objective: Objective,
    strength: float,
    logits: Tensor,
    without: Tensor,
    target: Tensor,
    node: Tensor,
    trie: Trie | DeviceTrie,
    weight: Tensor | None = None,
    n_edges: int | None = None,
) -> Parts:
    r"""The loss of CFT per token, with the support, temperature and weights of ``objective``.

    .. math:: \ell_m = w_m \, \mathrm{nll}(f_m, y_m) + \lambda \, w_m \, \mathrm{nll}(f_m - f^0_m, y_m)

    Differences of log-probabilities over the vocabulary would give the same: a softmax does not see what is
    added to all logits. Both passes carry gradient.

    Args:
        objective: Support and temperature of both terms; no adaptive temperature.
        strength: Lambda, >= 0.
        logits: Next-token logits with the history (M, V), any float dtype.
        without: Those of the same tokens without the history (M, V).
        target: Target token ids (M,), int64.
        node: Trie node before each target (M,), int64.
        trie: The trie of all items.
        weight: Token weights (M,) >= 0; None: 1.
        n_edges: As in `losses.trie_nll`.

    Returns:
        ``loss`` of both terms; ``contribution`` and ``nll`` of the first, so that the divisor is the sum of the
        weights and lambda = 0 is the objective itself.

    Source: the code of CFT and of IGD, which agree; the formula of the CFT paper was not read.
    """
    factual = objective.parts(logits, target, node, trie, weight, n_edges)
    effect = logits.float() - without.float()
    contrast = objective.parts(effect, target, node, trie, weight, n_edges)
    return factual._replace(loss=factual.loss + strength * contrast.loss)
