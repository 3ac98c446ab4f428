"""Gains, zero-gain tokens and the weights made from them.

The catalogue of the worked numbers (9 ends a title; counts 4, 2, 1, 1):

    root -- 1 -- 2 -- 9        A, p = 1/2
         |    `- 3 -- 9        B, p = 1/4
         |         `- 5 -- 9   C, p = 1/8
         `- 7 -- 8 -- 9        D, p = 1/8
"""

from __future__ import annotations

import csv
import json
from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from tests.reference.trie import DictTrie
from tests.strategies import weighted_catalogues
from triewise.errors import UserError
from triewise.tokens import (
    Trie,
    average_valid_tokens,
    binary_weights,
    decoding_weights,
    forced_share,
    information_gain,
    linear_weights,
    position_weights,
    zero_gain,
    zero_gain_share,
)
from triewise.tokens.decisiveness import MEASURES, front_weights, gain_by, gain_entropy, rarity_weights

TITLES, COUNTS = [[1, 2, 9], [1, 3, 9], [1, 3, 5, 9], [7, 8, 9]], [4, 2, 1, 1]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
Case = tuple[list[list[int]], list[int]]
quick = settings(max_examples=60, deadline=None)


@pytest.fixture
def trie() -> Trie:
    return Trie.from_sequences(TITLES)


def along(t: Trie, value_N: np.ndarray, title: list[int]) -> list[float]:
    return value_N[t.walk(title)[1:]].tolist()


def test_worked_gains(trie: Trie) -> None:
    gain = information_gain(trie, COUNTS)
    half, eighth = log(2) / 2, log(8) / 8  # the terms of p = 1/2 (and of 1/4) and of p = 1/8
    root = 2 * half + 2 * eighth
    assert gain_entropy(trie, COUNTS)[0] == pytest.approx(root) == pytest.approx(1.2130, abs=5e-5)
    assert along(trie, gain, TITLES[0]) == pytest.approx([eighth, half + eighth, 0])
    assert along(trie, gain, TITLES[1]) == pytest.approx([eighth, half, eighth])
    assert along(trie, gain, TITLES[2]) == pytest.approx([eighth, half, half, 0])
    assert along(trie, gain, TITLES[3]) == pytest.approx([root - eighth, 0, 0])
    assert gain[0] == 0


def test_worked_shares(trie: Trie) -> None:
    assert zero_gain_share(trie, COUNTS) == 7 / 25
    assert average_valid_tokens(trie, COUNTS) == pytest.approx(43 / 25) == pytest.approx(1.72)
    assert forced_share(trie, COUNTS) == 7 / 25
    assert forced_share(trie, [1, 1, 1, 1]) == pytest.approx(4 / 13)


def test_worked_decoding_weights(trie: Trie) -> None:
    weight = decoding_weights(trie, information_gain(trie, COUNTS), 0.4)
    children = {prefix: trie.children(trie.walk(prefix)[-1]) for prefix in [(), (1,), (1, 3)]}
    found = {prefix: dict(zip(*map(list, pair), strict=True)) for prefix, pair in children.items()}
    by_token = {prefix: {t: weight[n] for t, n in pair.items()} for prefix, pair in found.items()}
    assert by_token[()] == pytest.approx({1: 1.0, 7: 0.6})
    assert by_token[(1,)] == pytest.approx({2: 0.6, 3: 1.0})
    assert by_token[(1, 3)] == pytest.approx({5: 0.6, 9: 1.0})
    assert weight[0] == 1
    forced = np.flatnonzero(trie.n_children[trie.parent] == 1)
    assert (weight[forced[forced > 0]] == 1).all()


def test_worked_binary_weights(trie: Trie) -> None:
    weight = binary_weights(trie, COUNTS, 0.2)
    assert along(trie, weight, TITLES[0]) == [1, 1, 0.2]
    assert along(trie, weight, TITLES[1]) == [1, 1, 1]  # here a terminator decides: C goes on where B ends
    assert along(trie, weight, TITLES[2]) == [1, 1, 1, 0.2]
    assert along(trie, weight, TITLES[3]) == [1, 0.2, 0.2]


def test_worked_linear_weights(trie: Trie) -> None:
    """The largest gain is that of D's first token: H(root) minus its own term, .9531 nats."""
    weight = linear_weights(trie, COUNTS, 0.2)
    top = 0.9531
    assert along(trie, weight, TITLES[0]) == pytest.approx(
        [0.2 + 0.8 * 0.2599 / top, 0.2 + 0.8 * 0.6065 / top, 0.2], abs=5e-5
    )
    assert along(trie, weight, TITLES[3]) == [1, 0.2, 0.2]
    assert (linear_weights(trie, [0, 5, 0, 0], 0.3) == 0.3).all(), "nothing gains anything"


@quick
@given(weighted_catalogues(), st.floats(0, 1))
def test_linear_weights_by_definition(case: Case, beta: float) -> None:
    """On the trie of the trained titles alone, as the authors build it; the others change nothing."""
    trained = [title for title, count in zip(*case, strict=True) if count]
    reference = DictTrie(trained)
    gain = reference.gain([count for count in case[1] if count])
    top = max(gain)
    expected = [beta + (1 - beta) * (g / top if top > 0 else 0) for g in gain]
    trie = Trie.from_sequences(case[0])
    weight = linear_weights(trie, case[1], beta)
    nodes = [trie.walk(prefix)[-1] for prefix in reference.prefixes()]
    np.testing.assert_allclose(weight[nodes], expected, rtol=1e-6, atol=1e-7)  # the slow ln of p near 1
    assert ((weight >= beta - 1e-12) & (weight <= 1 + 1e-12)).all()
    assert (weight[zero_gain(trie, case[1])] == beta).all()


def test_worked_position_weights() -> None:
    assert position_weights(5, 0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    assert position_weights([3, 1, 2], 0.5) == pytest.approx([1, 0.75, 0.5, 1, 1, 0.5])
    assert len(position_weights([], 0.5)) == 0


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(0, 1))
def test_position_weights_by_definition(lengths: list[int], beta: float) -> None:
    expected = [
        1 - (t - 1) * (1 - beta) / (length - 1) if length > 1 else 1
        for length in lengths
        for t in range(1, length + 1)
    ]
    np.testing.assert_allclose(position_weights(lengths, beta), expected, rtol=1e-12, atol=1e-12)


def test_untrained_children(trie: Trie) -> None:
    """D is never a target: its first token takes all of the root's entropy away, the rest of it nothing."""
    counts = [4, 2, 2, 0]
    gain, zero = information_gain(trie, counts), zero_gain(trie, counts)
    assert along(trie, gain, TITLES[3]) == [gain_entropy(trie, counts)[0], 0, 0]
    assert along(trie, zero, TITLES[3]) == [False, True, True]
    assert along(trie, zero, TITLES[0]) == [True, False, True]  # all mass is under the prefix [1]
    assert gain[1] == 0
    assert decoding_weights(trie, gain, 0.4)[2] == pytest.approx(0.6)


def test_an_untrained_sibling_changes_no_decoding_weight() -> None:
    """Siblings with counts 6 and 3 weigh .6 and 1, as in the authors' trie, which has no others; a third one 1."""
    two, three = Trie.from_sequences([[1, 9], [2, 9]]), Trie.from_sequences([[1, 9], [2, 9], [3, 9]])
    gains = information_gain(two, [6, 3]), information_gain(three, [6, 3, 0])
    assert decoding_weights(two, gains[0], 0.4, [6, 3])[1:3] == pytest.approx([0.6, 1.0])
    assert decoding_weights(three, gains[1], 0.4, [6, 3, 0])[1:4] == pytest.approx([0.6, 1.0, 1.0])
    over_all = decoding_weights(three, gains[1], 0.4)[1:4]
    assert over_all[2] == pytest.approx(0.6), "the untrained one gains most"
    assert over_all[0] > 0.8, "and brings the trained one near 1"
    only = decoding_weights(three, information_gain(three, [0, 6, 0]), 0.4, [0, 6, 0])
    assert (only == 1).all(), "nothing to scale over"


def test_equal_titles_are_one(trie: Trie) -> None:
    """Splitting B's count over two items with its title changes nothing."""
    split = Trie.from_sequences([*TITLES, TITLES[1]])
    for counts in ([4, 1, 1, 1, 1], [4, 0, 1, 1, 2]):
        assert np.array_equal(information_gain(split, counts), information_gain(trie, COUNTS))
        assert np.array_equal(zero_gain(split, counts), zero_gain(trie, COUNTS))


def test_all_mass_on_one_title(trie: Trie) -> None:
    """Nothing is uncertain, so no token gains anything; what is not zero-gain is decided by the counts."""
    assert information_gain(trie, [0, 5, 0, 0]).tolist() == [0.0] * trie.n_nodes
    assert along(trie, zero_gain(trie, [0, 5, 0, 0]), TITLES[0]) == [True, False, True]
    assert (decoding_weights(trie, information_gain(trie, [0, 5, 0, 0]), 1.0) == 1).all()


def test_the_term_of_a_title_that_has_nearly_all_mass_is_exact() -> None:
    """-p ln p is about d - d**2 / 2 for p = 1 - d; ln of the rounded p keeps 7 digits of it."""
    d = 1 / (10**9 + 1)
    entropy = gain_entropy(Trie.from_sequences([[1], [2]]), [10**9, 1])
    assert entropy[1] == pytest.approx(d - d**2 / 2, rel=1e-14)


def test_sums_that_differ_in_the_last_bit_are_equal() -> None:
    """Both children of the root hold the same counts in another order: their weights must not differ."""
    counts = [1, 3, 7, 11, 13, 29, 31, 37, 41]
    titles = [[side, i, 9] for side in (1, 2) for i in range(len(counts))]
    trie = Trie.from_sequences(titles)
    gain = information_gain(trie, counts + sorted(counts, key=lambda c: c % 5))
    assert (decoding_weights(trie, gain, 0.5)[1:3] == 1).all()


@quick
@given(weighted_catalogues())
def test_equals_its_definition(case: Case) -> None:
    trie, reference = Trie.from_sequences(case[0]), DictTrie(case[0])
    counts = case[1]
    gain, zero = information_gain(trie, counts), zero_gain(trie, counts)
    np.testing.assert_allclose(gain, reference.gain(counts), rtol=1e-9, atol=1e-12)
    expected = [reference.entropy(counts, prefix) for prefix in reference.prefixes()]
    np.testing.assert_allclose(gain_entropy(trie, counts), expected, rtol=1e-12, atol=1e-15)
    assert zero.tolist() == reference.zero_gain(counts)
    assert (gain >= 0).all()
    assert (gain[zero] == 0).all()


@quick
@given(weighted_catalogues())
def test_gains_telescope(case: Case) -> None:
    trie = Trie.from_sequences(case[0])
    gain, entropy = information_gain(trie, case[1]), gain_entropy(trie, case[1])
    for title, leaf in zip(case[0], trie.leaf, strict=True):
        assert sum(along(trie, gain, title)) == pytest.approx(
            entropy[0] - entropy[leaf], rel=1e-12, abs=1e-12
        )


@quick
@given(weighted_catalogues(), st.integers(2, 1000))
def test_scaling_counts_changes_nothing(case: Case, factor: int) -> None:
    trie, scaled = Trie.from_sequences(case[0]), [factor * count for count in case[1]]
    assert np.array_equal(information_gain(trie, scaled), information_gain(trie, case[1]))
    assert np.array_equal(zero_gain(trie, scaled), zero_gain(trie, case[1]))


@quick
@given(weighted_catalogues(), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.3, 1.0]))
def test_shuffling_items_changes_nothing(case: Case, random, share: float) -> None:
    order = list(range(len(case[0])))
    random.shuffle(order)
    measured = []
    for sequences, counts in (case, ([case[0][i] for i in order], [case[1][i] for i in order])):
        t = Trie.from_sequences(sequences)
        gain = information_gain(t, counts)
        measured.append((gain, decoding_weights(t, gain, share), binary_weights(t, counts, share)))
    for a, b in zip(*measured, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@quick
@given(weighted_catalogues(max_items=8), weighted_catalogues(max_items=2))
def test_an_item_without_counts_changes_no_other_token(case: Case, other: Case) -> None:
    sequences, counts = case
    added = [*other[0][0][:-1], sequences[0][-1]]
    assume(sequences[0][-1] not in added[:-1])
    before, after = Trie.from_sequences(sequences), Trie.from_sequences([*sequences, added])
    gain = information_gain(before, counts), information_gain(after, [*counts, 0])
    zero = zero_gain(before, counts), zero_gain(after, [*counts, 0])
    for sequence in sequences:
        old, new = before.walk(sequence), after.walk(sequence)
        np.testing.assert_allclose(gain[0][old], gain[1][new], rtol=1e-12, atol=1e-14)
        assert np.array_equal(zero[0][old], zero[1][new])


@quick
@given(weighted_catalogues(), st.floats(0, 1), st.booleans())
def test_decoding_weights_by_definition(case: Case, alpha: float, trained: bool) -> None:
    trie = Trie.from_sequences(case[0])
    gain = information_gain(trie, case[1])
    weight = decoding_weights(trie, gain, alpha, case[1] if trained else None)
    assert ((weight >= 1 - alpha - 1e-12) & (weight <= 1)).all()
    mass = trie.subtree_count(np.array(case[1]))
    for node in np.flatnonzero(trie.n_children):
        siblings = trie.children(node)[1]
        if trained:
            assert (weight[siblings[mass[siblings] == 0]] == 1).all()
            siblings = siblings[mass[siblings] > 0]
        if not len(siblings):
            continue
        low, high = gain[siblings].min(), gain[siblings].max()
        if high - low > 1e-9 * high:
            expected = 1 - alpha * (gain[siblings] - low) / (high - low)
            np.testing.assert_allclose(weight[siblings], expected, rtol=1e-12, atol=1e-12)
        elif high - low < 1e-15 * high:
            assert (weight[siblings] == 1).all()


def test_alpha_zero_and_beta_one_are_uniform(trie: Trie) -> None:
    assert (decoding_weights(trie, information_gain(trie, COUNTS), 0) == 1).all()
    assert (binary_weights(trie, COUNTS, 1) == 1).all()
    assert (linear_weights(trie, COUNTS, 1) == 1).all()
    assert (position_weights([3, 4], 1) == 1).all()


@pytest.mark.parametrize("measure", [gain_entropy, information_gain, zero_gain, zero_gain_share])
@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([0, 0, 0, 0], "wanted at least one training target, got counts that are all zero"),
        ([1, 2, 3], r"wanted one count for each of 4 items, got shape \(3,\)"),
        ([1, -2, 3, 4], "wanted counts >= 0, got -2 for item 1"),
        ([0.5, 0.25, 0.125, 0.125], r"wanted integer counts, got fractions \(float64\)"),
        ([1.0, float("nan"), 0.0, 0.0], "wanted integer counts"),
    ],
)
def test_counts_that_are_refused(trie: Trie, measure, counts: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(trie, counts)


def test_whole_floats_are_counts(trie: Trie) -> None:
    as_floats = information_gain(trie, np.array(COUNTS, dtype=np.float64))
    assert np.array_equal(as_floats, information_gain(trie, COUNTS))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_that_are_refused(trie: Trie, share: float) -> None:
    with pytest.raises(UserError, match=r"wanted alpha in \[0, 1\], got"):
        decoding_weights(trie, np.zeros(trie.n_nodes), share)
    with pytest.raises(UserError, match=r"wanted beta in \[0, 1\], got"):
        binary_weights(trie, COUNTS, share)
    with pytest.raises(UserError, match=r"wanted beta in \[0, 1\], got"):
        linear_weights(trie, COUNTS, share)
    with pytest.raises(UserError, match=r"wanted beta in \[0, 1\], got"):
        position_weights(5, share)


def test_lengths_that_are_refused() -> None:
    with pytest.raises(UserError, match="wanted lengths of at least 1, got 0; count the terminator too"):
        position_weights([3, 0], 0.5)


def test_gains_that_are_refused(trie: Trie) -> None:
    with pytest.raises(UserError, match=r"a finite gain for each of 11 nodes, got an array of shape \(4,\)"):
        decoding_weights(trie, np.zeros(4), 0.1)
    with pytest.raises(UserError, match="with 1 values that are not"):
        decoding_weights(trie, np.where(np.arange(11) == 3, np.nan, 0.0), 0.1)


def catalogue_on_disk(folder: Path) -> Case:
    """Titles as UTF-8 bytes closed by 256, and how often each item is a training target."""
    if (folder / "info.txt").exists():
        lines = (folder / "info.txt").read_text(encoding="utf-8").splitlines()
        titles = {int(line.rsplit("\t", 1)[1]): line.rsplit("\t", 1)[0] for line in lines}
    else:
        titles = {
            int(k): v
            for k, v in json.loads((folder / "id2name4Rec.json").read_text(encoding="utf-8")).items()
        }
    index = {raw: i for i, raw in enumerate(titles)}
    counts = [0] * len(titles)
    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            counts[index[int(row["item_id"]) if "item_id" in row else json.loads(row["item_ids"])[-1]]] += 1
    return [[*title.encode(), 256] for title in titles.values()], counts


@pytest.mark.parametrize(
    ("name", "n_items"), [("amazon_office", 2414), ("amazon_books", 6344), ("amazon_games_d3", 3858)]
)
def test_gains_telescope_on_every_title_of_a_real_catalogue(name: str, n_items: int) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not beside the project; the test needs its titles and training targets")
    sequences, counts = catalogue_on_disk(DATA / name)
    trie = Trie.from_sequences(sequences)
    assert trie.n_items == n_items
    gain, entropy = information_gain(trie, counts), gain_entropy(trie, counts)
    node_before, offsets = trie.paths()
    # the gains of the nodes before each token leave out the leaf's; the root's, which they have, is 0
    along_title = np.add.reduceat(gain[node_before], offsets[:-1]) + gain[trie.leaf]
    np.testing.assert_allclose(along_title, entropy[0] - entropy[trie.leaf], rtol=1e-12)
    assert (gain >= 0).all()
    assert (gain[zero_gain(trie, counts)] == 0).all()


# --- other measures ---------------------------------------------------------------------------------------------------


def test_information_is_the_default_bit_for_bit(trie: Trie) -> None:
    assert (gain_by(trie, COUNTS) == information_gain(trie, COUNTS)).all()
    for made in (binary_weights, linear_weights):
        assert (made(trie, COUNTS, 0.2) == made(trie, COUNTS, 0.2, "information")).all()
    with pytest.raises(UserError, match="wanted a measure among information, gini, .*, got 'purity'"):
        gain_by(trie, COUNTS, "purity")


def test_worked_measures(trie: Trie) -> None:
    """Token 2 after 1 leaves A (4 of 8) and rules out B and C (2 and 1 of 8); 7 at the root leaves D alone."""
    a, d = trie.walk([1, 2])[-1], trie.walk([7])[-1]
    assert gain_by(trie, COUNTS, "gini")[a] == pytest.approx(2 / 8 * 6 / 8 + 1 / 8 * 7 / 8)
    assert gain_by(trie, COUNTS, "chi-squared")[[a, d]] == pytest.approx([3 / 8, 7 / 8])
    split = -4 / 7 * log(4 / 7) - 3 / 7 * log(3 / 7)
    assert gain_by(trie, COUNTS, "gain-ratio")[a] == pytest.approx(information_gain(trie, COUNTS)[a] / split)
    below = -4 / 7 * log(4 / 7) - 2 / 7 * log(2 / 7) - 1 / 7 * log(1 / 7)
    assert gain_by(trie, COUNTS, "conditional-entropy")[a] == pytest.approx(below)
    # A rare token behind which all is open raises the entropy.
    rare = Trie.from_sequences([[1, 9], [2, 3, 9], [2, 4, 9]])
    assert gain_by(rare, [98, 1, 1], "conditional-entropy")[2] < 0
    assert binary_weights(rare, [98, 1, 1], 0.2, "conditional-entropy")[1:3].tolist() == [1, 0.2]
    assert linear_weights(rare, [98, 1, 1], 0.2, "conditional-entropy")[2] == 0.2


@pytest.mark.parametrize("measure", MEASURES[1:])
@quick
@given(case=weighted_catalogues())
def test_measures_by_looking_at_every_title(measure: str, case: Case) -> None:
    sequences, counts = case[0], [c % 1000 for c in case[1]]
    assume(any(counts))
    reference, trie = DictTrie(sequences), Trie.from_sequences(sequences)
    found = gain_by(trie, counts, measure)
    nodes = [trie.walk(prefix)[-1] for prefix in reference.prefixes()]
    np.testing.assert_allclose(found[nodes], reference.measured(counts, measure), rtol=1e-6, atol=1e-9)
    assert (found[zero_gain(trie, counts)] == 0).all()
    np.testing.assert_allclose(gain_by(trie, [7 * c for c in counts], measure), found, rtol=1e-9, atol=1e-12)
    assert (linear_weights(trie, counts, 0.3, measure) >= 0.3 - 1e-12).all()


@quick
@given(weighted_catalogues())
def test_gain_ratio_decodes_as_the_information_gain(case: Case) -> None:
    """Siblings share the split information, which scaling over siblings takes out again."""
    trie, counts = Trie.from_sequences(case[0]), [c % 1000 for c in case[1]]
    assume(any(counts))
    plain, ratio = (
        decoding_weights(trie, gain_by(trie, counts, m), 0.4, counts) for m in ("information", "gain-ratio")
    )
    np.testing.assert_allclose(ratio, plain, atol=1e-6)


@quick
@given(weighted_catalogues())
def test_front_and_rarity_weights_along_titles(case: Case) -> None:
    sequences, counts = case[0], [c % 1000 for c in case[1]]
    assume(any(counts))
    trie, reference = Trie.from_sequences(sequences), DictTrie(sequences)
    gain = dict(zip(reference.prefixes(), reference.measured(counts, "conditional-entropy"), strict=True))
    often: dict[int, int] = {}
    for title, count in zip(sequences, counts, strict=True):
        for token in title:
            often[token] = often.get(token, 0) + count
    front, rare, offsets = front_weights(trie, counts), rarity_weights(trie, counts, 0.9), trie.paths()[1]
    for i, title in enumerate(sequences):
        each = [np.log1p(max(gain[tuple(title[: t + 1])], 0)) for t in range(len(title))]
        seldom = [0.1 / (1 - 0.9 ** max(often[token], 1)) for token in title]
        for raw, found in ((each, front), (seldom, rare)):
            mean = sum(raw) / len(title)
            wanted = [r / mean for r in raw] if mean > 1e-12 else [1.0] * len(title)
            np.testing.assert_allclose(found[offsets[i] : offsets[i + 1]], wanted, rtol=1e-4, atol=1e-6)
