"""Statistics of both papers equal slow references, and their sentences say what the numbers say."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from tests.reference import statistics as slow
from tests.strategies import weighted_catalogues
from triewise.ranking import Evaluation
from triewise.recipe import parse_recipe
from triewise.reports import (
    PLACES,
    StudiedData,
    StudiedRun,
    first_word_repetition,
    item_score_entropy,
    logit_density,
    make_statistics,
    prefixes,
)
from triewise.reports.run_statistics import MADE, variant
from triewise.reports.statistics import spoken, statistics_section, times
from triewise.reports.tidy import (
    gain_bins,
    gradient_weights,
    group_losses,
    logged_parts,
    prefix_entropy,
    rank_correlation,
    zero_gain_tokens,
)
from triewise.tokens import Trie

QUOTED = [[5, 1, 2, 9], [5, 1, 3, 9], [5, 1, 3, 4, 9], [5, 7, 8, 9], [5, 7, 9]]  # 5 is a quote, 9 the end
COUNTS = [4, 2, 1, 1, 0]


@settings(max_examples=40, deadline=None)
@given(weighted_catalogues())
def test_tokens_that_decide_nothing_equal_a_count(case: tuple[list[list[int]], list[int]]) -> None:
    titles, counts = case[0], [min(c, 50) for c in case[1]]
    table = zero_gain_tokens(Trie.from_sequences(titles), counts)
    found = dict(table.select("group", "tokens").iter_rows())
    assert found == slow.zero_gain_tokens(titles, counts)
    assert table["share"].sum() == pytest.approx(1)
    # the control: counted over titles, not over training targets
    if slow.zero_gain_tokens(titles, counts) != slow.zero_gain_tokens(titles, [1] * len(titles)):
        assert found != slow.zero_gain_tokens(titles, [1] * len(titles))


@settings(max_examples=40, deadline=None)
@given(weighted_catalogues(), st.data())
def test_prefix_entropies_equal_loops(case: tuple[list[list[int]], list[int]], data: st.DataObject) -> None:
    titles, counts = case[0], [min(c, 50) for c in case[1]]
    some = st.integers(0, len(titles) - 1)
    n_users = data.draw(st.integers(1, 3))
    target = data.draw(st.lists(some, min_size=n_users, max_size=n_users))
    items = [[*data.draw(st.lists(some, min_size=1, max_size=3)), -1, -1][:3] for _ in range(n_users)]
    found = prefixes(Trie.from_sequences(titles), counts, np.array(items), np.array(target))
    expected = slow.prefix_entropies(titles, counts, items, target)
    assert found.select("row", "step").rows() == [row[:2] for row in expected]
    np.testing.assert_allclose(found.select("predicted", "truth"), [row[2:] for row in expected], atol=1e-12)
    table = prefix_entropy(found)
    of_users = [
        np.mean([p - t for u, _, p, t in expected if u == user])
        for user in dict.fromkeys(r[0] for r in expected)
    ]
    assert table["step"].to_list() == [0, *sorted({row[1] for row in expected})]
    assert table["difference"][0] == pytest.approx(np.mean(of_users))
    for step, difference in table.select("step", "difference").rows()[1:]:
        assert difference == pytest.approx(np.mean([p - t for _, s, p, t in expected if s == step]))


def test_a_prefix_that_leaves_more_open_is_above_zero() -> None:
    trie = Trie.from_sequences(QUOTED)
    found = prefix_entropy(prefixes(trie, COUNTS, np.array([[0, 1]]), np.array([3])))
    wrong = prefix_entropy(prefixes(trie, COUNTS, np.array([[3, 3]]), np.array([0])))
    assert found["difference"][2] > 0 > wrong["difference"][2]  # seven of eight targets begin with 1


def test_repetition_looks_behind_what_all_titles_share() -> None:
    trie, items = Trie.from_sequences(QUOTED), np.array([[0, 1, 2, 3], [3, 4, 0, -1], [2, -1, -1, -1]])
    found = first_word_repetition(trie, items)
    assert found.tolist() == [slow.first_word_repetition(QUOTED, row) for row in items.tolist()]
    assert found.tolist() == [3 / 4, 2 / 3, 1.0]
    assert found[0] != 1, "the control: every first token is the quote"


def test_entropy_of_scores_is_in_bits() -> None:
    scores = np.array([[-1.0, -2.0, -4.0], [-3.0, -3.0, -3.0], [-1.0, -np.inf, -np.inf]])
    found = item_score_entropy(scores)
    assert found == pytest.approx([slow.item_score_entropy(row) for row in scores.tolist()])
    assert found[1:] == pytest.approx([math.log2(3), 0])
    assert found[0] != pytest.approx(slow.item_score_entropy(scores[0].tolist(), base=math.e)), (
        "the control: nats"
    )


def test_bins_of_the_gain_hold_every_token() -> None:
    rng = np.random.default_rng(1)
    gain = np.concatenate([np.zeros(7), 10 ** rng.uniform(-2, 1, 40)])
    tokens = pl.DataFrame({"row": rng.integers(0, 6, 47), "gain": gain, "log_p": -rng.random(47)})
    table = gain_bins(tokens)
    assert table["tokens"].sum() == 47 and table.row(0)[:3] == (0, 0, 0) and table["tokens"][0] == 7
    assert table["from"].to_list() == sorted(table["from"].to_list())
    for low, high, at, log_p, down, up, n in table.rows():
        part = [(u, g, p) for u, g, p in tokens.rows() if (low <= g < high if high else g == 0)]
        users = [np.mean([p for u, _, p in part if u == user]) for user in {u for u, _, _ in part}]
        assert len(part) == n and at == pytest.approx(np.mean([g for _, g, _ in part]))
        assert log_p == pytest.approx(np.mean(users))
        assert down <= log_p <= up
    over_tokens = tokens.filter(pl.col("gain") == 0)["log_p"].mean()
    assert table["log_p"][0] != pytest.approx(over_tokens), "the control: a mean over tokens"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=12))
def test_rank_correlation_equals_its_definition(rows: list[tuple[int, int, int]]) -> None:
    user, x, y = (np.array(column) for column in zip(*rows, strict=True))
    found, low, high = rank_correlation(user, x.astype(float), y.astype(float))
    if len(set(x.tolist())) > 1 and len(set(y.tolist())) > 1:
        assert found == pytest.approx(slow.spearman(x.tolist(), y.tolist()), abs=1e-9)
    assert -1 - 1e-9 <= low <= high <= 1 + 1e-9


def test_logits_against_a_gaussian() -> None:
    z = np.random.default_rng(0).normal(size=400)
    table, skewed = logit_density(z), logit_density(np.exp(z))
    assert table["distance"][0] == pytest.approx(slow.distance_from_gaussian(z.tolist()))
    assert (table["density"] * 0.25).sum() == pytest.approx(1)
    assert (table["gaussian"] * 0.25).sum() == pytest.approx(1, abs=1e-4)
    assert table["distance"][0] < 0.08 < 0.3 < skewed["distance"][0], "the control: what is no Gaussian"


def test_logs_become_rows() -> None:
    log = [
        {"step": 10, "epoch": 0.5, "loss_zero_gain": None, "loss_positive_gain": 3.0, "w": None},
        {"step": 20, "epoch": 1.0, "loss_zero_gain": 0.5, "loss_positive_gain": 2.0, "w": 0.7},
        {
            "step": 30,
            "epoch": 1.5,
            "loss_zero_gain": 0.4,
            "loss_positive_gain": 1.0,
            "w": 0.6,
            "temperature": 2.0,
        },
    ]
    of_parts = {"loss_invalid": 1.0, "loss_choice": 2.0, "grad_norm_invalid": 3.0, "grad_norm_choice": 4.0}
    assert group_losses(log).rows() == [
        (10, 0.5, "positive gain", 3.0),
        (20, 1.0, "zero gain", 0.5),
        (20, 1.0, "positive gain", 2.0),
    ]
    assert gradient_weights(log).rows() == [(20, 0.7, 1.0), (30, 0.6, 2.0)]
    assert logged_parts(log).height == 0
    assert logged_parts([log[0] | of_parts]).rows() == [(10, "invalid", 1.0, 3.0), (10, "choice", 2.0, 4.0)]


# --- runs ---------------------------------------------------------------------------------------------------


def run(name: str, rank: list[int], seconds: float = 10.0, seed: int = 0, **objective: Any) -> StudiedRun:
    values = {"name": name, "seed": seed, "data": {"source": "ml-100k"}, "objective": objective}
    values |= {"training": {"steps": 10}}
    ranks = np.array(rank, dtype=np.int32)
    n = len(rank)
    nothing: Any = np.zeros((n, 1))
    metrics = {"NDCG@10": float(np.where(ranks >= 0, 1 / np.log2(np.maximum(ranks, 0) + 2.0), 0).mean())}
    evaluation = Evaluation(name, metrics, ranks, nothing, nothing, nothing, np.zeros(n, np.int32), nothing)
    return StudiedRun(name, parse_recipe(values, "test"), (), seconds, 10, evaluation)


GOOD, BAD = [0] * 30 + [3] * 10, [5] * 30 + [-1] * 10


def made(name: str, *runs: StudiedRun) -> Any:
    found = make_statistics([name], runs)
    return found[0] if found else None


def test_temperatures() -> None:
    runs = (
        run("one", BAD, support="trie"),
        run("two", GOOD, support="trie", temperature=2.0),
        replace(
            run("ats", GOOD, support="trie", temperature="adaptive"),
            log=({"step": 10, "temperature": 1.7}, {"step": 10, "valid": {"NDCG@10": 0.1}}),
        ),
        run("lml", GOOD, support="vocabulary", temperature=3.0),
        run("alpha", GOOD, support="trie", expand_negatives=True),
    )
    found = made("temperature", *runs)
    assert found.table["temperature"].to_list() == [1.0, 2.0, 1.7]
    assert (
        "2 is best" in found.sentence
        and "2 (chosen on these very users) is above temperature 1: NDCG@10 +" in found.sentence
    )
    assert "ends at 1.70" in found.sentence
    assert made("temperature", runs[0], runs[2]) is None, "one fixed temperature is no curve"


def test_betas() -> None:
    runs = (
        run("lml", BAD, support="vocabulary"),
        run("igd", GOOD, support="vocabulary", weight="igd", beta=0.2),
        run("worse", BAD, support="vocabulary", weight="igd", beta=0.5),
    )
    gini = run("gini", GOOD, support="vocabulary", weight="igd-linear", beta=0.4, measure="gini")
    found = made("beta", *runs, gini)
    assert found.table["beta"].to_list() == [1.0, 0.2, 0.5]
    assert found.sentence.startswith(
        "IGD with beta 0.2 (chosen on these very users) is above lml, which weighs all tokens alike: NDCG@10 +"
    )
    elsewhere = made("beta", run("msl", BAD, support="trie"), runs[1])
    assert elsewhere.sentence == (
        "IGD with beta 0.2 reaches NDCG@10 0.858; no run of vocabulary support weighs all tokens alike."
    )
    assert made("beta", runs[0]) is None and made("beta", *runs[1:]) is None


def test_times_seeds_and_the_ablation() -> None:
    lml, msl = run("lml", BAD, 100, support="vocabulary"), run("msl", GOOD, 200, support="trie")
    found = made("accuracy-time", lml, msl)
    assert found.sentence == (
        "The most accurate is msl (NDCG@10 0.858) after 200 s of training; lml trains in 100 s, 2 times as fast, "
        "and has 0.267."
    )
    assert made("accuracy-time", lml) is None
    again = run("msl", [*GOOD[:-1], -1], seed=1, support="trie")
    found = made("seeds", msl, again, lml)
    assert found.table.select("run", "seeds").rows() == [("msl", 2)]
    values = [r.evaluation.metrics["NDCG@10"] for r in (msl, again) if r.evaluation is not None]
    assert found.table["relative_deviation"][0] == pytest.approx(np.std(values, ddof=1) / np.mean(values))
    assert again.evaluation is not None
    alpha = replace(again, evaluation=replace(again.evaluation, metrics={"NDCG@10": 0.5, "alpha": 0.4}))
    assert made("seeds", msl, run("msl", BAD, support="trie")) is None, "one seed twice says nothing of seeds"
    assert made("seeds", msl, alpha) is None, "they differ in how they were ranked"
    found = made("ablation", lml, msl, again)
    assert found.table.select("variant", "run").rows() == [("LML", "lml"), ("MSL", "msl")]
    assert "MSL is above LML: NDCG@10 +0.591" in found.sentence
    assert made("ablation", msl) is None
    assert lml.evaluation is not None
    other = replace(lml, evaluation=replace(lml.evaluation, metrics={"NDCG@10": 0.3, "exclude": "seen"}))
    assert "above" not in made("ablation", other, msl).sentence, "other items were left out"
    assert [times(ratio) for ratio in (0.123, 2.04, 99.4, 99.6, 12345.6)] == [
        "0.12",
        "2",
        "99",
        "100",
        "12,346",
    ]


def test_variants_of_the_loss() -> None:
    kinds: list[tuple[str | None, dict[str, Any]]] = [
        ("LML", {"support": "vocabulary"}),
        ("LML + tau", {"support": "vocabulary", "temperature": 2.0}),
        ("MSL", {"support": "trie"}),
        ("MSL + tau", {"support": "trie", "temperature": 2.0}),
        ("MSL + ATS", {"support": "trie", "temperature": "adaptive"}),
        ("MSL + alpha", {"support": "trie", "expand_negatives": True}),
        (None, {"support": "trie", "weight": "igd"}),
        (None, {"support": "trie", "bear": {"strength": 0.25}}),
        (None, {"support": "vocabulary", "apao": {"strength": 0.1}}),
        (None, {"support": "trie", "soft_targets": "runs/sasrec"}),
        (None, {"support": "vocabulary", "contrast": {"strength": 0.1}}),
    ]
    for expected, objective in kinds:
        assert variant(run("x", GOOD, **objective).recipe) == expected
    lml, bear = run("lml", BAD, support="vocabulary"), run("bear", GOOD, support="trie", bear={"strength": 1})
    assert made("ablation", lml, bear) is None, "what BEAR reaches is not said of MSL"


def test_runs_on_different_rows_are_not_compared() -> None:
    lml, igd = run("lml", BAD, support="vocabulary"), run("igd", GOOD, support="vocabulary", weight="igd")
    assert igd.evaluation is not None
    other = replace(igd, evaluation=replace(igd.evaluation, target=np.ones(40, np.int32)))
    assert "were evaluated on different rows" in made("beta", lml, other).sentence
    assert made("accuracy-time", lml, other) is None
    one, two = run("one", BAD, support="trie"), run("two", GOOD, support="trie", temperature=2.0)
    assert two.evaluation is not None
    apart = replace(two, evaluation=replace(two.evaluation, target=np.ones(40, np.int32)))
    assert made("temperature", one, two) and made("temperature", one, apart) is None


def test_what_is_said_of_tokens_and_logs() -> None:
    log = [
        {
            "step": s,
            "epoch": s / 20,
            "loss_zero_gain": 2.0 / s,
            "loss_positive_gain": 4.0 - s / 10,
            "w": 1 - s / 100,
        }
        for s in (5, 10, 20)
    ]
    studied = replace(run("lml", GOOD, support="vocabulary"), log=log)
    assert made("token-losses", studied).sentence == (
        "In the first epoch of lml the loss of deciding tokens goes from 3.500 to 2.000 nats, that of zero-gain tokens "
        "from 0.400 to 0.100."
    )
    assert "from 0.950 to 0.800 in 20 steps of lml" in made("gradient-weight", studied).sentence
    for name in (
        "prefix-entropy",
        "gain-probability",
        "repetition",
        "alpha",
        "lml-parts",
        "logits",
        "trie-time",
    ):
        assert made(name, studied) is None


def test_the_list_of_places_is_whole() -> None:
    assert list(MADE) == list(PLACES)
    assert spoken(PLACES["token-losses"][1]) == "IGD figures 2, 5 and 7"
    assert spoken(PLACES["beta"][1]) == "IGD table 8; IGD appendix H"


def test_names_stay_text_on_the_page() -> None:
    trie = Trie.from_sequences(QUOTED)
    facts = {"users": 1, "items": 5, "interactions": None, "density": None, "AVT": 1.5, "forced_share": 0.5}
    data = StudiedData("<script>alert(1)</script>", facts, trie, np.array(COUNTS), {"building the trie": 0.1})
    found = make_statistics(["zero-gain", "valid-tokens", "trie-time"], (), (data,))
    page = statistics_section(found)
    assert len(found) == 3 and "<script" not in page and page.count("&lt;script&gt;alert(1)") >= 5
    assert "of the 33 target tokens" in found[0].sentence
