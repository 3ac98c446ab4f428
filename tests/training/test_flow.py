"""Flower: prior, rewards, balance against loops; batches and steps; draws that become as frequent as their reward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray
from torch import Tensor

from tests.conftest import SIX
from tests.reference.flow import Rewards, sub_trajectories
from tests.strategies import weighted_catalogues
from tests.token_worlds import Row, make_prompts, make_split
from tests.train_child import small_model
from tests.training.test_losses import CLOSE, gradient, some_logits, tokens
from tests.training.test_trainer import Gradients, config
from triewise.arrays import Ragged
from triewise.decoding.draws import Draws
from triewise.decoding.growth import Edges
from triewise.errors import UserError
from triewise.objectives import FlowSettings
from triewise.recipe import parse_recipe
from triewise.tokens import Trie
from triewise.training import Examples, Flow, Objective, history_prior, make_windows, processes
from triewise.training.flow import balance, flow_parts
from triewise.training.trainer import TrieTrainer

N = 12  # titles of the world below; some begin others, the last two stand in no history
BODIES = [
    (2,),
    (2, 3),
    (2, 3, 4),
    (5,),
    (5, 6),
    (5, 6, 2),
    (7, 2),
    (7, 3),
    (8, 8, 8),
    (9,),
    (9, 4),
    (9, 5, 6),
]
COUNTS = np.array([4, 1, 2, 3, 2, 6, 1, 5, 2, 3, 0, 0])
LIKED = np.random.default_rng(2).dirichlet(np.ones(N), 20)  # of users, by the last item of their history


def liked(rows: Ragged, n_context: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.log(LIKED[[int(row[n - 1]) for row, n in zip(rows, n_context.tolist(), strict=True)]])


def flow_settings(reward: Any = "div", **changes: Any) -> FlowSettings:
    return FlowSettings(reward=reward, scores=None if reward == "logp" else "run", **changes)


def world(supervision: str = "last", n_rows: int = 16) -> Examples:
    sequences = [[*body, 0] for body in BODIES]
    trie, random = Trie.from_sequences(sequences), np.random.default_rng(0)
    rows: list[Row] = [
        (str(r), random.integers(0, N, 2 + r % 3).tolist(), int(random.integers(N))) for r in range(n_rows)
    ]
    windows = make_windows(make_split(rows), supervision)
    if supervision == "every":
        windows.n_context[:] = 1
    return Examples(windows, make_prompts(sequences), trie, None, np.zeros(trie.n_nodes, bool))


def by_number(prompts: Any, uniform: NDArray[np.float64]) -> NDArray[np.int32]:
    """Draws without a model: what the first number says."""
    return (uniform[:, 0] * N).astype(np.int32)


def flow_of(
    examples: Examples, reward: Any = "div", support: str = "trie", draw: Any = by_number, **changes: Any
) -> Flow:
    """A flow for runs of one step, two micro-batches at most."""
    training = config(
        steps=changes.pop("steps", 1), accumulation=changes.pop("accumulation", 1), batch_size=8
    )
    prior = history_prior(examples.trie, COUNTS)
    scores = None if reward == "logp" else liked
    return Flow(Objective(support), flow_settings(reward, **changes), training, prior, draw, scores)


def rewards_by_hand(user: int, reward: str = "div", **how: Any) -> Rewards:
    histories = [body for body, n in zip(BODIES, COUNTS.tolist(), strict=True) for _ in range(n)]
    p = None if reward == "logp" else dict(zip(BODIES, LIKED[user].tolist(), strict=True))
    return Rewards(BODIES, histories, p, reward, **how)


# --- the parts of the loss --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(weighted_catalogues())
def test_the_prior_is_counted_below_each_node(world: tuple[list[list[int]], list[int]]) -> None:
    sequences, counts = world
    trie = Trie.from_sequences(sequences)
    log_q = history_prior(trie, np.array(counts))
    assert log_q[0] == 0
    for node in range(1, trie.n_nodes):
        path = trie.token[trie.path_to(node)].tolist()
        below, above = (
            sum(n for s, n in zip(sequences, counts, strict=True) if s[:d] == path[:d])
            for d in (len(path), len(path) - 1)
        )
        alike = -math.log(trie.n_children[trie.parent[node]])
        wanted = math.log(below / above) if below else -15.0 if above else alike
        assert log_q[node] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_balance_equals_all_sub_trajectories_in_value_and_gradient(seed: int) -> None:
    random, n = np.random.default_rng(seed), torch.tensor([4, 1, 2, 6])
    arrays = [torch.from_numpy(random.normal(size=(4, 6)) * 5).requires_grad_() for _ in range(3)]
    found = balance(*arrays, n)
    rows = [[list(array[t, :size]) for array in arrays] for t, size in enumerate(n.tolist())]
    slow = torch.stack([x for row in rows for x in sub_trajectories(*row)])
    assert len(slow) == int((n * (n - 1) // 2).sum())
    torch.testing.assert_close(found, slow.sum())
    for ours, theirs in zip(
        torch.autograd.grad(found, arrays[:2]), torch.autograd.grad(slow.sum(), arrays[:2]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_probabilities_are_among_valid_tokens_and_the_terminator_or_all(support: str) -> None:
    trie = Trie.from_sequences(SIX)
    target, node, _ = tokens(trie)
    logits, objective = some_logits(len(target)), Objective(support)
    ends = torch.tensor([0 in trie.children(n)[0] for n in node.tolist()])
    parts = flow_parts(objective, 0, logits, target, node, trie, None, None, None, ends)
    among = [
        sorted({0, *trie.children(n)[0].tolist()}) if support == "trie" else list(range(logits.shape[1]))
        for n in node.tolist()
    ]
    slow = torch.stack(
        [
            torch.stack([z[y] - z[some].logsumexp(0), z[0] - z[some].logsumexp(0)])
            for z, y, some in zip(logits, target.tolist(), among, strict=True)
        ]
    )
    torch.testing.assert_close(parts.loss[:, 1:], slow, **CLOSE)
    weight = torch.rand(slow.shape)
    ours, theirs = ((x * weight).sum() for x in (parts.loss[:, 1:], slow))
    torch.testing.assert_close(gradient(ours, logits), gradient(theirs, logits), **CLOSE)
    assert torch.equal(parts.loss[:, 0], objective.parts(logits, target, node, trie).loss)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefixes", ["own", "coded"])
@pytest.mark.parametrize("reward", ["div", "add", "logp"])
def test_rewards_of_a_batch_equal_a_count(reward: str, prefixes: str) -> None:
    examples = world()
    flow = flow_of(examples, reward, prefixes=prefixes, lam=0.7)
    batches = flow.batches(examples, np.arange(16).reshape(1, 16), False)
    item, drawn = batches[0], batches.batch(0)
    n, seen = item["n_prefixes"].tolist(), set()
    for t, row in enumerate(range(1, 32, 2)):
        body = tuple(drawn.target[drawn.position // drawn.input_ids.shape[1] == row].tolist()[:-1])
        user = int(examples.windows.items[t][-2])
        by_hand = rewards_by_hand(user, reward, lam=0.7, coded=prefixes == "coded")
        np.testing.assert_allclose(item["log_r"][t, : n[t]], by_hand.of_path(body), rtol=1e-5)
        seen.add(body)
    assert {(2, 3, 4), (9, 4)} & seen and len(seen) > 5
    assert item["pairs"] == sum(k * (k - 1) // 2 for k in n)


def test_a_reward_by_hand() -> None:
    """Title [2, 3, 4]: 2 of 29 histories; [2] alone 4, [2, 3] 1; S by the user."""
    examples, S = world(), (LIKED[0] - LIKED[0].mean()) / np.ptp(LIKED[0]) + 1
    flow, node = flow_of(examples), np.array([0, *examples.trie.path_to(0)])
    node = examples.trie.walk([2, 3, 4])[:4].astype(np.int64)
    user = Ragged.from_lists([[0, 2]])
    examples.windows = replace(examples.windows, items=user, n_context=np.array([1], np.int32))
    for prefixes, wanted in (
        ("own", [-15, np.log(4 / 29) / S[0], np.log(1 / 29) / S[1], np.log(2 / 29) / S[2]]),
        ("coded", [-15, np.log(7 / 29) / S[2] - 15, np.log(3 / 29) / S[2] - 15, np.log(2 / 29) / S[2]]),
    ):
        flow = flow_of(examples, prefixes=prefixes)
        found = flow.batches(examples, np.zeros((1, 1), np.int64), False)._rewards(
            np.array([0]), node, np.array([4])
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_titles_that_share_their_codes_are_liked_together() -> None:
    """Codes of .2 + .4 and of .4: S is 1.5 for the first."""
    sequences, rows = [[7, 0], [7, 0], [9, 0]], make_split([("u", [2], 0)])
    prompts, trie = make_prompts(sequences), Trie.from_sequences(sequences)
    windows = make_windows(rows, "last", prompts)
    examples = Examples(windows, prompts, trie, None, np.zeros(trie.n_nodes, bool))
    flow = replace(
        flow_of(world()),
        prior=history_prior(trie, np.array([1, 1, 2])),
        scores=lambda *_: np.log([[0.2, 0.4, 0.4]]),
    )
    found = flow.batches(examples, np.zeros((1, 1), np.int64), False)._rewards(
        np.array([0]), trie.walk([7, 0])[:2].astype(np.int64), np.array([2])
    )
    np.testing.assert_allclose(found, [-15, np.log(0.5) / 1.5], rtol=1e-6)


def test_a_draw_depends_on_seed_step_and_window_alone() -> None:
    examples, seen = world(), []

    def remember(prompts: Any, uniform: NDArray[np.float64]) -> NDArray[np.int32]:
        seen.append(uniform)
        return by_number(prompts, uniform)

    order = np.arange(16).reshape(2, 8)  # two steps
    whole = flow_of(examples, draw=remember, steps=2).batches(examples, order, False)
    _ = whole[0], whole[1]
    halves = flow_of(examples, draw=remember, steps=2, accumulation=2)
    parts = halves.batches(examples, order.reshape(4, 4), False)
    _ = [parts[i] for i in range(4)]
    resumed = halves.batches(examples, order.reshape(4, 4)[2:], False)
    _ = resumed[0]
    np.testing.assert_array_equal(np.concatenate(seen[:2]), np.concatenate(seen[2:6]))
    np.testing.assert_array_equal(seen[6], seen[4])
    again = flow_of(examples, draw=remember, steps=2).batches(examples, order[::-1], False)
    _ = again[1]
    assert not np.isin(seen[7], seen[0]).any()  # the same windows in another step
    _ = replace(halves, seed=1).batches(examples, order.reshape(4, 4), False)[0]
    assert not np.isin(seen[8], seen[2]).any()


def one_step(examples: Examples, learned: Flow, out: Path, **changes: Any) -> dict[str, Tensor]:
    """The gradient that the optimiser is given."""
    seen = Gradients()
    how = config(steps=1, batch_size=8, max_grad_norm=1e9, **changes)
    trainer = TrieTrainer(small_model(), examples, replace(learned, training=how), how, out)
    trainer.add_callback(seen)
    trainer.train()
    return seen.steps[0]


def by_hand(examples: Examples, flow: Flow, rows: list[int], accumulation: int = 1) -> dict[str, Tensor]:
    """The same from one plain forward a title."""
    model, trie = small_model(), examples.trie
    sft: list[Tensor] = []
    pairs: list[Tensor] = []

    def logits_of(history: list[int], body: tuple[int, ...]) -> Tensor:
        prompt = examples.prompts.encode(history)
        ids = torch.tensor([[*prompt, *body]])
        found: Tensor = model(input_ids=ids).logits[0, len(prompt) - 1 :].double()
        return found

    def log_p(z: Tensor, prefix: tuple[int, ...], stop: bool) -> Tensor:
        valid = set(trie.children(int(trie.walk(prefix)[-1]))[0].tolist()) | ({0} if stop else set())
        if flow.objective.support == "trie":
            z = z + torch.tensor([0.0 if v in valid else -math.inf for v in range(len(z))])
        return z.log_softmax(0)

    for w in rows:
        items, first = examples.windows.items[w].tolist(), int(examples.windows.n_context[w])
        for place in range(first, len(items)):
            body = BODIES[items[place]]
            z = logits_of(items[:place], body)
            sft += [-log_p(z[t], body[:t], False)[y] for t, y in enumerate((*body, 0))]
        uniform = np.random.default_rng([flow.seed, 3, 0, w]).random(int(trie.depth.max()))
        body = BODIES[by_number(None, uniform[None])[0]]
        z = logits_of(items[:-1], body)
        p = [log_p(z[t], body[:t], True) for t in range(len(body) + 1)]
        log_r = rewards_by_hand(items[-2]).of_path(body)
        pairs += sub_trajectories([p[t][y] for t, y in enumerate(body)], [x[0] for x in p], log_r)
    theta = flow.reward.strength
    loss = theta * torch.stack(sft).mean() + (1 - theta) * torch.stack(pairs).mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("support", "supervision"), [("trie", "last"), ("vocabulary", "last"), ("vocabulary", "every")]
)
def test_the_step_is_the_gradient_of_a_plain_recomputation(
    support: str, supervision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it is accumulated, packed or computed in blocks; every window has one draw behind its whole history."""
    examples = world(supervision)
    flow = flow_of(examples, support=support, strength=0.7)
    how = config(steps=1, batch_size=8)
    loader = TrieTrainer(small_model(), examples, flow, how, tmp_path).get_train_dataloader()
    wanted = by_hand(examples, flow, loader.dataset.rows.ravel().tolist())
    step = functools.partial(one_step, examples, flow, tmp_path)
    found = [step(packing=False), step(accumulation=4), step()]
    with monkeypatch.context() as patch:
        patch.setattr("triewise.training.objective.LOGITS_AT_ONCE", 20 * 5)
        found.append(step())
    for name, slow in wanted.items():
        scale = float(slow.abs().max()) + 1e-3
        for ours in found:
            torch.testing.assert_close(ours[name] / scale, slow / scale, rtol=1e-3, atol=2e-5)


def test_counts_and_sums_of_the_log_are_those_of_true_titles(tmp_path: Path) -> None:
    examples = world()
    flow, rows = flow_of(examples), np.arange(8)[None]
    ours, plain = flow.batches(examples, rows, False)[0], Objective().batches(examples, rows, False)[0]
    for name in ("zero_gain", "positive_gain", "decisions"):
        assert ours["counts"][name] == plain["counts"][name]
    assert ours["contribution"] == plain["contribution"]
    ours.pop("counts"), plain.pop("counts")
    one = flow.module(small_model(), examples.trie)(**ours, pair_weight=0.0)
    other = Objective().module(small_model(), examples.trie)(**plain)
    torch.testing.assert_close(one["sums"], other["sums"])
    torch.testing.assert_close(one["loss"], other["loss"] * flow.reward.strength)


# --- what it is for ---------------------------------------------------------------------------------------------------

TWENTY = sorted({(a, *b) for a in (2, 3, 4) for b in ((), (5,), (6,), (5, 6), (6, 6), (5, 5, 5), (2,))})[:20]


def shares_of(table: Tensor, trie: Trie) -> NDArray[np.float64]:
    """(I,) probability with which a table of logits (N, V) draws each title."""
    found = []
    for leaf in trie.leaf:
        p = 1.0
        for node in trie.path_to(int(leaf)):
            parent = int(trie.parent[node])
            valid = trie.children(parent)[0].tolist()
            p *= float(table[parent, valid].softmax(0)[valid.index(int(trie.token[node]))])
        found.append(p)
    return np.array(found)


def draws_of(table: Tensor, trie: Trie, uniform: NDArray[np.float64]) -> NDArray[np.int64]:
    """Leaves (B,) that a table of logits draws."""
    draws = Draws(trie, uniform)
    draws.start(np.arange(len(uniform)))
    while len(draws.live):
        _, node = draws.request()
        child, row = trie.below(node)
        draws.update(Edges(row, child, table[node[row], trie.token[child]].numpy()))
    return draws.node


def train_table(flow: Flow, trie: Trie, steps: int, balanced: bool) -> Tensor:
    """A table of logits (N, V) that is trained by the balance of what it draws, or by its true titles alone."""
    table = torch.zeros(trie.n_nodes, 8)
    # It knows where titles do not end. While that is learned, what was not drawn yet becomes too rare to be drawn.
    table[[n for n in range(trie.n_nodes) if 0 not in trie.children(n)[0]], 0] = -15
    optimizer = torch.optim.SGD([table.requires_grad_()], lr=1.0)
    examples = Examples(
        make_windows(make_split([("u", [0], 0)] * 32), "last"),
        make_prompts([[*body, 0] for body in TWENTY]),
        trie,
        None,
        np.zeros(trie.n_nodes, bool),
    )
    random, leaves = np.random.default_rng(0), {int(leaf): i for i, leaf in enumerate(trie.leaf)}

    def draw(prompts: Any, _: Any) -> NDArray[np.int32]:
        uniform = random.random((len(prompts), 9))
        drawn = [leaves[leaf] for leaf in draws_of(table.detach(), trie, uniform).tolist()]
        return np.array(drawn if balanced else random.integers(0, 20, len(prompts)), np.int32)

    batches = replace(flow, sample=draw).batches(examples, np.arange(32)[None], False)
    for _ in range(steps):
        item = batches[0]
        place, node, target = item["place"], item["node"], item["target"]
        ends = item["ends"]
        parts = flow_parts(flow.objective, 0, table[node], target, node, trie, None, None, None, ends)
        _, log_pf, log_stop = parts.loss.unbind(1)
        loss = balance(log_pf[place], log_stop[place], item["log_r"], item["n_prefixes"]) / item["pairs"]
        if not balanced:
            loss = -log_pf[place].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return table.detach()


def test_draws_become_as_frequent_as_their_reward() -> None:
    """Twenty titles, some of which begin others; true titles alone give their own frequencies, which are others."""
    trie = Trie.from_sequences([[*body, 0] for body in TWENTY])
    counts = np.arange(1, 21)[np.random.default_rng(1).permutation(20)]
    p = np.random.default_rng(3).dirichlet(np.ones(20))
    histories = [body for body, n in zip(TWENTY, counts.tolist(), strict=True) for _ in range(n)]
    shares = Rewards(TWENTY, histories, dict(zip(TWENTY, p.tolist(), strict=True)), "div").shares()
    wanted = np.array([shares[body] for body in TWENTY])
    scores: Callable[..., Any] = lambda rows, n_context: np.log(np.tile(p, (len(rows), 1)))  # noqa: E731
    flow = Flow(Objective(), flow_settings(), config(), history_prior(trie, counts), by_number, scores)
    table = train_table(flow, trie, 300, balanced=True)
    np.testing.assert_allclose(shares_of(table, trie), wanted, rtol=0.05)
    drawn = draws_of(table, trie, np.random.default_rng(9).random((100_000, 9)))
    frequency = np.array([(drawn == leaf).mean() for leaf in trie.leaf])
    assert np.abs(frequency - wanted).sum() / 2 < 0.05
    for other in (torch.zeros_like(table), train_table(flow, trie, 300, balanced=False)):
        assert np.abs(shares_of(other, trie) - wanted).sum() / 2 > 0.1
        assert not np.allclose(shares_of(other, trie), wanted, rtol=0.5)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "line"),
    [
        (
            {"flow": {"reward": "div"}},
            "reward 'div' and 'add' need scores, 'logp' has none, got 'div'",
        ),
        ({"flow": {"reward": "logp", "scores": "run"}}, "'logp' has none, got 'logp'"),
        ({"flow": {"strength": 1.0, "scores": "run"}}, "objective.flow.strength"),
        (
            {"flow": {"scores": "run"}, "temperature": 2.0},
            "flow is about probabilities at temperature 1; leave",
        ),
        ({"flow": {"scores": "run"}, "temperature": "adaptive"}, "leave temperature at 1"),
        (
            {"flow": {"scores": "run"}, "soft_targets": "run"},
            "soft_targets and flow are two objectives; use one",
        ),
        (
            {"flow": {"scores": "run"}, "expand_negatives": True},
            "flow and expand_negatives = true are two objectives",
        ),
    ],
)
def test_recipes_that_are_refused(objective: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_recipe({"name": "x", "data": {"source": "ml-100k"}, "objective": objective}, "test")


def test_workers_and_shards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {"name": "x", "data": {"source": "ml-100k"}, "objective": {"flow": {"reward": "logp"}}}
    with pytest.raises(UserError, match=r"objective.flow asks a model .*: set training.workers = 0"):
        parse_recipe(raw | {"training": {"workers": 2}}, "test")
    monkeypatch.setattr(processes, "sharded", lambda: True)
    with pytest.raises(UserError, match="draws from whole weights, got FSDP; launch without --use_fsdp"):
        flow_of(world()).module(small_model(), world().trie)
