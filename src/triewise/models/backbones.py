"""From the name of a backbone to the model: built here, from the hub, from a folder, or an adapter on any of them.

Nothing here knows about recommendation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from triewise.errors import UserError
from triewise.files import read_json
from triewise.models.adapters import ADAPTER_CONFIG, add_lora, load_lora
from triewise.models.anatomy import resolve_device, resolve_dtype
from triewise.models.checks import check_model, check_vocabulary, grow
from triewise.models.hub import download
from triewise.models.item_slots import load_slots
from triewise.models.loading import BASE, BASE_FACTS, Backbone, How, from_pretrained, quantised, tokenizer_of
from triewise.models.smollm2 import SMOLLM2, converted_smollm2, explain_stand_in, smollm2
from triewise.models.tiny import build_tiny, train_tokenizer
from triewise.settings import LoraSettings, TinyModel

ADAPTER_FILES = [
    "adapter_*",
    "*token*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "*.jinja",
]  # of a repository of PEFT


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
    layers: int | None = None,
) -> Backbone:
    """Load ``name`` in evaluation mode.

    Args:
        name: ``tiny`` (built and initialised here), ``smollm2-135m``, ``smollm2-135m-q4`` (4-bit weights from
            the package index, dequantised), a hub id, or a local folder: a checkpoint, an adapter of PEFT, or what
            :meth:`Backbone.save` wrote.
        titles: Texts on which the ``tiny`` tokenizer is trained.
        seed: Seed of the initialisation of ``tiny`` and of a new adapter.
        revision: Commit, branch or tag of a hub id.
        device: ``auto`` (cuda, mps, cpu in this order) or a torch device.
        dtype: ``auto`` (bfloat16 on a CUDA device that has it, else float32) or a torch dtype's name. An adapter is
            float32 whatever its base is; so is what transformers keeps in float32 (rotary frequencies, some norms).
        tiny: Shape of ``tiny``; default half a million parameters.
        quantisation: ``none``, ``8bit`` or ``4bit`` (bitsandbytes); all but the head and the embeddings.
        lora: Adds a new adapter of this rank, if it is not 0.
        base: Where ``name`` is an adapter: folder of its base, if that is no longer where it was.
        trust_remote_code: Passed to transformers; executes code of the model's repository.
        layers: Only the first so many layers of a checkpoint, see `first_layers`; None: all.

    Raises:
        UserError: Unknown device, dtype or quantisation, a model that cannot be found or `checks` refuses, too many
            ``layers`` or those of no checkpoint, another base than an adapter's, or targets that are no layers.
    """
    target = resolve_device(device)
    how = How(target, resolve_dtype(dtype, target), quantisation, trust_remote_code, layers)
    if Path(name, BASE_FACTS).is_file():
        backbone = _load_adapted(Path(name), base, how)
    elif name == "tiny":
        backbone = _built(titles, tiny or TinyModel(), seed, how)
    elif name == "smollm2-135m":
        backbone = smollm2(how)
    elif name == "smollm2-135m-q4":
        backbone = from_pretrained(converted_smollm2(), None, how, name)
    else:
        backbone = _checkpoint_or_adapter(name, revision, base, how)
    if quantisation != "none":
        backbone = replace(backbone, origin=backbone.origin | {"quantisation": quantisation})
    if not (backbone.quantised or backbone.adapted):
        backbone.model.to(target)  # to no dtype: transformers keeps rotary frequencies in float32
    backbone.model.eval()
    check_model(backbone.model)
    if lora is not None and lora.rank:
        backbone = with_adapter(backbone, lora, seed)
    load_slots(backbone.model, Path(name))
    return backbone


def _built(titles: Sequence[str], tiny: TinyModel, seed: int, how: How) -> Backbone:
    _check_whole("tiny", how.layers)
    backbone = build_tiny(titles, tiny, seed, how.dtype)
    return backbone if how.quantisation == "none" else quantised(backbone, how)


def _check_whole(name: str, layers: int | None) -> None:
    if layers is not None:
        raise UserError(
            f"wanted a checkpoint to take the first {layers} layers of, got {name!r}; leave layers out"
        )


def load_tokenizer(name: str, *, titles: Sequence[str] = (), tiny: TinyModel | None = None) -> Any:
    """The tokenizer of :func:`load_backbone`'s ``name`` alone."""
    if name == "tiny":
        return train_tokenizer(titles, (tiny or TinyModel()).vocabulary)
    if name == "smollm2-135m-q4":
        return tokenizer_of(converted_smollm2())
    if name == "smollm2-135m":
        try:
            return tokenizer_of(*SMOLLM2)
        except UserError as error:
            explain_stand_in(error)
            return tokenizer_of(converted_smollm2())
    return tokenizer_of(name)


def with_adapter(backbone: Backbone, lora: LoraSettings, seed: int, tokens: Sequence[int] = ()) -> Backbone:
    """The same with a new adapter, which trains the rows of some tokens too; see `add_lora`."""
    origin = backbone.origin | {"lora": lora.model_dump(mode="json")}
    return replace(backbone, model=add_lora(backbone.model, lora, seed, tokens), origin=origin)


def _checkpoint_or_adapter(name: str, revision: str | None, base: str | Path | None, how: How) -> Backbone:
    """A checkpoint, or what PEFT wrote: a folder or repository with an adapter."""
    folder, problem = Path(name), None
    if not (folder / ADAPTER_CONFIG).is_file():
        try:
            found = from_pretrained(name, revision, how, name)
            if not getattr(found.model, "_hf_peft_config_loaded", False):
                return found
        except UserError as error:
            if folder.is_dir():
                raise
            problem = error
        try:
            folder = download(name, revision, ADAPTER_FILES)
        except UserError as error:
            raise problem or error from None
        if problem and not (folder / ADAPTER_CONFIG).is_file():
            raise problem
    return _foreign_adapter(name, folder, base, how)


def _foreign_adapter(name: str, folder: Path, base: str | Path | None, how: How) -> Backbone:
    """An adapter that PEFT wrote, on the base that it names, or on another one that is given."""
    config = read_json(folder / ADAPTER_CONFIG)
    place = base or config.get("base_model_name_or_path")
    if not place or (Path(place).is_absolute() and not Path(place).exists()):
        raise UserError(
            f"wanted the base model of the adapter in {folder}, which names {place or 'none'} in {ADAPTER_CONFIG}; "
            "correct base_model_name_or_path there, or give a folder as base"
        )
    inner = load_backbone(
        str(place),
        revision=None if base else config.get("revision"),
        device=str(how.device),
        dtype=str(how.dtype).removeprefix("torch."),
        quantisation=how.quantisation,
        trust_remote_code=how.trust,
        layers=how.layers,
    )
    model = load_lora(inner.model, folder, ours=False)
    tokenizer = inner.tokenizer
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = tokenizer_of(str(folder))
        check_vocabulary(model, tokenizer)  # tokens may have been added for the adapter
    return Backbone(model, tokenizer, name, inner.origin | {"adapter": Path(name).name})


def _load_adapted(folder: Path, base: str | Path | None, how: How) -> Backbone:
    """An adapter that :meth:`Backbone.save` wrote, on its own base and no other."""
    _check_whole(str(folder), how.layers)
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
        layers=None if facts["saved"] else origin.get("layers"),
    )
    wanted = {"sha256": facts["saved"]} if facts["saved"] else origin
    _check_base(inner.origin, wanted, folder, given=base is not None)
    tokenizer = tokenizer_of(str(folder))
    grow(inner.model, tokenizer)  # rows of new tokens are in the adapter
    return Backbone(load_lora(inner.model, folder), tokenizer, origin["name"], origin)


def _check_base(origin: dict[str, Any], wanted: dict[str, Any], folder: Path, given: bool) -> None:
    """Refuse a base with other weights; a folder given for a hub id has no hash that could be compared."""
    for key in ("sha256_source", "sha256", *(() if given else ("revision",))):
        if origin.get(key) and wanted.get(key):
            if origin[key] == wanted[key]:
                return
            raise UserError(
                f"the base model of the adapter in {folder} is not the one it was trained on ({origin['repository']} "
                f"has another {key.partition('_')[0]}); give that one's folder as base, or train again"
            )
