"""Beam search against `transformers.generate` on real catalogues.

Fast tier: a two-layer model with random weights, 24 users, every combination of support, length penalty and beams in
turn. Slow tier: the 135M model, a user for each combination (`generate` takes up to two minutes for one). Where
the margin between a kept and a dropped score is below the tolerance, rounding may decide; such users are counted,
and there may be few.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import shared
from tests.reference import beam as reference
from tests.reference.trie import DictTrie
from triewise.cache import cache_folder
from triewise.data import Dataset, prepare
from triewise.decoding import TrieEngine, beam_search
from triewise.models import Backbone, load_backbone
from triewise.tokens import Trie, build_prompts

COMBINATIONS = list(itertools.product(("trie", "vocabulary"), (0.0, 1.0), (5, 10)))
pytestmark = pytest.mark.parity


def real(name: str, folder: Path) -> Dataset:
    """ml-100k from the cache, or a shared folder; a skip that says why where it is absent."""
    if name == "ml-100k":
        if not (cache_folder() / "ml-100k").is_dir():
            pytest.skip("ml-100k is not in the cache; run triewise prepare ml-100k --out DIR once")
        return prepare(name, folder, max_history=10)
    return prepare(f"msl:{shared(name)}", folder, max_history=10)


def compare(
    dataset: Dataset, backbone: Backbone, template: str, n_users: int, tolerance: float, on_sums: bool
) -> int:
    """Assert that users get the same items and scores (or sums: scores without the length penalty).

    Returns:
        The number of users excused by their margin.
    """
    tokenizer, model = backbone.tokenizer, backbone.model
    prompts = build_prompts(tokenizer, dataset.catalog, template, dataset.info["noun"], dataset.info["verb"])
    titles = [ids.tolist() for ids in prompts.title_tokens]
    slow, trie = DictTrie(titles), Trie.from_sequences(titles)
    rows = np.linspace(0, dataset.test.n_rows - 1, n_users).astype(int)
    texts = [prompts.encode(dataset.test.history[r]) for r in rows]
    excused = 0
    for c, (support, length_penalty, beams) in enumerate(COMBINATIONS):
        users = list(range(c, n_users, len(COMBINATIONS)))
        engine = TrieEngine(model, trie, support)  # type: ignore[arg-type]
        ranking = beam_search(engine, [texts[b] for b in users], beams, beams, length_penalty)
        for place, b in enumerate(users):
            wanted = reference.generate(
                model, texts[b], slow, beams, length_penalty, support, int(tokenizer.eos_token_id)
            )
            items = ranking.items[place].tolist()
            found = {tuple(titles[i]): float(s) for i, s in zip(items, ranking.scores[place], strict=True)}
            assert len(wanted) == len(found) == beams
            if set(found) != set(wanted):
                log_p = reference.model_log_p(model, texts[b], slow, support)
                _, margin = reference.beam(log_p, slow, beams, length_penalty)
                assert margin <= tolerance, (
                    f"user {b}: other titles, though no score was closer than {margin:.2g}"
                )
                excused += 1
                continue
            for title, score in found.items():
                factor = len(title) ** length_penalty if on_sums else 1.0
                # A random model spends a thousand nats on a long title: there float32 has no fourth decimal.
                assert score * factor == pytest.approx(wanted[title] * factor, abs=tolerance, rel=1e-6)
    return excused


@pytest.mark.parametrize("name", ["ml-100k", "amazon_office"])
def test_two_layers(name: str, tmp_path: Path) -> None:
    dataset = real(name, tmp_path / "data")
    backbone = load_backbone("tiny", titles=dataset.catalog.title, device="cpu")
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    assert compare(dataset, backbone, "plain", 24, 1e-4, on_sums=False) <= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["ml-100k", "amazon_office"])
def test_smollm2(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    if not (cache_folder() / "models" / "smollm2-135m-q4").is_dir():
        pytest.skip(
            "smollm2-135m-q4 is not in the cache; run triewise describe DIR --tokenizer smollm2-135m-q4 once"
        )
    dataset = real(name, tmp_path / "data")
    backbone: Any = load_backbone("smollm2-135m-q4", device="cpu", dtype="float32")
    assert compare(dataset, backbone, "msl", 8, 1e-3, on_sums=True) <= 1
