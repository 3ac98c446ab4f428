"""The page about trials: every trial on it, text of others escaped, nothing without trials."""

from __future__ import annotations

import re

from triewise.reports import StepOfTrials, TrialShown, trials_page


def step(*trials: TrialShown) -> StepOfTrials:
    keys, importance = ("training.learning_rate", "backbone.name"), {"training.learning_rate": 1.0}
    return StepOfTrials(
        "a<b", keys, frozenset(keys[:1]), trials, importance if trials else {}, 1 if trials else None
    )


def trial(number: int, value: float | None, state: str = "complete", name: str = "x") -> TrialShown:
    values = {"training.learning_rate": 10.0**-number, "backbone.name": name}
    return TrialShown(number, state, value, values, ((5, value),) if value is not None else ())


def test_every_trial_is_on_the_page_and_others_text_is_text() -> None:
    trials = [
        trial(1, 0.3),
        trial(2, 0.1, "pruned"),
        trial(3, None, "fail"),
        trial(4, 0.2, name="<script>x</script>"),
    ]
    page = trials_page("T & T", "NDCG@10", 500, [step(*trials), step()])
    assert "<script" not in page and "T &amp; T" in page and "a&lt;b" in page
    assert "Best is trial 1 with NDCG@10 0.3000" in page and "No trial yet." in page
    assert (
        "Of 4 trials: 2 ended, 1 stopped early, 1 impossible." in page and "stopped early at step 5" in page
    )
    assert re.findall(r'<th scope="row">(\d)', page) == ["1", "4", "2", "3"], "best first"
    assert page.count('class="c2 line"') == 1 and "100 %" in page


def test_the_same_trials_give_the_same_text() -> None:
    assert len({trials_page("T", "HR@10", 5, [step(trial(1, 0.25))]) for _ in range(2)}) == 1
