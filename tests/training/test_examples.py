from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.conftest import SIX
from tests.token_worlds import Row, make_prompts, make_split
from triewise.errors import UserError
from triewise.tokens import Trie, position_weights
from triewise.training import Examples, Windows, along_titles, make_windows, target_counts
from triewise.training.windows import batch_order


def listed(windows: Windows) -> list[tuple[list[int], int]]:
    return [(row.tolist(), int(n)) for row, n in zip(windows.items, windows.n_context, strict=True)]


def shifted_rows(user: str | None, items: list[int], longest: int, first: int = 1) -> list[Row]:
    """Rows of one user as leave-one-out gives them: each position from ``first`` on is a target."""
    return [(user, items[max(i - longest, 0) : i], items[i]) for i in range(first, len(items))]


# --- windows ----------------------------------------------------------------------------------------------------------


def test_last_takes_each_row_as_it_is() -> None:
    split = make_split([("a", [3, 1], 2), (None, [], 4)])
    assert listed(make_windows(split, "last")) == [([3, 1, 2], 2), ([4], 0)]


def test_every_tiles_from_the_end() -> None:
    rows = shifted_rows("a", [10, 11, 12, 13, 14, 15], longest=2)
    windows = make_windows(make_split(rows), "every")
    assert listed(windows) == [([10, 11], 1), ([11, 12, 13], 1), ([13, 14, 15], 1)]


def test_an_overlap_with_the_first_window_is_context_only() -> None:
    rows = shifted_rows("a", [0, 1, 2, 3, 4], longest=3, first=3)
    assert listed(make_windows(make_split(rows), "every")) == [([0, 1, 2, 3], 1), ([1, 2, 3, 4], 3)]


def test_users_may_be_interleaved_and_chains_broken() -> None:
    a, b = shifted_rows("a", [0, 1, 2, 3], longest=9), shifted_rows("b", [5, 6, 7], longest=9)
    mixed = [a[0], b[0], a[1], b[1], a[2]]
    assert sorted(listed(make_windows(make_split(mixed), "every"))) == [([0, 1, 2, 3], 1), ([5, 6, 7], 1)]
    gap = [a[0], a[2]]  # the row between is missing: each piece alone
    assert listed(make_windows(make_split(gap), "every")) == [([0, 1], 1), ([0, 1, 2, 3], 1)]
    nobody = [(None, history, target) for _, history, target in a]
    assert len(make_windows(make_split(nobody), "every")) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 14), st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=4))
def test_every_interaction_after_the_first_is_a_target_once(users: list[tuple[int, int, int]]) -> None:
    rows: list[Row] = []
    expected: Counter[int] = Counter()
    for user, (n, longest, first) in enumerate(users):
        items = [100 * user + i for i in range(n)]
        mine = shifted_rows(str(user), items, longest, first)
        rows += mine
        known = items[max(first - longest, 0) :] if mine else []
        expected.update(known[1:])
    split = make_split(rows)
    if not expected:
        with pytest.raises(UserError, match="got none with a target"):
            make_windows(split, "every")
        return
    windows = make_windows(split, "every")
    counts = target_counts(windows, 500)
    assert {i: int(c) for i, c in enumerate(counts) if c} == dict(expected)
    whole = {(*history, target) for _, history, target in rows}
    assert all(tuple(items) in whole and n >= 1 for items, n in listed(windows))


def test_target_counts_by_hand() -> None:
    split = make_split([("a", [3, 1], 2), ("b", [2], 2), ("c", [1, 2], 0)])
    assert target_counts(make_windows(split, "last"), 5).tolist() == [1, 0, 2, 0, 0]
    assert target_counts(make_windows(split, "every"), 5).tolist() == [1, 1, 3, 0, 0]


def test_windows_that_are_too_long_lose_their_oldest_titles(capsys: pytest.CaptureFixture[str]) -> None:
    prompts = make_prompts(SIX, max_tokens=8)  # titles of 3, 3, 4, 3, 3 and 1 tokens after one first token
    split = make_split([("a", [0, 1, 2, 3], 5), ("b", [5], 0)])
    windows = make_windows(split, "every", prompts)
    assert listed(windows) == [([2, 3, 5], 1), ([5, 0], 1)]
    assert "1 of 2 windows are longer than 8 tokens" in capsys.readouterr().err
    assert len(prompts.encode([2, 3])) == 8
    assert listed(make_windows(split, "every", make_prompts(SIX, max_tokens=1))) == [([3, 5], 1), ([5, 0], 1)]


def test_wrong_supervision() -> None:
    with pytest.raises(UserError, match="wanted supervision 'last' or 'every', got 'all'"):
        make_windows(make_split([("a", [0], 1)]), "all", make_prompts(SIX))


# --- order ------------------------------------------------------------------------------------------------------------


def test_the_schedule_is_one_permutation_after_another() -> None:
    order = batch_order(n_windows=7, batch_size=3, steps=6, seed=4)
    assert order.shape == (6, 3)
    flat = order.ravel()
    assert sorted(flat[:7]) == sorted(flat[7:14]) == list(range(7))
    assert not np.array_equal(flat[:7], flat[7:14])
    assert np.array_equal(batch_order(7, 3, 9, 4)[:6], order), "more steps only add to it"
    assert not np.array_equal(batch_order(7, 3, 6, 5), order)


# --- batches ----------------------------------------------------------------------------------------------------------


def slow_batch(examples: Examples, indices: list[int], weight_N: Any, zero_N: Any) -> dict[str, list[Any]]:
    """One window after the other, one token after the other."""
    prompts, trie = examples.prompts, examples.trie
    result: dict[str, list[Any]] = {
        name: [] for name in ("ids", "row", "column", "target", "node", "w", "zero")
    }
    for row, index in enumerate(indices):
        items = examples.windows.items[index].tolist()
        n = int(examples.windows.n_context[index])
        ids = prompts.encode(items[:n])
        for item in items[n:]:
            sequence = prompts.title_tokens[item].tolist()
            walked = trie.walk(sequence)
            for place, token in enumerate(sequence):
                result["row"].append(row)
                result["column"].append(len(ids) - 1)
                result["target"].append(token)
                result["node"].append(walked[place])
                result["w"].append(weight_N[walked[place + 1]])
                result["zero"].append(zero_N[walked[place + 1]])
                ids.append(token)
        result["ids"].append(ids)
    return result


@pytest.mark.parametrize("supervision", ["last", "every"])
def test_batch_equals_a_loop(supervision: str, rng: np.random.Generator) -> None:
    prompts, trie = make_prompts(SIX), Trie.from_sequences(SIX)
    rows: list[Row] = []
    for user in "abcde":
        rows += shifted_rows(user, rng.integers(0, 6, rng.integers(2, 9)).tolist(), longest=3)
    windows = make_windows(make_split(rows), supervision, prompts)
    weight, zero = rng.random(trie.n_nodes), rng.random(trie.n_nodes) < 0.5
    examples = Examples(windows, prompts, trie, along_titles(trie, weight), zero)
    for indices in ([0], [2, 2, 1], list(range(len(windows)))):
        batch, slow = examples.batch(indices), slow_batch(examples, indices, weight, zero)
        length = batch.input_ids.shape[1]
        assert length == max(map(len, slow["ids"]))
        padded = [ids + [0] * (length - len(ids)) for ids in slow["ids"]]
        assert batch.input_ids.tolist() == padded
        assert np.array_equal(batch.position, np.array(slow["row"]) * length + slow["column"])
        assert batch.target.tolist() == slow["target"]
        assert batch.node.tolist() == slow["node"]
        assert batch.zero_gain.tolist() == slow["zero"]
        assert batch.n_tokens == sum(map(len, slow["ids"]))
        assert batch.n_tokens == examples.size[indices].sum() + len(indices), "titles and the first token"
        np.testing.assert_array_equal(batch.weight, np.array(slow["w"], dtype=np.float32))
        assert {str(a.dtype) for a in (batch.input_ids, batch.position, batch.target, batch.node)} == {
            "int64"
        }


def test_a_row_without_history_is_predicted_from_the_first_token() -> None:
    prompts, trie = make_prompts(SIX), Trie.from_sequences(SIX)
    windows = make_windows(make_split([("a", [], 0)]), "last")
    batch = Examples(windows, prompts, trie, None, np.zeros(trie.n_nodes, dtype=bool)).batch([0])
    assert batch.input_ids.tolist() == [[1, 1, 2, 0]]
    assert batch.position.tolist() == [0, 1, 2]
    assert batch.weight.tolist() == [1, 1, 1]


def test_a_weight_may_depend_on_the_title_and_not_on_the_node_alone() -> None:
    """The first token of items 0 and 5 is weighed by their lengths, 3 and 1; that of 1 and 2 is one node."""
    prompts, trie = make_prompts(SIX), Trie.from_sequences(SIX)
    weight = position_weights([len(title) for title in SIX], 0.4)
    zero = np.zeros(trie.n_nodes, dtype=bool)
    windows = make_windows(make_split([("a", [0, 1, 2], 5)]), "every")
    batch = Examples(windows, prompts, trie, weight, zero).batch([0])
    by_hand = [1, 0.7, 0.4, 1, 0.8, 0.6, 0.4, 1]
    np.testing.assert_allclose(batch.weight, by_hand, rtol=1e-6)


def test_a_number_per_node_along_titles() -> None:
    trie = Trie.from_sequences(SIX)
    expected = [node for title in SIX for node in trie.walk(title)[1:].tolist()]
    assert along_titles(trie, np.arange(trie.n_nodes)).tolist() == expected
    with pytest.raises(UserError, match=rf"wanted a value for each of {trie.n_nodes} nodes, got .* \(3,\)"):
        along_titles(trie, np.ones(3))


def test_the_fingerprint_tells_other_examples_apart() -> None:
    prompts, trie = make_prompts(SIX), Trie.from_sequences(SIX)
    zero = np.zeros(trie.n_nodes, dtype=bool)
    one, other = (make_windows(make_split([("a", [0], t)]), "last") for t in (1, 2))
    prints = {
        Examples(one, prompts, trie, None, zero).fingerprint(),
        Examples(other, prompts, trie, None, zero).fingerprint(),
        Examples(one, prompts, trie, np.full(17, 0.5), zero).fingerprint(),
        Examples(one, prompts, trie, position_weights([3, 3, 4, 3, 3, 1], 0.5), zero).fingerprint(),
        Examples(one, prompts, trie, None, ~zero).fingerprint(),
    }
    assert len(prints) == 5
    assert Examples(one, prompts, trie, np.ones(17), zero).fingerprint() in prints


def test_wrong_examples() -> None:
    prompts, trie = make_prompts(SIX), Trie.from_sequences(SIX)
    zero = np.zeros(trie.n_nodes, dtype=bool)
    windows = make_windows(make_split([("a", [0, 1], 2)]), "every")
    with pytest.raises(UserError, match="wanted the trie of the prompts' titles, got another one"):
        Examples(windows, prompts, Trie.from_sequences(SIX[::-1]), None, zero)
    with pytest.raises(UserError, match=r"wanted weight for 17 title tokens, got an array of shape \(3,\)"):
        Examples(windows, prompts, trie, np.ones(3), zero)
    with pytest.raises(UserError, match=r"wanted zero_gain for \d+ nodes, got an array of shape \(17,\)"):
        Examples(windows, prompts, trie, None, np.zeros(17, dtype=bool))
    with pytest.raises(
        UserError, match="several targets need the plain template or prompts that grow, got 'd3'"
    ):
        Examples(windows, make_prompts(SIX, "d3"), trie, None, zero)
