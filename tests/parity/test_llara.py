"""LLaRA against numbers of its authors' code (ljy0ustc/LLaRA @9733f73, float64 on a CPU)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.parity.hybrid_values import Piece, fill, piece
from tests.token_worlds import make_prompts, make_split
from triewise.models import ItemSlots
from triewise.models.item_slots import projection
from triewise.settings import TrainingSettings
from triewise.tokens import Trie
from triewise.training import Examples, make_windows
from triewise.training.curriculum import are_hybrid
from triewise.training.item_fit import learning_rate
from triewise.training.rates import floor_cosine


def projector(values: Piece) -> nn.Module:
    return fill(projection(6, 10), *(values[name] for name in ("w1", "b1", "w2", "b2")))


def test_projector() -> None:
    values = piece("llara", "projector")
    values.close(projector(values)(values["x"]), "y")


def test_which_places_of_a_prompt_hold_item_vectors() -> None:
    """Theirs: a marker and the items of the row, in order. Ours: an id that says which item, wherever it stands."""
    values = piece("llara", "prompt_mix")
    table: Tensor = values["token_table"]
    words = nn.Embedding.from_pretrained(table)
    slots = ItemSlots(words, "llara", values["item_table"], "").double()
    slots.table = values["item_table"]
    slots.item = projector(piece("llara", "projector"))
    ids = values["ids"].clone()
    for row, (seq, cans, item) in enumerate(
        zip(values["seq"], values["cans"], values["item_id"].tolist(), strict=True)
    ):
        for marker, items in ((17, seq.tolist()), (18, cans.tolist()), (19, [item])):
            at = (ids[row] == marker).nonzero()[:, 0]
            ids[row, at] = torch.tensor([slots.ids.item(i) for i in items[: len(at)]], dtype=torch.int64)
    values.close(slots(ids), "inputs_embeds")


def batch_of(prompts: list[list[int]], titles: list[list[int]]) -> Any:
    """The micro-batch of rows whose prompts and titles are token ids already; row b has title b as its target."""
    made = make_prompts(titles)
    rows: Any = SimpleNamespace(
        **{name: getattr(made, name) for name in ("title_tokens", "template", "hash", "slots")},
        encode=lambda history: prompts[history[0]],
    )
    trie = Trie.from_sequences(titles)
    windows = make_windows(make_split([(None, [b], b) for b in range(len(titles))]), "last")
    examples = Examples(windows, rows, trie, None, np.zeros(trie.n_nodes, dtype=bool))
    return examples.batch(np.arange(len(titles)))


def dense_targets(batch: Any) -> Tensor:
    """The target of each place of a micro-batch, -100 where there is none: the form of the authors' labels."""
    targets = np.full(batch.input_ids.size, -100)
    targets[batch.position + 1] = batch.target
    return torch.from_numpy(targets.reshape(batch.input_ids.shape))


def test_which_tokens_have_a_loss() -> None:
    """The answer alone, its terminator included, nothing behind it."""
    values = piece("llara", "targets")
    ids, kinds = values["ids"].tolist(), values["type_ids"][:, 1:].tolist()
    prompts = [
        [i for i, kind in zip(*row, strict=True) if not kind and i] for row in zip(ids, kinds, strict=True)
    ]
    titles = [[i for i, kind in zip(*row, strict=True) if kind] for row in zip(ids, kinds, strict=True)]
    batch = batch_of(prompts, titles)
    assert batch.input_ids.tolist() == ids
    values.close(dense_targets(batch), "targets", 0)


def test_curriculum() -> None:
    values = piece("llara", "curriculum")
    drawn, length = values["u"].numpy(), values["C"]
    assert are_hybrid(drawn, length).tolist() == values.outputs["hybrid"]
    thresholds = np.arange(1, len(drawn) + 1) / length
    assert thresholds.tolist() == values.outputs["threshold"]


def test_a_counter_for_all_workers_is_theirs_up_to_a_step() -> None:
    """Theirs: every worker of the loader counts for itself. Ours: one counter, so a length without workers."""
    values = piece("llara", "curriculum")
    epochs, rows, batch, workers = (values[name] for name in ("epochs", "rows", "batch", "workers"))
    of_a_worker, ours = values.outputs["C_of_formula"], epochs * (rows // batch)
    assert of_a_worker == ours // workers
    g = np.arange(ours)
    theirs = (g // workers + 1) / of_a_worker
    assert np.abs(theirs - (g + 1) / ours).max() < 1.5 / of_a_worker


def test_learning_rate() -> None:
    values = piece("llara", "learning_rate")
    steps, top = values["S"], values["top"]
    settings = TrainingSettings(
        steps=steps, warmup_steps=steps // 20, learning_rate=top, schedule="cosine-floor"
    )
    at = [int(s) for s in values["step"]]
    values.close(torch.tensor([learning_rate(settings, s) for s in at], dtype=torch.float64), "rate", 1e-12)
    assert top * floor_cosine(0, steps, 10) == pytest.approx(values["start"])
    assert max(values.outputs["rate"]) < top  # the peak is never reached
