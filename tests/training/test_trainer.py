from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from tests import worlds
from tests.reference.losses import dense_lml_parts
from tests.tiny_models import tiny_model
from tests.token_worlds import cycle_world
from tests.train_child import CONFIG, KILLED_STEP, PLACES, adaptive_run, die, small_model, some_metric
from tests.worlds import write_msl_folder
from triewise.app import train_run
from triewise.errors import UserError
from triewise.recipe import load_recipe, recipe_folder
from triewise.settings import TrainingSettings
from triewise.tokens import binary_weights, zero_gain
from triewise.training import (
    AdaptiveTemperature,
    Contrast,
    Examples,
    Objective,
    Preferences,
    along_titles,
    make_windows,
    target_counts,
    train,
)
from triewise.training.checkpoints import WEIGHTS, checkpoints
from triewise.training.meter import PARTS
from triewise.training.objective import MicroBatches, TitleLoss
from triewise.training.preferences import reference_logp
from triewise.training.state import Stop
from triewise.training.trainer import TrainResult, TrieTrainer
from triewise.training.windows import batch_order

TIMES = ("seconds", "tokens_per_second")


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def read_log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def config(**changes: Any) -> TrainingSettings:
    return TrainingSettings(
        **{"steps": 6, "learning_rate": 3e-3, "batch_size": 4, "warmup_steps": 2, **changes}
    )


@dataclass(frozen=True)
class End:
    """What a run of `adaptive_run` leaves: best weights, last weights, log."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    log: list[dict[str, Any]]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, End)
        return same(self.best, other.best) and same(self.last, other.last) and self.log == other.log


def end(model: Any, result: TrainResult, out: Path) -> End:
    assert (result.steps_done, result.stopped) == (CONFIG.steps, "steps")
    last = load_file(out / f"checkpoint-{CONFIG.steps}" / WEIGHTS)
    assert result.history == read_log(out)
    assert not list(out.glob(".tmp-*"))
    return End(weights(model), last, untimed(result.history))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> End:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole")
    whole = end(*adaptive_run(out), out)
    assert not same(whole.best, whole.last)
    return whole


# --- what is not trained ----------------------------------------------------------------------------------------------


def real_world() -> Examples:
    """Rows over titles that a tokenizer reads."""
    made = worlds.recommender()
    windows = make_windows(worlds.split([[0, 1], [2, 3]], [5, 6]), "last")
    return Examples(windows, made.prompts, made.trie, None, zero_gain(made.trie, target_counts(windows, 9)))


def bert(decoder: bool) -> Any:
    from transformers import BertConfig, BertLMHeadModel

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertLMHeadModel(BertConfig(vocab_size=400, is_decoder=decoder, **shape))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    return model


def test_a_model_that_sees_the_future_is_not_trained_and_is_no_reference(tmp_path: Path) -> None:
    examples, one = real_world(), config(steps=1, batch_size=2, warmup_steps=0)
    rejected = np.array([[0], [1]], dtype=np.int32)
    sees = bert(decoder=False)
    learned = [Objective("trie"), Contrast(Objective("vocabulary"), 0.5)]
    learned.append(Preferences(rejected, np.zeros((2, 2), dtype=np.float32)))
    for objective in learned:
        with pytest.raises(UserError, match="got BertLMHeadModel, which sees the future"):
            train(sees, examples, objective, one, tmp_path / "run")
    with pytest.raises(UserError, match="sees the future"):
        reference_logp(sees, examples, rejected, "vocabulary")
    assert not (tmp_path / "run").exists()
    causal = bert(decoder=True)
    assert train(causal, examples, learned[0], one, tmp_path / "run").steps_done == 1
    assert np.isfinite(reference_logp(causal, examples, rejected, "vocabulary")).all()


def test_a_tokenizer_larger_than_the_embedding_is_one_line_before_training(tmp_path: Path) -> None:
    examples, one = real_world(), config(steps=1, batch_size=2, warmup_steps=0)
    n = len(examples.prompts.tokenizer)
    small, rejected = tiny_model("llama", vocabulary=n - 1), np.array([[0], [1]], dtype=np.int32)
    wanted = rf"ids below {n - 1}, the rows of the model's embedding, got one with ids up to {n - 1}"
    with pytest.raises(UserError, match=wanted):
        train(small, examples, Objective("trie"), one, tmp_path / "run")
    with pytest.raises(UserError, match=wanted):
        reference_logp(small, examples, rejected, "trie")
    fits = tiny_model("llama", vocabulary=n)
    assert train(fits, examples, Objective("trie"), one, tmp_path / "run").steps_done == 1


# --- one micro-batch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma2", "granite", "bert"])
@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_the_module_equals_the_models_own_logits(
    kind: str, support: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma 2 caps its logits, Granite divides them; BERT's go through a layer more, so its own forward is used."""
    changes = {"final_logit_softcapping": 2.0} if kind == "gemma2" else {}
    model, examples = tiny_model(kind, **changes), cycle_world()
    objective = Objective(support, 1.3)
    module = TitleLoss(model, objective, examples.trie).eval()
    assert module.by_hand == (kind != "bert")
    assert ("warning: these logits" in capsys.readouterr().err) == (kind == "bert")
    rows = np.array([[0, 1, 5]])
    inputs = MicroBatches(examples, objective, rows)[0]
    counts, contribution = inputs.pop("counts"), inputs.pop("contribution")
    outputs = module(**inputs)
    batch = examples.batch(rows[0])
    logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)[batch.position]
    target, node = torch.from_numpy(batch.target), torch.from_numpy(batch.node)
    parts = objective.parts(logits, target, node, examples.trie, torch.from_numpy(batch.weight))
    torch.testing.assert_close(outputs["loss"], parts.loss.sum(), rtol=1e-4, atol=1e-4)
    assert contribution == pytest.approx(parts.contribution.sum().item())
    zero = torch.from_numpy(batch.zero_gain)
    decision = torch.from_numpy(examples.trie.branching[batch.node])
    expected = [
        parts.nll[zero].sum(),
        parts.nll[~zero].sum(),
        (1 - (-parts.nll[decision]).exp()).sum(),
    ]
    torch.testing.assert_close(outputs["sums"], torch.stack(expected).detach(), rtol=1e-4, atol=1e-4)
    assert counts == {
        "tokens": batch.n_tokens,
        "zero_gain": int(zero.sum()),
        "positive_gain": int((~zero).sum()),
        "decisions": int(decision.sum()),
        "places": inputs["input_ids"].numel(),
    }


def test_trie_support_leaves_out_what_nothing_depends_on() -> None:
    examples = cycle_world()
    full, short = (
        MicroBatches(examples, Objective(s), np.array([[0, 1]]))[0] for s in ("vocabulary", "trie")
    )
    assert full["input_ids"].shape[1] == examples.batch([0, 1]).input_ids.shape[1] - 1
    assert short["input_ids"].shape[1] == full["input_ids"].shape[1] - 1, "the last terminator is forced"
    assert len(short["target"]) == short["counts"]["decisions"] < len(full["target"])


def test_a_step_has_its_windows_in_order_of_length(tmp_path: Path) -> None:
    examples, settings = weighted_examples(), config(batch_size=6, accumulation=3)
    rows = (
        TrieTrainer(small_model(), examples, Objective(), settings, tmp_path)
        .get_train_dataloader()
        .dataset.rows
    )
    order = batch_order(len(examples), 6, settings.steps, 0)
    assert rows.shape == (18, 2)
    assert np.array_equal(np.sort(rows.reshape(6, 6)), np.sort(order))
    assert (np.diff(examples.size[rows.reshape(6, 6)]) >= 0).all()


# --- the normaliser ---------------------------------------------------------------------------------------------------


class Gradients(TrainerCallback):  # type: ignore[misc]
    """What the optimiser is given, step by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.model.named_parameters()})


def weighted_examples() -> Examples:
    """IGD weights, so that the micro-batches of a step have unequal sums of weights."""
    plain = cycle_world()
    counts = target_counts(plain.windows, 12)
    counts[::3] = 0  # some titles then decide nothing on their way
    weight = along_titles(plain.trie, binary_weights(plain.trie, counts, 0.2))
    plain.windows.n_context[::2] = 3
    return Examples(plain.windows, plain.prompts, plain.trie, weight, zero_gain(plain.trie, counts))


@pytest.mark.parametrize(
    "objective",
    [
        *(Objective(s, 1.2, n) for s in ("trie", "vocabulary") for n in ("weights", "decisions", "sum")),
        Objective("trie", 1.2, expand_negatives=True),
        Objective("trie", AdaptiveTemperature(0.5, clamp=(0.1, 5.0), scope="token")),
    ],
    ids=lambda o: "-".join(map(str, o.settings().values())) if not o.is_adaptive else "token",
)
def test_accumulation_changes_nothing(objective: Objective, tmp_path: Path) -> None:
    found = []
    for accumulation in (1, 4):
        model, seen = small_model(), Gradients()
        settings = config(
            steps=3, batch_size=8, accumulation=accumulation, max_grad_norm=1e9, learning_rate=1e-4
        )
        trainer = TrieTrainer(model, weighted_examples(), objective, settings, tmp_path)
        trainer.add_callback(seen)
        trainer.train()
        found.append((seen.steps, weights(model), trainer.run.history))
    (one, end_one, log_one), (four, end_four, log_four) = found
    for ours, theirs in zip(one, four, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    for name in end_one:
        torch.testing.assert_close(end_one[name], end_four[name], rtol=0, atol=1e-4)
    assert log_one[-1]["loss"] == pytest.approx(log_four[-1]["loss"], rel=1e-5)


def test_the_step_is_the_gradient_of_the_objective_over_the_whole_batch(tmp_path: Path) -> None:
    examples, objective, seen = weighted_examples(), Objective("vocabulary"), Gradients()
    settings = config(steps=1, batch_size=8, accumulation=4, max_grad_norm=1e9)
    trainer = TrieTrainer(small_model(), examples, objective, settings, tmp_path)
    trainer.add_callback(seen)
    rows = np.concatenate([r for r in trainer.get_train_dataloader().dataset.rows])
    trainer.train()
    model, batch = small_model(), examples.batch(rows)
    logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)[batch.position]
    tensors = (torch.from_numpy(a) for a in (batch.target, batch.node))
    objective(logits, *tensors, examples.trie, torch.from_numpy(batch.weight)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-6)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective", [Objective("trie"), Objective("vocabulary")], ids=["trie", "vocabulary"]
)
def test_a_cycle_is_learned(objective: Objective, tmp_path: Path) -> None:
    settings = config(steps=120, learning_rate=2e-2, batch_size=8, log_every=20)
    model = small_model()
    result = train(model, cycle_world(), objective, settings, tmp_path)
    losses = [row["loss"] for row in result.history]
    assert len(losses) == 6
    assert losses[-1] < 0.1 * losses[0]
    assert result.stopped == "steps" and result.steps_done == 120
    assert not model.training


def test_a_row_of_the_log(tmp_path: Path) -> None:
    ats = AdaptiveTemperature(eta=0.5, clamp=(0.1, 5.0))
    result = train(small_model(), cycle_world(), Objective(temperature=ats), config(log_every=4), tmp_path)
    assert read_log(tmp_path) == result.history
    assert [row["step"] for row in result.history] == [4, 6]
    last = result.history[-1]
    assert set(last) == {
        *(
            "step",
            "loss",
            "loss_zero_gain",
            "loss_positive_gain",
            "w",
            "tokens_per_place",
            "tokens_per_second",
        ),
        *("temperature", "learning_rate", "grad_norm", "epoch", "seconds"),
    }
    assert last["temperature"] == ats.value != 1.5
    assert last["epoch"] == 1.0
    assert 0 < last["w"] < 1 and last["grad_norm"] > 0 and last["tokens_per_second"] > 0
    assert last["loss_zero_gain"] == 0, "forced tokens cost nothing in trie support"


def test_the_temperature_moves_once_a_micro_batch_and_in_training_only(tmp_path: Path) -> None:
    calls = []

    class Counting(AdaptiveTemperature):
        def update(self, positive: Tensor, valid: Tensor, m: float) -> float:
            calls.append(m)
            return super().update(positive, valid, m)

    ats = Counting(eta=0.5)
    train(small_model(), cycle_world(), Objective(temperature=ats), config(accumulation=2), tmp_path)
    assert calls == [4] * 12
    module = TitleLoss(small_model(), Objective(temperature=ats), cycle_world().trie).eval()
    inputs = MicroBatches(cycle_world(), module.objective, np.array([[0]]))[0]
    del inputs["counts"], inputs["contribution"]
    module(**inputs)
    assert len(calls) == 12


# --- both parts of the language-modelling loss ------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_logged_parts_equal_a_plain_recomputation(support: str, accumulation: int, tmp_path: Path) -> None:
    """Losses and gradient norms of the first step, from the whole batch at once and a dense softmax."""
    examples, objective = weighted_examples(), Objective(support, 1.7)
    settings = config(batch_size=8, accumulation=accumulation, log_every=1, steps=1, log_parts=True)
    trainer = TrieTrainer(small_model(), examples, objective, settings, tmp_path)
    rows = np.concatenate([r for r in trainer.get_train_dataloader().dataset.rows])
    trainer.train()
    model, batch = small_model(), examples.batch(rows)
    expected = []
    for part in range(2):
        logits = model(input_ids=torch.from_numpy(batch.input_ids)).logits.flatten(0, 1)[batch.position]
        tensors = (torch.from_numpy(array) for array in (batch.target, batch.node))
        mean = dense_lml_parts(logits, *tensors, examples.trie)[part].mean()
        squares = [g.square().sum() for g in torch.autograd.grad(mean, tuple(model.parameters()))]
        expected.append((mean.item(), torch.stack(squares).sum().sqrt().item()))
    found = [trainer.run.history[-1][name] for name in PARTS]
    assert found == pytest.approx([value for pair in zip(*expected, strict=True) for value in pair], rel=1e-4)
    assert found[0] > 0, "forced tokens are paid for too, in both supports"


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_logging_the_parts_changes_nothing(support: str, tmp_path: Path) -> None:
    ends, logs = [], []
    for log_parts in (False, True):
        model, script = small_model(dropout=0.3), Scripted(0.1, 0.3, 0.2)
        ats = AdaptiveTemperature(0.5, clamp=(0.1, 5.0))
        objective = Objective(support, ats if support == "trie" else 1.0)
        settings = config(accumulation=2, log_every=2, evaluate_every=3, steps=7, log_parts=log_parts)
        out = tmp_path / str(log_parts)
        result = train(model, cycle_world(), objective, settings, out, validate=script)
        ends.append([*script.shown[1:], load_file(out / "checkpoint-7" / WEIGHTS)])
        logs.append(untimed(result.history))
    assert all(same(ours, theirs) for ours, theirs in zip(*ends, strict=True))
    rows = [row for row in logs[1] if "loss" in row]
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 7]
    assert all(row[name] > 0 for row in rows for name in PARTS)
    assert logs[0] == [{k: v for k, v in row.items() if k not in PARTS} for row in logs[1]]


def test_the_parts_are_those_of_the_step_with_its_dropout(tmp_path: Path) -> None:
    """With uniform weights and vocabulary support the loss of a step is the sum of its parts."""
    settings = config(accumulation=2, log_every=1, log_parts=True)
    result = train(small_model(dropout=0.3), cycle_world(), Objective("vocabulary"), settings, tmp_path)
    assert len(result.history) == 6
    for row in result.history:
        assert row["loss_invalid"] + row["loss_choice"] == pytest.approx(row["loss"], rel=1e-5)


# --- stopping and going on --------------------------------------------------------------------------------------------


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    ends = []
    for i, seed in enumerate((0, 0, 1)):
        model = small_model(dropout=0.3)
        train(model, cycle_world(), Objective(), config(), tmp_path / str(i), seed=seed)
        ends.append(weights(model))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.fixture(scope="module")
def forks() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train_child", "transformers.models.qwen2.modeling_qwen2"])
    return context


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_to_the_same_weights(
    place: str, forks: Any, tmp_path: Path, uninterrupted: End
) -> None:
    child = forks.Process(target=die, args=(str(tmp_path), place))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert [step for step, _ in checkpoints(tmp_path)] == [4], "nothing half-written is listed"
    leftovers = [path.name for path in tmp_path.glob(".tmp-*")]
    left = [f".tmp-{child.pid}-checkpoint-{KILLED_STEP}"]
    assert leftovers == (left if place in ("middle", "rename") else [])
    assert end(*adaptive_run(tmp_path, resume=True), tmp_path) == uninterrupted
    assert [step for step, _ in checkpoints(tmp_path)] == [8, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_a_resume_goes_on(
    number: signal.Signals, tmp_path: Path, uninterrupted: End
) -> None:
    handler = signal.getsignal(number)
    stopped_at = 7
    original = TitleLoss.forward
    calls = 0

    def forward(self: TitleLoss, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 * stopped_at - 1:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TitleLoss, "forward", forward)
        _, result = adaptive_run(tmp_path)
    assert (result.stopped, result.steps_done) == ("interrupted", stopped_at)
    assert signal.getsignal(number) == handler
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 99}\n{"step": 7, "lo')  # a row of a step that was lost, and half a row
    resumed = end(*adaptive_run(tmp_path, resume=True), tmp_path)
    assert same(resumed.best, uninterrupted.best) and same(resumed.last, uninterrupted.last)
    steps = [row["step"] for row in uninterrupted.log]
    assert [row["step"] for row in resumed.log] == sorted([*steps, stopped_at]), (
        "a row at the stop, none twice"
    )


def test_the_time_limit_stops_after_a_step_and_a_resume_goes_on(tmp_path: Path, uninterrupted: End) -> None:
    _, result = adaptive_run(tmp_path, time_limit_s=1e-6)
    assert (result.stopped, result.steps_done, result.best_step) == ("time limit", 1, 1)
    assert result.history[-1]["valid"], "the weights it ends with were validated"
    resumed = end(*adaptive_run(tmp_path, resume=True), tmp_path)
    assert same(resumed.best, uninterrupted.best) and same(resumed.last, uninterrupted.last)


@pytest.mark.parametrize(
    "ats", [{"scope": "token"}, {"root": "exact", "rows": "all"}], ids=["token", "exact-all"]
)
def test_a_resumed_run_has_the_temperatures_and_parts_of_an_uninterrupted_one(
    ats: dict[str, Any], tmp_path: Path
) -> None:
    def run(out: str, resume: bool = False, **changes: Any) -> TrainResult:
        objective = Objective(temperature=AdaptiveTemperature(0.5, clamp=(0.1, 5.0), **ats))
        settings = config(log_every=2, log_parts=True, **changes)
        return train(
            small_model(dropout=0.3), cycle_world(), objective, settings, tmp_path / out, resume=resume
        )

    whole = untimed(run("whole").history)
    stopped = run("parted", time_limit_s=1e-6).history
    assert [(row["step"], row["loss_choice"]) for row in stopped] == [(1, None)], "nobody could foresee it"
    resumed = untimed(run("parted", resume=True).history)[1:]
    assert [row["step"] for row in resumed] == [row["step"] for row in whole] == [2, 4, 6]
    kept = ("temperature", "grad_norm", *PARTS)
    assert [[row[k] for k in kept] for row in resumed] == [[row[k] for k in kept] for row in whole]
    assert len({row["temperature"] for row in whole}) == 3


def test_a_finished_run_is_not_run_again(tmp_path: Path, uninterrupted: End) -> None:
    _, first = adaptive_run(tmp_path)
    model, again = adaptive_run(tmp_path, resume=True)
    assert end(model, again, tmp_path) == uninterrupted
    assert (again.steps_done, again.stopped, again.best_step) == (12, "steps", first.best_step)
    assert again.history == first.history


def test_starting_anew_forgets_the_run_before(tmp_path: Path) -> None:
    adaptive_run(tmp_path)
    (tmp_path / "recipe.toml").write_text("kept")
    train(small_model(), cycle_world(), Objective(), config(steps=2), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "log.jsonl", "recipe.toml"]
    assert [row["step"] for row in read_log(tmp_path)] == [2]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"learning_rate": 1.0},
            "wanted to resume with learning_rate = 0.003 as in .*checkpoint-12, got 1.0",
        ),
        ({"steps": 24}, "wanted to resume with steps = 12"),
        ({"seed": 1}, "wanted to resume with seed = 0"),
    ],
)
def test_a_checkpoint_of_another_run(changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    adaptive_run(tmp_path)
    with pytest.raises(UserError, match=line):
        adaptive_run(tmp_path, resume=True, **changes)
    with pytest.raises(UserError, match="wanted to resume with objective"):
        train(
            small_model(),
            cycle_world(),
            Objective("vocabulary"),
            CONFIG,
            tmp_path,
            validate=some_metric,
            resume=True,
        )


def test_every_choice_of_an_objective_is_part_of_a_checkpoint(tmp_path: Path) -> None:
    ats = [{}, {"scope": "token"}, {"root": "exact"}, {"rows": "all"}, {"rows": "root"}, {"eta": 0.5}]
    objectives = [
        *(Objective(temperature=AdaptiveTemperature(**choice)) for choice in ats),
        Objective(),
        Objective("vocabulary"),
        Objective(normaliser="sum"),
        Objective(expand_negatives=True),
    ]
    found = [
        TrieTrainer(small_model(), cycle_world(), o, config(), tmp_path).run.identity["objective"]
        for o in objectives
    ]
    assert len({json.dumps(one) for one in found}) == len(objectives)


# --- validation -------------------------------------------------------------------------------------------------------


class Scripted:
    """Metrics from a list; remembers the weights it was shown."""

    def __init__(self, *values: float) -> None:
        self.values, self.shown = list(values), [{}]

    def __call__(self, model: Any) -> dict[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        self.shown.append(weights(model))
        return {"HR@10": 0.0, "NDCG@10": self.values[len(self.shown) - 2]}


def test_patience_ends_the_run_and_the_best_weights_stay(tmp_path: Path) -> None:
    model, script = small_model(), Scripted(0.1, 0.3, 0.3, 0.2, 0.9)
    settings = config(steps=20, evaluate_every=2, patience=2)
    result = train(model, cycle_world(), Objective(), settings, tmp_path, validate=script)
    assert (result.stopped, result.steps_done, result.best_step, result.best_metric) == (
        "patience",
        8,
        4,
        0.3,
    )
    assert same(weights(model), script.shown[2])
    assert not same(script.shown[2], script.shown[3])
    rows = [row for row in read_log(tmp_path) if "valid" in row]
    assert rows[1] == {"step": 4, "valid": {"HR@10": 0.0, "NDCG@10": 0.3}}
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 4
    again = small_model()
    result = train(again, cycle_world(), Objective(), settings, tmp_path, validate=script, resume=True)
    assert result.stopped == "patience" and same(weights(again), script.shown[2])


@pytest.mark.parametrize("metrics", [None, {"NDCG@10": 0.2}])
def test_who_validates_may_end_the_run(metrics: dict[str, float] | None, tmp_path: Path) -> None:
    """A checkpoint is left, and a resumed run ends with the weights of one that was not ended."""
    model, settings = small_model(dropout=0.3), config(evaluate_every=2)

    def stop(model: Any) -> dict[str, float]:
        raise Stop("pruned", metrics)

    result = train(model, cycle_world(), Objective(), settings, tmp_path / "parts", validate=stop)
    assert (result.stopped, result.steps_done) == ("pruned", 2)
    assert (result.best_step, result.best_metric) == ((2, 0.2) if metrics else (None, None))
    assert [row["valid"] for row in result.history if "valid" in row] == [metrics] * bool(metrics)
    assert [step for step, _ in checkpoints(tmp_path / "parts")] == [2]
    for folder in ("parts", "whole"):
        script = Scripted(*[0.1, 0.5, 0.6][folder == "parts" :])
        model, how = small_model(dropout=0.3), {"validate": script, "resume": folder == "parts"}
        result = train(model, cycle_world(), Objective(), settings, tmp_path / folder, **how)
        assert (result.stopped, result.best_step) == ("steps", 6)
    parts, whole = (load_file(tmp_path / f / "checkpoint-6" / WEIGHTS) for f in ("parts", "whole"))
    assert same(parts, whole)


def test_without_patience_the_best_weights_stay_too_and_the_last_step_is_validated(tmp_path: Path) -> None:
    model, script = small_model(), Scripted(0.5, 0.4, 0.6)
    settings = config(steps=5, evaluate_every=2)
    result = train(model, cycle_world(), Objective(), settings, tmp_path, validate=script)
    assert (result.stopped, result.best_step) == ("steps", 5)
    assert same(weights(model), script.shown[3])


def test_validating_does_not_change_what_is_learned(tmp_path: Path) -> None:
    ends = []
    for every in (0, 1):
        model = small_model(dropout=0.3)
        script = Scripted(*map(float, range(6)))  # the last one is the best

        def noisy(m: Any, script: Scripted = script) -> dict[str, float]:
            torch.rand(3), np.random.rand(3)
            return script(m)

        settings = config(evaluate_every=every)
        train(model, cycle_world(), Objective(), settings, tmp_path / str(every), validate=noisy)
        ends.append(weights(model))
    assert same(*ends)


def test_best_weights_survive_a_resume(tmp_path: Path) -> None:
    """The best validation is before the checkpoint; afterwards it gets worse."""
    script = Scripted(0.9, 0.1, 0.1)
    settings = config(steps=6, evaluate_every=2, time_limit_s=None, checkpoint_every=4)
    train(small_model(), cycle_world(), Objective(), settings, tmp_path, validate=script)
    for path in (tmp_path / "checkpoint-6", tmp_path / "best"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    model, late = small_model(), Scripted(0.2)
    result = train(model, cycle_world(), Objective(), settings, tmp_path, validate=late, resume=True)
    assert (result.best_step, result.best_metric) == (2, 0.9)
    assert same(weights(model), script.shown[1])


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"steps": 0}, "steps\n.*greater than or equal to 1"),
        ({"learning_rate": 0.0}, "learning_rate\n.*greater than 0"),
        ({"batch_size": 6, "accumulation": 4}, "batch_size must be a multiple of accumulation, got 6 and 4"),
        ({"schedule": "step"}, "schedule\n.*'linear', 'constant', 'cosine' or 'cosine-floor'"),
        ({"order": "users"}, "order\n.*'rows' or 'chains'"),
        ({"patience": 1}, "patience counts validations: wanted evaluate_every > 0, got 0"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=line):
        config(**changes)


def test_wrong_calls(tmp_path: Path) -> None:
    examples, objective = cycle_world(), Objective()
    with pytest.raises(UserError, match="needs something to validate with"):
        train(small_model(), examples, objective, config(evaluate_every=1), tmp_path)
    wrong = config(evaluate_every=1, metric="HR@5")
    with pytest.raises(UserError, match=r"wanted the metric HR@5, validation gives NDCG@10"):
        train(small_model(), examples, objective, wrong, tmp_path, validate=some_metric)
    broken = small_model()
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"whose logits are not numbers \(NaN\)"):
        train(broken, examples, objective, config(), tmp_path)
    with pytest.raises(UserError, match="the loss is nan around step 6; lower the learning rate"):
        train(small_model(), examples, objective, config(learning_rate=1e30), tmp_path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    train(small_model(), cycle_world(), Objective(), config(steps=1), tmp_path)
    other = small_model()
    other.model.layers[0].requires_grad_(False)
    with pytest.raises(UserError, match="wanted to resume with trained parameters"):
        train(other, cycle_world(), Objective(), config(steps=1), tmp_path, resume=True)


# --- recipes ----------------------------------------------------------------------------------------------------------

RECIPES = sorted(recipe_folder().rglob("*.toml"))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Changes that put a small world and a small model in the place of a recipe's own."""
    folder = tmp_path_factory.mktemp("published")
    raw = write_msl_folder(folder / "amazon_office")
    tiny = {"vocabulary": 300, "width": 16, "heads": 2, "feed_forward": 32}
    return [
        f"data.source=msl:{raw.as_posix()}",
        f"data.folder={(folder / 'prepared').as_posix()}",
        "training.steps=2",
        *(f"backbone.tiny.{key}={value}" for key, value in tiny.items()),
    ]


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.relative_to(recipe_folder()).as_posix())
def test_shipped_recipes_load_and_those_of_a_published_split_train(
    file: Path, published: list[str], tmp_path: Path
) -> None:
    recipe = load_recipe(file)
    if recipe.sequential is None and recipe.data.source.startswith("msl:") and recipe.backbone.name == "tiny":
        changes = list(published)
        partners = {
            "hybrid.items": recipe.hybrid,
            "identifier.items": recipe.identifier.items,
            "objective.flow.scores": recipe.objective.flow,
        }
        keys = [key for key, named in partners.items() if named is not None]
        if keys:
            items = [change for change in published if not change.startswith("backbone.")]
            few = ["training.evaluate_every=0", "training.batch_size=4"]
            train_run(load_recipe("office/sasrec", [*items, *few]), tmp_path / "items")
            changes += [f"{key}={(tmp_path / 'items').as_posix()}" for key in keys]
        if recipe.hybrid is not None:
            changes.append("hybrid.alignment.steps=2")
        if recipe.objective.preference.reference:
            first = "lml" if recipe.hybrid is None else f"{recipe.hybrid.kind}-lml"
            train_run(load_recipe(f"office/{first}", changes), tmp_path / "reference")
            where = (tmp_path / "reference").as_posix()
            changes.append(f"objective.preference.reference={where}")
        result = train_run(load_recipe(file, changes), tmp_path / "run")
        assert (result.steps_done, result.stopped) == (2, "steps")
        assert math.isfinite(result.history[-1]["loss"])


def test_expanded_negatives_want_trie_support() -> None:
    with pytest.raises(UserError, match="objective: expand_negatives = true needs support = 'trie'"):
        load_recipe("office/lml", ["objective.expand_negatives=true"])
