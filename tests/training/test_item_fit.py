"""Sequential models: losses against loops, padding, known worlds, resume, and the recommender's contract."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import triewise
from tests import worlds
from tests.token_worlds import make_split
from tests.worlds import HISTORIES
from triewise.arrays import Ragged, padded
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.models import SequentialModel
from triewise.recommenders import SequentialRecommender
from triewise.settings import EncoderSettings, SequentialSettings, TrainingSettings
from triewise.testing import RecommenderContract
from triewise.training import Sequences, Windows, fit, make_windows, target_counts
from triewise.training.item_fit import learning_rate
from triewise.training.item_tasks import (
    Task,
    cloze_task,
    draw_negatives,
    dros,
    item_loss,
    pairwise,
    propensities,
    shifted_task,
    task_loss,
)

KINDS = ("gru4rec", "sasrec", "esasrec", "bert4rec", "lrurec")


def small(
    kind: str = "sasrec", n_items: int = 9, seed: int = 0, max_length: int = 6, **changes: Any
) -> SequentialModel:
    shape = {"width": 8, "blocks": 2, "heads": 2, "dropout": 0.0} | changes
    return SequentialModel(EncoderSettings(encoder=kind, **shape), n_items, max_length, seed)


def sequential(**changes: Any) -> SequentialSettings:
    """SASRec, or BERT4Rec for the loss of masks."""
    encoder = "bert4rec" if changes.get("loss") == "cloze" else "sasrec"
    return SequentialSettings(**{"encoder": encoder} | changes)


def recommender(kind: str = "sasrec", **changes: Any) -> SequentialRecommender:
    model = small(kind, **changes).eval()
    with torch.no_grad():  # far from ties
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.5)
    return SequentialRecommender(model, worlds.catalog(), np.arange(9), batch_users=3)


class TestSASRec(RecommenderContract):
    make = staticmethod(recommender)


class TestESASRec(RecommenderContract):
    make = staticmethod(functools.partial(recommender, "esasrec"))


class TestGRU4Rec(RecommenderContract):
    make = staticmethod(functools.partial(recommender, "gru4rec", head="linear"))


class TestBERT4Rec(RecommenderContract):
    make = staticmethod(functools.partial(recommender, "bert4rec"))


class TestLRURec(RecommenderContract):
    make = staticmethod(functools.partial(recommender, "lrurec"))


# ---------------------------------------------------------------- encoders
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_what_comes_later_change_nothing(kind: str) -> None:
    model = recommender(kind).model
    row = torch.tensor([[3, 1, 4]])
    alone, longer = model(row), model(torch.nn.functional.pad(row, (0, 3)))
    torch.testing.assert_close(longer[:, :3], alone)
    future = model(torch.tensor([[3, 1, 4, 9]]))[:, :3]
    assert torch.allclose(future, alone, atol=1e-5) == (kind != "bert4rec")


FORMS: list[tuple[str, dict[str, Any]]] = [
    *(("sasrec", {"norm": norm, "scaled": True}) for norm in ("query", "inner", "post", "pre")),
    ("sasrec", {"positions": "newest", "initial": "xavier"}),
    ("esasrec", {"positions": "newest", "last_norm": False}),
    ("bert4rec", {"positions": "newest", "last_norm": False, "item_std": 1.0, "position_std": 1.0}),
    ("lrurec", {"initial": "truncated"}),
]


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_every_form_of_the_authors_pads_saves_and_learns(
    kind: str, form: dict[str, Any], tmp_path: Path
) -> None:
    learner = recommender(kind, **form)
    row = torch.tensor([[3, 1, 4]])
    alone, longer = learner.model(row), learner.model(torch.nn.functional.pad(row, (0, 3)))
    torch.testing.assert_close(longer[:, :3], alone)
    learner.save_pretrained(tmp_path / "saved")
    loaded: Any = triewise.load(tmp_path / "saved")
    assert loaded.model.settings == learner.model.settings
    assert (loaded.item_scores(HISTORIES) == learner.item_scores(HISTORIES)).all()
    assert (
        hit_rate(kind, "cycle", tmp_path, shape=form, **({"mask_last": 0.9} if kind == "bert4rec" else {}))[0]
        > 0.9
    )


def test_places_are_counted_from_the_newest_as_with_padding_on_the_left() -> None:
    model = recommender(positions="newest").model
    place = model.body.positions.position.weight
    ids = torch.tensor([[3, 1, 4], [2, 0, 0]])
    before = model.last_scores(ids)
    with torch.no_grad():
        place[:3] += 1  # three items of six places: the first three are padding
    torch.testing.assert_close(model.last_scores(ids), before)
    with torch.no_grad():
        place[5] += torch.arange(8)
    assert (model.last_scores(ids) - before).abs().amax(1).min() > 1e-3


def test_weights_at_the_start() -> None:
    wide = {"width": 64, "blocks": 1}
    assert small(item_std=0.5, **wide).items.weight[1:].std().item() == pytest.approx(0.5, rel=0.1)
    cut = small("lrurec", initial="truncated", **wide)
    for name, weight in cut.named_parameters():
        if "norm" not in name and name.rpartition(".")[2] not in ("nu", "theta", "gamma"):
            assert 0 < weight.abs().max() <= 0.04, name
    model = small(initial="xavier", **wide)
    assert model.body.attention[0].q.weight.std().item() == pytest.approx(0.125, rel=0.05)
    assert not model.items.weight[0].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_item_is_an_item_and_padding_is_none(kind: str) -> None:
    """Item 0 has scores of its own, changes what comes next, and learns; padding stays zero."""
    learner = recommender(kind)
    with_it, without = learner.item_scores([[0, 5], [5]])
    assert np.abs(with_it - without).max() > 1e-3
    model = learner.model
    ids = torch.tensor([[1, 6, 0]])
    model.last_scores(ids)[0, 0].backward()
    gradient = model.items.weight.grad
    assert gradient is not None
    assert gradient[1].abs().sum() > 0
    assert gradient[0].abs().sum() == 0


def test_dropout_is_off_when_scoring_and_on_again_after() -> None:
    learner = recommender(dropout=0.5)
    learner.model.train()
    first, again = (learner.item_scores(HISTORIES) for _ in range(2))
    assert (first == again).all()
    assert learner.model.training


def test_long_and_empty_histories() -> None:
    for kind in KINDS:
        learner = recommender(kind)
        scores = learner.item_scores([[0, 1, 2, 3, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7], []])
        assert scores[0] == pytest.approx(scores[1], abs=1e-5), "only the last six are read"
        assert np.isfinite(scores[2]).all()
        assert learner.item_scores([[]])[0] == pytest.approx(scores[2], abs=1e-5)
        if kind != "bert4rec":
            assert scores[2] == pytest.approx(learner.model.bias.detach().numpy())


def test_the_scan_equals_the_recurrence() -> None:
    unit = recommender("lrurec").model.body.unit[0]
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    eigenvalue = torch.polar((-unit.nu.exp()).exp(), unit.theta.exp())
    into = torch.view_as_complex(unit.into(x).unflatten(-1, (-1, 2))) * unit.gamma.exp()
    h, states = torch.zeros_like(into[:, 0]), []
    for k in range(6):
        h = eigenvalue * h + into[:, k]
        states.append(unit.out(torch.view_as_real(h).flatten(-2)))
    torch.testing.assert_close(unit(x), torch.stack(states, 1), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- losses
def test_a_gated_encoder_equals_its_formulas_place_by_place() -> None:
    """LiGR layers as loops over places and heads, with nothing but products of a vector and a matrix."""
    model = recommender("esasrec").model
    body, rows = model.body, torch.tensor([[3, 1, 4, 2, 7]])
    x = [model.items.weight[i] + body.positions.position.weight[n] for n, i in enumerate(rows[0])]
    for block in range(2):
        attention = body.attention[block]
        normed = [body.before[block](v) for v in x]
        q, k, v = ([layer(y).view(2, 4) for y in normed] for layer in (attention.q, attention.k, attention.v))
        for n in range(len(x)):
            heads = []
            for h in range(2):
                share = torch.stack([q[n][h] @ k[m][h] / 2 for m in range(n + 1)]).softmax(0)
                heads.append(sum(share[m] * v[m][h] for m in range(n + 1)))
            mixed = attention.out(torch.cat(heads))
            x[n] = x[n] + torch.sigmoid(body.attention_gate[block](x[n])) * mixed
        for n, each in enumerate(x):
            wide = body.up[block].weight @ body.between[block](each)
            value, gate = wide[:32], wide[32:]
            fed = body.down[block].weight @ (gate / (1 + torch.exp(-gate)) * value)
            x[n] = each + torch.sigmoid(body.feed_gate[block](each)) * fed
    expected = torch.stack([body.last_norm(each) for each in x])
    torch.testing.assert_close(model(rows)[0], expected, atol=1e-5, rtol=1e-4)


def test_dros_worked_by_hand() -> None:
    """Three items, target first: ln( e^(.9 * .2^2) + e^(.8 * .09) + e^(.85 * .25) ) = 1.2084."""
    scores = torch.tensor([[1.2, -0.3, 0.5]])
    p = torch.tensor([0.9, 0.8, 0.85])
    assert dros(scores, torch.tensor([0]), p).item() == pytest.approx(1.2084, abs=1e-4)
    assert torch.isfinite(dros(scores * 1e3, torch.tensor([0]), p)).all()


def test_dros_equals_the_formula_of_its_authors() -> None:
    rng = np.random.default_rng(0)
    y, target, counts = rng.normal(size=(5, 7)), rng.integers(7, size=5), rng.integers(20, size=7)
    p = propensities(counts)
    assert p == pytest.approx([((c + 1) / (counts.sum() + 7)) ** 0.05 for c in counts])
    for beta in (0.5, 1.0):
        found = dros(torch.from_numpy(y), torch.from_numpy(target), torch.from_numpy(p), beta)
        for row, t, value in zip(y, target, found.tolist(), strict=True):
            total = sum(math.exp(p[i] * row[i] ** 2 / beta) for i in range(7))
            total -= math.exp(p[t] * row[t] ** 2 / beta)
            total += math.exp(p[t] * (row[t] - 1) ** 2 / beta)
            assert value == pytest.approx(math.log(total), rel=1e-6)


def test_bce_equals_a_loop() -> None:
    positive, negative = torch.tensor([0.3, -2.0]), torch.tensor([[1.0, -1.0], [0.0, 4.0]])

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    wanted = [
        (-math.log(sigmoid(p)) - sum(math.log(1 - sigmoid(n)) for n in ns) / 2) / 2
        for p, ns in zip(positive.tolist(), negative.tolist(), strict=True)
    ]
    assert pairwise("bce", positive, negative).tolist() == pytest.approx(wanted, rel=1e-5)


def test_negatives_lie_outside_the_history() -> None:
    """Each of the items that are left is drawn as often as any other."""
    data = sequences([[0, 3, 0, 7, 2], [8, 8, 1]], [1, 1])
    task = shifted_task(data, np.arange(2))
    drawn = draw_negatives(task, 6000, 9, "history", np.random.default_rng(0))
    for m, (row, length) in enumerate([(0, 2), (0, 3), (0, 4), (0, 5), (1, 2), (1, 3)]):
        left = sorted(set(range(9)) - set([[0, 3, 0, 7, 2], [8, 8, 1]][row][:length]))
        items, times = np.unique(drawn[m], return_counts=True)
        assert items.tolist() == left
        assert times / 6000 == pytest.approx(1 / len(left), abs=0.03)
    assert task.row.tolist() == [0, 0, 0, 0, 1, 1]
    with pytest.raises(UserError, match="got a history of all 3 items; set sequential.negatives_outside"):
        draw_negatives(
            shifted_task(sequences([[0, 1, 2]]), np.arange(1)), 1, 3, "history", np.random.default_rng(0)
        )


def sequences(rows: list[list[int]], context: list[int] | None = None) -> Sequences:
    n_context = np.array(context or [1] * len(rows), dtype=np.int32)
    return Sequences.from_windows(Windows(Ragged.from_lists(rows), n_context))


ROWS = [[0, 1, 2, 3], [4, 0], [8, 7, 6]]


@pytest.mark.parametrize("base", ["cross-entropy", "bce"])
@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_the_loss_of_a_batch_equals_one_prefix_at_a_time(base: str, alpha: float) -> None:
    """Shifted sequences ask the same as one row per prefix, and BCE scores the negatives that were drawn."""
    model, counts = recommender().model, np.arange(9)
    loss = item_loss(model, sequential(loss=base, negatives=3, dros_alpha=alpha), counts)
    p = torch.from_numpy(propensities(counts))
    data = sequences(ROWS, [2, 1, 1])
    task = shifted_task(data, np.arange(3))
    found = task_loss(model, task, loss, np.random.default_rng(5))
    drawn = np.random.default_rng(5).integers(8, size=(5, 3))
    wanted, m = [], 0
    for row, n_context in zip(ROWS, [2, 1, 1], strict=True):
        for place in range(n_context, len(row)):
            target = row[place]
            score = model.last_scores(torch.tensor([row[:place]]) + 1)[0]
            if base == "bce":
                negatives = [n + (n >= target) for n in drawn[m].tolist()]
                assert target not in negatives
                one = pairwise("bce", score[[target]], score[negatives][None])[0]
            else:
                one = -score.log_softmax(0)[target]
            wanted.append(one + alpha * dros(score[None], torch.tensor([target]), p)[0])
            m += 1
    assert m == 5
    assert found.item() == pytest.approx(torch.stack(wanted).mean().item(), rel=1e-4)


def test_weights_of_rows_weigh_their_targets() -> None:
    model = recommender().model
    loss = item_loss(model, sequential(), np.arange(9))
    rng = np.random.default_rng(0)
    windows = Windows(Ragged.from_lists(ROWS), np.ones(3, dtype=np.int32))
    only = Sequences.from_windows(windows, np.array([0.0, 2.0, 0.0]))
    whole = task_loss(model, shifted_task(only, np.arange(3)), loss, rng)
    alone = task_loss(model, shifted_task(sequences(ROWS[1:2]), np.arange(1)), loss, rng)
    assert whole.item() == pytest.approx(alone.item(), rel=1e-5)
    nothing = Sequences.from_windows(windows, np.zeros(3))
    assert task_loss(model, shifted_task(nothing, np.arange(3)), loss, rng).item() == 0


def test_cloze_hides_what_it_asks_for() -> None:
    rng = np.random.default_rng(0)
    rows = [rng.permutation(9)[:6].tolist() for _ in range(400)]
    data, config = sequences(rows), sequential(loss="cloze", mask_probability=0.3, mask_last=0.0)
    task = cloze_task(data, np.arange(400), config, mask=10, rng=rng)
    whole = padded(Ragged.from_lists(rows))
    assert (task.target == whole.reshape(-1)[task.place] - 1).all()
    assert set(range(400)) == set((task.place // 6).tolist()), "each sequence has a mask"
    untouched = np.ones(task.ids.size, dtype=bool)
    untouched[task.place] = False
    assert (task.ids.reshape(-1)[untouched] == whole.reshape(-1)[untouched]).all()
    assert len(task.place) / 2400 == pytest.approx(0.3, abs=0.05)
    assert (task.ids.reshape(-1)[task.place] == 10).mean() == pytest.approx(0.8, abs=0.05)


def test_cloze_at_the_end_asks_as_the_ranking_does() -> None:
    """One mask behind a prefix: the same rows as `last_scores` makes of histories."""
    data, config = sequences(ROWS, [3, 1, 1]), sequential(loss="cloze", mask_last=1.0)
    for seed in range(5):
        task = cloze_task(data, np.arange(3), config, mask=10, rng=np.random.default_rng(seed))
        for b, row in enumerate(ROWS):
            place = task.place[b] - b * task.ids.shape[1]
            assert place >= [3, 1, 1][b], "context is no target"
            assert task.ids[b].tolist() == [i + 1 for i in row[:place]] + [10] + [0] * (
                task.ids.shape[1] - place - 1
            )
            assert task.target[b] == row[place]


# ---------------------------------------------------------------- worlds
N_ITEMS = 10


@functools.cache
def world(name: str, seed: int = 0) -> tuple[Windows, list[list[int]], np.ndarray, float]:
    """Windows to train on, test histories with targets, and the best possible HR@1.

    Cycle: item i is followed by i + 1. Markov: by one favourite with probability .7, else by anything. Shuffled: the
    next item has nothing to do with the history.
    """
    rng = np.random.default_rng(seed)
    favourite = rng.permutation(N_ITEMS)

    def walk(length: int) -> list[int]:
        items = [int(rng.integers(N_ITEMS))]
        while len(items) < length:
            if name == "cycle":
                items.append((items[-1] + 1) % N_ITEMS)
            elif name == "markov" and rng.random() < 0.7:
                items.append(int(favourite[items[-1]]))
            else:
                items.append(int(rng.integers(N_ITEMS)))
        return items

    train = [walk(6) for _ in range(200)]
    test = [walk(5) for _ in range(300)]
    split = make_split([(str(u), row[:k], row[k]) for u, row in enumerate(train) for k in range(1, 6)])
    best = {"cycle": 1.0, "markov": 0.73, "shuffled": 0.1}[name]
    return make_windows(split, "every"), [t[:-1] for t in test], np.array([t[-1] for t in test]), best


def hit_rate(
    kind: str, name: str, out: Path, steps: int = 150, shape: dict[str, Any] | None = None, **loss: Any
) -> tuple[float, float]:
    """HR@1 of a trained model, and the best possible one."""
    windows, histories, targets, best = world(name)
    model = small(kind, N_ITEMS, width=16, blocks=1, **(shape or {}))
    base = SequentialSettings(
        **{"encoder": kind, "loss": "cloze" if kind == "bert4rec" else "cross-entropy"} | loss
    )
    config = TrainingSettings(steps=steps, learning_rate=1e-2, batch_size=64, warmup_steps=5, log_every=150)
    fit(model, Sequences.from_windows(windows), target_counts(windows, N_ITEMS), base, config, out)
    catalog = worlds.catalog(tuple(f"Title {i}" for i in range(N_ITEMS)))
    ranking = SequentialRecommender(model, catalog, np.zeros(N_ITEMS)).recommend(histories, k=1)
    return float((ranking.items[:, 0] == targets).mean()), best


LEARNERS = [
    ("gru4rec", {}),
    ("sasrec", {}),
    ("esasrec", {"steps": 100}),  # learns the rows by heart after that
    ("lrurec", {}),
    ("bert4rec", {"mask_last": 0.9}),
    ("sasrec", {"loss": "bce", "negatives": 4}),
    ("sasrec", {"dros_alpha": 0.1}),
]


@pytest.mark.parametrize("name", ["cycle", "markov"])
@pytest.mark.parametrize(("kind", "loss"), LEARNERS)
def test_a_known_world_is_learned(kind: str, loss: dict[str, Any], name: str, tmp_path: Path) -> None:
    found, best = hit_rate(kind, name, tmp_path, **loss)
    assert found >= 0.9 * best


@pytest.mark.parametrize("kind", KINDS)
def test_a_shuffled_world_stays_at_chance(kind: str, tmp_path: Path) -> None:
    """Chance is .1; with 300 rows .17 is four standard errors above it."""
    assert hit_rate(kind, "shuffled", tmp_path, steps=60)[0] < 0.17


# ---------------------------------------------------------------- runs
CONFIG = TrainingSettings(
    steps=12,
    learning_rate=3e-3,
    batch_size=16,
    warmup_steps=2,
    log_every=3,
    evaluate_every=5,
    checkpoint_every=4,
)


def some_metric(model: SequentialModel) -> dict[str, float]:
    """Depends on the weights; what it draws must not matter."""
    torch.rand(3)
    return {"NDCG@10": -model.items.weight.abs().sum().item()}


def run_of(out: Path, kind: str, resume: bool = False, **changes: Any) -> Any:
    windows = world("markov")[0]
    model = small(kind, N_ITEMS, dropout=0.3)
    base = sequential(loss="cloze") if kind == "bert4rec" else sequential(loss="bce", dros_alpha=0.1)
    config = TrainingSettings(**{**vars(CONFIG), **changes})
    data, counts = Sequences.from_windows(windows), target_counts(windows, N_ITEMS)
    return model, fit(model, data, counts, base, config, out, validate=some_metric, resume=resume)


@pytest.mark.parametrize("kind", ["sasrec", "bert4rec"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole, result = run_of(tmp_path / "whole", kind)
    run_of(tmp_path / "parts", kind, time_limit_s=1e-9)
    for path in (tmp_path / "parts").glob("checkpoint-1"):
        assert path.is_dir()
    parts, resumed = run_of(tmp_path / "parts", kind, resume=True)
    assert result.stopped == resumed.stopped == "steps"
    assert (result.best_step, result.best_metric) == (resumed.best_step, resumed.best_metric)
    for name, parameter in whole.named_parameters():
        assert parameter.equal(parts.get_parameter(name)), name
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in result.history]
    again = [{k: v for k, v in row.items() if k != "seconds"} for row in resumed.history]
    assert [row for row in again if row["step"] > 3] == [row for row in without if row["step"] > 3]


@pytest.mark.parametrize("kind", ["esasrec", "bert4rec"])
def test_micro_batches_of_like_length_change_no_step(kind: str, tmp_path: Path) -> None:
    """Their targets are weighed as in one batch: the loss, the gradient and the weights are the same."""
    lengths = [(str(u), [u % N_ITEMS] * (1 + u % 5), (u + 1) % N_ITEMS) for u in range(40)]
    windows = make_windows(make_split(lengths), "last")
    data, counts = Sequences.from_windows(windows), target_counts(windows, N_ITEMS)
    masks = {"mask_last": 1.0} if kind == "bert4rec" else {}
    base = sequential(encoder=kind, loss="cloze" if masks else "cross-entropy", **masks)
    ends, logs = [], []
    for parts in (1, 4):
        model = small(kind, N_ITEMS)
        settings = {**vars(CONFIG), "evaluate_every": 0, "log_every": 1, "accumulation": parts, "steps": 3}
        result = fit(model, data, counts, base, TrainingSettings(**settings), tmp_path / str(parts))
        ends.append(dict(model.named_parameters()))
        logs.append([(row["loss"], row["grad_norm"]) for row in result.history if "loss" in row])
    if not masks:  # what is masked is drawn for each part
        assert logs[0] == pytest.approx(np.array(logs[1]), rel=1e-4)
        for name, weight in ends[0].items():
            torch.testing.assert_close(ends[1][name], weight, atol=2e-4, rtol=1e-4)  # of steps of .01
    assert len(logs[0]) == len(logs[1]) == 3


def test_patience_ends_a_run_with_its_best_weights(tmp_path: Path) -> None:
    seen: list[float] = []

    def validate(model: SequentialModel) -> dict[str, float]:
        seen.append(model.bias[0].item())
        return {"NDCG@10": [0.1, 0.3, 0.2, 0.2][len(seen) - 1]}

    windows = world("markov")[0]
    model = small(n_items=N_ITEMS)
    config = TrainingSettings(**{**vars(CONFIG), "evaluate_every": 2, "patience": 2})
    data, counts = Sequences.from_windows(windows), target_counts(windows, N_ITEMS)
    result = fit(model, data, counts, sequential(), config, tmp_path, validate=validate)
    assert (result.stopped, result.steps_done, result.best_step) == ("patience", 8, 4)
    assert model.bias[0].item() == seen[1]
    assert not model.training


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainingSettings(steps=10, learning_rate=1.0, warmup_steps=3, schedule="linear")
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0 < rates[-1] < 0.2


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    windows = world("markov")[0]
    data, counts = Sequences.from_windows(windows), target_counts(windows, N_ITEMS)
    with pytest.raises(UserError, match="wanted the loss cloze for bert4rec, got 'bce'"):
        fit(small("bert4rec", N_ITEMS), data, counts, sequential(loss="bce"), CONFIG, tmp_path)
    with pytest.raises(UserError, match="evaluate_every > 0 needs something to validate with"):
        fit(small(n_items=N_ITEMS), data, counts, sequential(), CONFIG, tmp_path)
    with pytest.raises(UserError, match="validation gives HR@1; choose one of them"):
        fit(
            small(n_items=N_ITEMS),
            data,
            counts,
            sequential(),
            CONFIG,
            tmp_path,
            validate=lambda _: {"HR@1": 0},
        )
    fast = TrainingSettings(**{**vars(CONFIG), "learning_rate": 1e30, "log_every": 1, "evaluate_every": 0})
    with pytest.raises(UserError, match=r"the loss is (nan|inf) around step \d+; lower the learning rate"):
        fit(small(n_items=N_ITEMS), data, counts, sequential(), fast, tmp_path)
    run_of(tmp_path / "run", "sasrec", time_limit_s=1e-9)
    with pytest.raises(UserError, match=r"wanted to resume with learning_rate = 0.003 as in .*, got 0.1"):
        run_of(tmp_path / "run", "sasrec", resume=True, learning_rate=0.1)
    with pytest.raises(ValueError, match="encoder\n.*'gru4rec', 'sasrec', 'esasrec', 'bert4rec' or 'lrurec'"):
        small("x")
    with pytest.raises(ValueError, match="width must be a multiple of heads, got 8 and 3"):
        small(heads=3)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_ranks_the_same(kind: str, tmp_path: Path) -> None:
    learner = recommender(kind, head="linear")
    learner.save_pretrained(tmp_path / "a")
    loaded = triewise.load(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = triewise.load(tmp_path / "b")
    wanted = learner.recommend(HISTORIES, k=5)
    for other in (loaded, again):
        found = other.recommend(HISTORIES, k=5)
        assert (found.items == wanted.items).all()
        assert found.scores == pytest.approx(wanted.scores, abs=1e-5)


def test_config_json_keeps_its_keys(tmp_path: Path) -> None:
    """A model saved by an earlier version has these, and loads."""
    recommender("bert4rec", heads=4).save_pretrained(tmp_path)
    config = read_json(tmp_path / "model" / "config.json")
    shape = {"width": 8, "blocks": 2, "heads": 4, "dropout": 0.0, "head": "tied"}
    assert config == {"kind": "bert4rec", "n_items": 9, "max_length": 6, **shape}
    model = SequentialModel.from_config(config)
    assert (model.config, model.mask, model.bidirectional) == (config, 10, True)


def test_a_loss_may_be_brought_along(tmp_path: Path) -> None:
    """Here the scores of a teacher that always wants item 3, in the place of the targets."""
    windows, model = world("markov")[0], small(n_items=N_ITEMS)

    def distil(states: torch.Tensor, task: Task, rng: np.random.Generator) -> torch.Tensor:
        assert len(states) == len(task.target)
        return -model.scores(states).log_softmax(1)[:, 3]

    data, counts = Sequences.from_windows(windows), target_counts(windows, N_ITEMS)
    settings = TrainingSettings(steps=60, learning_rate=1e-2, batch_size=16, warmup_steps=2)
    fit(model, data, counts, sequential(), settings, tmp_path, loss=distil)
    assert model.last_scores(torch.tensor([[1, 2], [5, 9]])).argmax(1).tolist() == [3, 3]


def test_what_is_no_sequential_recommender_is_refused(tmp_path: Path) -> None:
    recommender().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="scores every item: wanted no search, got 'beam'; leave it out"):
        recommender().with_settings(search="beam")
    facts = read_json(tmp_path / "recommender.json")
    (tmp_path / "catalog.parquet").unlink()
    with pytest.raises(UserError, match=r"wanted catalog.parquet in .*, which is missing"):
        SequentialRecommender.from_pretrained(tmp_path)
    write_json(tmp_path / "recommender.json", facts | {"format": 99})
    with pytest.raises(UserError, match="wanted a sequential recommender of format 1 in .*, got kind seq"):
        SequentialRecommender.from_pretrained(tmp_path)


def test_a_group_counts_as_its_best_member() -> None:
    learner = recommender()
    with torch.no_grad():
        learner.model.bias[4] += 100
    ranking = learner.recommend([[0]], k=1)
    assert learner.groups.of_item[ranking.items[0, 0]] == learner.groups.of_item[4]
    assert ranking.scores[0, 0] == pytest.approx(learner.item_scores([[0]])[0, 4])
