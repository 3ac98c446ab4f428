"""A short attack in every run of the tests, and a long one among the slow ones; see `tests.attack`."""

from __future__ import annotations

import sys

import pytest

from tests.attack import attack

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are killed and forked")


@pytest.mark.parametrize("seconds", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_nothing_is_wrong_in_silence_or_stuck(seconds: float) -> None:
    found = attack(seconds, seed=int(seconds))
    print(found.table)
    assert not found.bad, "\n".join(found.bad)
    assert sum(found.counts.values()) > seconds / 5
