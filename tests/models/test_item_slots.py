"""Ids beyond the vocabulary that stand for items and users: everything else must go on as if they were words."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import triewise
from tests.sealing import sealed_again
from tests.slot_worlds import KINDS, recommender, with_slots
from tests.tiny_models import tiny_model
from tests.worlds import HISTORIES, TITLES, backbone, catalog, split
from triewise.decoding import beam_search, exact_search, rank_catalogue
from triewise.errors import UserError
from triewise.models import (
    Histories,
    ItemSlots,
    SequentialModel,
    attach,
    load_backbone,
    max_positions,
    slots_of,
)
from triewise.models.adapters import add_lora
from triewise.recommenders import GenerativeRecommender
from triewise.settings import EncoderSettings, LoraSettings
from triewise.tokens import build_prompts, zero_gain
from triewise.training import Examples, Objective, make_windows
from triewise.training.objective import MicroBatches, TitleLoss

TIGHT = {"rtol": 0, "atol": 1e-4}


def one_forward_a_title(made: GenerativeRecommender, history: list[int]) -> np.ndarray[Any, Any]:
    """(I,) log-probability of each title among valid tokens: the definition, without cache, packing or search."""
    prompt, trie = made.prompts.encode(history), made.trie
    found = np.zeros(made.catalog.n_items)
    with torch.no_grad():
        for item in range(made.catalog.n_items):
            title = made.prompts.title_tokens[item].tolist()
            logits = made.backbone.model(input_ids=torch.tensor([prompt + title])).logits[0].double()
            for t, node in enumerate(trie.walk(title)[:-1]):
                tokens, _ = trie.children(node)
                row = logits[len(prompt) + t - 1]
                found[item] += float(
                    row[title[t]] - row[torch.tensor(np.asarray(tokens, np.int64))].logsumexp(0)
                )
    return found


def test_an_id_is_a_word_an_item_a_placeholder_or_a_user() -> None:
    made = backbone()
    words = made.model.get_input_embeddings()
    slots = with_slots(made, "a-llmrec")
    v, n = words.num_embeddings, len(TITLES)
    user = slots.ids.user([3, 1])
    ids = torch.tensor([[5, v + 2, *user, v + n]])
    got = made.model.get_input_embeddings()(ids)[0]
    encoder = slots.ids.histories.encoder  # type: ignore[union-attr]
    state = encoder(torch.tensor([[4, 2]]))[:, -1]
    expected = [words(ids[0, :1]), slots.item(slots.table[2:3]), slots.user(state), slots.nothing[None]]  # type: ignore[misc]
    torch.testing.assert_close(got, torch.cat(expected))
    assert slots.n_ids > user[0] > v + n and slots.num_embeddings == v and slots.weight is words.weight
    assert slots.ids.histories.states([slots.ids.histories.number([])], ids.device).abs().sum() == 0  # type: ignore[union-attr]


def test_words_alone_are_embedded_as_before_and_projections_are_left_alone() -> None:
    made = backbone()
    plain = made.model.get_input_embeddings()
    slots = with_slots(made, "llara")
    ids = torch.tensor([[1, 2, 3], [4, slots.ids.placeholder, 5]])
    assert torch.equal(slots(ids[:1]), plain(ids[:1]))
    slots(ids).sum().backward()
    assert all(
        p.grad is None for p in slots.item.parameters()
    )  # a batch of text leaves no gradient, not even 0
    slots(torch.tensor([[slots.ids.item(0)]])).sum().backward()
    assert all(p.grad is not None for p in slots.item.parameters())


def test_numbers_of_histories_are_the_same_everywhere_and_old_ones_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = (Histories(SequentialModel(EncoderSettings(encoder="gru4rec"), 9, 5)) for _ in range(2))
    assert first.number([1, 2]) == second.number(np.array([1, 2], dtype=np.int32)) != first.number([2, 1])
    assert copy.deepcopy(first) is first
    monkeypatch.setattr("triewise.models.item_slots.REMEMBERED", 2)
    kept = first.number([7], keep=True)
    numbers = [first.number([i]) for i in range(4)]
    first.states([kept, *numbers[2:]], torch.device("cpu"))
    with pytest.raises(UserError, match="the slot of an unknown user"):
        first.states(numbers[:1], torch.device("cpu"))
    assert first.number([2]) == numbers[2]  # again, so it is newer than the last one
    first.states([first.number([8]), numbers[2]], torch.device("cpu"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["plain", "msl", "d3"])
def test_a_slot_stands_behind_each_title(kind: str, template: str) -> None:
    made = recommender(kind, template)
    slots, history = made.prompts.slots, [0, 6, 2]
    assert slots is not None
    ids = made.prompts.encode(history)
    at = [n for n, i in enumerate(ids) if i >= slots.first]
    users = [] if kind == "llara" else slots.user(history)
    assert [ids[n] for n in at] == [*users, *(slots.item(i) for i in history)]
    assert at[: len(users)] == [0] * len(users)
    titles = [made.backbone.tokenizer.decode(ids[a + 1 : b]) for a, b in zip([-1, *at], at, strict=False)]
    for i, text in zip(history, titles[-3:], strict=True):
        assert TITLES[i] in text
    if template != "plain":
        whole = "".join(
            made.backbone.tokenizer.decode(ids[a + 1 : b])
            for a, b in zip([-1, *at], [*at, len(ids)], strict=True)
        )
        plain = build_prompts(made.backbone.tokenizer, catalog(), template, max_history=5)
        assert whole.removeprefix(" is a user representation. ") == made.backbone.tokenizer.decode(
            plain.encode(history)
        )
        assert len(made.prompts.encode([])) >= 1
    assert (
        made.prompts.hash != build_prompts(made.backbone.tokenizer, catalog(), template, max_history=5).hash
    )


def test_dropped_titles_take_their_slots_along() -> None:
    made = recommender("a-llmrec")
    ids = made.prompts.encode([0, 1, 2])
    short = replace(made.prompts, max_tokens=len(ids) - 1)
    kept = [i for i in short.encode([0, 1, 2]) if i >= made.prompts.slots.first]  # type: ignore[union-attr]
    assert kept == [ids[0], *(made.prompts.slots.item(i) for i in (1, 2))]  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_every_search_equals_one_forward_a_title(kind: str) -> None:
    made = recommender(kind)
    prompts = [made.prompts.encode(history) for history in HISTORIES]
    expected = np.array([one_forward_a_title(made, history) for history in HISTORIES])
    assert made.engine.tree_cache_works and made.engine.fits_tree(prompts)
    n = made.groups.n_groups
    for ranking in (
        rank_catalogue(made.engine, prompts),
        exact_search(made.engine, prompts, n),
        beam_search(made.engine, prompts, n, 4 * n),
    ):
        np.testing.assert_allclose(ranking.scores, np.take_along_axis(expected, ranking.items, 1), **TIGHT)
    filtered = exact_search(made.engine, prompts, 3, exclude=HISTORIES)
    for b, items in enumerate(filtered.items):
        assert not set(items.tolist()) & set(HISTORIES[b])


@pytest.mark.parametrize("kind", KINDS)
def test_shuffled_slots_change_what_is_recommended(kind: str) -> None:
    made = recommender(kind)
    before = made.recommend([[0, 1, 2]], None).scores
    slots = slots_of(made.backbone.model)
    assert slots is not None
    slots.table.copy_(slots.table.flip(0))
    assert np.abs(made.recommend([[0, 1, 2]], None).scores - before).max() > 1e-2


def examples_of(made: GenerativeRecommender) -> Examples:
    rows = split([[0, 1], [0, 1, 2], [0, 1, 2, 5], [7, 0]], [2, 5, 6, 8])
    counts = np.ones(len(TITLES), dtype=np.int64)
    return Examples(make_windows(rows, "last"), made.prompts, made.trie, None, zero_gain(made.trie, counts))


@pytest.mark.parametrize("template", ["plain", "msl"])
@pytest.mark.parametrize("support", ["trie", "vocabulary"])
def test_packed_rows_give_the_loss_and_gradients_of_the_rows(support: str, template: str) -> None:
    made = recommender("llara", template)
    examples, objective = examples_of(made), Objective(support)
    model = made.backbone.model.train()
    found = []
    for packing in (False, True):
        batch = MicroBatches(examples, objective, np.arange(4)[None], packing)[0]
        assert ("subtree_end" in batch) == packing
        del batch["counts"], batch["contribution"]
        model.zero_grad()
        loss = TitleLoss(model, objective, examples.trie)(**batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for plain, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-3, atol=1e-4)


def several_targets(made: GenerativeRecommender) -> Examples:
    windows = make_windows(split([[0, 1], [2], [5, 6, 7]], [2, 5, 0]), "every")
    windows.n_context[:] = [1, 1, 2]
    return Examples(windows, made.prompts, made.trie, None, np.zeros(made.trie.n_nodes, dtype=bool))


def test_each_of_several_targets_has_its_slot_behind_it() -> None:
    """A row is the prompt of all its items, without the slot of the last."""
    made = recommender("llara")
    examples = several_targets(made)
    batch = examples.batch([0, 1, 2])
    n_tokens = 0
    for row, items in zip(batch.input_ids, examples.windows.items, strict=True):
        expected = made.prompts.encode(items.tolist())[:-1]
        assert row[: len(expected)].tolist() == expected and not row[len(expected) :].any()
        n_tokens += len(expected)
    assert batch.n_tokens == n_tokens
    assert (batch.input_ids.ravel()[batch.position + 1] == batch.target).all()
    length = examples.prompts.title_tokens.lengths
    assert len(batch.target) == length[[1, 2, 5, 7, 0]].sum()


def test_a_user_with_several_histories_is_refused() -> None:
    with pytest.raises(UserError, match="a user's slot knows one"):
        several_targets(recommender("a-llmrec"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [False, True])
def test_saved_and_loaded_and_merged_they_rank_alike(kind: str, lora: bool, tmp_path: Path) -> None:
    made = recommender(kind)
    if lora:
        model = made.backbone.model
        slots = slots_of(model)
        assert slots is not None
        model.set_input_embeddings(slots.words)
        adapted = add_lora(model, LoraSettings(rank=2), 0)
        attach(adapted, slots)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_()
        made = replace(made, backbone=replace(made.backbone, model=adapted.eval()))
    before = made.recommend(HISTORIES, None)
    made.save_pretrained(tmp_path)
    assert slots_of(made.backbone.model) is not None  # saving takes them off for a moment only
    loaded = triewise.load(tmp_path)
    after = loaded.recommend(HISTORIES, None)
    np.testing.assert_array_equal(after.items, before.items)
    np.testing.assert_allclose(after.scores, before.scores, **TIGHT)
    if lora:
        merged = made.merged().recommend(HISTORIES, None)
        np.testing.assert_allclose(merged.scores, before.scores, **TIGHT)
    # The language model alone is an ordinary checkpoint.
    kept = [*(tmp_path / "model").rglob("model.safetensors")]
    assert not any(".words." in name or ".item." in name for name in load_file(kept[0]))


def test_damaged_slots_and_other_catalogues_are_refused(tmp_path: Path) -> None:
    made = recommender("llara")
    made.save_pretrained(tmp_path)
    other = catalog((*TITLES[:-1], "another"))
    with pytest.raises(UserError, match="wanted item vectors of this catalogue"):
        replace(made, catalog=other)
    file = tmp_path / "model" / "item_slots.safetensors"
    tensors = load_file(file)
    for damage in (lambda t: t.pop("item.0.bias"), lambda t: t.update({"item.0.bias": torch.zeros(3)})):
        damaged = dict(tensors)
        damage(damaged)
        save_file(damaged, file)
        with pytest.raises(UserError, match="the item slots in .* do not fit their model"):
            load_backbone(str(tmp_path / "model"))
    save_file(tensors, file)
    config = tmp_path / "model" / "item_slots.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"catalog": "0" * 64}))
    sealed_again(tmp_path)
    with pytest.raises(UserError, match="wanted item vectors of this catalogue"):
        triewise.load(tmp_path)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "llama", "gemma2", "gemma3"])
def test_other_families_read_slots(kind: str) -> None:
    model = tiny_model(kind)
    plain = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    positions = max_positions(model)
    slots = ItemSlots(model.get_input_embeddings(), "llara", torch.randn(4, 6), "")
    attach(model, slots)
    assert max_positions(model) == positions
    assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, plain)
    with_item = model(input_ids=torch.tensor([[1, slots.ids.item(2), 3]])).logits
    assert (with_item[:, 0] - plain[:, 0]).abs().max() < 1e-4 < (with_item[:, 2] - plain[:, 2]).abs().max()


def test_a_model_that_looks_at_ids_elsewhere_is_refused() -> None:
    model = tiny_model("qwen2")
    words = model.get_input_embeddings()
    per_layer = nn.Embedding(30, 32)
    model.model.register_forward_pre_hook(
        lambda m, a, k: per_layer(k["input_ids"]) and None, with_kwargs=True
    )
    with pytest.raises(UserError, match="which fails on item slots"):
        attach(model, ItemSlots(words, "llara", torch.randn(4, 6), ""))
    assert model.get_input_embeddings() is words


def test_ids_beyond_the_slots_are_refused() -> None:
    made = recommender("llara")
    slots = made.prompts.slots
    assert slots is not None
    with pytest.raises(UserError, match="wanted prompt tokens in"):
        rank_catalogue(made.engine, [[1, slots.placeholder + 1]])


@pytest.mark.parametrize("kind", KINDS)
def test_explanations_and_free_text_know_slots_too(kind: str) -> None:
    made = recommender(kind)
    told = made.explain([0, 1], [2, 3], target=6)
    assert [one.item for one in told][:2] == [2, 3]
    near = made.with_settings(search="grounding", text_tokens=4).recommend([[0, 1]], 3)
    assert near.items.shape == (1, 3)


@pytest.mark.parametrize("quantisation", ["8bit", "4bit"])
def test_slots_over_a_quantised_base(quantisation: str, tmp_path: Path) -> None:
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed (pip install 'triewise[quant]')"
    )
    made = recommender("llara")
    made.backbone.save(tmp_path / "base")
    how = {"device": "cpu", "dtype": "float32", "quantisation": quantisation}
    base = load_backbone(str(tmp_path / "base"), lora=LoraSettings(rank=2), **how)
    slots = slots_of(base.model)
    assert slots is not None and base.quantised and base.adapted
    words = replace(made, backbone=base)
    before = words.recommend(HISTORIES, None)
    words.save_pretrained(tmp_path / "saved")
    after = triewise.load(tmp_path / "saved", device="cpu", dtype="float32").recommend(HISTORIES, None)
    np.testing.assert_allclose(after.scores, before.scores, **TIGHT)
    if quantisation == "4bit":  # the layers of 8bit round their inputs, a merged one does not
        merged = words.merged().recommend(HISTORIES, None)
        np.testing.assert_allclose(merged.scores, before.scores, **TIGHT)
