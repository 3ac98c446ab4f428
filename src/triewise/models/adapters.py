"""Low-rank adapters and quantised bases: add, load, save. Models only, no tokenizers.

An adapter sits on linear layers of the text body, named in full: those that a text runs through as modules that give
a tensor. So no routers (they give tuples, or are called so), no vision or audio towers and no cross-attention (a text
does not reach them), and of a Mamba layer ``in_proj`` alone (fused kernels read its other weights by hand). The head
and the embeddings never carry one, because engine and loss multiply hidden states with rows of the head by hand; rows
of some tokens, such as codes of items, may be trained beside it. A quantised base is frozen.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from triewise.errors import UserError, first_line, reading
from triewise.files import read_json, write_json
from triewise.models.anatomy import causal_lm, probing, sample_ids, text_body
from triewise.models.merging import PEFT_FAILURES, adapted_layers, fold, is_adapted, is_packed, twin

if TYPE_CHECKING:
    from triewise.settings import LoraSettings

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PROBE = 8  # tokens of the text that shows which layers are used


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


def add_lora(model: Any, settings: LoraSettings, seed: int, tokens: Sequence[int] = ()) -> Any:
    """Put a fresh adapter around a causal LM and freeze everything else; scores stay those of the base.

    One layer of each kind is tried: what it gives with an adapter that does something must be what it gives with
    that adapter folded in.

    Args:
        model: A causal LM without adapter; it becomes part of the result.
        settings: Rank, alpha, dropout, targets, and whether fused experts are adapted too.
        seed: Of the initial weights (float32, drawn on the CPU); the global random state is left alone.
        tokens: Ids whose rows in the embedding and the head are trained too.

    Raises:
        UserError: A target that is no linear layer of the body, experts that cannot be adapted, a model that has an
            adapter already, or what PEFT says.
    """
    from peft import LoraConfig, get_peft_model

    if is_adapted(model):
        raise UserError(
            "wanted a base model without adapter to train a new one, got an adapter; give its base, or merge it first"
        )
    with _training(model):
        linear, stacked = _used_layers(model)
    if settings.experts and not (stacked and not settings.dropout):
        reason = f"lora.dropout = 0, got {settings.dropout}" if stacked else "a model with fused experts"
        raise UserError(f"backbone.lora.experts = true needs {reason}; set it to false")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(linear, settings.targets),
        target_parameters=stacked if settings.experts else None,
        trainable_token_indices=_layers_of_tokens(model, tokens),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _names_of_today(model):
            # PEFT uses a deprecated name, and says that it sets fan_in_fan_out for GPT-2's layers.
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(seed)
            adapted = get_peft_model(model, config).eval()
        off = _folding_errors(adapted)
    except PEFT_FAILURES as error:
        raise UserError(
            f"PEFT cannot adapt this {type(model).__name__} ({type(error).__name__}: {first_line(error)}); name other "
            "layers in backbone.lora.targets"
        ) from error
    if off:
        raise UserError(
            f"the adapter of {', '.join(off)} is another one once it is folded in; leave such layers out of "
            "backbone.lora.targets"
        )
    return adapted


def _layers_of_tokens(model: Any, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """What PEFT is told of trained tokens: the embedding, and the head where it has weights of its own."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = (words,) if head.weight is words.weight else (words, head)
    names = [name for name, module in model.named_modules() if module in layers]
    return {name: list(tokens) for name in names} if tokens else None


@contextmanager
def _names_of_today(model: Any) -> Iterator[None]:
    """PEFT takes names in mixture-of-experts models for those of transformers 4 and moves them to fused experts.

    Names here are those of the model as it is, so its type, by which PEFT decides, is hidden meanwhile.
    """
    config, kind = model.config, model.config.model_type
    config.model_type = ""
    try:
        yield
    finally:
        config.model_type = kind


def load_lora(model: Any, folder: Path, *, ours: bool = True) -> Any:
    """Put a saved adapter around its base, frozen, in evaluation mode.

    Args:
        model: The base.
        folder: What `save_lora` or PEFT itself wrote.
        ours: Names in it are those of the model as it is; PEFT translates what it wrote itself.

    Raises:
        UserError: The files are damaged, or the adapter is of another base.
    """
    from peft import PeftModel

    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if ours else (ADAPTER_CONFIG,):
        if not (folder / name).is_file():
            raise UserError(f"wanted {name} in {folder}, which is missing; restore it or train again")
    with reading(folder), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with _names_of_today(model) if ours else nullcontext():
                adapted = PeftModel.from_pretrained(model, str(folder)).eval()
            # PEFT only warns of weights that it did not find: they would be those of a new adapter.
            lost = [str(w.message) for w in said if "missing adapter keys" in str(w.message)]
            if lost:
                raise LookupError(lost[0][:200])
        except PEFT_FAILURES as error:
            raise UserError(
                f"the adapter in {folder} does not fit its base model ({first_line(error)}); give the one it was "
                "trained on"
            ) from None
    return adapted


def unfreeze_lora(model: Any) -> None:
    """Let a loaded adapter be trained on, with the rows of tokens that it has."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".trainable_tokens_delta." in name:
            parameter.requires_grad_(True)


def save_lora(model: Any, folder: Path, base: str, revision: str | None) -> None:
    """Write an ordinary PEFT adapter folder; ``base`` is what its config names as the base."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; ours is written where the recommender is
    config = read_json(folder / ADAPTER_CONFIG)
    config |= {"base_model_name_or_path": base, "revision": revision}
    for key in ("target_modules", "target_parameters"):
        if isinstance(config.get(key), list):
            config[key] = sorted(config[key])  # a set: its order changes from run to run
    write_json(folder / ADAPTER_CONFIG, config)


@torch.no_grad()
def _used_layers(model: Any) -> tuple[list[str], list[str]]:
    """Full names of the linear layers that an adapter may have, and of the weights (E, A, B) of fused experts.

    A layer must be called in training and in evaluation: some read a weight by hand in one of the two. Of experts
    that are modules of their own, those that this text was not sent to count as well.
    """
    head = model.get_output_embeddings()
    modules = {n: m for n, m in model.named_modules() if m is not head and (_linear(m) or _stacked(n, m))}
    given: dict[bool, dict[nn.Module, bool]] = {True: {}, False: {}}

    def notice(module: nn.Module, args: Any, output: Any) -> None:
        whole = isinstance(output, Tensor)
        if whole and args and isinstance(module, nn.Linear):
            # Some multiply each group of numbers by rows of its own.
            whole = output.shape == (*args[0].shape[:-1], module.out_features)
        given[model.training][module] = whole

    hooks = [m.register_forward_hook(notice) for m in modules.values()]
    try:
        for training in given:
            with probing(model, training):
                model(input_ids=sample_ids(model, _PROBE), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    used = [{_beside(name) for name, m in modules.items() if m in gives} for gives in given.values()]
    linear = [
        name
        for name, m in modules.items()
        if _linear(m)
        and all(_beside(name) in names for names in used)
        and all(gives.get(m, True) for gives in given.values())
        and not _left_out(model, name)
    ]
    stacked = [f"{name}.{w}" for name, m in modules.items() if m in given[True] for w in _stacked(name, m)]
    return linear, stacked


def _beside(name: str) -> str:
    """The name that modules of one list in one layer share: ``layers.3.experts.*.up``."""
    numbers = list(re.finditer(r"(?<=\.)\d+(?=\.|$)", name))
    if len(numbers) < 2:
        return name
    return name[: numbers[-1].start()] + "*" + name[numbers[-1].end() :]


def _left_out(model: nn.Module, name: str) -> bool:
    """Whether a linear layer is a router, or read by hand in the fused kernels of a Mamba layer."""
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    chooses = last.endswith("gate") and any("expert" in child for child, _ in parent.named_children())
    mamba = all(hasattr(parent, part) for part in ("A_log", "D", "conv1d"))
    return (
        "router" in last or path.endswith("router") or chooses or (mamba and not last.startswith("in_proj"))
    )


def _targets(linear: list[str], wanted: str | tuple[str, ...]) -> list[str]:
    """Full names of the layers with some ends; each given one must match a layer of the body."""
    if wanted == "all-linear":
        return linear
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise UserError(
                f"wanted ends of names of the body's linear layers ({', '.join(ends)}) in backbone.lora.targets, "
                f"got {target!r}; correct it or use 'all-linear'"
            )
    return [name for name in linear if any(name == t or name.endswith(f".{t}") for t in wanted)]


@torch.no_grad()
def _folding_errors(model: Any) -> list[str]:
    """Kinds of layers that give something else once a random adapter is folded in; quantised ones are not tried."""
    kinds: dict[str, Any] = {}
    for name, layer in adapted_layers(model.get_base_model()):
        if not is_packed(layer.get_base_layer()) and not name.endswith(".base_layer"):
            kinds.setdefault(_kind(name), layer)
    ups = {p: p.clone() for m in kinds.values() for n, p in m.named_parameters() if ".lora_B." in f".{n}"}
    generator, wrong = torch.Generator().manual_seed(0), set()

    def notice(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        whole = twin(layer)
        for _, part in adapted_layers(whole):
            fold(part)
        off = (whole.get_base_layer()(*args, **kwargs) - output).abs().max()
        # In bfloat16 this is 6 % of the largest number.
        loose = max(1e-4, 8 * torch.finfo(output.dtype).eps)
        if off > loose * output.abs().max():
            wrong.add(layer)

    hooks = [m.register_forward_hook(notice, with_kwargs=True) for m in kinds.values()]
    try:
        for weight in ups:
            weight.copy_(torch.randn(weight.shape, generator=generator))
        with probing(model):
            model(input_ids=sample_ids(model, _PROBE), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for weight, before in ups.items():
            weight.copy_(before)
    return [kind for kind, layer in kinds.items() if layer in wrong]


def _kind(name: str) -> str:
    """A name without numbers: what layers of one kind share."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def describe_lora(model: Any) -> str:
    """One line: the share of the text body's matrix weights that an adapter covers, and what it leaves out."""
    head, total, left = causal_lm(model).get_output_embeddings(), 0, Counter[str]()
    adapted = {(m.get_base_layer(), getattr(m, "parameter_name", "weight")) for _, m in adapted_layers(model)}
    for name, module in text_body(model).named_modules():
        if isinstance(module, nn.Embedding) or module is head or ".lora_" in name:
            continue
        for key, weight in module.named_parameters(recurse=False):
            if (weight.dim() == 2 and key == "weight") or (weight.dim() == 3 and _stacked(name, module)):
                size = module.in_features * module.out_features if is_packed(module) else weight.numel()
                total += size
                if (module, key) not in adapted:
                    kind = _kind(f".{name}.{key}".replace(".base_layer", ""))
                    left[re.sub(r"^.*?\*\.", "", kind).strip(".").removesuffix(".weight")] += size
    rest = ", ".join(kind for kind, _ in left.most_common(4))
    share = 1 - left.total() / max(total, 1)
    more = f"; not among the adapted: {rest}" if rest else ""
    return f"LoRA adapts {100 * share:.3g} % of the matrix weights of the text body{more}"


@contextmanager
def _training(model: Any) -> Iterator[None]:
    """Forwards of a model in training mode: some take texts of certain lengths alone there (Reformer).

    Raises:
        UserError: One fails.
    """
    try:
        yield
    except (*PEFT_FAILURES, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"wanted a model that trains on texts of any length, got {type(causal_lm(model)).__name__}, which fails "
            f"({type(error).__name__}: {first_line(error)}); choose another one"
        ) from error


@torch.enable_grad()
def freeze_unused(model: Any, n: int = _PROBE) -> None:
    """Freeze what a text does not reach: vision towers, cross-attention, weights that others stand in for.

    Such weights get no gradient, so nothing else changes; several processes wait for the gradient of every weight
    that can be trained, and files of trained weights need not hold them. Found from the graph of one small forward,
    as torch's DDP does; of experts that are modules of their own, one that is used speaks for all.

    Args:
        model: A causal LM, or PEFT's adapter around one.
        n: Tokens of the text.

    Raises:
        UserError: It does not train on such a text.
    """
    with _training(model), probing(model, training=True):
        end = model(input_ids=sample_ids(model, n), use_cache=False).logits.grad_fn
    todo, seen, reached = [end], {end, None}, set()
    while todo:
        node = todo.pop()
        if node is not None:
            reached.add(id(getattr(node, "variable", None)))
            new = {following for following, _ in node.next_functions} - seen
            seen |= new
            todo.extend(new)
    used = {_beside(name) for name, p in model.named_parameters() if id(p) in reached}
    for name, p in model.named_parameters():
        if p.requires_grad and _beside(name) not in used:
            p.requires_grad_(False)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _stacked(name: str, module: nn.Module) -> list[str]:
    """Names of a module's weights that hold one matrix for each expert."""
    if "expert" not in f"{name} {type(module).__name__}".lower():
        return []
    return [key for key, weight in module.named_parameters(recurse=False) if weight.dim() == 3]
