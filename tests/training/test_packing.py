"""Packed rows: every token sees its own row and nothing else, and losses and gradients stay as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tests.conftest import shared
from tests.tiny_models import tiny_model
from tests.token_worlds import make_prompts, make_split
from triewise.data import Split, prepare
from triewise.errors import UserError
from triewise.models import compute_again, computes_again
from triewise.settings import TrainingSettings
from triewise.tokens import Trie, zero_gain
from triewise.training import (
    AdaptiveTemperature,
    Examples,
    Objective,
    make_windows,
    objective,
    target_counts,
    train,
)
from triewise.training.objective import MicroBatches, TitleLoss
from triewise.training.packing import SHARE_AT_LEAST, hidden_states, pack, packing_works
from triewise.training.trainer import TrieTrainer, packs
from triewise.training.windows import batch_order, chains


@st.composite
def micro_batches(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Rows that share beginnings of any length, and the columns of each that are needed."""
    stem = draw(st.lists(st.integers(1, 9), min_size=1, max_size=60))
    rows, needed = [], []
    for _ in range(draw(st.integers(1, 6))):
        tail = draw(st.lists(st.integers(1, 3), max_size=25))
        row = stem[: draw(st.integers(1, len(stem)))] + tail
        rows.append(row)
        needed.append(sorted(draw(st.sets(st.integers(0, len(row) - 1), max_size=3))))
    if not any(needed):
        needed[0] = [0]
    return rows, needed


def padded(rows: list[list[int]]) -> np.ndarray:
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = row
    return ids


@settings(max_examples=200, deadline=None)
@given(batch=micro_batches(), capacity=st.integers(1, 120))
def test_a_target_sees_its_row_up_to_its_position_in_order(
    batch: tuple[list[list[int]], list[list[int]]], capacity: int
) -> None:
    rows, needed = batch
    ids = padded(rows)
    wanted = [(b, c) for b, columns in enumerate(needed) for c in columns]
    packed = pack(ids, np.array([b * ids.shape[1] + c for b, c in wanted]), capacity)
    n_prefix, width = len(packed.prefix_ids), packed.input_ids.shape[1]
    for (b, column), at in zip(wanted, packed.position, strict=True):
        s, place = divmod(int(at), width)
        seen = [j for j in range(place + 1) if packed.subtree_end[s, j] > place]
        assert packed.prefix_ids.tolist() + packed.input_ids[s, seen].tolist() == rows[b][: column + 1]
        assert packed.position_ids[s, seen].tolist() == list(range(n_prefix, column + 1))
    assert packed.n_places <= max(ids.size, 1)


def growing(n_rows: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two users that grow behind one instruction, and two needed positions of each."""
    rng = np.random.default_rng(seed)
    instruction = rng.integers(1, 30, 2 * SHARE_AT_LEAST).tolist()
    rows: list[list[int]] = []
    for _ in range(2):
        history = rng.integers(1, 30, SHARE_AT_LEAST).tolist()
        for _ in range(n_rows // 2):
            rows.append([*instruction, *history, 7, 7, *rng.integers(1, 30, 4).tolist()])
            history += rng.integers(1, 30, 5).tolist()
    ids = padded(rows)
    last = np.array([len(row) - 1 for row in rows])
    return ids, np.concatenate([np.arange(len(rows)) * ids.shape[1] + last - back for back in (0, 3)])


def gradients(model: Any, hidden: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape)
    model.zero_grad()
    (hidden * weight).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_hidden_states_and_gradients_are_those_of_single_rows(kind: str, again: bool) -> None:
    model = tiny_model(kind)
    if again:
        compute_again(model, True)
        for module in model.train().modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    ids, position = growing()
    packed = pack(ids, position)
    assert len(packed.prefix_ids) >= 2 * SHARE_AT_LEAST and packed.n_places < 0.6 * ids.size
    tensors = [
        torch.from_numpy(getattr(packed, name))
        for name in ("input_ids", "position_ids", "subtree_end", "prefix_ids")
    ]
    ours = hidden_states(model, *tensors).flatten(0, 1)[torch.from_numpy(packed.position)]
    theirs = model.base_model(input_ids=torch.from_numpy(ids), use_cache=False).last_hidden_state
    theirs = theirs.flatten(0, 1)[torch.from_numpy(position)]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    found, wanted = gradients(model, ours), gradients(model, theirs)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm(), name


def test_a_model_with_a_short_window_is_refused_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Its sliding layers read the place in the packed row for a distance: no error, wrong gradients."""
    tokens = np.arange(3, 20)
    assert not packing_works(tiny_model("gemma3"), tokens, longest=200)
    assert "window of 4 tokens is shorter than the longest path of 200" in capsys.readouterr().err
    assert packing_works(tiny_model("qwen2"), tokens, longest=200)
    assert not capsys.readouterr().err


# --- chains ---------------------------------------------------------------------------------------------------------


def rows_of(*rows: list[int]) -> Split:
    return make_split([(None, row[:-1], row[-1]) for row in rows])


def test_rows_that_continue_each_other_are_one_chain() -> None:
    split = rows_of([1, 2], [5, 6], [1, 2, 3], [5, 6, 7], [1, 2, 3, 4], [2, 3, 4, 5], [1, 2, 3], [9, 8])
    found = chains(make_windows(split, "last"))
    # 2 3 4 is what is left of 1 2 3 4 when a history has three titles; the second 1 2 3 has nobody to continue.
    assert found.tolist() == [0, 1, 0, 1, 0, 0, 2, 3]


def test_the_chains_of_games_are_its_users(tmp_path: Path) -> None:
    data = prepare(f"d3:{shared('amazon_games_d3')}", tmp_path / "games", max_history=10)
    found = chains(make_windows(data.train, "last"))
    assert len(found) == 49133
    assert 7900 < len(np.unique(found)) < 8200  # the authors' files name no users; about 8,060


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    batch=st.integers(1, 5),
    seed=st.integers(0, 9),
)
@settings(max_examples=50, deadline=None)
def test_an_epoch_of_chains_has_each_window_once_and_keeps_chains_together(
    sizes: list[int], batch: int, seed: int
) -> None:
    chain = np.repeat(np.arange(len(sizes)), sizes)
    n = len(chain)
    order = batch_order(n, batch, -(-2 * n // batch), seed, chain).reshape(-1)
    assert sorted(order[:n]) == list(range(n)) == sorted(order[n : 2 * n])
    starts = np.flatnonzero(np.diff(chain[order[:n]], prepend=-1))
    assert len(starts) == len(sizes), "the windows of a chain follow each other"
    inside = np.diff(order[:n])[np.diff(chain[order[:n]]) == 0]
    assert (inside > 0).all(), "and keep their order in time"


# --- in training ----------------------------------------------------------------------------------------------------


def loss_and_gradients(model: Any, examples: Examples, objective: Objective, packing: bool) -> Any:
    rows = np.arange(min(len(examples), 12))[None]
    module = TitleLoss(model, objective, examples.trie).train()
    batch = MicroBatches(examples, objective, rows, packing)[0]
    contribution, counts = batch.pop("contribution"), batch.pop("counts")
    assert counts.pop("places") == batch["input_ids"].numel() + len(batch.get("prefix_ids", ()))
    model.zero_grad()
    out = module(**batch)
    out["loss"].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out["loss"].item(), out["sums"], found, contribution, counts, "subtree_end" in batch


OBJECTIVES = {
    "lml": lambda: Objective("vocabulary"),
    "msl": lambda: Objective("trie", 2.0),
    "msl-ats": lambda: Objective("trie", AdaptiveTemperature(eta=0.6, momentum=0.0), "decisions"),
    "msl-token": lambda: Objective("trie", AdaptiveTemperature(eta=0.6, scope="token")),
    "msl-alpha": lambda: Objective("trie", expand_negatives=True),
}


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_packed_loss_and_gradients_equal_those_of_rows(name: str) -> None:
    examples, model = growing_examples()
    plain = loss_and_gradients(model, examples, OBJECTIVES[name](), packing=False)
    packed = loss_and_gradients(model, examples, OBJECTIVES[name](), packing=True)
    assert packed[5] and not plain[5], "one is packed, the other is not"
    assert packed[0] == pytest.approx(plain[0], rel=1e-4) and packed[3:5] == plain[3:5]
    torch.testing.assert_close(packed[1], plain[1], rtol=1e-4, atol=1e-4)
    for parameter, gradient in plain[2].items():
        assert (packed[2][parameter] - gradient).norm() <= 1e-4 * gradient.norm(), parameter


def test_the_vocabulary_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    examples, model = growing_examples()
    whole = loss_and_gradients(model, examples, Objective("vocabulary"), packing=False)
    monkeypatch.setattr(objective, "LOGITS_AT_ONCE", 7 * 30)
    blocks = loss_and_gradients(model, examples, Objective("vocabulary"), packing=False)
    assert blocks[0] == pytest.approx(whole[0], rel=1e-5)
    for parameter, gradient in whole[2].items():
        torch.testing.assert_close(blocks[2][parameter], gradient, rtol=1e-4, atol=1e-5)


def growing_examples() -> tuple[Examples, Any]:
    """Two users whose histories grow, every row with its own target; and a model."""
    sequences = [[2 + i % 4, 6 + i, 20 + i % 3, 25, 26, 0] for i in range(12)]
    prompts, trie = make_prompts(sequences), Trie.from_sequences(sequences)
    rows = [[(start + i) % 12 for i in range(length + 1)] for start in (0, 5) for length in range(3, 9)]
    windows = make_windows(rows_of(*rows), "last", prompts)
    gain = zero_gain(trie, target_counts(windows, 12))
    return Examples(windows, prompts, trie, None, gain), tiny_model("qwen2")


def test_training_with_and_without_packing_ends_with_the_same_weights(tmp_path: Path) -> None:
    ends = []
    for packing in (True, False):
        examples, model = growing_examples()
        config = TrainingSettings(
            steps=4, learning_rate=1e-3, batch_size=6, accumulation=1, order="chains", packing=packing
        )
        train(model, examples, Objective("trie"), config, tmp_path / str(packing))
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, weight in ends[1].items():
        torch.testing.assert_close(ends[0][name], weight, rtol=1e-3, atol=1e-5)


def kept_bytes(model: Any, examples: Examples, out: Path, again: bool) -> tuple[int, dict[str, Tensor]]:
    """What a short packed training keeps for its backward passes, and the weights it ends with."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    config = TrainingSettings(
        steps=3, learning_rate=1e-3, batch_size=6, order="chains", gradient_checkpointing=again
    )
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train(model, examples, Objective("trie"), config, out)
    assert not computes_again(model.train()), "it is switched off again"
    return sum(sizes), {name: p.detach().clone() for name, p in model.named_parameters()}


def test_activations_that_are_computed_again_take_less_memory_and_change_nothing(tmp_path: Path) -> None:
    found = [
        kept_bytes(*reversed(growing_examples()), tmp_path / str(again), again) for again in (False, True)
    ]
    assert found[1][0] < 0.7 * found[0][0]
    for name, weight in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weight, rtol=1e-3, atol=1e-5)


def test_a_model_without_gradient_checkpointing_is_refused(tmp_path: Path) -> None:
    examples, model = growing_examples()
    model.supports_gradient_checkpointing = False
    config = TrainingSettings(steps=1, learning_rate=1e-3, batch_size=2, gradient_checkpointing=True)
    with pytest.raises(
        UserError, match="wanted a model with gradient checkpointing, got Qwen2ForCausalLM, which"
    ):
        train(model, examples, Objective("trie"), config, tmp_path)


def test_a_window_is_held_against_the_rows_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """Not against ``max_tokens``, which is 1,024 where the longest prompt has a twentieth."""
    examples, _ = growing_examples()
    windows = examples.windows
    contexts = [row[:n].tolist() for row, n in zip(windows.items, windows.n_context, strict=True)]
    longest = max(len(examples.prompts.encode(context)) for context in contexts) + int(
        examples.trie.depth.max()
    )
    before = examples.prompts.n_dropped
    assert longest < 100 < examples.prompts.max_tokens
    assert packs(tiny_model("gemma3", sliding_window=longest), examples) and not capsys.readouterr().err
    assert not packs(tiny_model("gemma3", sliding_window=longest - 1), examples)
    assert (
        f"window of {longest - 1} tokens is shorter than the longest path of {longest}"
        in capsys.readouterr().err
    )
    assert examples.prompts.n_dropped == before


def test_only_models_that_can_are_packed(tmp_path: Path) -> None:
    examples, model = growing_examples()
    config = TrainingSettings(steps=1, learning_rate=1e-3, batch_size=2)
    assert TrieTrainer(model, examples, Objective("trie"), config, tmp_path).packing
    capped = tiny_model("gemma2", final_logit_softcapping=2.0)
    assert TrieTrainer(capped, examples, Objective("trie"), config, tmp_path).packing
    other_head = tiny_model("bert")
    assert not TrieTrainer(other_head, examples, Objective("trie"), config, tmp_path).packing
