"""CFT: the loss, the prompts without history, the module, and runs with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from tests.reference.losses import dense_trie_nll, plain_cft
from tests.strategies import catalogues
from tests.token_worlds import Row, cycle_world, make_prompts, make_split
from tests.train_child import small_model
from tests.training.test_losses import CLOSE, gradient, some_logits, tokens
from tests.training.test_trainer import Gradients, config, same, untimed, weights
from tests.worlds import backbone, catalog, write_msl_folder
from triewise.app import train_run
from triewise.errors import UserError
from triewise.recipe import load_recipe, parse_recipe
from triewise.tokens import Trie, build_prompts, position_weights
from triewise.training import AdaptiveTemperature, Contrast, Examples, Objective, make_windows, train
from triewise.training.contrast import contrast_parts
from triewise.training.trainer import TrieTrainer


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.integers(0, 99), st.sampled_from([0.025, 0.1, 2.0]))
def test_equals_a_loop_in_value_and_both_gradients(
    sequences: list[list[int]], seed: int, strength: float
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    f, f_0, weight = (
        some_logits(len(target), seed),
        some_logits(len(target), seed + 1),
        torch.rand(len(target)),
    )
    parts = contrast_parts(Objective("vocabulary"), strength, f, f_0, target, node, trie, weight)
    ours = parts.loss.sum() / parts.contribution.sum()
    slow = plain_cft(f, f_0, target, weight.tolist(), strength).float()
    torch.testing.assert_close(ours, slow, **CLOSE)
    for logits in (f, f_0):
        (found,) = torch.autograd.grad(ours, logits, retain_graph=True)
        (expected,) = torch.autograd.grad(slow, logits, retain_graph=True)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert found.abs().sum() > 0


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.integers(0, 99))
def test_in_trie_support_the_effect_is_compared_among_valid_tokens(
    sequences: list[list[int]], seed: int
) -> None:
    trie = Trie.from_sequences(sequences)
    target, node, _ = tokens(trie)
    f, f_0 = some_logits(len(target), seed), some_logits(len(target), seed + 1)
    parts = contrast_parts(Objective("trie"), 0.3, f, f_0, target, node, trie)
    slow = dense_trie_nll(f, target, node, trie, 1.0) + 0.3 * dense_trie_nll(f - f_0, target, node, trie, 1.0)
    torch.testing.assert_close(parts.loss, slow, **CLOSE)
    torch.testing.assert_close(gradient(parts.loss.sum(), f_0), gradient(slow.sum(), f_0), **CLOSE)
    forced = torch.from_numpy(trie.n_children[node.numpy()] == 1)
    assert (parts.loss[forced] == 0).all()


def test_strength_zero_is_pos_and_log_probabilities_do_as_well() -> None:
    trie = Trie.from_sequences([[1, 2, 3, 0], [1, 4, 0]])
    target, node, _ = tokens(trie)
    f, f_0 = some_logits(len(target), 1), some_logits(len(target), 2)
    weight = torch.from_numpy(position_weights(np.array([4, 3]), 0.25))
    objective = Objective("vocabulary")
    none = contrast_parts(objective, 0.0, f, f_0, target, node, trie, weight)
    pos = objective.parts(f, target, node, trie, weight)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(none, pos, strict=True))
    some = contrast_parts(objective, 0.1, f, f_0, target, node, trie, weight)
    logs = contrast_parts(objective, 0.1, f.log_softmax(1), f_0.log_softmax(1), target, node, trie, weight)
    torch.testing.assert_close(logs.loss, some.loss, **CLOSE)
    assert torch.equal(some.contribution, pos.contribution) and torch.equal(some.nll, pos.nll)


def test_by_hand() -> None:
    """One token of two: f = (ln 3, 0), f_0 = (ln 2, 0): -ln 3/4 - 0.5 ln (3/2 / (3/2 + 1))."""
    f, f_0 = torch.tensor([[3.0, 1.0]]).log(), torch.tensor([[2.0, 1.0]]).log()
    trie, zero = Trie.from_sequences([[0], [1]]), torch.tensor([0])
    parts = contrast_parts(Objective("vocabulary"), 0.5, f, f_0, zero, zero, trie)
    assert parts.loss.item() == pytest.approx(-np.log(0.75) - 0.5 * np.log(0.6))


def test_large_logits_stay_finite() -> None:
    f, f_0 = torch.full((1, 5), 1e4), torch.full((1, 5), -1e4)
    trie, zero = Trie.from_sequences([[0], [1]]), torch.tensor([0])
    parts = contrast_parts(Objective("vocabulary"), 0.5, f.bfloat16(), f_0.bfloat16(), zero, zero, trie)
    assert parts.loss.item() == pytest.approx(1.5 * np.log(5), rel=1e-5)


# --- prompts and batches without history ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["msl", "d3"])
def test_both_prompts_without_history(template: str) -> None:
    tokenizer = backbone().tokenizer
    prompts = build_prompts(tokenizer, catalog(), template, "films", "watched")
    with_history, alone, unknown = (
        tokenizer.decode(ids)
        for ids in (prompts.encode([0]), prompts.without_history(), prompts.without_history("unknown"))
    )
    section = {"msl": "### Input:\n", "d3": "### User Input: \n"}[template]
    before, _, after = with_history.partition(section)
    assert unknown == before + section + "Unknow" + after[after.index("\n") :]
    response = with_history[with_history.index("\n\n### Response") :]
    task = with_history[with_history.index("\n\n### Instruction") : with_history.index("\n" + section)]
    blank = {"msl": "", "d3": " "}[template]  # d3's authors have one before the instruction
    assert alone == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request." + blank + task.rstrip("\n") + response
    )
    assert "Alien" in with_history and "Alien" not in alone + unknown


def test_a_plain_prompt_without_history_is_an_empty_one() -> None:
    prompts = make_prompts([[2, 0]])
    assert prompts.without_history() == prompts.encode([]) == [1]
    with pytest.raises(
        UserError, match=r"'unknown' needs an instruction template \(msl or d3\) that does not grow"
    ):
        prompts.without_history("unknown")
    with pytest.raises(UserError, match="wanted without_history among no-input, unknown, got 'none'"):
        prompts.without_history("none")


def test_titles_without_history_are_those_of_the_batch() -> None:
    """Several targets in a window, the same title in several windows."""
    examples, rows = cycle_world(), [0, 3, 3, 7]
    batch, alone = examples.batch(rows), examples.without_history(rows, [1, 19])
    ids = alone.input_ids.ravel()
    assert np.array_equal(ids[alone.position + 1], batch.target)
    assert np.array_equal(alone.node, batch.node)
    assert len(np.unique(alone.input_ids, axis=0)) == len(alone.input_ids) < len(batch.target) / 3
    assert (alone.input_ids[:, :2] == [1, 19]).all()
    assert alone.n_tokens == alone.input_ids.size, "all titles of this world have three tokens"


# --- training ---------------------------------------------------------------------------------------------------------


def pos_world() -> Examples:
    plain = cycle_world()
    weight = position_weights(plain.prompts.title_tokens.lengths, 0.25)
    return Examples(
        plain.windows, plain.prompts, plain.trie, weight, np.zeros(plain.trie.n_nodes, dtype=bool)
    )


def one_step(learned: Any, out: Path, accumulation: int = 1, batch_size: int = 8) -> dict[str, torch.Tensor]:
    """The gradient that the optimiser is given."""
    seen, settings = (
        Gradients(),
        config(steps=1, batch_size=batch_size, accumulation=accumulation, max_grad_norm=1e9),
    )
    trainer = TrieTrainer(small_model(), pos_world(), learned, settings, out)
    trainer.add_callback(seen)
    trainer.train()
    return seen.steps[0]


@pytest.mark.parametrize("support", ["vocabulary", "trie"])
def test_the_step_is_the_gradient_of_a_plain_recomputation(support: str, tmp_path: Path) -> None:
    """One row at a time, each target title behind its own context and alone behind the first token."""
    examples, learned = pos_world(), Contrast(Objective(support), 0.3)
    settings = config(steps=1, batch_size=8, accumulation=4)
    rows = TrieTrainer(small_model(), examples, learned, settings, tmp_path).get_train_dataloader().dataset
    found = one_step(learned, tmp_path, accumulation=4)
    model, total, weight = small_model(), torch.zeros(()), 0.0
    for row in rows.rows.ravel().tolist():
        batch = examples.batch([row])
        logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits[0][batch.position]
        ends = (np.flatnonzero(batch.target == 0) + 1).tolist()
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            title = torch.from_numpy(batch.target[start:end])
            f_0 = model(input_ids=torch.cat([torch.tensor([1]), title[:-1]])[None]).logits[0]
            f, node = logits[start:end], torch.from_numpy(batch.node[start:end])
            for row_w, row_f, row_0, y, n in zip(batch.weight[start:end], f, f_0, title, node, strict=True):
                for z, factor in ((row_f, 1.0), (row_f - row_0, 0.3)):
                    one = (z[None], y[None], n[None], examples.trie, 1.0)
                    nll = dense_trie_nll(*one) if support == "trie" else -z.log_softmax(0)[y][None]
                    total = total + factor * float(row_w) * nll[0]
                weight += float(row_w)
    (total / weight).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("support", ["vocabulary", "trie"])
def test_accumulation_changes_nothing(support: str, tmp_path: Path) -> None:
    learned = Contrast(Objective(support, 1.2), 0.3)
    one, four = (one_step(learned, tmp_path / str(n), n) for n in (1, 4))
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-5, atol=1e-6)


def test_blocks_of_logits_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, steps = Contrast(Objective("vocabulary"), 0.3), []
    for at_once in (1 << 26, 20 * 5):
        monkeypatch.setattr("triewise.training.objective.LOGITS_AT_ONCE", at_once)
        steps.append(one_step(learned, tmp_path / str(at_once)))
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-5, atol=1e-6)


def test_packing_changes_nothing(tmp_path: Path) -> None:
    """Windows of growing histories; the second pass is never packed."""
    learned, plain, steps = Contrast(Objective("trie"), 0.3), cycle_world(), []
    sequences = [plain.prompts.title_tokens[i].tolist() for i in range(12)]
    rows: list[Row] = [("a", list(range(n)), n) for n in range(2, 12)]
    windows = make_windows(make_split(rows), "last")
    examples = Examples(windows, make_prompts(sequences), plain.trie, None, np.ones(plain.trie.n_nodes, bool))
    for packing in (False, True):
        seen, settings = Gradients(), config(steps=1, batch_size=8, max_grad_norm=1e9, packing=packing)
        trainer = TrieTrainer(small_model(), examples, learned, settings, tmp_path)
        assert ("subtree_end" in trainer.get_train_dataloader().dataset[0]) == packing
        trainer.add_callback(seen)
        trainer.train()
        steps.append(seen.steps[0])
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(out: str, resume: bool = False, **changes: Any) -> tuple[Any, Any]:
        model, settings = small_model(dropout=0.3), config(steps=3, log_every=1, log_parts=True, **changes)
        learned = Contrast(Objective("vocabulary"), 0.1)
        return model, train(model, pos_world(), learned, settings, tmp_path / out, resume=resume)

    model, whole = run("whole")
    run("parted", time_limit_s=1e-6)
    again, resumed = run("parted", resume=True)
    assert same(weights(model), weights(again))
    assert untimed(whole.history)[1:] == untimed(resumed.history)[1:]
    with pytest.raises(UserError, match="wanted to resume with objective = "):
        train(
            again,
            pos_world(),
            Contrast(Objective("vocabulary"), 0.2),
            config(steps=3, log_every=1),
            tmp_path / "whole",
            resume=True,
        )


def test_a_cycle_is_learned(tmp_path: Path) -> None:
    settings = config(steps=60, learning_rate=3e-2, batch_size=8, log_every=20)
    result = train(small_model(), pos_world(), Contrast(Objective("vocabulary"), 0.1), settings, tmp_path)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < 0.4 * losses[0]


def test_a_recipe_of_strength_zero_is_pos(tmp_path: Path) -> None:
    raw = write_msl_folder(tmp_path / "office")
    changes = [f"data.source=msl:{raw.as_posix()}", f"data.folder={(tmp_path / 'prepared').as_posix()}"]
    tiny = {"vocabulary": 300, "width": 16, "heads": 2, "feed_forward": 32}
    changes += ["training.steps=3", *(f"backbone.tiny.{key}={value}" for key, value in tiny.items())]
    logs = []
    for name, more in (("pos", []), ("cft", ["objective.contrast.strength=0.0"]), ("cft", [])):
        recipe = load_recipe(f"office/{name}", [*changes, *more])
        logs.append(untimed(train_run(recipe, tmp_path / str(len(logs))).history))
    assert logs[0] == logs[1] != logs[2]
    assert logs[2][-1]["loss"] > 1.05 * logs[0][-1]["loss"]


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        ({"contrast": {"strength": -1}}, "objective.contrast.strength: .*, got -1"),
        (
            {"contrast": {"strength": 0.1}, "temperature": "adaptive"},
            "objective: contrast.strength > 0 needs a fixed temperature: 'adaptive' is found for other logits",
        ),
        (
            {"contrast": {"without_history": "unknown"}},
            "recipe: objective.contrast.without_history = 'unknown' needs backbone.template = 'msl' or 'd3'",
        ),
    ],
)
def test_recipes_that_make_no_sense(objective: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_recipe({"name": "x", "data": {"source": "ml-100k"}, "objective": objective}, "test")


def test_wrong_settings() -> None:
    with pytest.raises(UserError, match="wanted a strength of the contrast > 0, got 0"):
        Contrast(Objective(), 0)
    with pytest.raises(UserError, match="a contrast needs a fixed temperature"):
        Contrast(Objective(temperature=AdaptiveTemperature()), 0.1)
