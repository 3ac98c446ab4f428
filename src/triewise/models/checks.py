"""What a language model must be before anything is trained or ranked with it; each fault is one line.

The config is read before the weights, the report of transformers after them, and two small forwards show whether a
model sees the future. Nothing here changes a model or draws from the global random numbers.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from triewise.errors import UserError, first_line
from triewise.models.anatomy import causal_lm, head_weight, probing, sample_ids, text_body
from triewise.progress import note

DECLARED = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, ImportError, AssertionError)
_SOUND: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models that `check_model` has seen
_TOWERS = r"vision|visual|image|audio|speech"
# Of old checkpoints: what is computed today. Scales of a cache in fp8 are not needed for one in full precision.
_TABLES = r"(inv_freq|masked_bias|attn\.bias|attention\.bias|(cos|sin)_cached|position_ids|[kvq]_scale)$"
_CHUNKED = 67  # tokens; no multiple of a chunk's length
_LENGTH = 12  # tokens of the probe; the second half is changed


def check_config(name: str, config: Any) -> None:
    """Refuse what is no causal LM, or is packed by a method other than bitsandbytes.

    Args:
        name: What the user asked for.
        config: The model's config, before its weights are read.

    Raises:
        UserError: One of these.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"wanted a causal language model, got {name!r}, an encoder-decoder ({config.model_type}); choose a "
            "decoder such as Qwen2 or Llama"
        )
    if causal_class(config) is None:
        raise UserError(
            f"wanted a causal language model, got {name!r}, which transformers does not know as one "
            f"({config.model_type}); choose a decoder such as Qwen2 or Llama"
        )
    for part in (config, config.get_text_config(decoder=True)):
        packed = getattr(part, "quantization_config", None) or {}
        facts: Mapping[str, Any] = packed if isinstance(packed, dict) else packed.to_dict()
        ours = facts.get("load_in_4bit") or facts.get("load_in_8bit")
        method = facts.get("quant_method") or ("bitsandbytes" if ours or not facts else "an unnamed method")
        method = getattr(method, "value", method)
        if method != "bitsandbytes":
            raise UserError(
                f"wanted weights in full precision or packed by bitsandbytes, got {name!r} packed by {method}; choose "
                "its unpacked checkpoint, and backbone.quantisation = '8bit' or '4bit' to pack it here"
            )


def causal_class(config: Any) -> Any:
    """The class of transformers that loads a causal LM with this config, or None.

    What is loaded from a model of images and text is saved with the text's config alone (Mllama, Emu3), by which
    AutoModelForCausalLM does not find it again; the config names its class.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own_code or type(config) in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    named = set(config.architectures or ()) & set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    made = [getattr(transformers, name, None) for name in sorted(named)]
    return next((one for one in made if getattr(one, "config_class", None) is type(config)), None)


def check_weights(name: str, model: Any, found: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights of the model, has more of the same layers, or holds an encoder beside it.

    Args:
        name: What the user asked for.
        model: The causal LM that was made of it.
        found: The report of ``from_pretrained(..., output_loading_info=True)``.

    Raises:
        UserError: Weights were initialised at random or left out, or belong to another model.
    """
    for key, what in (("missing_keys", "without"), ("mismatched_keys", "with another shape of")):
        lost = sorted(k if isinstance(k, str) else k[0] for k in found.get(key) or ())
        if lost:
            raise UserError(
                f"wanted all weights of a causal language model, got {name!r} {what} {_some(lost)}; they would be "
                "random: choose a checkpoint that was saved with its language-model head"
            )
    unused = [
        k for k in sorted(found.get("unexpected_keys") or ()) if not re.search(f"{_TOWERS}|{_TABLES}", k)
    ]
    encoder = [k for k in unused if re.search(r"(^|\.)encoder\.", k)]
    if encoder:
        raise UserError(
            f"wanted a causal language model, got {name!r} with weights of an encoder ({_some(encoder)}); choose a "
            "decoder such as Qwen2 or Llama"
        )
    inside = [k for k in unused if _is_inside(model, k)]
    if inside:
        raise UserError(
            f"wanted weights that {type(model).__name__} has, got {name!r} with {_some(inside)} beside them; choose a "
            "checkpoint that fits its config.json"
        )
    if unused:
        note(f"warning: {name} holds weights that its config.json leaves out: {_some(unused)}")


def _is_inside(model: nn.Module, key: str) -> bool:
    """Whether a weight that a model does not have would be part of one of its layers, or of its head."""
    for name in (key, f"{getattr(model, 'base_model_prefix', '')}.{key}"):
        module, path = model, name.split(".")
        while path and hasattr(module, path[0]) and isinstance(getattr(module, path[0]), nn.Module):
            module = getattr(module, path.pop(0))
        above = name.removesuffix("." + ".".join(path))
        if above != name and (
            re.search(r"\.\d+(\.|$)", above) or next(module.parameters(recurse=False), None) is not None
        ):
            return True
    return False


def check_vocabulary(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer with ids that the model has no row for.

    Raises:
        UserError: It has some.
    """
    embedding = causal_lm(model).get_input_embeddings()
    rows = min(head_weight(model).shape[0], getattr(embedding, "num_embeddings", 1 << 62))
    largest = largest_id(tokenizer)
    if largest >= rows:
        raise UserError(
            f"wanted a tokenizer with ids below {rows}, the rows of the model's embedding, got one with ids up to "
            f"{largest}; use the model's own, or save both after model.resize_token_embeddings({largest + 1})"
        )


def largest_id(tokenizer: Any) -> int:
    """The largest id that a tokenizer gives."""
    try:
        return max(tokenizer.get_vocab().values(), default=0)
    except (NotImplementedError, AttributeError):
        return len(tokenizer) - 1


def reads_nothing(tokenizer: Any) -> bool:
    """Whether a tokenizer has special tokens alone."""
    try:
        known = set(tokenizer.get_vocab())
    except (NotImplementedError, AttributeError):
        return False
    return known <= {str(token) for token in (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())}


def grow(model: Any, tokenizer: Any) -> None:
    """Rows for every id of a tokenizer, where a model has too few: drawn as its others were."""
    needed = largest_id(tokenizer) + 1
    if needed > causal_lm(model).get_input_embeddings().weight.shape[0]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            causal_lm(model).resize_token_embeddings(needed, mean_resizing=False)


def check_model(model: Any, tokenizer: Any = None) -> None:
    """Refuse a model that sees the future, does not run on text alone, or has an adapter that is not understood.

    A model that passed is not tried again.

    Args:
        model: A causal LM, or PEFT's adapter around one; it stays as it is.
        tokenizer: Whose ids it has to have rows for, see `check_vocabulary`; None: not asked.

    Raises:
        UserError: One of these.
    """
    if tokenizer is not None:
        check_vocabulary(model, tokenizer)
    if model in _SOUND:
        return
    base = causal_lm(model)
    if hasattr(model, "peft_config") or getattr(base, "_hf_peft_config_loaded", False):
        _check_adapter(model)
    if base not in _SOUND:
        _check_causal(base)
    _SOUND.add(base)
    _SOUND.add(model)


def _check_adapter(model: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model, "get_base_model"):
        raise UserError(
            f"wanted PEFT's model around a base, got a {type(model).__name__} that holds an adapter itself; use "
            "peft.get_peft_model or peft.PeftModel.from_pretrained"
        )
    configs = model.peft_config
    if list(configs) != ["default"]:
        raise UserError(
            f"wanted a model with one adapter named 'default', got {', '.join(configs)}; merge or delete the others"
        )
    if configs["default"].is_prompt_learning:
        raise UserError(
            f"wanted an adapter of weights such as LoRA, got {configs['default'].peft_type.value}, which changes the "
            "prompt; train another one"
        )
    if isinstance(causal_lm(model).get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "wanted an adapter of the body, got one on the output head, whose rows are used by hand; leave it out, or "
            "merge it with PEFT's merge_and_unload first"
        )


@torch.no_grad()
def _check_causal(model: Any) -> None:
    """Two rows of a text; in the second run the second half of one row is another. No earlier logit may move.

    How far logits move when the *other* row changes is the model's noise: experts and kernels see all rows.
    """
    ids = sample_ids(model, 2 * _LENGTH)[0]
    same, other = ids[::2], ids[1::2]
    half = _LENGTH // 2
    changed = torch.cat([same[:half], other[half:]])
    try:
        with probing(model):
            # Some cut longer texts into chunks, in other code. First, because RoPE may remember a long text.
            model(input_ids=sample_ids(model, odd_length(model)), use_cache=False)
            runs: list[Tensor] = [
                model(input_ids=torch.stack(rows), use_cache=False).logits[:, :half].float()
                for rows in ([same, same], [same, changed], [changed, same])
            ]
    except _FAILURES as error:
        raise UserError(
            f"wanted a causal language model that reads text alone in {head_weight(model).dtype}, got "
            f"{type(model).__name__}, which fails ({type(error).__name__}: {first_line(error)}); set another "
            "backbone.dtype, or choose another model"
        ) from error
    kind = head_weight(model).dtype
    # Tokens that a model never writes have the least number.
    usual = runs[0].abs() < torch.finfo(kind).max / 4
    if not usual.any() or any(bool(run.isnan().any()) for run in runs):
        raise UserError(
            f"wanted a causal language model, got {type(model).__name__} whose logits are not numbers (NaN) in {kind}; "
            "set another backbone.dtype, or restore its weights"
        )
    moves = {
        (n, row): (runs[n][row] - runs[0][row])[usual[row]].abs().max() for n in (1, 2) for row in (0, 1)
    }
    moved, noise = float(moves[1, 1]), max(float(moves[1, 0]), float(moves[2, 1]))
    floor = 1e-4 if kind in (torch.float32, torch.float64) else 2 * torch.finfo(kind).eps
    size = float(runs[0][usual].abs().max())
    if moved > max(10 * noise, floor * size):
        raise UserError(
            f"wanted a causal language model, got {type(model).__name__}, which sees the future: logits move by "
            f"{moved:.2g} when later tokens change; set is_decoder = true in its config.json if it was trained so, or "
            "choose another model"
        )


def odd_length(model: Any) -> int:
    """Tokens of a probe: no multiple of what a model may cut texts into, where it has so many positions."""
    return min(_CHUNKED, max_positions(model) or _CHUNKED)


def max_positions(model: Any) -> int | None:
    """Tokens that the model has positions for, or None where no table of positions ends.

    Learned and sinusoidal tables of the text body count (GPT-2, OPT, BERT, GPT-J), and what is as long as the config
    says (a causal mask that is stored, MPT's ALiBi). Rotary positions are computed, so they never end.

    Args:
        model: A causal LM, or an adapter around one.
    """
    text = text_body(model)
    found = [*_embedded(text, causal_lm(model).get_input_embeddings())]
    config = causal_lm(model).config.get_text_config(decoder=True)
    declared = next((int(n) for n in (getattr(config, key, None) for key in DECLARED) if n), None)
    if declared is not None and (_is_stored(text, declared) or hasattr(text, "build_mpt_alibi_tensor")):
        found.append(declared)
    return min(found, default=None)


def _embedded(text: nn.Module, words: Any) -> Iterator[int]:
    """Usable rows of each embedding of positions."""
    for name, module in text.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and module is not words
            and re.search(r"(^|[._])(pos|wpe)", name)
            and not re.search(f"rel|{_TOWERS}", name)
        ):
            # OPT, BART and BioGPT leave the first rows out; RoBERTa counts from behind the padding's row.
            unused = getattr(module, "offset", None)
            behind = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - int(behind if unused is None else unused)


def _is_stored(text: nn.Module, n: int) -> bool:
    """Whether a module keeps a table of n positions or a mask (n, n); rotary caches grow and do not count."""
    for module in text.modules():
        kept = {**dict(module.named_buffers(recurse=False)), **vars(module)}
        for name, tensor in kept.items():
            if not isinstance(tensor, Tensor) or re.search(r"freq|cos|sin_|sin$", name):
                continue
            table = "pos" in name and n in tensor.shape
            if table or (tensor.dim() >= 2 and tensor.shape[-2:] == (n, n)):
                return True
    return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
