"""Codes of items: what quantisation promises, files as MiniOneRec and LETTER publish them, and prompts with codes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import worlds
from tests.conftest import shared
from triewise.data import Catalog
from triewise.errors import UserError
from triewise.models import add_tokens
from triewise.tokens import (
    Identifier,
    Prompts,
    Trie,
    build_prompts,
    read_identifier,
    residual_codes,
    told_apart,
)
from triewise.tokens.identifiers import default_levels, k_means

RNG = np.random.default_rng


def clouds(n_items: int = 60, n_clouds: int = 4, width: int = 5, seed: int = 0) -> tuple[Any, Any]:
    """Points around far centres, and which centre each is of."""
    rng = RNG(seed)
    cloud = rng.integers(0, n_clouds, n_items)
    return 100 * rng.normal(size=(n_clouds, width))[cloud] + rng.normal(size=(n_items, width)), cloud


def trie_of(identifier: Identifier) -> Trie:
    return Trie.from_sequences(identifier.sequences)


def test_k_means_finds_clouds_and_gives_the_nearest_centre() -> None:
    points, cloud = clouds()
    centre, code = k_means(points, 4, RNG(1))
    assert len({(c, k) for c, k in zip(cloud, code, strict=True)}) == 4
    distance = ((points[:, None] - centre) ** 2).sum(2)
    np.testing.assert_array_equal(distance.argmin(1), code)
    for k in range(4):
        np.testing.assert_allclose(centre[k], points[code == k].mean(0))


def test_points_that_weigh_more_get_more_of_the_codes() -> None:
    """Centres are weighted means, and what is minimised is the weighted sum of squared distances."""
    points = RNG(0).normal(size=(200, 3))
    weight = np.where(np.arange(200) < 20, 50.0, 1.0)
    left = {}
    for name, given in (("weighted", weight), ("alike", None)):
        centre, code = k_means(points, 8, RNG(1), given)
        left[name] = (weight * ((points - centre[code]) ** 2).sum(1)).sum()
        for k in np.unique(code):
            by = np.ones(200) if given is None else given
            np.testing.assert_allclose(
                centre[k], np.average(points[code == k], axis=0, weights=by[code == k])
            )
    assert left["weighted"] < 0.8 * left["alike"]


def test_codes_are_of_directions_and_finer_where_items_are_met() -> None:
    vectors, _ = clouds(80)
    plain = residual_codes(vectors, np.arange(80), (6, 4), False, 0)
    assert residual_codes(3 * vectors + 7, np.arange(80), (6, 4), False, 0) == plain
    met = np.where(np.arange(80) < 12, 1000, 0)
    told = residual_codes(vectors, np.arange(80), (6, 4), False, 0, met)
    assert len(set(told.codes[:12])) > len(set(plain.codes[:12]))
    assert residual_codes(np.ones((5, 2)), np.arange(5), (2,), False, 0).collisions > 0


@pytest.mark.parametrize("n_points", [1, 3, 7])
def test_fewer_or_equal_points_than_codes(n_points: int) -> None:
    assert sorted(k_means(np.eye(7)[:n_points], 5, RNG(0))[1].tolist())[-1] == min(n_points, 5) - 1
    assert set(k_means(np.zeros((n_points, 2)), 5, RNG(0))[1].tolist()) <= set(range(5))


def test_every_title_is_reached_once_and_equal_titles_share_their_codes() -> None:
    vectors, _ = clouds(80)
    group = np.arange(80)
    group[[7, 9]] = 3
    made = residual_codes(vectors, group, (4, 3), False, 0)
    assert {len(codes) for codes in made.codes} == {2}
    assert made.codes[7] == made.codes[9] == made.codes[3]
    assert made.collisions == 80  # twelve codes
    whole = told_apart(made, group, np.zeros(80, int))
    assert {len(codes) for codes in whole.codes} == {3}
    assert all(long[:2] == short for long, short in zip(whole.codes, made.codes, strict=True))
    trie = trie_of(whole)
    assert trie.n_groups == 78
    np.testing.assert_array_equal(
        np.unique(trie.leaf, return_inverse=True)[1] == 0, trie.leaf == trie.leaf.min()
    )
    assert len({tuple(np.flatnonzero(trie.leaf == leaf)) for leaf in trie.leaf}) == 78
    assert told_apart(whole, group, np.zeros(80, int)) is whole


def test_of_equal_codes_the_most_trained_title_comes_first() -> None:
    same = Identifier((("<a_0>",), ("<a_0>",), ("<a_1>",), ("<a_0>",)))
    told = told_apart(same, np.array([0, 1, 2, 0]), np.array([1, 5, 9, 2]))
    assert [codes[-1] for codes in told.codes] == ["<b_1>", "<b_0>", "<b_0>", "<b_1>"]


def test_codes_depend_on_the_seed_alone() -> None:
    vectors, _ = clouds(50)
    made = [residual_codes(vectors, np.arange(50), None, False, seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
    assert default_levels(50) == (8, 8)


def test_files_are_read_back(tmp_path: Path) -> None:
    catalog = worlds.catalog()
    vectors, _ = clouds(catalog.n_items)
    made = residual_codes(vectors, catalog.group, (2, 2), True, 0)
    made.save(tmp_path / "identifier.json", catalog.item_id)
    assert read_identifier(tmp_path / "identifier.json", catalog, True) == made
    packed = tmp_path / "x.index.json.gz"
    packed.write_bytes(gzip.compress((tmp_path / "identifier.json").read_bytes()))
    assert read_identifier(packed, catalog) == Identifier(made.codes)


def test_level_numbers_become_names_and_every_item_has_codes(tmp_path: Path) -> None:
    file, catalog = tmp_path / "index.json", worlds.catalog()
    file.write_text(json.dumps({f"raw-{i}": [i, 0] for i in range(9)}))
    assert read_identifier(file, catalog).codes[7] == ("<a_7>", "<b_0>")
    file.write_text('{"raw-0": ["<a_1>"]}')
    with pytest.raises(
        UserError, match=r"wanted codes for every item .* got none for 'raw-1' \(8 of 9 items\)"
    ):
        read_identifier(file, catalog)


@pytest.mark.parametrize(
    ("file", "n_items", "wanted"),
    [
        (
            "minionerec_office/index.json",
            3459,
            "Trie(3444 titles of 3459 items, 9465 nodes, 670 branching, depth 4)",
        ),
        ("letter_instruments/Instruments.index.json.gz", 9922, "Trie(9897 titles of 9922 items, "),
    ],
)
def test_published_codes(file: str, n_items: int, wanted: str) -> None:
    path = shared(Path(file).parent.name) / Path(file).name
    ids = [str(item) for item in range(n_items)]
    made = read_identifier(path, Catalog.from_titles(ids, ids))
    assert repr(trie_of(made)).startswith(wanted)
    assert made.collisions == {3459: 30, 9922: 48}[n_items]
    assert trie_of(told_apart(made, np.arange(n_items), np.zeros(n_items, int))).n_groups == n_items


# ---------------------------------------------------------------- prompts
def prompts_of(template: str, titled: bool, max_tokens: int = 1024) -> Prompts:
    catalog, tokenizer = worlds.catalog(), worlds.backbone().tokenizer
    made = residual_codes(clouds(catalog.n_items)[0], catalog.group, (2, 2), titled, 0)
    made = told_apart(made, catalog.group, np.zeros(catalog.n_items, int))
    add_tokens(worlds.backbone().model, tokenizer, made.names, [np.array([5])] * len(made.names))
    return build_prompts(tokenizer, catalog, template, max_tokens=max_tokens, identifier=made)


@pytest.mark.parametrize("template", ["plain", "msl", "d3"])
@pytest.mark.parametrize("titled", [False, True])
def test_histories_are_written_as_items_are(template: str, titled: bool) -> None:
    """Codes, between texts that are as they were; titles that spell a code stay text."""
    prompts, plain = (
        prompts_of(template, titled),
        build_prompts(worlds.backbone().tokenizer, worlds.catalog(), template),
    )
    read = prompts.tokenizer
    for item, row in enumerate(prompts.title_tokens):
        codes = [*read.convert_tokens_to_ids(list(prompts.identifier.codes[item]))]  # type: ignore[union-attr]
        assert row.tolist() == [
            *codes,
            *(plain.title_tokens[item].tolist() if titled else [read.eos_token_id]),
        ]
    history = [3, 0, 6]
    ids = prompts.encode(history)
    written = read.decode(ids, clean_up_tokenization_spaces=False)
    shown = read.decode([i for i in ids if i < len(plain.tokenizer)], clean_up_tokenization_spaces=False)
    if titled:
        assert shown == read.decode(plain.encode(history), clean_up_tokenization_spaces=False)
    else:
        assert "Alien" not in written
    assert prompts.encode([])[: len(prompts.bos)] == list(prompts.bos)
    assert (template == "plain") or prompts.encode([]) == plain.encode([])
    assert prompts.hash != plain.hash


def test_a_title_that_spells_a_code_is_text() -> None:
    prompts = prompts_of("msl", True)
    code = prompts.tokenizer.convert_tokens_to_ids("<a_0>")
    assert code not in prompts.encode_texts(["I am <a_0>"])[0]
    assert prompts.tokenizer.decode(prompts.encode_texts(["I am <a_0>"])[0]) == "I am <a_0>"


def test_long_prompts_lose_whole_items() -> None:
    prompts = prompts_of("plain", False, max_tokens=11)
    assert len(prompts.encode([0, 1, 2, 5])) <= 11
    assert prompts.n_dropped >= 1
    assert not list(prompts.readback.warnings())
