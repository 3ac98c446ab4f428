"""The Hugging Face hub: read what is cached, ask whether it answers before asking it for anything, upload a folder.

The hub's own client retries every request for almost a minute. Here a hub that cannot be reached is noticed
within ten seconds and becomes one line; ``HF_HUB_OFFLINE=1`` and ``TRIEWISE_OFFLINE=1`` are asked first.
"""

from __future__ import annotations

import http.client
import logging
import os
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triewise.cache import connect, offline
from triewise.errors import UserError, first_line, reading

HUB_SECONDS = "10"
# What transformers stumbles over in a config that it does not understand, or code of a model for another release.
_UNFIT = (LookupError, AttributeError, TypeError, AssertionError, NameError, SyntaxError)


def silence() -> None:
    """Progress is ours to show (a bar for one shard of weights is noise), and a hub's error becomes one line."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def from_hub(load: Callable[..., Any], name: str, revision: str | None, **options: Any) -> Any:
    """``load(name)``, a language model or its tokenizer, from a folder, the local cache or the hub.

    The hub is asked where it can be reached within ten seconds, and only for what is not in the cache.

    Args:
        load: Takes a name, ``revision`` and ``local_files_only``.
        name: A hub id or a local folder.
        revision: Commit, branch or tag; None for the default branch.
        options: Passed on to ``load``.

    Raises:
        UserError: It cannot be had; the line says why.
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", HUB_SECONDS)
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", HUB_SECONDS)
    silence()
    with reading(name):  # in files that are damaged transformers and tokenizers stumble over much else
        try:
            try:
                return load(name, revision=revision, local_files_only=True, **options)
            except (OSError, ValueError):
                if Path(name).is_dir() or not hub_answers():
                    raise
            return load(name, revision=revision, **options)
        except Exception as error:
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"{name!r} comes with code of its own; add --trust-remote-code (trust_remote_code=True) where you "
                    "trust it"
                ) from None
            found = _reason(name, error)
            if found is None:
                raise
            raise UserError(
                f"wanted the language model {name!r} (a hub id or a local folder), got: {found[0]}; {found[1]}"
            ) from error


def _reason(name: str, error: Exception) -> tuple[str, str] | None:
    """Why a model cannot be had, and what to do; None where its files are damaged."""
    place, said = Path(name), first_line(error)
    if place.is_file() and place.suffix != ".gguf":
        return "a file", "give the folder that holds config.json, weights in safetensors and the tokenizer"
    files = sorted(place.iterdir()) if name and place.is_dir() else [place] if place.is_file() else []
    pointer = next((file.name for file in files if _is_pointer(file)), None)
    if pointer is not None:
        return f"{pointer}, a pointer of git LFS", "run git lfs pull there"
    kinds = {file.suffix for file in files}
    if ".gguf" in kinds and not kinds & {".safetensors", ".bin"}:
        return "weights in GGUF", "take the checkpoint in safetensors that they were made from"
    if name and place.is_dir() and not any(file.name == "config.json" for file in files):
        return "a folder without config.json", "give the one that holds it, weights and tokenizer"
    if not files and (place.is_absolute() or name.startswith(("~", ".")) or len(place.parts) > 2):
        return "no such folder", "correct the path"
    if isinstance(error, ImportError):
        return said, "install what it needs, or choose another model"
    if isinstance(error, _UNFIT) or type(error).__name__.startswith("StrictDataclass"):
        import transformers

        return (
            f"{type(error).__name__}: {said}",
            f"its files are wrong, or made for another release of transformers than {transformers.__version__}",
        )
    if not isinstance(error, (OSError, ValueError, RuntimeError)):
        return None
    if files:
        return said, "restore the files of this folder or make them again"
    return said, "check the name and the network, or put the files in a local folder and give its path"


def _is_pointer(file: Path) -> bool:
    """Whether a file stands for one that git LFS has not fetched."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(24) == b"version https://git-lfs."


def hub_answers() -> bool:
    """Whether the hub answers at all within ten seconds, whatever it says; False where the user works offline."""
    if offline() or os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return False
    try:
        connect(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), float(HUB_SECONDS)).close()
    except urllib.error.HTTPError as error:
        error.close()
    except (OSError, http.client.HTTPException):
        return False
    return True


def download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a recommender's repository in the cache, brought up to date where the hub answers.

    Args:
        repo_id: ``namespace/name``.
        revision: Commit, branch or tag; None for the default branch.
        patterns: Names of the files that are wanted.

    Raises:
        UserError: It cannot be had; the line says why.
    """
    from huggingface_hub import snapshot_download

    silence()
    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=patterns, local_files_only=not hub_answers()
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"wanted the recommender {repo_id!r} (a folder or a hub id), got: {first_line(error)}; check the name and "
            "the network"
        ) from error
    return Path(folder)


def upload(folder: Path, repo_id: str, *, private: bool | None, token: str | None, message: str) -> str:
    """Make the model repository ``repo_id`` where it is absent, write a folder into it, and give its address.

    Raises:
        UserError: The hub cannot be reached, or refuses.
    """
    import huggingface_hub

    silence()
    if not hub_answers():
        raise UserError(
            f"wanted to write {repo_id!r} on the hub, which does not answer (or HF_HUB_OFFLINE or TRIEWISE_OFFLINE is "
            "set); use save_pretrained and upload the folder later"
        )
    api = huggingface_hub.HfApi(token=token)
    # Among the bases of the hub's error is that of the transport library, whichever this version uses.
    failures: Any = (OSError, ValueError, RuntimeError, *huggingface_hub.errors.HfHubHTTPError.__bases__)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=str(repo_id), folder_path=str(folder), commit_message=message)
    except failures as error:
        raise UserError(
            f"wanted to write {repo_id!r} on the hub, got: {first_line(error)}; check the name NAMESPACE/NAME, and log "
            "in with hf auth login or give token"
        ) from error
    return str(address)
