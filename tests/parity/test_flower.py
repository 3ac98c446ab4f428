"""Flower as its authors' code has it: prior, personal score, rewards of prefixes, balance, its gradient, the sum."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.parity.golden import close, piece
from triewise.objectives import FlowSettings
from triewise.tokens import Trie
from triewise.training import Objective, flow
from triewise.training.flow import FlowLoss, balance, flow_parts, history_prior, personal_terms, state_rewards

REWARDS = {"div": "div", "add": "add", "logp": "plain"}  # ours: theirs


def settings(reward: Any, prefixes: Any = "coded") -> FlowSettings:
    return FlowSettings(reward=reward, prefixes=prefixes, scores=None if reward == "logp" else "run")


def world() -> tuple[Trie, NDArray[np.float64]]:
    """The trie of the authors' titles with their stop token, and its prior."""
    given, _ = piece("flower", "prior")
    trie = Trie.from_sequences([[*title, given["stop"]] for title in given["titles"]])
    return trie, history_prior(trie, given["counts"].long().numpy())


def test_prior() -> None:
    trie, log_q = world()
    _, wanted = piece("flower", "prior")
    found: dict[str, dict[str, float]] = {}
    for node in range(1, trie.n_nodes):
        prefix = [str(trie.token[n]) for n in trie.path_to(int(trie.parent[node]))]
        found.setdefault("-".join(prefix) or "first", {})[str(trie.token[node])] = log_q[node]
    assert found.keys() == wanted["log_q"].keys()
    for prefix, theirs in wanted["log_q"].items():
        assert found[prefix] == pytest.approx(theirs, abs=1e-6)


def probabilities() -> NDArray[np.float64]:
    given, wanted = piece("flower", "personal_score")
    p = given["item_logits"].softmax(1)
    close(p, wanted["p"])
    return p.numpy()  # type: ignore[no-any-return]


def test_personal_scores() -> None:
    _, wanted = piece("flower", "personal_score")
    close(torch.from_numpy(1 / personal_terms(settings("div"), probabilities())[0]), wanted["S"])
    b = personal_terms(settings("add"), probabilities())[1]
    close(torch.from_numpy(np.exp(b)), wanted["s"])


def paths(trie: Trie) -> list[list[int]]:
    """The prefixes of each title as nodes."""
    return [
        trie.walk(title)[:-1].tolist()
        for title in ([3, 4, 0], [3, 4, 5, 0], [3, 6, 7, 0], [8, 0], [8, 2, 5, 9, 0])
    ]


def padded(rows: list[Any], width: int) -> Tensor:
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("reward", REWARDS)
def test_rewards_of_prefixes_balance_and_its_gradient(reward: str) -> None:
    """From logits in float64 to the loss, with the functions that training runs."""
    given, wanted = piece("flower", "flow")
    trie, log_q = world()
    a, b = personal_terms(settings(reward), probabilities())
    rows, log_r, logits = paths(trie), [], given["logits"].requires_grad_()
    for title, (path, row) in enumerate(zip(rows, given["row_of_item_logits"], strict=True)):
        scored = np.arange(len(path)) == len(path) - 1
        stop = np.full(len(path), log_q[trie.leaf[title]])
        terms = (np.full(len(path), x[int(row), title]) for x in (a, b))
        log_r.append(state_rewards(log_q[path], stop, scored, np.array([len(path)]), *terms))
    close(padded(log_r, 5), wanted[f"log_r_{REWARDS[reward]}"])
    length, target = torch.tensor([len(path) for path in rows]), given["actions"].long().ravel()
    ends = torch.zeros(25, dtype=torch.bool)
    node = torch.zeros(25, dtype=torch.int64)
    objective = Objective("vocabulary")
    parts = flow_parts(objective, 0, logits.view(25, 10), target, node, trie, None, None, None, ends)
    _, log_pf, log_stop = (x.view(5, 5) for x in parts.loss.unbind(1))
    there = torch.arange(5) < length[:, None]
    close(log_stop * there, wanted["log_pterm"])
    close(log_pf * (torch.arange(5) < length[:, None] - 1), wanted["log_pf"])
    loss = balance(log_pf, log_stop, padded(log_r, 5), length) / (length * (length - 1) // 2).sum()
    assert loss.item() == pytest.approx(wanted[f"loss_{REWARDS[reward]}"], abs=1e-6)
    if reward == "div":
        loss.backward()
        close(logits.grad, wanted["gradient_of_logits_loss_div"])


def test_a_balanced_sampler_has_no_loss() -> None:
    given, wanted = piece("flower", "balanced")
    arrays = (given["log_pf"], given["log_pterm"], given["log_r"])
    assert balance(*arrays, torch.tensor([3])).item() == pytest.approx(wanted["loss"], abs=1e-12)
    assert balance(arrays[0], arrays[1], arrays[2] * 2, torch.tensor([3])).item() > 0.1


def test_total(monkeypatch: pytest.MonkeyPatch) -> None:
    """What training adds up, of a loss of the true titles and a balance that are those of the authors."""
    given, wanted = piece("flower", "total")
    both: Any = SimpleNamespace(
        strength=given["theta"],
        objective=None,
        stop=0,
        losses=lambda *_: (torch.tensor([[given["sft"], 0.0, 0.0]]).double(), torch.zeros(1)),
    )
    monkeypatch.setattr(flow, "balance", lambda *_: torch.tensor(given["flow"]).double())
    one, yes = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    batch = {"place": one[None], "true": one, "n_prefixes": one, "zero_gain": yes, "decision": yes}
    total = FlowLoss.forward(both, **batch, log_r=one[None], pair_weight=1.0)["loss"]
    assert total.item() == pytest.approx(wanted["total"], abs=1e-12)
