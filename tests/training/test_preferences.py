"""S-DPO: the loss, its rejected titles, the reference, the module, and runs with it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from tests.reference.losses import dense_trie_nll, plain_sdpo
from tests.strategies import catalogues
from tests.token_worlds import Row, make_prompts, make_split
from tests.train_child import small_model
from tests.training.test_trainer import Gradients, config, same, untimed, weights
from tests.worlds import write_msl_folder
from triewise.app import evaluate_run, train_run
from triewise.errors import UserError
from triewise.recipe import Recipe, parse_recipe
from triewise.tokens import Trie, zero_gain
from triewise.training import (
    Examples,
    Objective,
    Preferences,
    Windows,
    draw_rejected,
    kept_reference,
    make_windows,
    target_counts,
    train,
)
from triewise.training.preferences import reference_key, reference_logp, sdpo_loss
from triewise.training.trainer import TrieTrainer


def sums(n_rows: int, n: int, seed: int = 0, scale: float = 3.0) -> list[Tensor]:
    """Log-probabilities of chosen and rejected titles under model and reference."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n_rows,), (n_rows,), (n_rows, n), (n_rows, n)]
    return [(-scale * torch.rand(shape, generator=generator)).requires_grad_() for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.1, 0.3, 1.0, 4.0]))
def test_equals_a_loop_in_value_and_gradient(n_rows: int, n: int, seed: int, beta: float) -> None:
    values = sums(n_rows, n, seed)
    ours, slow = sdpo_loss(*values, beta), torch.stack(plain_sdpo(*values, beta)).float()
    torch.testing.assert_close(ours, slow)
    found, expected = (torch.autograd.grad(loss.sum(), values) for loss in (ours, slow))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_worked_number() -> None:
    ones, zero = torch.ones(1), torch.zeros(1)
    rejected = torch.tensor([[-1.0, 0.5, 0.2]])
    assert sdpo_loss(ones, zero, rejected, torch.zeros(1, 3), 1.0).item() == pytest.approx(0.7844, abs=5e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_one_rejected_title_is_dpo(beta: float) -> None:
    theta_w, ref_w, theta_d, ref_d = sums(7, 1)
    margin = (theta_w - ref_w) - (theta_d - ref_d)[:, 0]
    dpo = -torch.nn.functional.logsigmoid(beta * margin)
    torch.testing.assert_close(sdpo_loss(theta_w, ref_w, theta_d, ref_d, beta), dpo)


def test_the_reference_itself_costs_log_of_one_more_than_the_rejected() -> None:
    theta_w, _, theta_d, _ = sums(3, 4)
    loss = sdpo_loss(theta_w, theta_w, theta_d, theta_d, 1.0)
    torch.testing.assert_close(loss, torch.full((3,), math.log(5)))


@pytest.mark.parametrize("margin", [-5e3, 5e3])
def test_far_apart_sums_stay_finite(margin: float) -> None:
    """The authors' exp overflows here."""
    zeros, theta = torch.zeros(1, 3), torch.tensor([margin], requires_grad=True)
    loss = sdpo_loss(theta, torch.zeros(1), zeros, zeros, 1.0)
    assert loss.item() == pytest.approx(max(-margin + math.log(3), 0.0))
    (gradient,) = torch.autograd.grad(loss.sum(), theta)
    assert gradient.item() == pytest.approx(-1.0 if margin < 0 else 0.0, abs=1e-4)


# --- rejected titles --------------------------------------------------------------------------------------------------


def world(n_items: int = 12, n_users: int = 24, length: int = 3) -> Examples:
    """Item i is followed by item i + 1; one target a row, titles of two to four tokens."""
    sequences = [[2 + i % 4, 6 + i, *([3] * (i % 3)), 0] for i in range(n_items)]
    starts = np.random.default_rng(0).integers(0, n_items, n_users)
    rows: list[Row] = [
        (str(u), [(int(s) + j) % n_items for j in range(length - u % 2)], (int(s) + length - u % 2) % n_items)
        for u, s in enumerate(starts)
    ]
    prompts, trie = make_prompts(sequences), Trie.from_sequences(sequences)
    windows = make_windows(make_split(rows), "last", prompts)
    return Examples(windows, prompts, trie, None, zero_gain(trie, target_counts(windows, n_items)))


@settings(max_examples=25, deadline=None)
@given(catalogues(), st.integers(0, 99), st.integers(1, 3))
def test_rejected_titles_are_others_and_differ(sequences: list[list[int]], seed: int, n: int) -> None:
    """Items of equal titles are one title."""
    trie, rng = Trie.from_sequences(sequences), np.random.default_rng(seed)
    history = rng.integers(len(sequences), size=(6, 2)).tolist()
    rows: list[Row] = [(None, [a], b) for a, b in history]
    windows = make_windows(make_split(rows), "last")
    left = [len(set(trie.leaf.tolist()) - {int(trie.leaf[i]) for i in row}) for row in history]
    if min(left) < n:
        with pytest.raises(
            UserError, match=f"wanted {n} rejected titles for each row, .* leaves {min(left)} "
        ):
            draw_rejected(windows, trie.leaf, n, seed)
        return
    rejected = draw_rejected(windows, trie.leaf, n, seed)
    assert rejected.shape == (6, n) and rejected.dtype == np.int32
    for row, drawn in zip(history, rejected.tolist(), strict=True):
        titles = [int(trie.leaf[i]) for i in drawn]
        assert len(set(titles)) == n and not set(titles) & {int(trie.leaf[i]) for i in row}
    assert np.array_equal(rejected, draw_rejected(windows, trie.leaf, n, seed))


def test_rejected_titles_are_uniform_over_the_others() -> None:
    rows: list[Row] = [(None, [0], 1)] * 4000
    windows = make_windows(make_split(rows), "last")
    rejected = draw_rejected(windows, np.arange(6), 3, 0)
    counts = np.bincount(rejected.ravel(), minlength=6)
    assert counts[:2].tolist() == [0, 0]
    assert np.abs(counts[2:] / 12000 - 0.25).max() < 0.02
    first = np.bincount(rejected[:, 0], minlength=6)
    assert np.abs(first[2:] / 4000 - 0.25).max() < 0.03
    assert not np.array_equal(rejected, draw_rejected(windows, np.arange(6), 3, 1))


def test_several_targets_in_a_window_are_refused() -> None:
    items = world().windows.items
    with pytest.raises(UserError, match="S-DPO wants one target in each window"):
        draw_rejected(Windows(items, np.ones(len(items.offsets) - 1, dtype=np.int32)), np.arange(12), 2, 0)


def test_each_window_stands_once_for_each_title() -> None:
    examples = world()
    rejected = draw_rejected(examples.windows, examples.trie.leaf, 2, 0)
    several, items = examples.with_rejected(rejected), examples.windows.items
    assert len(several) == 3 * len(examples) and len(several.size) == len(several)
    for w in range(len(examples)):
        *context, target = items[w].tolist()
        for j, title in enumerate([target, *rejected[w].tolist()]):
            assert several.windows.items[3 * w + j].tolist() == [*context, title]
    assert examples.windows.items is items and several.fingerprint() != examples.fingerprint()


# --- the reference ----------------------------------------------------------------------------------------------------


def plain_logp(model: Any, examples: Examples, context: list[int], title: int, support: str) -> Tensor:
    """Log-probability of a title, from its own forward pass without padding."""
    title_ids = examples.prompts.title_tokens[title].tolist()
    ids = [*examples.prompts.encode(context), *title_ids]
    logits = model(input_ids=torch.tensor([ids])).logits[0, -len(title_ids) - 1 : -1]
    target = torch.tensor(title_ids)
    if support == "vocabulary":
        return logits.log_softmax(1).gather(1, target[:, None]).sum()
    before, offsets = examples.trie.paths()
    node = torch.from_numpy(before[offsets[title] : offsets[title + 1]].astype(np.int64))
    return -dense_trie_nll(logits, target, node, examples.trie, 1.0).sum()


@pytest.mark.parametrize("support", ["vocabulary", "trie"])
def test_the_reference_equals_one_forward_pass_a_title(support: str) -> None:
    examples, model = world(), small_model(dropout=0.3).train()
    rejected = draw_rejected(examples.windows, examples.trie.leaf, 2, 0)
    found = reference_logp(model, examples, rejected, support, at_once=7)
    for at_once in (8, 100):
        np.testing.assert_allclose(
            reference_logp(model, examples, rejected, support, at_once), found, rtol=1e-5
        )
    assert found.shape == (24, 3) and found.dtype == np.float32 and not model.training
    for w in range(0, 24, 5):
        *context, target = examples.windows.items[w].tolist()
        slow = [
            plain_logp(model, examples, context, t, support).item() for t in (target, *rejected[w].tolist())
        ]
        np.testing.assert_allclose(found[w], slow, rtol=1e-5)


def test_the_reference_is_computed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples, path = world(), tmp_path / "reference.npz"
    rejected = draw_rejected(examples.windows, examples.trie.leaf, 2, 0)
    first, key = kept_reference(path, small_model(), examples, rejected, "vocabulary")
    assert "computed again" not in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triewise.training.preferences.reference_logp", None)
        again, same_key = kept_reference(path, small_model(), examples, rejected, "vocabulary")
    assert np.array_equal(first, again) and key == same_key
    other, _ = kept_reference(path, small_model(seed=1), examples, rejected, "vocabulary")
    assert (
        "is of other weights, prompts or rows, or damaged; the reference is computed again"
        in capsys.readouterr().err
    )
    assert not np.array_equal(first, other)
    path.write_bytes(path.read_bytes()[:100])
    back, _ = kept_reference(path, small_model(), examples, rejected, "vocabulary")
    assert "cannot be read" in capsys.readouterr().err
    assert np.array_equal(first, back) and [p.name for p in tmp_path.iterdir()] == ["reference.npz"]


def test_the_key_knows_all_the_reference_depends_on() -> None:
    examples, model = world(), small_model()
    rejected, others = (draw_rejected(examples.windows, examples.trie.leaf, 2, seed) for seed in (0, 1))
    keys = {
        reference_key(model, examples, rejected, "vocabulary"),
        reference_key(model, examples, rejected, "trie"),
        reference_key(model, examples, others, "vocabulary"),
        reference_key(model, world(n_users=25), np.vstack([rejected, rejected[:1]]), "vocabulary"),
        reference_key(small_model().bfloat16(), examples, rejected, "vocabulary"),
    }
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert len(keys | {reference_key(model, examples, rejected, "vocabulary")}) == 6


# --- training ---------------------------------------------------------------------------------------------------------


def learned(examples: Examples, support: str = "vocabulary", beta: float = 1.0, seed: int = 0) -> Preferences:
    """With a reference that is not the model, so that not all rows cost the same."""
    rejected = draw_rejected(examples.windows, examples.trie.leaf, 3, seed)
    reference = reference_logp(small_model(seed=3), examples, rejected, support)
    return Preferences(rejected, reference, beta, support, "key")


@pytest.mark.parametrize("support", ["vocabulary", "trie"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_step_is_the_gradient_of_a_plain_recomputation(
    support: str, accumulation: int, tmp_path: Path
) -> None:
    """One forward pass for each title, and the mean of the slow losses; the same however the batch is cut."""
    examples, seen = world(), Gradients()
    preferences = learned(examples, support, beta=0.7)
    settings = config(steps=1, batch_size=8, accumulation=accumulation, max_grad_norm=1e9)
    trainer = TrieTrainer(small_model(), examples, preferences, settings, tmp_path)
    rows = trainer.get_train_dataloader().dataset.windows.ravel().tolist()
    trainer.add_callback(seen)
    trainer.train()
    model, theta = small_model(), []
    for w in rows:
        *context, target = examples.windows.items[w].tolist()
        titles = [target, *preferences.rejected[w].tolist()]
        theta.append(torch.stack([plain_logp(model, examples, context, t, support) for t in titles]))
    logp, reference = torch.stack(theta), torch.from_numpy(preferences.reference[rows])
    slow = plain_sdpo(logp[:, 0], reference[:, 0], logp[:, 1:], reference[:, 1:], 0.7)
    loss = torch.stack(slow).mean()
    loss.backward()
    assert trainer.run.history[-1]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen.steps[0][name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("support", ["vocabulary", "trie"])
def test_packing_runs_a_prompt_once_and_changes_nothing(support: str, tmp_path: Path) -> None:
    examples, steps, places = world(n_items=14, length=8), [], []
    preferences = learned(examples, support)
    for packing in (False, True):
        seen, settings = Gradients(), config(steps=1, batch_size=4, max_grad_norm=1e9, packing=packing)
        trainer = TrieTrainer(small_model(), examples, preferences, settings, tmp_path)
        item = trainer.get_train_dataloader().dataset[0]
        assert ("subtree_end" in item) == packing
        places.append(item["input_ids"].numel())
        trainer.add_callback(seen)
        trainer.train()
        steps.append(seen.steps[0])
    assert places[1] < 0.5 * places[0]
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-4, atol=1e-6)
    apart, packed = (
        reference_logp(small_model(), examples, preferences.rejected, support, 7, packing)
        for packing in (False, True)
    )
    np.testing.assert_allclose(apart, packed, rtol=1e-4)


def test_blocks_of_logits_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, steps = world(), []
    for at_once in (1 << 26, 20 * 5):
        monkeypatch.setattr("triewise.training.objective.LOGITS_AT_ONCE", at_once)
        seen, settings = Gradients(), config(steps=1, batch_size=4, max_grad_norm=1e9)
        trainer = TrieTrainer(small_model(), examples, learned(examples), settings, tmp_path)
        trainer.add_callback(seen)
        trainer.train()
        steps.append(seen.steps[0])
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name], rtol=1e-5, atol=1e-6)


def test_the_log_speaks_of_the_chosen_titles(tmp_path: Path) -> None:
    examples = world()
    trainers = []
    for objective in (learned(examples), Objective("vocabulary")):
        trainer = TrieTrainer(small_model(), examples, objective, config(steps=1, log_every=1), tmp_path)
        trainer.train()
        trainers.append(trainer.run.history[-1])
    for name in ("loss_zero_gain", "loss_positive_gain", "w"):
        assert trainers[0][name] == pytest.approx(trainers[1][name], rel=1e-5)


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    examples = world()

    def run(out: str, resume: bool = False, seed: int = 0, **changes: Any) -> tuple[Any, Any]:
        model, settings = small_model(dropout=0.3), config(steps=3, log_every=1, log_parts=True, **changes)
        preferences = learned(examples, seed=seed)
        return model, train(model, examples, preferences, settings, tmp_path / out, resume=resume)

    model, whole = run("whole")
    run("parted", time_limit_s=1e-6)
    again, resumed = run("parted", resume=True)
    assert same(weights(model), weights(again))
    assert untimed(whole.history)[1:] == untimed(resumed.history)[1:]
    with pytest.raises(UserError, match="wanted to resume with objective = "):
        run("whole", resume=True, seed=1)


def test_it_starts_at_log_of_one_more_than_the_rejected_and_goes_down(tmp_path: Path) -> None:
    examples, model = world(), small_model()
    rejected = draw_rejected(examples.windows, examples.trie.leaf, 3, 0)
    preferences = Preferences(rejected, reference_logp(model, examples, rejected, "vocabulary"))
    settings = config(steps=40, learning_rate=1e-2, batch_size=8, log_every=1)
    result = train(model, examples, preferences, settings, tmp_path)
    losses = [row["loss"] for row in result.history]
    assert losses[0] == pytest.approx(math.log(4), rel=1e-4)
    assert np.mean(losses[-3:]) < 0.3 * losses[0]
    after = reference_logp(model, examples, rejected, "vocabulary") - preferences.reference
    assert (after[:, :1] > after[:, 1:]).mean() > 0.9, "chosen titles gained more than rejected ones"


def test_wrong_settings() -> None:
    rejected, reference = np.zeros((4, 2), np.int32), np.zeros((4, 3), np.float32)
    with pytest.raises(UserError, match="wanted a beta of S-DPO > 0, got 0"):
        Preferences(rejected, reference, 0)
    with pytest.raises(UserError, match=r"rejected \(W, n\) and reference \(W, 1 \+ n\), got"):
        Preferences(rejected, reference[:, 1:])


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msl_folder(tmp_path_factory.mktemp("raw") / "office")


def recipe(raw: Path, **sections: dict[str, Any]) -> Recipe:
    """A world in which everybody walks round a cycle of 12 titles."""
    values: dict[str, Any] = {
        "name": "sdpo",
        "data": {"source": f"msl:{raw}", "folder": str(raw.parent / "prepared"), "max_history": 6},
        "backbone": {"tiny": {"vocabulary": 300, "width": 16, "layers": 2, "heads": 2, "feed_forward": 32}},
        "objective": {"support": "vocabulary"},
        "training": {"steps": 10, "batch_size": 16, "learning_rate": 3e-2, "warmup_steps": 2, "log_every": 1},
        "evaluation": {"users": 4},
    }
    for section, changes in sections.items():
        values[section] = values[section] | changes
    return parse_recipe(values, "test")


def preference(reference: Path, n: int = 3, **changes: Any) -> dict[str, Any]:
    return changes | {"preference": {"negatives": n, "reference": str(reference)}}


@pytest.fixture(scope="module")
def reference(raw: Path) -> Path:
    train_run(recipe(raw), raw.parent / "lml")
    return raw.parent / "lml"


def test_a_run_starts_from_its_reference_and_is_resumed_without_computing_it_again(
    raw: Path, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = recipe(raw, objective=preference(reference))
    whole = train_run(made, tmp_path / "whole")
    losses = [row["loss"] for row in whole.history]
    assert losses[0] == pytest.approx(math.log(4), rel=1e-3)
    assert len(evaluate_run(tmp_path / "whole").items) == 4
    short = recipe(raw, objective=preference(reference), training={"time_limit_s": 1e-6})
    train_run(short, tmp_path / "parted")
    file = tmp_path / "parted" / "reference.npz"
    written = file.stat().st_mtime_ns
    resumed = train_run(made, tmp_path / "parted", resume=True)
    assert untimed(resumed.history)[1:] == untimed(whole.history)[1:]
    assert file.stat().st_mtime_ns == written
    assert "computed again" not in capsys.readouterr().err


def test_an_adapter_is_trained_on(raw: Path, tmp_path: Path) -> None:
    lora = {"lora": {"rank": 2}}
    small = recipe(raw).backbone.model_dump()
    train_run(recipe(raw, backbone=small | lora, training={"steps": 2}), tmp_path / "lml")
    made = recipe(raw, backbone=small | lora, objective=preference(tmp_path / "lml"), training={"steps": 5})
    result = train_run(made, tmp_path / "sdpo")
    assert result.history[0]["loss"] == pytest.approx(math.log(4), rel=0.1), "dropout of the adapter"
    assert result.history[0]["grad_norm"] > 0
    assert evaluate_run(tmp_path / "sdpo").metrics["adapter"] == "merged"
    other = recipe(raw, backbone=small, objective=preference(tmp_path / "lml"))
    with pytest.raises(
        UserError, match=r"wanted backbone.lora = .*rank=2.* as in the reference .*, got .*rank=0"
    ):
        train_run(other, tmp_path / "other")


@pytest.mark.parametrize(
    ("objective", "training", "line"),
    [
        (
            {"preference": {"negatives": 3}},
            {},
            "objective: preference.negatives > 0 and preference.reference, ",
        ),
        (
            {"preference": {"reference": "runs/x"}},
            {},
            "objective: preference.negatives > 0 and preference.refe",
        ),
        (preference(Path("x"), contrast={"strength": 0.1}), {}, "are two objectives; use one"),
        (preference(Path("x"), weight="igd"), {}, "compares whole titles; leave weight at 'uniform'"),
        (preference(Path("x"), temperature=2.0), {}, "compares whole titles; leave temperature at 1.0"),
        (preference(Path("x")), {"supervision": "every"}, "needs training.supervision = 'last'"),
    ],
)
def test_recipes_that_make_no_sense(objective: dict[str, Any], training: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        recipe(Path("x"), objective=objective, training=training)


def test_references_that_do_not_fit(raw: Path, reference: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wanted a run folder, but .*nothing has no run.json"):
        train_run(recipe(raw, objective=preference(tmp_path / "nothing")), tmp_path / "run")
    wide = recipe(raw).backbone.model_dump() | {"tiny": {"width": 32}}
    with pytest.raises(UserError, match=r"wanted backbone.tiny = .* as in the reference .*, got .*width=32"):
        train_run(recipe(raw, backbone=wide, objective=preference(reference)), tmp_path / "run")
    long = recipe(raw).backbone.model_dump() | {"max_tokens": 500}
    with pytest.raises(
        UserError, match="the prompt of the reference .* is another one; give both the same data"
    ):
        train_run(recipe(raw, backbone=long, objective=preference(reference)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    later = write_msl_folder(tmp_path / "other" / "office", seed=1)
    other = recipe(later, objective=preference(reference))
    with pytest.raises(
        UserError, match="the reference .*lml was trained on other rows than those of .*other"
    ):
        train_run(other, tmp_path / "run")
    train_run(recipe(raw, training={"steps": 1, "rows": "train+valid"}), tmp_path / "both")
    with pytest.raises(
        UserError, match=r"both was trained on the validation rows; .* set training.rows = 'train\+valid'"
    ):
        train_run(recipe(raw, objective=preference(tmp_path / "both")), tmp_path / "run")
    made = recipe(raw).model_dump(exclude={"backbone", "identifier", "objective"}) | {
        "sequential": {"encoder": "gru4rec", "width": 8}
    }
    made["training"] |= {"steps": 1, "warmup_steps": 0}
    made["evaluation"] = {"users": 4}
    train_run(parse_recipe(made, "test"), tmp_path / "items")
    with pytest.raises(
        UserError, match="wanted a language model as the reference, got the sequential run .*items"
    ):
        train_run(recipe(raw, objective=preference(tmp_path / "items")), tmp_path / "run")
