"""Whom a report shows closely, and that what it says of them is what the evaluation stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.app.test_runs import cycle, recipe, runs  # noqa: F401  # fixtures
from triewise.app import evaluate_run, open_run, report_runs
from triewise.app.compare import collect
from triewise.app.exploring import chosen_rows
from triewise.ranking import load_evaluation


def test_rows_are_of_every_kind() -> None:
    n = 100
    kinds = {"rare": np.zeros(n, bool), "often": np.arange(n) % 2 == 0, "never": np.zeros(n, bool)}
    kinds["rare"][[3, 77]] = True
    rows = chosen_rows(kinds, [50, 4], 12)
    assert rows == sorted(set(rows)) and len(rows) == 12
    assert {3, 77, 50, 4} <= set(rows)
    assert sum(r % 2 == 0 for r in rows) >= 4
    assert max(np.diff([0, *rows, n])) < 40, "evenly"
    assert chosen_rows(kinds, [], 1000) == list(range(n))
    assert chosen_rows(kinds, [5, 6, 7], 2) == [5, 6]


def test_what_is_shown_is_what_was_ranked(runs: tuple[Path, Path]) -> None:  # noqa: F811
    evaluation = load_evaluation(runs[0])
    report = collect(list(runs), users=6)
    explorer = report.explorer
    assert explorer is not None and len(explorer.users) == 6
    assert [m.name for m in explorer.methods] == ["msl", "lml", "item-kNN", "most popular"]
    assert [m.other for m in explorer.methods] == ["10 beams", "10 beams", "", ""]
    assert "6 of " in explorer.chosen
    row = {str(user): r for r, user in enumerate(evaluation.user_id)}
    for user in explorer.users:
        r = row[user.user]
        msl, popular = user.ranked[0], user.ranked[-1]
        assert [t.item for t in msl.found] == evaluation.items[r, :10].tolist()
        assert msl.rank == evaluation.rank[r]
        assert all("".join(token.text for token in t.tokens) == t.title for t in msl.found)
        assert (msl.target is None) == (0 <= msl.rank < 10)
        assert not popular.found[0].tokens and popular.otherwise is None
        assert msl.otherwise is not None and len(msl.otherwise) == 10
        assert ("found" in user.kinds) != ("missed" in user.kinds)
        assert ("beams differ" in user.kinds) == (set(msl.otherwise) != {t.title for t in msl.found})


def test_beams_are_compared_with_the_exact_search(runs: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    settings = open_run(runs[0])[0].evaluation
    exact = load_evaluation(runs[0])
    evaluate_run(runs[0], settings.model_copy(update={"search": "beam"}))
    explorer = collect([runs[0]], users=4).explorer
    evaluate_run(runs[0])
    assert explorer is not None and explorer.methods[0].other == "the exact search"
    title = {t.title: t.item for user in explorer.users for of in user.ranked for t in of.found}
    row = {str(user): r for r, user in enumerate(exact.user_id)}
    for user in explorer.users:
        best = [title.get(t) for t in user.ranked[0].otherwise or ()]
        assert all(t in (None, i) for t, i in zip(best, exact.items[row[user.user], :10], strict=True))


def test_users_are_numbered_or_left_out(runs: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    report = collect([runs[0]], users=3, anonymous=True)
    assert report.explorer is not None
    shown, explored = ([user.user for user in users] for users in (report.examples, report.explorer.users))
    assert shown == ["1", "2", "3"] and sorted({*shown, *explored}) == ["1", "2", "3"], (
        "who is in both has one number"
    )
    assert report_runs([runs[0]], tmp_path / "r.html", users=0).explorer is None
    assert "<script" not in (tmp_path / "r.html").read_text(encoding="utf-8")
