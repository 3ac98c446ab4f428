"""A catalogue that changes while it is recommended from."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import slot_worlds, version_child, worlds
from tests.attack_child import Children
from triewise.data import Catalog
from triewise.errors import UserError
from triewise.files import read_json
from triewise.models import sequential_model
from triewise.ranking import MostPopular
from triewise.recommenders import GenerativeRecommender, SequentialRecommender
from triewise.serving import LiveCatalogue, Version, answer
from triewise.serving.versions import KEPT
from triewise.serving.view import View
from triewise.tokens import Identifier, Trie, build_prompts

NEW = [("new-0", "Alien Resurrection (1997)"), ("new-1", "Brazil (1985)"), ("new-2", "Dune (2021)")]


def scratch(like: GenerativeRecommender, **changes: Any) -> GenerativeRecommender:
    """The same model with the same catalogue, built from nothing."""
    catalog = Catalog.from_titles(like.catalog.item_id, like.catalog.title)
    prompts = build_prompts(like.backbone.tokenizer, catalog, **like.prompts.settings)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    return GenerativeRecommender(like.backbone, catalog, prompts, trie, like.counts, **changes)


def sequential(titles: tuple[str, ...] = worlds.TITLES) -> SequentialRecommender:
    model = sequential_model({"kind": "sasrec", "n_items": len(titles), "max_length": 5, "width": 8}).eval()
    return SequentialRecommender(model, worlds.catalog(titles), np.arange(len(titles)))


@pytest.mark.parametrize("template", ["plain", "msl"])
@pytest.mark.parametrize(
    "how",
    [
        {"search": "exact"},
        {"search": "beam", "alpha": 0.4, "beams": 8},
        {"search": "catalogue", "support": "vocabulary", "length_penalty": 1.0},
        {"search": "grounding", "text_tokens": 4, "text_beams": 1},
    ],
)
def test_a_version_is_what_is_built_from_nothing(template: str, how: dict[str, Any]) -> None:
    live = LiveCatalogue(worlds.recommender(template=template, **how))
    live.change(NEW[:1], ["raw-1", "raw-6"])
    live.change(NEW[1:], ["raw-0"])
    made = live.current.recommender
    assert isinstance(made, GenerativeRecommender)
    wanted = scratch(made, **how)
    assert made.catalog.item_id == (
        *(f"raw-{i}" for i in (2, 3, 4, 5, 7, 8)),
        *(item_id for item_id, _ in NEW),
    )
    assert made.counts.tolist() == [2, 3, 4, 5, 7, 8, 0, 0, 0]
    assert made.hashes == wanted.hashes
    histories = [[0], [2, 6], [8, 1, 5]]
    for exclude in (None, "history"):
        got, want = made.recommend(histories, 6, exclude), wanted.recommend(histories, 6, exclude)
        assert got.items.tolist() == want.items.tolist()
        assert got.scores.tolist() == want.scores.tolist()
        assert got.certified.tolist() == want.certified.tolist()


def test_a_new_title_is_recommended_at_once_and_running_requests_finish_on_the_old() -> None:
    live = LiveCatalogue(worlds.recommender())
    before = live.current
    rankings = before.recommender.recommend([[0]], 9).items.tolist()
    after = live.change(NEW, [])
    assert (before.number, after.number, live.current) == (0, 1, after)
    titles = {r.title for r in answer(after.recommender, [["Alien (1979)"]], 12).of_each[0].recommendations}
    assert titles >= {title for _, title in NEW if title != "Brazil (1985)"}
    assert before.recommender.recommend([[0]], 9).items.tolist() == rankings


def test_what_could_not_be_added_is_forgotten() -> None:
    live = LiveCatalogue(worlds.recommender())
    live.change([("a", "Metropolis")], [])
    for _ in range(3):
        with pytest.raises(UserError, match="wanted titles of at most 256 tokens"):
            live.change([("b", "Solaris"), ("c", "x" * 999)], ["a"])
    assert len(live._met) == len(live._number_met) == 1
    assert live.change([("b", "Solaris")], ["a"]).recommender.catalog.item_id[-1] == "b"
    assert live.change([("a", "Metropolis")], []).recommender.catalog.title[-2:] == ("Solaris", "Metropolis")


@pytest.mark.parametrize("search", ["exact", "beam", "catalogue"])
def test_all_titles_may_be_new(search: str) -> None:
    """Then no token was a training target: none decides more than another."""
    live = LiveCatalogue(worlds.recommender(alpha=0.5, search=search))
    after = live.change([("n1", "Red Sun"), ("n2", "Red Moon")], live.current.recommender.catalog.item_id)
    plain = after.recommender.with_settings(alpha=0.0)
    for recommender in (after.recommender, plain):
        found = answer(recommender, [["Alien (1979)"]], 2, explain=True).of_each[0].recommendations
        assert {one.title for one in found} == {"Red Sun", "Red Moon"}
        alone = answer(plain, [["Alien (1979)"]], 2).of_each[0].recommendations
        assert [one.score for one in found] == [one.score for one in alone]


def test_a_model_is_probed_once() -> None:
    live = LiveCatalogue(worlds.recommender(search="beam"))
    before = live.current.recommender
    before.engine.chunk = 8  # type: ignore[attr-defined]  # the probe has as many nodes
    before.recommend([[0]], 1)
    assert before.engine._misfits  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triewise.decoding.engine.measured", None)
        assert live.change(NEW, []).recommender.recommend([[0]], 1).items.shape == (1, 1)


def test_no_request_makes_what_a_version_has_made() -> None:
    version = LiveCatalogue(worlds.recommender(alpha=0.5, search="beam")).change(NEW, [])
    view = View(version, {})
    assert view.searching(None) is version.recommender
    for other in (view.searching("exact"), view.searching(None, beams=True)):
        assert other.gain is version.recommender.gain and other.groups is version.recommender.groups  # type: ignore[attr-defined]
    other = version.recommender.with_settings(measure="gini")
    assert not np.array_equal(other.gain, version.recommender.gain)  # type: ignore[attr-defined]


@pytest.mark.parametrize("made", [worlds.recommender, sequential])
def test_a_history_may_hold_what_was_removed(made: Any) -> None:
    live = LiveCatalogue(made())
    whole = answer(live.current.recommender, [["Alien (1979)", "Brazil (1985)"]], 9).of_each[0]
    live.change([], ["raw-0"])
    for by, names in (("title", ["Alien (1979)", "Brazil (1985)"]), ("id", ["raw-0", "raw-3"])):
        got = answer(live.current.recommender, [names], 9, by=by, strict=True, exclude=names[:1]).of_each[0]  # type: ignore[arg-type]
        assert got.unknown == ()
        assert [r.item_id for r in got.recommendations] == [r.item_id for r in whole.recommendations]
    both = live.current.recommender.recommend([[8, 2]], 8, "history")
    assert both.items.max() < 8
    assert live.current.recommender.recommend([[2]], 8, "history").scores.tolist() != both.scores.tolist()
    with pytest.raises(UserError, match=r"wanted item indices in \[0, 9\), got 9"):
        live.current.recommender.recommend([[9]], 3)


def test_back_and_back_again(tmp_path: Path) -> None:
    for folder in (None, tmp_path / "versions"):
        live = LiveCatalogue(worlds.recommender(), folder)
        ids = [live.current.recommender.catalog.item_id]
        for add, remove in ((NEW[:1], ["raw-3"]), (NEW[1:], ["new-0"]), ([], ["raw-0", "new-1"])):
            ids.append(live.change(add, remove).recommender.catalog.item_id)
        assert (live.rollback().recommender.catalog.item_id, live.current.number) == (ids[2], 4)
        if folder is not None:  # a service that starts again goes back as far
            live = LiveCatalogue(worlds.recommender(), folder)
            assert (live.current.recommender.catalog.item_id, live.current.number) == (ids[2], 4)
        assert live.rollback().recommender.catalog.item_id == ids[1]
        assert live.rollback().recommender.catalog.item_id == ids[0]
        assert live.current.recommender.counts.tolist() == list(range(9))
        with pytest.raises(UserError, match="wanted a version before 6 to go back to, got none"):
            live.rollback()
        # What comes back under its old title has its place and its counts.
        live.change([], ["raw-3"])
        again = live.change([("raw-3", "Brazil (1985)"), NEW[0]], []).recommender
        assert again.catalog.item_id == (*ids[0], "new-0")
        assert again.counts.tolist() == [*range(9), 0]
        other = live.change([("raw-3", "Brazil (2025)")], ["raw-3"]).recommender
        assert (other.catalog.item_id[-1], other.counts.tolist()[-1]) == ("raw-3", 0)


def test_a_started_service_takes_up_the_last_version(tmp_path: Path) -> None:
    live = LiveCatalogue(worlds.recommender(), tmp_path)
    for n in range(KEPT + 2):
        live.change([(f"n-{n}", f"Title {n}")], [f"n-{n - 1}"] if n else ["raw-2"])
    assert len(list(tmp_path.glob("version-*.json"))) == len(list(tmp_path.glob("version-*.parquet"))) == KEPT
    again = LiveCatalogue(worlds.recommender(), tmp_path)
    assert again.current.number == KEPT + 2
    one, other = again.current.recommender, live.current.recommender
    assert one.hashes == other.hashes
    assert one.former is not None
    assert one.former.item_id == other.former.item_id  # type: ignore[union-attr]
    assert one.recommend([[0, 9]], 5).scores.tolist() == other.recommend([[0, 9]], 5).scores.tolist()
    with pytest.raises(UserError, match="holds versions of another catalogue than the model's"):
        LiveCatalogue(worlds.recommender((*worlds.TITLES, "one more")), tmp_path)
    live.change([], ["raw-1"])
    with pytest.raises(UserError, match=f"another process has made version {KEPT + 3} in"):
        again.change([], ["raw-1"])
    assert again.current.number == KEPT + 2
    (tmp_path / f"version-{KEPT + 3:06d}.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is not the file that was written"):
        LiveCatalogue(worlds.recommender(), tmp_path)
    (tmp_path / f"version-{KEPT + 3:06d}.json").unlink()
    assert LiveCatalogue(worlds.recommender(), tmp_path).current.number == KEPT + 2


@pytest.mark.parametrize(
    ("add", "remove", "line"),
    [
        ([], [], "wanted items to add or to remove, got neither"),
        ([("raw-1", "x")], [], "wanted new ids to add, got 'raw-1', which is there"),
        (
            [],
            ["raw-9", "x"],
            r"wanted ids of the catalogue \(9 items\) to remove, got 'raw-9' \(2 unknown ids\)",
        ),
        ([], ["raw-1", "raw-1"], "wanted each item once, got 'raw-1' 2 times"),
        ([("a", "x"), ("a", "y")], [], "wanted each item once, got 'a' 2 times"),
        ([("a", " ")], [], "wanted an id and a title with text, got 'a' and ' '"),
        ([("", "x")], [], "wanted an id and a title with text, got '' and 'x'"),
        ([("a", "\ud800")], [], "wanted an id and a title with text"),
        ([], [f"raw-{i}" for i in range(9)], "wanted at least one item to be left"),
        ([("a", "x" * 2000)], [], r"wanted titles of at most 256 tokens, got one of \d+ \('xxx"),
    ],
)
def test_a_change_that_cannot_be_made(add: Any, remove: Any, line: str, tmp_path: Path) -> None:
    live = LiveCatalogue(worlds.recommender(), tmp_path)
    with pytest.raises(UserError, match=line):
        live.change(add, remove)
    assert live.current.number == 0
    assert not list(tmp_path.iterdir())


def test_what_other_recommenders_can_and_cannot(tmp_path: Path) -> None:
    live = LiveCatalogue(sequential())
    whole = live.current.recommender.recommend([[0, 3], []], 9)
    with pytest.raises(UserError, match="wanted no new one, got 'Dune"):
        live.change(NEW[2:], [])
    fewer = live.change([], ["raw-1", "raw-5"]).recommender
    assert isinstance(fewer, SequentialRecommender)
    got = fewer.recommend([[0, 2], []], 9)
    kept = [0, 2, 3, 4, 6, 7, 8]
    for b in range(2):
        left = [(i, s) for i, s in zip(whole.items[b], whole.scores[b], strict=True) if i in kept]
        assert [kept[i] for i in got.items[b] if i >= 0] == [i for i, _ in left]
        assert [s for s in got.scores[b] if s > -np.inf] == [s for _, s in left]
    assert fewer.item_vectors().tolist() == sequential().item_vectors()[kept].tolist()
    with pytest.raises(UserError, match="whose catalogue was changed"):
        fewer.save_pretrained(tmp_path)
    assert live.change([("raw-1", "Aliens (1986)")], []).recommender.catalog.n_items == 8


def test_codes_can_be_removed_and_item_vectors_stay(tmp_path: Path) -> None:
    made = worlds.recommender()
    codes = tuple(tuple("abcdefghi"[i] + "xy"[i % 2]) for i in range(9))
    prompts = build_prompts(
        made.backbone.tokenizer, made.catalog, "msl", max_history=5, identifier=Identifier(codes)
    )
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    live = LiveCatalogue(replace(made, prompts=prompts, trie=trie))
    with pytest.raises(
        UserError, match="a model that writes codes has none for a new item: wanted no 'Alien R"
    ):
        live.change(NEW, [])
    whole = live.current.recommender.recommend([[1]], 9, [[4]])
    fewer = live.change([], ["raw-4"]).recommender
    former = fewer.recommend([[1]], 9)
    order = [i - (i > 4) for i in whole.items[0] if i >= 0]
    assert [i for i in former.items[0] if i >= 0] == order
    assert fewer.recommend([[8]], 3).scores.tolist() != former.scores.tolist()  # read, though it is gone
    fewer.save_pretrained(tmp_path / "saved")
    assert tuple(read_json(tmp_path / "saved" / "identifier.json")) == fewer.catalog.item_id
    slotted = LiveCatalogue(slot_worlds.recommender())
    for add, remove in ((NEW, []), ([], ["raw-1"])):
        with pytest.raises(UserError, match="a model that reads item vectors has those of its own catalogue"):
            slotted.change(add, remove)


def test_an_assistant_follows_or_says_that_it_cannot() -> None:
    how = {"search": "catalogue", "assistant_weight": 0.5}
    live = LiveCatalogue(worlds.recommender(assistant=sequential(), **how))
    with pytest.raises(UserError, match="a sequential model knows the items it was trained with"):
        live.change(NEW, [])
    fewer = live.change([], ["raw-1"]).recommender
    assert fewer.recommend([[0], [8]], 8, "history").items.max() < 8
    made = worlds.recommender()
    popular = MostPopular(made.groups, made.counts)
    alone = LiveCatalogue(replace(made, assistant=popular))
    with pytest.raises(
        UserError, match="wanted an assistant whose catalogue can change too, got a MostPopular"
    ):
        alone.change([], ["raw-1"])
    both = LiveCatalogue(worlds.recommender(assistant=worlds.recommender(seed=1), **how))
    assert both.change(NEW, ["raw-1"]).recommender.recommend([[0]], 11).items.max() == 10


def test_threads_change_one_after_the_other(tmp_path: Path) -> None:
    live = LiveCatalogue(worlds.recommender(), tmp_path)
    wrong: list[Exception] = []

    def some(n: int) -> None:
        try:
            live.change([(f"t-{n}", f"Thread {n}")], [])
            live.current.recommender.recommend([[0]], 3)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=some, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert live.current.number == 6
    assert live.current.recommender.catalog.n_items == 15


def killed(children: Children, folder: Path, at: int = 0, after: float = 0.0) -> bool:
    """Change a catalogue in a process of its own; whether that was killed.

    Args:
        children: Where processes are started.
        folder: Where versions are kept.
        at: The file change before which it is killed; 0: none.
        after: Seconds of the change after which it is killed; 0: not.
    """
    ours, theirs = children.context.Pipe()
    child = children.context.Process(target=version_child.change, args=(theirs, folder, at))
    child.start()
    theirs.close()
    if after:
        ours.recv()
        time.sleep(after)
        child.kill()
    child.join()
    return bool(child.exitcode == -signal.SIGKILL)


def whole(folder: Path, before: Version, after: tuple[str, ...]) -> bool:
    """Whether a service that starts again has the catalogue before or that after, all of it, and can go on."""
    live = LiveCatalogue(worlds.recommender(), folder)
    ids, wanted = live.current.recommender.catalog.item_id, before.recommender.catalog.item_id
    assert (live.current.number, ids) in ((before.number, wanted), (before.number + 1, after))
    assert isinstance(live.current.recommender, GenerativeRecommender)
    assert live.current.recommender.hashes == scratch(live.current.recommender).hashes
    number = live.current.number
    assert live.change([("later", "Later")], []).number == number + 1
    assert live.rollback().recommender.catalog.item_id == ids
    left = {path.name.split(".")[1] for path in folder.iterdir()}
    assert left == {"json", "parquet"}, left
    return number > before.number


@pytest.mark.skipif(sys.platform == "win32", reason="processes are killed and forked")
@pytest.mark.timeout(1800)  # fifty times two processes
@pytest.mark.parametrize("times", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_who_is_killed_while_it_changes_leaves_one_whole_version(tmp_path: Path, times: int) -> None:
    """Before each file change, the first ones or a few, and then after some time."""
    first, children = LiveCatalogue(worlds.recommender(), tmp_path / "first"), Children()
    for n in range(KEPT):  # so that the next version removes the oldest
        first.change([(f"a-{n}", f"Added {n}")], [])
    ids = first.current.recommender.catalog.item_id
    wanted = (*(i for i in ids if i not in version_child.REMOVE), *(i for i, _ in version_child.ADD))
    rng, seen, past_the_last = random.Random(times), set(), False
    for n in range(1, times + 1):
        folder = tmp_path / str(n)
        shutil.copytree(tmp_path / "first", folder)
        if past_the_last:
            killed(children, folder, after=rng.uniform(0.001, 0.3))
        else:
            past_the_last = not killed(children, folder, at=n if times > 4 else 4 * n - 2)
        seen.add(whole(folder, first.current, wanted))
    assert seen == {False, True}
