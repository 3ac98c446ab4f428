"""What is said about a data set, and which tokens decided a recommendation.

The catalogue of the hand cases (9 ends a title) and its training counts, as in the method notes:

    root -- 1 -- 2 -- 9        A = item 0, 4 times
         |    `- 3 -- 9        B = item 1, twice
         |         `- 5 -- 9   C = item 2, once
         `- 7 -- 8 -- 9        D = item 3, once
"""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from tests.strategies import weighted_catalogues
from tests.tiny_models import tiny_model
from triewise.arrays import Ragged
from triewise.data import Catalog, Dataset, Split
from triewise.decoding import TrieEngine, rank_catalogue
from triewise.models import load_tokenizer
from triewise.reports import describe, explain, forced_by_position
from triewise.reports.description import FACTS, compared, fact_lines, percent
from triewise.reports.explanation import Recommendation, Token, decoding_tree, pieces, token_texts
from triewise.tokens import Trie, build_prompts, forced_share, information_gain

FOUR = [[1, 2, 9], [1, 3, 9], [1, 3, 5, 9], [7, 8, 9]]
COUNTS = [4, 2, 1, 1]
TITLES = (
    "Star",
    "Star Wars (1977)",
    "千と千尋の神隠し (2001)",
    "千年女優",
    "👩‍🚀 Space 🚀",
    "👩‍🎨 Art",
    "Café Müller",
    "قصة الحب",
    "<b>bold</b> & [bold]",
    "a\nnew line",
    " space first",
    "",
    "ends in \N{REPLACEMENT CHARACTER}",
    "Star Wars (1977)",
)


# --- a data set ---------------------------------------------------------------------------------------------


def test_forced_by_position_by_hand() -> None:
    share, weight = forced_by_position(Trie.from_sequences(FOUR), COUNTS)
    # position 2: only D's "8" has no alternative; position 3: A's and D's ends, not B's end and not C's "5"
    assert share == pytest.approx([0, 1 / 8, 5 / 8, 1])
    assert weight == pytest.approx([8 / 25, 8 / 25, 8 / 25, 1 / 25])
    assert (share * weight).sum() == pytest.approx(7 / 25)


def test_positions_that_no_target_reaches_weigh_nothing() -> None:
    share, weight = forced_by_position(Trie.from_sequences(FOUR), [1, 0, 0, 0])
    assert weight == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert share == pytest.approx([0, 0, 1, 0])


@settings(max_examples=40, deadline=None)
@given(weighted_catalogues())
def test_forced_by_position_sums_to_the_forced_share(case: tuple[list[list[int]], list[int]]) -> None:
    trie = Trie.from_sequences(case[0])
    share, weight = forced_by_position(trie, case[1])
    assert weight.sum() == pytest.approx(1)
    assert (share * weight).sum() == pytest.approx(forced_share(trie, case[1]))


def split(rows: list[tuple[list[int], int]]) -> Split:
    histories, targets = [row[0] for row in rows], [row[1] for row in rows]
    users = np.array([f"u{i}" for i in range(len(rows))], dtype=object)
    return Split(
        users, Ragged.from_lists(histories), np.array(targets, np.int32), np.full(len(rows), -1, np.int64)
    )


@pytest.fixture
def dataset() -> Dataset:
    """Five items, two of them with one title; item 4 is never a training target but is one of the test's."""
    catalog = Catalog.from_titles(list("abcde"), ["ab", "ac", "b", "ab", "bc"])
    train = split([([0], 1), ([0, 1], 2), ([3], 2), ([2], 0)])
    info = {"source": "by hand", "counts": {"users": 2, "interactions": 8}}
    return Dataset(Path("x"), catalog, train, split([([0], 1)]), split([([0, 1], 4), ([2, 3, 0], 1)]), info)


class Letters:
    """A tokenizer of one token per letter, with the terminator 0."""

    eos_token_id, bos_token_id = 0, 9

    class backend_tokenizer:
        to_str = staticmethod(lambda: "{}")

    def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
        ids = [[ord(c) - 96 for c in title] for title in ([text] if isinstance(text, str) else text)]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return ["".join(chr(i + 96) for i in row) for row in rows]


def test_describe_by_hand(dataset: Dataset) -> None:
    prompts = build_prompts(Letters(), dataset.catalog)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    counts = np.bincount(dataset.train.target, minlength=5)  # ab 1, ac 1, b 2
    facts = describe(dataset, prompts, trie, counts)
    # a: b.  c.   b: .  c.   -- the root, a and b have two children each
    expected = {
        "source": "by hand",
        "users": 2,
        "items": 5,
        "interactions": 8,
        "density": 8 / 10,
        "titles": 4,
        "duplicate_titles": 2,
        "shared_titles": 0,
        "unknown_titles": 0,
        "changed_titles": 0,
        "train_rows": 4,
        "valid_rows": 1,
        "test_rows": 2,
        "cold_targets": 1,
        "cold_share": 0.5,
        "nodes": 10,
        "branching": 3,
        "tokens_per_title": (3 + 3 + 2 + 3) / 4,
        "tokens_per_title_p90": 3,
        "tokens_per_title_max": 3,
        "decisions_per_title": 2.0,
        "forced_share": 2 / 10,  # the ends of ab and ac, of 3 + 3 + 2 * 2 target tokens
        "zero_gain_share": 4 / 10,  # and, as bc is no target, the end of b
        "AVT": (2 + 2 + 1 + 2 + 2 + 1 + 2 * (2 + 2)) / 10,
        "prompt_tokens": (1 + 6 + 1 + 8) / 2,
    }
    assert facts == pytest.approx(expected)
    assert list(facts) == list(FACTS)


def test_identifiers_are_compared() -> None:
    tries = {
        "long": Trie.from_sequences([[1, 2, 3, 0], [1, 2, 4, 0], [5, 6, 7, 0], [5, 6, 7, 0]]),
        "short": Trie.from_sequences([[1, 0], [2, 0], [3, 0], [4, 0]]),
    }
    half = np.log(2)
    assert compared(tries, [1, 1, 1, 1]) == pytest.approx(
        {
            "long: tokens an item": 4.0,
            "long: decisions an item": 1.5,
            "long: nats a decision": 1.5 * half / 1.5,
            "long: items that share it": 2,
            "long: decisions of a ranking": 2,
            "long: tokens of a ranking": 3,  # the root, 1 and 2
            "short: tokens an item": 2.0,
            "short: decisions an item": 1.0,
            "short: nats a decision": 2 * half,
            "short: items that share it": 0,
            "short: decisions of a ranking": 1,
            "short: tokens of a ranking": 1,
        }
    )


def test_describe_counts_titles_that_the_tokenizer_makes_equal(dataset: Dataset) -> None:
    class SmallLetters(Letters):
        unk_token_id = 2

        def __call__(self, text: Any, **_: Any) -> dict[str, Any]:
            return super().__call__(text.lower() if isinstance(text, str) else [t.lower() for t in text])

    catalog = Catalog.from_titles(list("abcde"), ["ac", "AC", "b", "ac", "D"])
    prompts = build_prompts(SmallLetters(), catalog)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    facts = describe(dataclasses.replace(dataset, catalog=catalog), prompts, trie, np.ones(5))
    assert [facts[f"{kind}_titles"] for kind in ("duplicate", "shared", "unknown", "changed")] == [2, 2, 1, 2]
    assert all(isinstance(value, str | int | float) for value in facts.values())


def test_describe_leaves_the_prompts_as_they_were(dataset: Dataset) -> None:
    prompts = build_prompts(Letters(), dataset.catalog, max_tokens=4)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    assert describe(dataset, prompts, trie, [1, 1, 1, 1, 1])["prompt_tokens"] == 4  # the last title only
    assert prompts.n_dropped == 0


def test_describe_says_none_where_the_source_does_not_say(dataset: Dataset) -> None:
    dataset.info["counts"].clear()
    dataset = Dataset(Path("x"), dataset.catalog, dataset.train, split([]), split([]), dataset.info)
    prompts = build_prompts(Letters(), dataset.catalog)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    facts = describe(dataset, prompts, trie, [1, 1, 1, 1, 1])
    unknown = {name for name, value in facts.items() if value is None}
    assert unknown == {"users", "interactions", "density", "cold_share", "prompt_tokens"}


def test_fact_lines_are_for_people() -> None:
    lines = dict(
        fact_lines(
            {"users": 1234, "density": 0.0123, "AVT": 54.4, "folder": "a_b", "cold_share": None, "n_x": 0.5}
        )
    )
    assert lines == {
        "users": "1,234",
        "density": "1.23 %",
        "valid next tokens, mean (AVT)": "54.40",
        "folder": "a_b",
        "cold test targets, share": "unknown",
        "n x": "0.5",
    }


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0, "0"),
        (1e-6, "<0.01"),
        (0.0007, "0.07"),
        (0.0123, "1.2"),
        (0.34, "34"),
        (0.9996, "99.9"),
        (1, "100"),
    ],
)
def test_percent(p: float, text: str) -> None:
    assert percent(p) == f"{text}\xa0%"


# --- tokens of a title --------------------------------------------------------------------------------------


def metaspace() -> Any:
    """A sentencepiece-like tokenizer: a space before the first word, no byte level."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TITLES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Byte-level BPE with so few merges that characters are spread over tokens."""
    from triewise.settings import TinyModel

    return load_tokenizer("tiny", titles=TITLES[:2], tiny=TinyModel(vocabulary=262))


@pytest.fixture(scope="module")
def engine(tokenizer: Any) -> TrieEngine:
    catalog = Catalog.from_titles([str(i) for i in range(len(TITLES))], TITLES)
    prompts = build_prompts(tokenizer, catalog)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    return TrieEngine(tiny_model(vocabulary=len(tokenizer)), trie)


@pytest.fixture
def catalog() -> Catalog:
    return Catalog.from_titles([str(i) for i in range(len(TITLES))], TITLES)


@pytest.mark.parametrize("title", TITLES)
def test_texts_of_tokens_concatenate_to_the_title(tokenizer: Any, title: str) -> None:
    ids = tokenizer(title, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(texts) == title
    assert len(texts) == len(ids) + 1 and texts[-1] == ""
    if title.startswith("ends"):  # the title's own U+FFFD stays, nobody else's appears
        title = title[:-1]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(texts)[: len(title)]


def test_a_character_is_shown_by_the_token_that_completes_it(tokenizer: Any) -> None:
    ids = tokenizer("é千", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, [*ids, 0]) == ["", "é", "", "", "千", ""]


def test_texts_of_a_sentencepiece_like_tokenizer() -> None:
    tokenizer = metaspace()
    ids = tokenizer("Star Wars (1977)", add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(texts) == "Star Wars (1977)"
    assert texts[0].startswith("S")


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_explain_agrees_with_the_ranking(
    engine: TrieEngine, tokenizer: Any, catalog: Catalog, support: Any
) -> None:
    engine = TrieEngine(engine.model, engine.trie, support)
    gain = information_gain(engine.trie, np.ones(len(TITLES), np.int64))
    ranking = rank_catalogue(engine, [[1, 5, 6]])
    items = ranking.items[0].tolist()
    found = explain(engine, tokenizer, catalog, [1, 5, 6], items, 13, gain)
    assert [r.title for r in found] == [TITLES[i] for i in items]
    assert [r.score for r in found] == pytest.approx(ranking.scores[0].tolist(), abs=1e-4)
    for r in found:
        assert "".join(token.text for token in r.tokens) == r.title
        assert r.score == pytest.approx(sum(token.log_p for token in r.tokens))
        assert sum(token.gain for token in r.tokens) == pytest.approx(
            sum(gain[node] for node in engine.trie.walk(engine.trie.token[path(engine.trie, r.item)]))
        )
        assert r.is_target == (r.item in (1, 13)), "items of one title are one group"
        forced = [token for token in r.tokens if not token.decides]
        assert support == "vocabulary" or all(token.log_p == 0 for token in forced)
        assert [token.n_valid for token in r.tokens] == [
            len(engine.trie.children(n)[1]) for n in [0, *path(engine.trie, r.item)[:-1]]
        ]


def path(trie: Trie, item: int) -> list[int]:
    nodes = [int(trie.leaf[item])]
    while trie.parent[nodes[0]] > 0:
        nodes.insert(0, int(trie.parent[nodes[0]]))
    return nodes


# --- pieces and trees ---------------------------------------------------------------------------------------


def token(text: str, p: float, n_valid: int, node: int = -1) -> Token:
    return Token(text, math.log(p), n_valid, 0.5, node)


def test_pieces_join_what_has_no_text_of_its_own() -> None:
    tokens = (token("", 0.5, 3), token("", 1, 1), token("é", 0.5, 2, 7), token("a", 1, 1), token("", 0.5, 2))
    first, second, end = pieces(tokens)
    assert (first.text, first.n_valid, first.gain, first.node) == ("é", 3, 1.5, 7)
    assert first.log_p == pytest.approx(math.log(0.25))
    assert second == tokens[3] and not second.decides
    assert end == tokens[4] and end.decides


def test_pieces_keep_the_total(engine: TrieEngine, tokenizer: Any, catalog: Catalog) -> None:
    gain = np.zeros(engine.trie.n_nodes)
    for r in explain(engine, tokenizer, catalog, [1], range(len(TITLES)), 0, gain):
        parts = pieces(r.tokens)
        assert "".join(p.text for p in parts) == r.title
        assert all(p.text for p in parts[:-1]) and parts[-1].text == ""
        assert sum(p.log_p for p in parts) == pytest.approx(r.score)


def title(*tokens: Token) -> Recommendation:
    return Recommendation(0, "", sum(t.log_p for t in tokens), tokens, False)


def test_decoding_tree_by_hand() -> None:
    quote, star = token('"', 1, 1, 1), token("Star", 0.4, 5, 2)
    wars = (token(" Wars", 0.75, 2, 3), token("!", 1, 1, 4), token("", 1, 1, 5))
    trek = (token(" Trek", 0.25, 2, 6), token("", 1, 1, 7))
    heat = (token("Heat", 0.1, 5, 8), token("", 0.5, 2, 9))
    root = decoding_tree([title(quote, star, *wars), title(quote, *heat), title(quote, star, *trek)])
    assert (root.text, root.forced, root.n_valid, root.rank) == ("", '"', 5, -1)
    assert root.rest == pytest.approx(0.5)
    first, second = root.children
    assert (first.text, first.forced, first.n_valid, first.rest) == ("Star", "", 2, pytest.approx(0))
    assert [(c.text, c.forced, c.rank) for c in first.children] == [(" Wars", "!", 0), (" Trek", "", 2)]
    assert [math.exp(c.log_p) for c in first.children] == pytest.approx([0.75, 0.25])
    assert (second.text, second.n_valid, second.rest) == ("Heat", 2, pytest.approx(0.5))
    assert [(c.text, c.rank, c.n_valid, c.children) for c in second.children] == [("", 1, 0, ())]


def test_decoding_tree_keeps_the_mass_of_forced_tokens_apart() -> None:
    root = decoding_tree([title(token("a", 0.5, 2, 1), token("b", 0.9, 1, 2), token("", 0.5, 1, 3))])
    (only,) = root.children
    assert math.exp(only.log_p) == pytest.approx(0.5)
    assert math.exp(only.forced_log_p) == pytest.approx(0.45)


def test_a_catalogue_of_one_title_is_one_forced_run() -> None:
    root = decoding_tree([title(token("a", 1, 1, 1), token("b", 1, 1, 2), token("", 1, 1, 3))])
    assert (root.forced, root.rank, root.children) == ("ab", 0, ())


@settings(max_examples=40, deadline=None)
@given(weighted_catalogues(), st.integers(0, 2**32 - 1))
def test_decoding_tree_holds_every_title_and_all_mass(
    case: tuple[list[list[int]], list[int]], seed: int
) -> None:
    trie = Trie.from_sequences(case[0])
    p_I = np.random.default_rng(seed).random(trie.n_items) + 0.01
    mass_N = trie.subtree_sum(p_I)
    found = []
    for item, sequence in enumerate(case[0]):
        nodes = trie.walk(sequence)
        tokens = [
            Token(
                str(trie.token[n]),
                math.log(mass_N[n] / mass_N[up]),
                len(trie.children(int(up))[1]),
                0.0,
                int(n),
            )
            for up, n in pairwise(nodes)
        ]
        if trie.leaf[item] not in trie.leaf[:item]:
            found.append(title(*tokens))
    leaves: dict[int, float] = {}

    def visit(branch: Any, log_p: float) -> None:
        log_p += branch.log_p + branch.forced_log_p
        assert branch.rest == pytest.approx(0, abs=1e-6), "every child is drawn"
        if branch.rank >= 0:
            leaves[branch.rank] = log_p
        for child in branch.children:
            visit(child, log_p)

    visit(decoding_tree(found), 0.0)
    assert [leaves[rank] for rank in range(len(found))] == pytest.approx([r.score for r in found])
