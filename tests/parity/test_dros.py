"""DROS as its authors' code has it: base losses, the term, their sum and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.parity.golden import close, piece
from triewise.settings import SequentialSettings
from triewise.training import item_tasks
from triewise.training.item_tasks import Task, dros, item_loss, pairwise, propensities


class Scores:
    """A model whose states are the scores of all items."""

    def __init__(self, n_items: int) -> None:
        self.n_items, self.bias = n_items, torch.zeros(n_items, dtype=torch.float64)

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        return states

    def scores_of(self, states: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return states.gather(1, items)


def task_of(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Task:
    """The rows of a piece, with its negatives as what is drawn."""
    drawn = given["negative"].numpy()[:, None]
    monkeypatch.setattr(item_tasks, "draw_negatives", lambda *_: drawn)
    m = np.arange(len(given["target"]))
    return Task(m[:, None], m, given["target"].numpy(), np.ones(len(m), dtype=np.float32), m)


@pytest.mark.parametrize("base", ["bce", "bpr", "mse"])
@pytest.mark.parametrize(("alpha", "beta0"), [(0.5, 1.0), (0.1, 2.5)])
def test_base_term_sum_and_gradient(
    base: Any, alpha: float, beta0: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, wanted = piece("dros", f"{base}_alpha_{alpha}_beta0_{beta0}")
    counts, scores = given["counts"].numpy(), given["scores"].requires_grad_()
    close(torch.from_numpy(propensities(counts)), wanted["propensity"])
    task = task_of(given, monkeypatch)
    shown = torch.nn.functional.elu(scores) + 1 if base == "bpr" else scores
    some = shown.gather(1, torch.stack([given["target"], given["negative"]], 1))
    close(pairwise(base, some[:, 0], some[:, 1:]).mean(), wanted["base"])
    term = dros(shown, given["target"], torch.from_numpy(propensities(counts)), beta0)
    close(term, wanted["dros"])
    settings = SequentialSettings(encoder="sasrec", loss=base, dros_alpha=alpha, dros_beta0=beta0)
    model: Any = Scores(len(counts))
    loss = item_loss(model, settings, counts)(scores, task, np.random.default_rng()).mean()
    close(loss, wanted["loss_all"])
    loss.backward()
    assert scores.grad is not None
    close(scores.grad, wanted["gradient_of_scores"])
    alone = settings.model_copy(update={"dros_alpha": 0.0})
    close(item_loss(model, alone, counts)(scores, task, np.random.default_rng()).mean(), wanted["base"])
