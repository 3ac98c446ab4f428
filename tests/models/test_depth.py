"""The first layers of a pre-trained model: of every family what its own first layers give, saved, adapted, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model_families import FAMILIES, REFUSED, quiet, save
from tests.worlds import write_msl_folder
from triewise import load
from triewise.app import evaluate_run, train_run
from triewise.errors import UserError
from triewise.models import load_backbone
from triewise.models.anatomy import sample_ids, text_body, text_config
from triewise.models.depth import first_layers
from triewise.recipe import load_recipe
from triewise.recommenders import GenerativeRecommender
from triewise.settings import LoraSettings

FAST = ("llama", "gpt2", "gemma3", "minicpm3", "bert_decoder", "olmo3", "mixtral")
NO_PARTS = {
    "gemma4_text": "stand for themselves",
    "gemma3n_text": "stand for themselves",
    "longcat": "stand for",
}
# One layer is too few for some: attention and recurrent layers have to be there, or a depth above 1.
NEEDS_TWO = ("mamba2", "rwkv", "falcon_h1")
WHOLE = [n for n in FAMILIES if n not in (*REFUSED, *NO_PARTS, *NEEDS_TWO)]


def layers(model: Any) -> list[nn.ModuleList]:
    n = text_config(model).num_hidden_layers
    return [m for m in text_body(model).modules() if isinstance(m, nn.ModuleList) and len(m) == n]


@torch.no_grad()
def after_the_first(model: Any) -> Tensor:
    """What the first layer gives for a text."""
    given: list[Any] = []
    hook = layers(model)[0][0].register_forward_hook(lambda module, args, output: given.append(output))
    model(input_ids=sample_ids(model, 12), use_cache=False)
    hook.remove()
    states: Tensor = given[0] if isinstance(given[0], Tensor) else given[0][0]
    return states


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in WHOLE])
def test_the_first_layer_alone_is_the_first_of_the_whole_model(name: str, tmp_path: Path) -> None:
    with quiet():
        folder = str(save(name, tmp_path / "m"))
        whole, cut = load_backbone(folder, device="cpu"), load_backbone(folder, device="cpu", layers=1)
    assert [len(stack) for stack in layers(cut.model)] == [1] * len(layers(whole.model))
    ours, theirs = after_the_first(cut.model), after_the_first(whole.model)
    assert torch.allclose(ours, theirs, atol=1e-5)
    known = whole.model.state_dict()
    kept = cut.model.state_dict()
    assert all(known[key].equal(weight) for key, weight in kept.items()) and len(kept) < len(known)


@pytest.mark.parametrize("name", NO_PARTS)
def test_layers_that_hang_on_how_many_there_are_are_one_line(name: str, tmp_path: Path) -> None:
    with quiet(), pytest.raises(UserError, match=NO_PARTS[name]):
        load_backbone(str(save(name, tmp_path / "m")), device="cpu", layers=1)


def test_lists_with_an_entry_a_layer_lose_those_behind() -> None:
    from transformers import Gemma3TextConfig

    config = Gemma3TextConfig(num_hidden_layers=12, sliding_window=8)
    cut = first_layers("gemma", config, 7)
    assert (cut.num_hidden_layers, cut.layer_types) == (7, config.layer_types[:7])
    assert len(config.layer_types) == config.num_hidden_layers == 12


def test_an_adapter_on_few_layers_is_saved_and_comes_back(tmp_path: Path) -> None:
    with quiet():
        folder = str(save("llama", tmp_path / "m"))
        made = load_backbone(folder, device="cpu", layers=1, lora=LoraSettings(rank=2))
        with torch.no_grad():
            for name, weight in made.model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.5)
        made.save(tmp_path / "adapter")
        again = load_backbone(str(tmp_path / "adapter"), device="cpu")
    assert made.origin["layers"] == 1 and text_config(again.model).num_hidden_layers == 1
    ids = sample_ids(made.model, 8)
    assert torch.equal(made.model(input_ids=ids).logits, again.model(input_ids=ids).logits)
    with pytest.raises(UserError, match=r"wanted a checkpoint to take the first 1 layers of"):
        load_backbone(str(tmp_path / "adapter"), device="cpu", layers=1)


def test_a_few_layers_are_saved_as_a_checkpoint_of_their_own(tmp_path: Path) -> None:
    with quiet():
        made = load_backbone(str(save("gpt2", tmp_path / "m")), device="cpu", layers=1)
        made.save(tmp_path / "saved")
        again = load_backbone(str(tmp_path / "saved"), device="cpu")
    ids = sample_ids(made.model, 8)
    assert torch.equal(made.model(input_ids=ids).logits, again.model(input_ids=ids).logits)


def test_more_layers_than_there_are_is_one_line(tmp_path: Path) -> None:
    with (
        quiet(),
        pytest.raises(UserError, match=r"wanted backbone.layers of at most 2, the layers of .*, got 3"),
    ):
        load_backbone(str(save("llama", tmp_path / "m")), device="cpu", layers=3)


def test_layers_of_a_model_that_is_built_here_are_another_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layers is of a pre-trained model, got 'tiny': set tiny.layers"):
        load_recipe("demo/msl", ["backbone.layers=1"])


def test_a_run_of_few_layers_trains_and_is_loaded_again(tmp_path: Path) -> None:
    with quiet():
        base = save("llama", tmp_path / "m")
    changes = [f"data.source=msl:{write_msl_folder(tmp_path / 'raw')}", f"data.folder={tmp_path / 'data'}"]
    changes += [f"backbone.name={base}", "backbone.layers=1", "training.steps=2", "training.batch_size=4"]
    changes += ["backbone.device=cpu", "evaluation.exclude=none", "backbone.template=plain"]
    train_run(load_recipe("demo/msl", changes), tmp_path / "run")
    again = load(tmp_path / "run")
    assert isinstance(again, GenerativeRecommender)
    assert text_config(again.backbone.model).num_hidden_layers == 1
    assert evaluate_run(tmp_path / "run").metrics["n_users"] > 0
