"""The trie's arrays against the dict trie, its doors, errors and file.

The catalogue of the hand cases (9 ends a title; items 1 and 4 have the same title):

    root -- 1 -- 2 -- 9        A = item 0
         |    `- 3 -- 9        B = items 1 and 4
         |         `- 5 -- 9   C = item 2
         `- 7 -- 8 -- 9        D = item 3
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.reference.trie import DictTrie
from tests.strategies import catalogues, weighted_catalogues
from triewise.errors import UserError
from triewise.tokens import Trie
from triewise.tokens.trie import TRIE_FORMAT

TITLES = [[1, 2, 9], [1, 3, 9], [1, 3, 5, 9], [7, 8, 9], [1, 3, 9]]
ARRAYS = ("child_ptr", "token", "parent", "item_lo", "item_hi", "item_order", "leaf", "level_ptr")
quick = settings(max_examples=60, deadline=None)


@pytest.fixture
def trie() -> Trie:
    return Trie.from_sequences(TITLES)


def same(a: Trie, b: Trie) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


def test_arrays_of_the_drawn_catalogue(trie: Trie) -> None:
    assert trie.token.tolist() == [-1, 1, 7, 2, 3, 8, 9, 5, 9, 9, 9]
    assert trie.parent.tolist() == [-1, 0, 0, 1, 1, 2, 3, 4, 4, 5, 7]
    assert trie.child_ptr.tolist() == [1, 3, 5, 6, 7, 9, 10, 10, 11, 11, 11, 11]
    assert trie.level_ptr.tolist() == [0, 1, 3, 6, 10, 11]
    assert trie.leaf.tolist() == [6, 8, 10, 9, 8]
    assert trie.item_order.tolist() == [0, 2, 1, 4, 3]  # 1 3 5 9 comes before 1 3 9
    assert trie.item_lo.tolist() == [0, 0, 4, 0, 1, 4, 0, 1, 2, 4, 1]
    assert trie.item_hi.tolist() == [5, 4, 5, 1, 4, 5, 1, 2, 4, 5, 2]
    assert trie.depth.tolist() == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]
    assert trie.n_children.tolist() == [2, 2, 1, 1, 2, 1, 0, 1, 0, 0, 0]
    assert np.flatnonzero(trie.branching).tolist() == [0, 1, 4]
    assert np.flatnonzero(trie.is_leaf).tolist() == [6, 8, 9, 10]
    assert (trie.n_nodes, trie.n_items, trie.n_groups) == (11, 5, 4)
    assert repr(trie) == "Trie(4 titles of 5 items, 11 nodes, 3 branching, depth 4)"


def test_dtypes(trie: Trie) -> None:
    for name in ("child_ptr", "token", "parent", "item_lo", "item_hi", "item_order", "leaf", "depth"):
        assert getattr(trie, name).dtype == np.int32, name
    assert trie.level_ptr.dtype == trie.n_children.dtype == np.int64
    assert trie.branching.dtype == trie.is_leaf.dtype == np.bool_


def test_children_and_walk(trie: Trie) -> None:
    tokens, nodes = trie.children(4)
    assert (tokens.tolist(), nodes.tolist()) == ([5, 9], [7, 8])
    assert all(part.tolist() == [] for part in trie.children(6))
    assert trie.walk([1, 3, 9]).tolist() == [0, 1, 4, 8]
    assert trie.walk([1, 3]).tolist() == [0, 1, 4]  # a prefix of a title is on the trie
    assert trie.walk([]).tolist() == [0]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([2], r"position 0 wanted one of the tokens \[1, 7\], got the token 2"),
        ([1, 9], r"position 1 wanted one of the tokens \[2, 3\], got the token 9"),
        ([1, 3, 9, 9], "position 3 wanted the end of the title, got the token 9"),
        ([7, 2**40], r"position 1 wanted one of the tokens \[8\]"),
    ],
)
def test_walk_off_the_trie(trie: Trie, sequence: list[int], message: str) -> None:
    with pytest.raises(KeyError, match=message):
        trie.walk(sequence)


def test_walk_names_at_most_a_dozen_tokens() -> None:
    wide = Trie.from_sequences([[token] for token in range(100)])
    with pytest.raises(KeyError, match=r"0, 1, .* 11\] and 88 more"):
        wide.walk([100])


def test_peaked_masses_survive(trie: Trie) -> None:
    mass = trie.subtree_sum([1.0, 1e-17, 3e-17, 0.0, 2e-17])
    assert mass[4] == pytest.approx(6e-17, rel=1e-12)
    assert mass[8] == pytest.approx(3e-17, rel=1e-12)
    assert mass[10] == pytest.approx(3e-17, rel=1e-12)


def test_one_long_title_does_not_pad_the_others() -> None:
    titles = [[i % 50, i // 50, 99] for i in range(2000)] + [[7] * 4000 + [99]]
    trie = Trie.from_sequences(titles)
    assert trie.n_groups == 2001
    assert len(trie.level_ptr) - 2 == 4001
    assert trie.walk(titles[-1])[-1] == trie.leaf[-1]
    assert trie.subtree_sum(np.ones(2001))[0] == 2001


def test_tensors_equal_the_arrays(trie: Trie) -> None:
    torch = pytest.importorskip("torch")
    on_cpu = trie.to("cpu")
    for name in ("child_ptr", "token", "parent", "item_lo", "item_hi", "item_order", "leaf", "n_children"):
        tensor = getattr(on_cpu, name)
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == getattr(trie, name).tolist(), name
    assert (on_cpu.n_nodes, on_cpu.n_items, on_cpu.device.type) == (11, 5, "cpu")
    assert repr(on_cpu) == "DeviceTrie(5 items, 11 nodes, on cpu)"
    assert trie.to(torch.device("cpu")) is on_cpu


@quick
@given(catalogues())
def test_equals_the_dict_trie(sequences: list[list[int]]) -> None:
    trie, reference = Trie.from_sequences(sequences), DictTrie(sequences)
    prefixes = reference.prefixes()
    assert trie.n_nodes == len(prefixes)
    order = sorted(range(len(sequences)), key=lambda i: (sequences[i], i))
    assert trie.item_order.tolist() == order
    for node, prefix in enumerate(prefixes):
        assert trie.walk(prefix)[-1] == node
        tokens, nodes = trie.children(node)
        assert tokens.tolist() == sorted(reference.node(prefix))
        assert [prefixes[n] for n in nodes] == [(*prefix, t) for t in tokens.tolist()]
        assert trie.parent[node] == (prefixes.index(prefix[:-1]) if prefix else -1)
        assert trie.depth[node] == len(prefix)
        under = trie.item_order[trie.item_lo[node] : trie.item_hi[node]]
        assert sorted(under.tolist()) == reference.items_under(prefix)
    assert [prefixes[n] for n in trie.leaf] == [tuple(s) for s in sequences]


@quick
@given(weighted_catalogues())
def test_reductions_equal_the_reference(case: tuple[list[list[int]], list[int]]) -> None:
    sequences, counts = case
    trie, reference = Trie.from_sequences(sequences), DictTrie(sequences)
    assert trie.subtree_count(counts).tolist() == reference.subtree_sum(counts)
    peaked = [10.0 ** -(count % 19) for count in counts]
    np.testing.assert_allclose(trie.subtree_sum(peaked), reference.subtree_sum(peaked), rtol=1e-12)


@quick
@given(catalogues())
def test_paths_are_walks(sequences: list[list[int]]) -> None:
    trie = Trie.from_sequences(sequences)
    node_before, offsets = trie.paths()
    assert (node_before.dtype, offsets.dtype) == (np.int32, np.int64)
    walks = [trie.walk(sequence) for sequence in sequences]
    assert [node_before[a:b].tolist() for a, b in pairwise(offsets)] == [walk[:-1].tolist() for walk in walks]
    assert [walk[-1] for walk in walks] == trie.leaf.tolist()


@quick
@given(catalogues())
def test_lists_and_arrays_give_the_same_trie(sequences: list[list[int]]) -> None:
    tokens = np.array([token for sequence in sequences for token in sequence], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    flat = Trie.from_sequences((tokens, offsets))
    lists = Trie.from_sequences(sequences)
    assert same(flat, lists)
    assert same(flat, Trie.from_sequences(tuple(tuple(s) for s in sequences)))
    assert flat.fingerprint() == lists.fingerprint()


@quick
@given(catalogues(), st.randoms(use_true_random=False))
def test_shuffling_items_only_relabels(sequences: list[list[int]], random) -> None:
    order = list(range(len(sequences)))
    random.shuffle(order)
    trie, shuffled = (Trie.from_sequences(s) for s in (sequences, [sequences[i] for i in order]))
    for name in ("child_ptr", "token", "parent", "item_lo", "item_hi", "level_ptr"):
        assert np.array_equal(getattr(trie, name), getattr(shuffled, name)), name
    assert shuffled.leaf.tolist() == trie.leaf[order].tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("tries")


@settings(max_examples=15, deadline=None)
@given(catalogues())
def test_save_load_round_trip(folder, sequences: list[list[int]]) -> None:
    trie = Trie.from_sequences(sequences)
    trie.save(folder / "trie.npz")
    loaded = Trie.load(folder / "trie.npz")
    assert same(trie, loaded)
    assert all(getattr(loaded, name).dtype == getattr(trie, name).dtype for name in ARRAYS)
    assert loaded.fingerprint() == trie.fingerprint()
    assert [p.name for p in folder.iterdir()] == ["trie.npz"]


def test_fingerprint_sees_tokens_and_order(trie: Trie) -> None:
    others = [TITLES[::-1], [*TITLES[:3], [7, 6, 9], TITLES[4]], TITLES[:4]]
    assert len({trie.fingerprint(), *(Trie.from_sequences(s).fingerprint() for s in others)}) == 4


def test_file_of_another_version(trie: Trie, tmp_path) -> None:
    path = tmp_path / "trie.npz"
    arrays = {name: getattr(trie, name) for name in ARRAYS}
    np.savez(path, format=np.int64(TRIE_FORMAT + 1), **arrays)
    with pytest.raises(
        UserError, match=f"wanted a trie of format {TRIE_FORMAT} in .*, got format {TRIE_FORMAT + 1}"
    ):
        Trie.load(path)
    np.savez(path, **arrays)
    with pytest.raises(UserError, match="got format none"):
        Trie.load(path)


def test_files_that_are_no_trie(trie: Trie, tmp_path) -> None:
    with pytest.raises(UserError, match="which does not exist"):
        Trie.load(tmp_path / "absent.npz")
    path = tmp_path / "trie.npz"
    trie.save(path)
    whole = path.read_bytes()
    broken = [b"", b"text", whole[: len(whole) // 2], whole[:300] + b"\x07" + whole[301:]]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(UserError, match="got a file that is none"):
            Trie.load(path)
    np.save(tmp_path / "array.npy", trie.token)
    with pytest.raises(UserError, match="got a file that is none"):
        Trie.load(tmp_path / "array.npy")


def flat(tokens: list[float], offsets: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(tokens), np.array(offsets)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([], "wanted at least one title, got no items"),
        ([[1, 9], [], [2, 9]], "got none for item 1"),
        ([[1, 9], [2, -3, 9]], r"wanted tokens in \[0, 2\*\*31\), got -3 in item 1"),
        ([[1, 9], [2, 2**31]], r"got 2147483648 in item 1"),
        ([[1, 2], [3, 9], [1, 2, 9]], r"got item 0 \(\[1, 2\]\) that item 2 continues"),
        ([[1, 2, 9, 4], [3, 9], [1, 2, 9]], r"got item 2 \(\[1, 2, 9\]\) that item 0 continues"),
        ([[4, 1], [4], [4]], r"got item 1 \(\[4\]\) that item 0 continues"),
        ([[*range(20)], [*range(21)]], r"got item 0 \(\[0, 1, .*, 11\]\.\.\.\) that item 1"),
        (flat([1, 9], [0, 1]), "wanted offsets that ascend from 0 to the 2 tokens, got 0 to 1"),
        (flat([1, 9, 2, 9], [0, 3, 2, 4]), "wanted offsets that ascend"),
        (flat([1.5, 9.0], [0, 2]), "wanted flat integer arrays"),
        (flat([], [0]), "wanted flat integer arrays"),
    ],
)
def test_catalogues_that_are_refused(sequences, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trie.from_sequences(sequences)


def test_arguments_that_are_refused(trie: Trie) -> None:
    for call in (trie.subtree_sum, trie.subtree_count):
        with pytest.raises(UserError, match=r"one value for each of 5 items, got an array of shape \(4,\)"):
            call([1, 2, 3, 4])
    with pytest.raises(UserError, match="wanted integer counts, got float64"):
        trie.subtree_count([0.5, 1, 1, 1, 1])
    for node in (-1, 11):
        with pytest.raises(UserError, match=rf"wanted a node in \[0, 11\), got {node}"):
            trie.children(node)


def test_more_nodes_than_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triewise.tokens.trie.LIMIT", 9)  # 2**31 nodes do not fit into a test
    with pytest.raises(UserError, match=r"wanted fewer than 2\*\*31 nodes, got more at depth 2"):
        Trie.from_sequences([[1, 2, 0], [3, 4, 0], [5, 6, 0], [7, 8, 0]])
