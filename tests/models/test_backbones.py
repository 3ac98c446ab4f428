"""Loading models: the tiny one, local folders, names that cannot be had, and the question about the head."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from tests.tiny_models import tiny_model
from tests.worlds import TINY, TITLES, backbone
from triewise.errors import UserError
from triewise.models import (
    body,
    head_weight,
    load_backbone,
    load_tokenizer,
    resolve_device,
)
from triewise.models.anatomy import resolve_dtype


def test_tiny_is_what_the_seed_says() -> None:
    a, b, c = backbone(seed=1), backbone(seed=1), backbone(seed=2)
    assert all(x.equal(y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert not head_weight(a.model).equal(head_weight(c.model))
    assert a.model.config.model_type == "qwen2"
    assert not a.model.training


def test_the_default_tiny_has_half_a_million_parameters() -> None:
    titles = [
        f"{a}{b} {i}" for i, (a, b) in enumerate(itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=2))
    ]
    tokenizer = load_tokenizer("tiny", titles=titles * 2)
    model = load_backbone("tiny", titles=titles, device="cpu").model
    body_and_norms = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    assert 500_000 < body_and_norms + 2048 * 96 < 520_000
    assert len(tokenizer) <= 2048


def test_frequent_numbers_are_whole_tokens_and_survive_reloading(tmp_path: Path) -> None:
    """Qwen2's rules cut numbers into digits; years would be four tokens."""
    from transformers import AutoTokenizer

    titles = [f"Film {i} (1995)" for i in range(5)] + ["19951 nights", "x1995", "1995", "7 (2001)"]
    saved = load_backbone("tiny", titles=titles, device="cpu", tiny=TINY)
    saved.save(tmp_path / "m")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "m")
    year = saved.tokenizer.convert_tokens_to_ids("1995")
    assert saved.tokenizer.decode([year]) == "1995"
    for title in titles:
        ids = saved.tokenizer(title, split_special_tokens=True)["input_ids"]
        assert loaded(title, split_special_tokens=True)["input_ids"] == ids
        assert loaded.decode(ids) == title
        assert (year in ids) == ("1995" in title and title not in ("19951 nights", "x1995"))


def test_the_tokenizer_round_trips_any_script() -> None:
    tokenizer = backbone().tokenizer
    for text in (*TITLES, "Ünïcödé", "हिन्दी", "עברית", "\t tab  spaces ", ""):
        assert tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) == text


def test_body_gives_the_state_the_head_reads() -> None:
    model = tiny_model()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        hidden = body(model)(input_ids=ids).last_hidden_state
        assert torch.allclose(hidden @ head_weight(model).T, model(input_ids=ids).logits, atol=1e-5)


def test_a_local_folder_is_loaded_as_it_is(tmp_path: Path) -> None:
    saved = backbone()
    saved.save(tmp_path / "m")
    loaded = load_backbone(str(tmp_path / "m"), device="cpu")
    assert head_weight(loaded.model).equal(head_weight(saved.model))
    assert list(loaded.origin["sha256"]) == ["model.safetensors"]


def test_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="wanted titles to train the tokenizer"):
        load_backbone("tiny", tiny=TINY)
    with pytest.raises(
        UserError, match="wanted the language model .*nothing.*: no such folder; correct the path"
    ):
        load_backbone(str(tmp_path / "nothing"), device="cpu")
    with pytest.raises(
        UserError, match="wanted a device such as auto, cpu, cuda or mps that works here, got 'toaster'"
    ):
        resolve_device("toaster")
    with pytest.raises(UserError, match="wanted a dtype among auto, .*got 'int3'"):
        resolve_dtype("int3", torch.device("cpu"))
    monkeypatch.setenv("TRIEWISE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")
    with pytest.raises(UserError, match="the weights of smollm2-135m-q4, but the cache"):
        load_backbone("smollm2-135m-q4", device="cpu")
