"""Everyday mistakes with a model's folder: each is one line that says what is the matter, or it works as it should."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model_families import quiet, save
from triewise.errors import UserError
from triewise.models import load_backbone

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nothing is wrong with."""
    return save("llama", tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")


def config(folder: Path, **changed: Any) -> None:
    """Other settings in a folder's config; None takes one out."""
    found = json.loads((folder / CONFIG).read_text()) | changed
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def weights(folder: Path, **added: torch.Tensor) -> None:
    """More weights in a folder's file; ``__`` in a name stands for a point."""
    found = load_file(folder / WEIGHTS) | {name.replace("__", "."): w for name, w in added.items()}
    save_file(found, folder / WEIGHTS, metadata={"format": "pt"})


def only_gguf(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-q4.gguf")


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("token*"):
        file.unlink()


def another_family_without_tokenizer(folder: Path) -> None:
    """Of Qwen2 transformers makes a tokenizer of one token, which reads nothing."""
    config(folder, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    no_tokenizer(folder)


def a_pointer(name: str) -> Callable[[Path], None]:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"

    def replace(folder: Path) -> None:
        (folder / name).write_text(text)

    return replace


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), "a folder without config.json; give the one"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no file named .*; restore the files of this folder"),
    "weights in GGUF": (only_gguf, "got: weights in GGUF; take the checkpoint in safetensors"),
    "weights cut": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]), "is damaged"),
    "weights by git LFS": (a_pointer(WEIGHTS), "model.safetensors, a pointer of git LFS; run git lfs pull"),
    "tokenizer by git LFS": (a_pointer("tokenizer.json"), "tokenizer.json, a pointer of git LFS"),
    "no tokenizer": (no_tokenizer, "wanted a tokenizer beside the language model .*, got no files of one"),
    "no tokenizer, Qwen2": (another_family_without_tokenizer, "wanted a tokenizer beside the language model"),
    "a family of tomorrow": (
        lambda f: config(f, model_type="llama9"),
        "does not recognize this architecture",
    ),
    "an activation of tomorrow": (
        lambda f: config(f, hidden_act="swiglu9"),
        "KeyError: 'swiglu9'; its files are wrong, or made for another release of transformers than 5",
    ),
    "a number in words": (
        lambda f: config(f, hidden_size="32"),
        "Validation error for field 'hidden_size': .*; its files are wrong",
    ),
    "biases that the config has not": (
        lambda f: weights(f, model__layers__0__self_attn__q_proj__bias=torch.ones(32)),
        "weights that LlamaForCausalLM has, got .* with model.layers.0.self_attn.q_proj.bias beside them",
    ),
    "a bias of the head": (
        lambda f: weights(f, lm_head__bias=torch.ones(384)),
        "with lm_head.bias beside them",
    ),
    "norms that the family has not": (
        lambda f: weights(f, model__layers__1__self_attn__q_norm__weight=torch.ones(8)),
        "with model.layers.1.self_attn.q_norm.weight beside them",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_folder_with_a_mistake_is_refused_in_one_line(name: str, whole: Path, tmp_path: Path) -> None:
    make, line = MISTAKES[name]
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    make(folder)
    with quiet(), pytest.raises(UserError, match=line) as caught:
        load_backbone(str(folder), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("/nowhere/model", "no such folder; correct the path"),
        ("./some/models/nowhere", "no such folder; correct the path"),
        ("./nowhere", "no such folder; correct the path"),
        ("", "check the name and the network"),
        ("someone/nothing", "check the name and the network"),
    ],
)
def test_a_name_that_is_misspelt(name: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        load_backbone(name, device="cpu")


def test_code_of_a_model_that_needs_a_package_says_so(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    named = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config(folder, auto_map=named)
    (folder / "modeling_own.py").write_text("import a_package_that_is_not_there\n")
    with quiet(), pytest.raises(UserError, match="a_package_that_is_not_there.*; install what it needs"):
        load_backbone(str(folder), device="cpu", trust_remote_code=True)


def test_a_file_is_no_folder(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="got: weights in GGUF"):
        load_backbone(str(tmp_path / "some.gguf"), device="cpu")
    with pytest.raises(UserError, match="got: a file; give the folder that holds"):
        load_backbone(str(whole / WEIGHTS), device="cpu")


def test_layers_beyond_the_config_are_left_out_with_a_line(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    config(folder, num_hidden_layers=1)
    weights(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))  # is computed today
    with quiet():
        loaded = load_backbone(str(folder), device="cpu")
    assert loaded.model.config.num_hidden_layers == 1
    said = capfd.readouterr().err
    assert "holds weights that its config.json leaves out: model.layers.1." in said
    assert "inv_freq" not in said


@pytest.fixture(scope="module")
def adapter(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that PEFT wrote."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter") / "lora"
    with quiet():
        made = get_peft_model(
            AutoModelForCausalLM.from_pretrained(whole), LoraConfig(r=2, target_modules=["q_proj"])
        )
        made.save_pretrained(folder)
    return folder


def settings(folder: Path, **changed: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def cut_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda f: settings(f, base_model_name_or_path=None), "the base model of .*, which names none in"),
        (lambda f: settings(f, base_model_name_or_path="/nowhere/base"), "which names /nowhere/base in"),
        (lambda f: settings(f, target_modules=["k_proj"]), "does not fit its base .*missing adapter keys"),
        (lambda f: settings(f, r=3), "does not fit its base model .*size mismatch"),
        (cut_weights, "is damaged"),
    ],
)
def test_an_adapter_with_a_mistake(
    make: Callable[[Path], object], line: str, adapter: Path, tmp_path: Path
) -> None:
    """Not the base alone in silence: PEFT only warns where weights are missing."""
    folder = Path(shutil.copytree(adapter, tmp_path / "lora"))
    make(folder)
    with quiet(), pytest.raises(UserError, match=line):
        load_backbone(str(folder), device="cpu")
