"""The cache of prompts and nodes: who is beside a user changes nothing, and what is held is not copied for a node."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.conftest import SIX
from tests.tiny_models import tiny_model
from triewise.decoding import Counters, TrieEngine, rank_catalogue
from triewise.decoding.rooms import shared
from triewise.decoding.treecache import START, Prefix, TreeCache, blocks, on_device
from triewise.tokens import Trie

TRIE = Trie.from_sequences(SIX)
FIRST = TRIE.walk([1, 3])[1:2].tolist() + TRIE.walk([4, 4])[1:2].tolist()  # two nodes of depth 1
NEXT = int(TRIE.walk([1, 3])[2])  # a node below the first of them
PROMPTS = [[7, 8, 9, 10, 11], [12, 13], [14], [5, 6, 7]]
COPIES = "cat index index_select gather clone copy_ _to_copy index_copy_ index_put_ stack repeat".split()  # noqa: SIM905


class Copied(TorchDispatchMode):
    """The largest number of floats that an operator copied, and the operators' names."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.names = 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        copied = {"copy_": 1, "index_put_": 2, "index_copy_": 3}.get(name)
        what = result if copied is None else args[copied]
        if name in COPIES and isinstance(what, torch.Tensor) and what.is_floating_point():
            self.most = max(self.most, what.numel())
            self.names.add(name)
        return result


def hidden_alone(model: Any, prompt: list[int], *nodes: int) -> torch.Tensor:
    """The last node's hidden state, nodes one after the other, nobody beside."""
    cache = TreeCache(model, TRIE, [prompt], Counters())
    return [cache.append(np.array([[node]]))[0, 0] for node in nodes][-1]


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("same", [True, False])
def test_a_forward_copies_nothing_that_is_held(same: bool, kind: str) -> None:
    """Neither for nodes that are the same for all users nor for others, nor for heads that share keys (qwen2)."""
    prompts = [[3] * (n + 90) for n in range(10)]
    cache = TreeCache(tiny_model(kind), TRIE, prompts, Counters())
    for held in FIRST:
        node = np.array([[held]]) if same else np.where(np.arange(10) % 3, held, -1)[:, None]
        with Copied() as copied:
            cache.append(node)
        assert copied.names >= ({"copy_"} if same else {"index_copy_"})
        assert (
            copied.most <= 10 * 64
        )  # a token's widest state; the keys of all prompts are 10 * 32 * 95 numbers
    with Copied() as copied:
        if same:
            cache.keep(np.array([1]))
        else:
            assert cache.select(np.array([0, 8])).tolist() == [0, 1]
    assert copied.most <= (10 * 32 if same else 32 * 100)  # of nodes; of the one user who moves


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
def test_users_come_and_go_and_change_nothing_for_others(kind: str) -> None:
    model = tiny_model(kind)
    cache = TreeCache(model, TRIE, PROMPTS, Counters(), n_nodes=1)  # too few places: they are made anew
    first, second = FIRST
    cache.append(np.array([[first], [second], [-1], [first]]))
    cache.admit(np.array([1]), [[9, 9, 9]])  # the second goes, another comes
    hidden = cache.append(np.array([[NEXT, -1], [first, NEXT], [second, -1], [second, -1]]))
    people = [PROMPTS[0], [9, 9, 9], PROMPTS[2], PROMPTS[3]]
    assert torch.allclose(hidden[0, 0], hidden_alone(model, people[0], first, NEXT), atol=1e-4)
    assert torch.allclose(hidden[1, 1], hidden_alone(model, people[1], first, NEXT), atol=1e-4)
    assert torch.allclose(hidden[2, 0], hidden_alone(model, people[2], second), atol=1e-4)
    assert torch.allclose(
        hidden[3, 0], hidden_alone(model, people[3], second), atol=1e-4
    )  # whose first is no ancestor
    assert cache.select(np.array([3, 1])).tolist() == [0, 1]  # the longest goes: fewer places are read
    hidden = cache.append(np.array([[NEXT], [second]]))
    assert torch.allclose(hidden[0, 0], hidden_alone(model, people[3], first, NEXT), atol=1e-4)
    assert torch.allclose(hidden[1, 0], hidden_alone(model, people[1], second), atol=1e-4)
    alone = TreeCache(model, TRIE, [people[1]], Counters())
    assert torch.allclose(cache.root_hidden[1], alone.root_hidden[0], atol=1e-4)


@pytest.mark.parametrize("n_new", [1, 5])
def test_heads_that_share_keys_need_no_copies_of_them(n_new: int) -> None:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(3, 6, n_new, 8), torch.randn(2, 3, 2, 40, 8)
    mask = (torch.rand(3, 1, n_new, 40) < 0.6).index_fill(3, torch.tensor([0]), True)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True)
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
    wanted = attend(module, query, key, value, mask, scaling=0.3)[0]
    with Copied() as copied:
        found = attend(module, query, key, value, shared(mask), scaling=0.3)[0]
    assert copied.most <= query.numel()
    assert torch.allclose(found, wanted, atol=1e-6)
    assert found.shape == (3, n_new, 6, 8)


@torch.inference_mode()
def test_nothing_waits_for_the_device() -> None:
    """On meta tensors any question to the device is an error: prompts, nodes, users who come and go ask none."""
    model = tiny_model("llama").to("meta")
    beginning = list(range(5, 17))
    prefix = Prefix.run(model, beginning, Counters())
    prompts = [[*beginning, *prompt] for prompt in PROMPTS]
    cache = TreeCache(model, TRIE, prompts, Counters(), prefix, n_nodes=2)
    assert cache.append(np.array([FIRST])).shape == (4, 2, 32)
    cache.keep(np.array([1]))
    assert cache.append(np.array([[NEXT, -1], [-1, -1], [NEXT, 5], [-1, -1]])).device.type == "meta"
    cache.admit(np.array([1]), [prompts[2]])
    cache.select(np.array([0, 3]))
    cache.append(np.array([[5], [5]]))


def test_numbers_go_to_a_gpu_together(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[tuple[int, bool]] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, _, non_blocking: moves.append((len(self), non_blocking)) or self
    )
    given = [np.arange(6).reshape(2, 3), np.zeros((0,), dtype=np.int64), np.array([7])]
    there = on_device(SimpleNamespace(type="cuda"), *given)  # type: ignore[arg-type]
    assert [array.tolist() for array in there] == [array.tolist() for array in given]
    assert moves == [(7, True)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.sampled_from([0, 64, 512]))
def test_groups_of_prompts_cost_no_more_than_all_together_or_each_alone(
    lengths: list[int], start: int
) -> None:
    length = np.array(lengths)
    found = blocks(length, start)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(length)))
    cost = sum(len(block) * length[block].max() + start for block in found)
    assert cost <= min(len(length) * length.max() + start, length.sum() + len(length) * start)
    longest = [int(length[block].max()) for block in found]
    assert longest == sorted(longest, reverse=True)


def test_prompts_of_a_large_batch_are_hardly_padded() -> None:
    """Lengths as those of amazon_books, 256 users: all together 89 % of the positions would be padding."""
    length = np.random.default_rng(0).normal(97, 34, 256).clip(5, 183).astype(np.int64)
    assert len(length) * length.max() > 1.7 * length.sum()
    for start in START.values():
        padded = sum(len(block) * length[block].max() for block in blocks(length, start))
        assert padded <= 1.15 * length.sum()


def test_padding_is_counted() -> None:
    ranking = rank_catalogue(TrieEngine(tiny_model(), TRIE), [[7] * 100, [8], [9] * 3])
    assert ranking.counters["padding"] == 2  # the short ones share a forward
    assert ranking.counters["prompt_tokens"] == 104
