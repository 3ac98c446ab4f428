"""Who is told of a run: those that are asked for, of everything, and nobody else; and what a watch may do."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import worlds
from tests.token_worlds import cycle_world
from tests.train_child import small_model, some_metric
from triewise.errors import UserError
from triewise.files import read_json
from triewise.models import SequentialModel
from triewise.settings import SequentialSettings, TrainingSettings
from triewise.training import Objective, Sequences, fit, make_windows, target_counts, train
from triewise.training.tracking import tracked
from triewise.training.trainer import TrieTrainer

KINDS = ("language model", "sequential")


def trained(kind: str, out: Path, **more: Any) -> Any:
    """Six steps with a row of the log every second one and a validation every third."""
    how = {k: more.pop(k) for k in ("watch", "facts", "resume") if k in more}
    given = {
        "steps": 6,
        "batch_size": 4,
        "log_every": 2,
        "evaluate_every": 3,
        "checkpoint_every": 2,
        "warmup_steps": 1,
    }
    settings = TrainingSettings(**{**given, **more})
    if kind == "language model":
        return train(
            small_model(), cycle_world(), Objective(), settings, out, validate=some_metric, title="a", **how
        )
    windows = make_windows(worlds.split([[0, 1], [2, 3], [1, 2], [3, 4]], [5, 6, 3, 5]), "last")
    sequential = SequentialSettings(encoder="sasrec", width=8, device="cpu")
    model = SequentialModel(sequential, 9, 5, 0)
    return fit(
        model,
        Sequences.from_windows(windows),
        target_counts(windows, 9),
        sequential,
        settings,
        out,
        validate=lambda model: {"NDCG@10": float(model.bias.sum()), "HR@10": 0.5},
        title="a",
        **how,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_watch_is_told_each_row_and_ends_a_run_after_a_validation(kind: str, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []

    def watch(row: Any) -> str | None:
        rows.append(dict(row))
        return "pruned"  # of rows without a validation it changes nothing

    result = trained(kind, tmp_path, watch=watch)
    assert (result.steps_done, result.stopped, result.best_step) == (3, "pruned", 3)
    assert rows == result.history and [row["step"] for row in rows] == [2, 3, 3]
    assert (tmp_path / "checkpoint-3").is_dir(), "it can be gone on with"
    assert trained(kind, tmp_path, watch=lambda row: None, resume=True).stopped == "steps"


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_holds_settings_losses_and_validations(kind: str, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    facts = {"training": {"learning_rate": 1e-4}, "name": "a"}
    result = trained(kind, tmp_path, report_to=("tensorboard",), facts=facts)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    loss = [(e.step, e.value) for e in events.Scalars("loss")]
    rows = [(row["step"], row["loss"]) for row in result.history if "loss" in row]
    assert [step for step, _ in loss] == [step for step, _ in rows]
    assert np.allclose([v for _, v in loss], [v for _, v in rows])
    assert [e.step for e in events.Scalars("valid/NDCG@10")] == [3, 6]
    [text] = events.Tensors("settings/text_summary")
    assert b"| training.learning_rate | `0.0001` |" in text.tensor_proto.string_val[0]


class Told(types.ModuleType):
    """A stand-in for a tracker: it keeps what it is called with."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        for each in ("init", "log", "finish", "set_experiment", "log_params", "log_metrics"):
            setattr(self, each, self._keeps(each))

    def _keeps(self, name: str) -> Any:
        def keep(*args: Any, **how: Any) -> Any:
            self.calls.append((name, args, how))
            return types.SimpleNamespace(id="r1", name="a-2")

        return keep

    @contextmanager
    def start_run(self, **how: Any) -> Iterator[Any]:
        self.calls.append(("start_run", (), how))
        yield types.SimpleNamespace(info=types.SimpleNamespace(run_id="m1"))
        self.calls.append(("end_run", (), {}))

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_told_by_their_own_interface(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told(name)
    monkeypatch.setitem(sys.modules, name, told)
    result = trained(kind, tmp_path, report_to=(name,), facts={"seed": 0, "training": {"steps": 6}})
    assert told.names() == ["init", *["log"] * len(result.history), "finish"]
    init = told.calls[0][2]
    assert init["config"] == {"seed": 0, "training.steps": 6} and (init["project"], init["name"]) == (
        "triewise",
        "a",
    )
    steps = [how["step"] for call, _, how in told.calls if call == "log"]
    assert steps == [row["step"] for row in result.history]
    assert any("valid.NDCG@10" in args[0] for call, args, _ in told.calls if call == "log")
    # A run that goes on is the same run there, and another one of the same title is not.
    assert read_json(tmp_path / "tracking.json") == {name: "r1" if name == "wandb" else "a-2"}
    assert init["resume"] == ("allow" if name == "wandb" else "never") and "id" not in init
    told.calls.clear()
    with tracked([name], tmp_path, "a", {}):
        again = told.calls[0][2]
    assert again["resume"] == "allow" and (again.get("id"), again["name"]) == (
        ("r1", "a") if name == "wandb" else (None, "a-2")
    )


def test_mlflow_is_told_and_a_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told("mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", told)
    stop = {"watch": lambda row: "stop"}
    trained("sequential", tmp_path, report_to=("mlflow",), facts={"seed": 0}, **stop)
    assert told.names()[:3] == ["set_experiment", "start_run", "log_params"]
    metrics = [args[0] for call, args, _ in told.calls if call == "log_metrics"]
    assert any("valid.NDCG_at_10" in values for values in metrics)
    told.calls.clear()
    trained("sequential", tmp_path, report_to=("mlflow",), facts={"seed": 0}, resume=True)
    assert told.names()[:2] == ["set_experiment", "start_run"] and "log_params" not in told.names()
    assert told.calls[1][2] == {"run_id": "m1"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_outlives_its_trackers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that goes away is said once; what the run itself raises is not swallowed."""
    told = Told("wandb")

    def gone(*args: Any, **how: Any) -> None:
        told.calls.append(("gone", args, how))
        raise ConnectionError("no route\nto the host")

    told.log = told.finish = gone  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", told)
    result = trained(kind, tmp_path, report_to=("wandb",))
    assert (result.steps_done, result.stopped) == (6, "steps")
    assert told.names() == ["init", "gone", "gone"], "one row, and the end"
    assert capsys.readouterr().err.count("warning: wandb fails and is told no more: no route\n") == 1
    with pytest.raises(ZeroDivisionError), tracked(["wandb"], tmp_path / "b", "a", {}):
        raise ZeroDivisionError


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_is_told_unless_asked_whatever_the_environment_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_PROJECT", "WANDB_API_KEY", "MLFLOW_TRACKING_URI", "TRACKIO_PROJECT", "COMET_API_KEY"):
        monkeypatch.setenv(name, "https://127.0.0.1:1")
    monkeypatch.setenv("WANDB_MODE", "online")
    told = {name: Told(name) for name in ("wandb", "trackio", "mlflow")}
    for name, module in told.items():
        monkeypatch.setitem(sys.modules, name, module)
    plain = trained(kind, tmp_path / "a")
    assert not any(module.calls for module in told.values())
    assert not (tmp_path / "a" / "tensorboard").exists() and not (tmp_path / "a" / "tracking.json").exists()
    # Who is told changes nothing that is learned.
    other = trained(kind, tmp_path / "b", report_to=("wandb",))
    assert [row.get("loss") for row in plain.history] == [row.get("loss") for row in other.history]


def test_the_trainer_of_transformers_reports_to_nobody(tmp_path: Path) -> None:
    settings = TrainingSettings(steps=1, batch_size=4, report_to=("wandb",))
    trainer = TrieTrainer(small_model(), cycle_world(), Objective(), settings, tmp_path)
    assert trainer.args.report_to == []
    names = {type(each).__name__ for each in trainer.callback_handler.callbacks}
    assert not {name for name in names if "Wandb" in name or "Tensor" in name or "MLflow" in name}


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "mlflow", "wandb"])
def test_a_missing_package_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"training.report_to = \['{name}'\] needs the package {name}; run: pip"
    ):
        trained("sequential", tmp_path, report_to=(name,))
