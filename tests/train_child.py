"""Training runs that kill their own process at a chosen place; each is the target of a forked process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import triewise.files
import triewise.training.checkpoints
import triewise.training.objective
import triewise.training.state
from tests.token_worlds import cycle_world
from triewise.settings import TrainingSettings
from triewise.training import AdaptiveTemperature, Objective, train
from triewise.training.trainer import TrainResult

PLACES = ("training", "before", "middle", "rename")
KILLED_STEP = 8
CONFIG = TrainingSettings(
    steps=12,
    learning_rate=3e-3,
    batch_size=4,
    accumulation=2,
    warmup_steps=2,
    log_every=3,
    evaluate_every=5,
    checkpoint_every=4,
)


def small_model(dropout: float = 0.0, seed: int = 0) -> Any:
    """A two-layer Qwen2 of width 16 for `cycle_world`."""
    import transformers as tf

    torch.manual_seed(seed)
    config = tf.Qwen2Config(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=dropout,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=0,
    )
    return tf.Qwen2ForCausalLM(config).eval()


def some_metric(model: Any) -> dict[str, float]:
    """A number that depends on the weights, best before the end; the random numbers it draws must not matter."""
    torch.rand(3)
    return {"NDCG@10": -model.lm_head.weight.abs().sum().item()}


def adaptive_run(out: Path, resume: bool = False, seed: int = 0, **changes: Any) -> tuple[Any, TrainResult]:
    """Dropout, adaptive temperature, accumulation, validation and checkpoints together."""
    model = small_model(dropout=0.3)
    objective = Objective(temperature=AdaptiveTemperature(eta=0.5, clamp=(0.1, 5.0)))
    settings = TrainingSettings(**{**vars(CONFIG), **changes})
    how = {"seed": seed, "resume": resume}
    return model, train(model, cycle_world(), objective, settings, out, validate=some_metric, **how)


def die(out: str, place: str) -> None:
    """Run until ``place``, then be killed as by ``kill -9``."""
    torch.set_num_threads(1)
    name = f"checkpoint-{KILLED_STEP}"
    if place == "training":
        _kill_when(triewise.training.objective.TitleLoss, "forward", count=2 * 6 + 1)  # in the seventh step
    elif place == "before":
        _kill_when(triewise.training.state, "atomic_folder", lambda path, *_: path.name == name)
    elif place == "middle":
        _kill_when(torch, "save", lambda _, path, *__: name in str(path) and bool(_half(path)))
    else:
        _kill_when(os, "replace", lambda _, path: Path(path).name == name)
    adaptive_run(Path(out))


def _half(path: Path) -> int:
    return path.write_bytes(b"half a file")


def _kill_when(owner: Any, name: str, when: Callable[..., bool] | None = None, count: int = 1) -> None:
    original, calls = getattr(owner, name), 0

    def replacement(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += when is None or when(*args)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)
