"""Instruction templates with every title as a target: one forward a user, and no position knows what comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import worlds
from triewise import load
from triewise.app import evaluate_run, train_run
from triewise.app.assemble import assemble
from triewise.app.folders import open_data
from triewise.errors import UserError
from triewise.models import SlotIds
from triewise.recipe import load_recipe
from triewise.recommenders import GenerativeRecommender
from triewise.tokens import Prompts, Trie, build_prompts, zero_gain
from triewise.training import Examples, Objective, make_windows, target_counts
from triewise.training.objective import MicroBatches, TitleLoss
from triewise.training.windows import Windows

TEMPLATES = ("msl", "d3", "plain")
ITEMS = [5, 0, 3, 7, 1]


def world(template: str) -> tuple[Any, Prompts, Trie]:
    made = worlds.recommender()
    prompts = build_prompts(
        made.backbone.tokenizer, worlds.catalog(), template, "films", "seen", growing=True
    )
    return (
        made.backbone.model,
        prompts,
        Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets)),
    )


def examples(prompts: Prompts, trie: Trie, windows: Windows) -> Examples:
    return Examples(windows, prompts, trie, None, zero_gain(trie, target_counts(windows, len(worlds.TITLES))))


def windows_of(items: list[int], several: bool) -> Windows:
    """One window with all but the first title as targets, or one a target with its history."""
    if several:
        made = make_windows(worlds.split([items[:-1]], [items[-1]]), "last")
        return Windows(made.items, np.array([1], dtype=np.int32))
    histories = [items[:k] for k in range(1, len(items))]
    return make_windows(worlds.split(histories, items[1:]), "last")


@torch.no_grad()
def nll(model: Any, given: Examples) -> Tensor:
    """Of every target token, in the order of the windows."""
    rows = np.arange(len(given.windows))[None]
    objective = Objective("vocabulary")
    batch = MicroBatches(given, objective, rows)[0]
    loss = TitleLoss(model, objective, given.trie)
    found: Tensor = loss.losses(batch, loss.score(batch))[1]
    return found


@pytest.mark.parametrize("template", TEMPLATES)
def test_one_forward_gives_the_loss_of_one_row_a_target(template: str) -> None:
    model, prompts, trie = world(template)
    together = nll(model, examples(prompts, trie, windows_of(ITEMS, several=True)))
    apart = nll(model, examples(prompts, trie, windows_of(ITEMS, several=False)))
    assert len(together) == sum(len(prompts.title_tokens[i]) for i in ITEMS[1:])
    assert torch.allclose(together, apart, atol=2e-5)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_of_a_history_is_the_beginning_of_the_row(template: str) -> None:
    _, prompts, trie = world(template)
    [row] = examples(prompts, trie, windows_of(ITEMS, several=True)).batch([0]).input_ids.tolist()
    for k in range(len(ITEMS)):
        prompt = prompts.encode(ITEMS[:k])
        assert row[: len(prompt)] == prompt
        if k:
            assert (
                row[len(prompt) :][: len(prompts.title_tokens[ITEMS[k]])]
                == prompts.title_tokens[ITEMS[k]].tolist()
            )
    text = prompts.tokenizer.decode(list(prompts.head))
    assert ("films" in text) == (template != "plain") and "### Response" not in text


def test_no_position_knows_its_own_target_or_a_later_one() -> None:
    """Another title at place j changes nothing of what is predicted up to and with its first token."""
    model, prompts, trie = world("msl")
    before = nll(model, examples(prompts, trie, windows_of(ITEMS, several=True)))
    place = 0
    for j in range(1, len(ITEMS)):
        other = [*ITEMS[:j], 8, *ITEMS[j + 1 :]]
        after = nll(model, examples(prompts, trie, windows_of(other, several=True)))
        assert torch.allclose(before[:place], after[:place], atol=2e-5)
        place += len(prompts.title_tokens[ITEMS[j]])
    assert not torch.allclose(before[-3:], after[-3:], atol=1e-2)


def test_too_long_rows_lose_their_oldest_titles_as_prompts_do() -> None:
    tokenizer = worlds.backbone().tokenizer
    short = build_prompts(tokenizer, worlds.catalog(), "msl", growing=True)
    room = len(short.head) + sum(len(short.title_tokens[i]) for i in ITEMS[2:4])
    prompts = build_prompts(tokenizer, worlds.catalog(), "msl", growing=True, max_tokens=room)
    split = worlds.split([ITEMS[:k] for k in range(1, 5)], ITEMS[1:])
    split.user_id[:] = "u"
    windows = make_windows(split, "every", prompts)
    assert windows.items[len(windows) - 1].tolist() == ITEMS[2:]
    assert prompts.encode(ITEMS[:-1]) == [
        *prompts.head,
        *(int(t) for i in ITEMS[2:4] for t in prompts.title_tokens[i]),
    ]


def test_what_a_growing_prompt_cannot_be() -> None:
    tokenizer, catalog = worlds.backbone().tokenizer, worlds.catalog()
    prompts = build_prompts(tokenizer, catalog, "msl", growing=True)
    assert prompts.without_history() == list(prompts.head) == prompts.encode([])
    with pytest.raises(UserError, match="needs an instruction template .* that does not grow, got 'msl'"):
        prompts.without_history("unknown")
    assert prompts.hash != build_prompts(tokenizer, catalog, "msl").hash
    assert (
        build_prompts(tokenizer, catalog, "plain", growing=True).hash
        == build_prompts(tokenizer, catalog).hash
    )
    with pytest.raises(
        UserError, match="item vectors in a prompt that grows need the plain template, got 'msl'"
    ):
        build_prompts(tokenizer, catalog, "msl", growing=True, slots=SlotIds(300, 9, None))


def test_a_run_never_sees_what_is_held_out_and_ranks_with_the_prompt_it_was_trained_with(
    tmp_path: Path,
) -> None:
    """Each user's last two items occur nowhere else: they are neither targets nor history of the training."""
    raw = tmp_path / "raw"
    raw.mkdir()
    lines = ["user,item,timestamp"]
    lines += [f"u{u},{i % 6},{i}" for u in range(12) for i in range(u % 3, u % 3 + 6)]
    lines += [f"u{u},held{u}-{k},{20 + k}" for u in range(12) for k in range(2)]
    (raw / "interactions.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = [*map(str, range(6)), *(f"held{u}-{k}" for u in range(12) for k in range(2))]
    titles = "\n".join(["item,title", *(f"{i},Title {i}" for i in items)])
    (raw / "items.csv").write_text(titles + "\n", encoding="utf-8")
    changes = [f"data.source=csv:{raw}", f"data.folder={tmp_path / 'data'}", "backbone.device=cpu"]
    changes += [f"backbone.tiny.{key}" for key in ("vocabulary=300", "width=16", "layers=1", "heads=2")]
    changes += [
        "backbone.template=msl",
        "training.steps=3",
        "training.batch_size=4",
        "evaluation.exclude=none",
    ]
    recipe = load_recipe("demo/msl", changes)
    dataset = open_data(recipe)
    parts = assemble(recipe, dataset)
    held = {i for i, item in enumerate(dataset.catalog.item_id) if str(item).startswith("held")}
    assert len(held) == 24 and not held & set(parts.windows.items.values.tolist())
    assert int(parts.counts.sum()) == 12 * 5, "all but the first interaction of a user"
    train_run(recipe, tmp_path / "run")
    again = load(tmp_path / "run")
    assert isinstance(again, GenerativeRecommender) and again.prompts.growing
    assert again.prompts.encode([0, 1]) == parts.prompts.encode([0, 1])
    assert evaluate_run(tmp_path / "run").metrics["n_users"] == 12
