"""What each of two processes runs in `tests/training/test_slots_in_processes.py`; the target of a forked process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.process_child import learned, single_targets
from triewise.models import ItemSlots, SequentialModel, attach
from triewise.settings import EncoderSettings, TrainingSettings
from triewise.training import AdaptiveTemperature, Curriculum, Examples, Objective, train

SETTINGS = TrainingSettings(
    steps=8, learning_rate=3e-3, batch_size=8, accumulation=2, warmup_steps=2, log_every=1, checkpoint_every=4
)


def hybrid_run(out: Path) -> dict[str, Any]:
    """A run whose micro-batches are text alone at first, with user slots and adaptive temperature; what it leaves."""
    model, plain = learned(), single_targets()
    torch.manual_seed(0)
    encoder = SequentialModel(EncoderSettings(encoder="sasrec", width=8), 12, 20, seed=2)
    slots = ItemSlots(model.get_input_embeddings(), "a-llmrec", torch.randn(12, 6), "", encoder)
    attach(model, slots)
    prompts = replace(plain.prompts, slots=slots.ids)
    examples = Examples(plain.windows, prompts, plain.trie, None, np.zeros(plain.trie.n_nodes, dtype=bool))
    objective = Objective(temperature=AdaptiveTemperature(0.5, momentum=0.5, clamp=(0.1, 5.0)))
    course = Curriculum(objective, slots.ids, 16, 24, seed=1)
    result = train(model, examples, course, SETTINGS, out)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {"weights": weights, "loss": [row["loss"] for row in result.history]}
