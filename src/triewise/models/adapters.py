"""Low-rank adapters and quantised bases: add, load, save, take off, fold in. Models only, no tokenizers.

An adapter sits on linear layers of the body. The head and the embeddings never carry one, because engine and loss
multiply hidden states with rows of the head by hand. No tokens are added (MSL's authors add a ``<pad>`` token
and resize the embeddings; padding here needs no token of its own).

A quantised base is frozen. Merging never quantises again: the base is brought back to full precision, then the
adapter is added, so merged and unmerged scores agree. Not so over an ``8bit`` base: its layers round their inputs
too, and which columns are spared depends on the whole batch (LLM.int8()), so unmerged scores of one user depend on
the users beside it. Evaluation merges there.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.models.hub import first_line
from triewise.recipe import LoraSettings

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # PEFT's name of the only adapter


def quantisation_config(kind: str, dtype: torch.dtype) -> Any:
    """What transformers needs to quantise a model while it is loaded; the head stays in full precision.

    Args:
        kind: ``8bit`` (LLM.int8(), MSL's setting) or ``4bit`` (NF4 with double quantisation, IGD's 8B setting).
        dtype: Of the products of ``4bit`` layers.

    Raises:
        UserError: bitsandbytes is not installed, or an unknown kind.
    """
    if kind not in ("8bit", "4bit"):
        raise UserError(f"wanted quantisation none, 8bit or 4bit, got {kind!r}")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(
            f"quantisation = {kind!r} needs the bitsandbytes package; run: pip install 'triewise[quant]'"
        ) from None
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def freeze(model: Any) -> None:
    """Make a freshly quantised base constant: no gradients, and no layer that rewrites its weights."""
    model.requires_grad_(False)
    for module in model.modules():
        # On a CPU with AVX512-BF16 bitsandbytes repacks a 4-bit layer in bfloat16 at its first forward in evaluation
        # mode. That changes scores, cannot be undone exactly, and fails for widths below 64.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_adapted(model: Any) -> bool:
    """Whether the model is an adapter around a base."""
    return hasattr(model, "get_base_model")


def is_quantised(model: Any) -> bool:
    """Whether some layer of the model holds 8-bit or 4-bit weights."""
    return any(_is_packed(module) for module in model.modules())


def add_lora(model: Any, settings: LoraSettings, seed: int) -> Any:
    """Put a fresh adapter around a causal LM and freeze everything else; scores stay those of the base.

    Args:
        model: A causal LM without adapter; it becomes part of the result.
        settings: Rank, alpha, dropout, targets.
        seed: Of the initial weights (float32, drawn on the CPU); the global random state is left alone.

    Raises:
        UserError: A target that is no linear layer of the body, or a model that has an adapter already.
    """
    from peft import LoraConfig, get_peft_model

    if is_adapted(model):
        raise UserError(
            "wanted a base model without adapter to train a new one, got an adapter; give its base, or merge it first"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(model, settings.targets),
        exclude_modules=[name for name, m in model.named_modules() if m is model.get_output_embeddings()],
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT uses a deprecated name, and says that it sets fan_in_fan_out for GPT-2's layers.
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        adapted = get_peft_model(model, config)
    return adapted.eval()


def load_lora(model: Any, folder: Path) -> Any:
    """Put the adapter of `save_lora` around its base, frozen, in evaluation mode.

    Raises:
        UserError: The files are damaged, or the adapter is of another base.
    """
    from peft import PeftModel

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"wanted {name} in {folder}, which is missing; restore it or train again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the adapter in {folder} does not fit its base model ({first_line(error)}); give the one it was trained on"
        ) from None


def unfreeze_lora(model: Any) -> None:
    """Let a loaded adapter be trained on."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.requires_grad_(True)


def save_lora(model: Any, folder: Path, base: str, revision: str | None) -> None:
    """Write an ordinary PEFT adapter folder; ``base`` is what its config names as the base."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; ours is written where the recommender is
    config = read_json(folder / ADAPTER_CONFIG)
    config |= {"base_model_name_or_path": base, "revision": revision}
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order changes from run to run
    write_json(folder / ADAPTER_CONFIG, config)


def without_adapter(model: Any) -> Any:
    """The model under an adapter as a model of its own, which shares all weights; the given one stays as it is."""
    # The tensors are handed to deepcopy as copied already, so only modules are copied.
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    if is_adapted(twin):
        twin = twin.unload()
        twin.__dict__.pop("peft_config", None)
    return twin


def merged(model: Any) -> Any:
    """A plain causal LM in full precision with the adapter folded in.

    The given model stays as it is. Weights that neither an adapter nor quantisation touches are shared with it; the
    others are new, so for a quantised base this needs the memory of a full-size model.
    """
    layers = model.get_base_model().named_modules() if is_adapted(model) else ()
    delta = {name: m.get_delta_weight(_NAME).detach() for name, m in layers if hasattr(m, "get_delta_weight")}
    plain = without_adapter(model)
    if is_quantised(plain):
        _unpack(plain, delta)
    else:
        for name, change in delta.items():
            layer = plain.get_submodule(name)
            layer.weight = _frozen((layer.weight.float() + change.float()).to(layer.weight.dtype))
    return plain.eval()


def _unpack(model: Any, delta: dict[str, Tensor]) -> None:
    """Bring a quantised model to full precision, with a change added to some of its weights."""
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        architecture = type(model)(config)
    dtype = model.get_output_embeddings().weight.dtype
    for name, packed in [(name, m) for name, m in model.named_modules() if _is_packed(m)]:
        weight = dequantize_module_weight(packed).detach().float()
        weight = (weight + delta[name].float() if name in delta else weight).to(dtype)
        layer = architecture.get_submodule(name)
        # GPT-2 keeps its layers transposed; bitsandbytes does not.
        layer.weight = _frozen(weight.T.contiguous() if isinstance(layer, Conv1D) else weight)
        layer.bias = packed.bias
        model.set_submodule(name, layer)
    model.hf_quantizer, model.config = None, config
    model.is_quantized = model.is_loaded_in_4bit = model.is_loaded_in_8bit = False


def _targets(model: Any, wanted: str | tuple[str, ...]) -> list[str]:
    """Ends of the names of linear layers; each given one must match a layer of the body."""
    head = model.get_output_embeddings()
    layers = [name for name, m in model.named_modules() if m is not head and _linear(m)]
    ends = sorted({name.rpartition(".")[2] for name in layers})
    if wanted == "all-linear":
        return ends
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise UserError(
                f"wanted ends of names of the body's linear layers ({', '.join(ends)}) in backbone.lora.targets, "
                f"got {target!r}; correct it or use 'all-linear'"
            )
    return sorted(wanted)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_packed(module: nn.Module) -> bool:
    """Whether this is a quantised layer of bitsandbytes, not PEFT's layer of the same name around it."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and not hasattr(module, "base_layer")


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
