"""Amazon 2023 from the hub of its authors: interactions (5-core) and metadata of a category, checked, in pieces.

A download that stopped goes on where it was. Nothing but the command `triewise fetch` makes a connection here.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from triewise.cache import CONNECT_SECONDS, connect, offline
from triewise.errors import UserError
from triewise.files import TEMPORARY, sha256_file, sync
from triewise.progress import note, progress

_PLACE = "datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main"
_BLOCK = 1 << 20


class HubFile(NamedTuple):
    """A file of the hub: bytes and SHA-256."""

    size: int
    sha256: str


# The interactions `benchmark/5core/rating_only/NAME.csv` and the metadata `raw/meta_categories/meta_NAME.jsonl`.
CATEGORIES = {
    "Books": (
        HubFile(550_245_256, "6e65a282b42894099a105f3a30dae09354e6cf423b8b81f0014b21a1fd8d3add"),
        HubFile(14_697_581_022, "3b008960580e390874b6723d438a3df3558bc98b9547ed37c90dc1659109cec7"),
    ),
    "CDs_and_Vinyl": (
        HubFile(89_980_186, "897a633e7cf3e77f87c311447d3cfc7d761e7e900427ef23dd6eceda6a0c9f52"),
        HubFile(948_861_684, "c52275a5bce63bf293f987bff5ff1f2b268982797545f3df2b7662ab638e8aec"),
    ),
    "Clothing_Shoes_and_Jewelry": (
        HubFile(1_339_976_042, "dd1ea1d6cbdf4c061067648fb978fd4412eded0d59b48232e5db7b1057da7a12"),
        HubFile(17_960_532_903, "e5ff908573938ee114e4f4dfcfc46799b0ead24a57a8c075fbca2e6e28d78382"),
    ),
    "Gift_Cards": (
        HubFile(140_919, "7058a1488f6120bdeacc7be8fd4e8588f390db5dc2d6532567f30d1c0601c11b"),
        HubFile(2_038_189, "7909903c85f0690b4ff653981724af1ea6473e7b21a7e32c7adae5026240808f"),
    ),
    "Movies_and_TV": (
        HubFile(431_542_901, "95e28dfa9855fc883667a6b90fa0cc2b9d7cd18f9d704e36fcb4fc7765100b79"),
        HubFile(1_285_744_674, "beb82feef266bfa6d2e279903fd823a8b3b9c065059e1048226d0b74dc16b47d"),
    ),
    "Musical_Instruments": (
        HubFile(29_687_789, "e68320657122371f11839c3be69de0d0543bacebb0b1ede26d645724df19f87e"),
        HubFile(631_877_970, "96f40b5440918f07e3e08e84b7a6874a06a5e32a9988998ca9520cfd1b51a12c"),
    ),
    "Office_Products": (
        HubFile(104_457_590, "f21c01544176fb6a24821a32859af5c684812cef3e80f7be8d208c6bae51a420"),
        HubFile(2_146_468_843, "d9709095587ee34b2d5e639ca69de2a6fc8ab1953c467b86715e409c5ad78314"),
    ),
    "Sports_and_Outdoors": (
        HubFile(201_385_322, "572b2046ec1c67f9b9d041fae36256e20da6785e0e79fc688d7a81b11667b3e8"),
        HubFile(4_132_263_769, "321aba659220c48a8dcf2a4034f1eb965fae031941d81c9b7e47811caae85db9"),
    ),
    "Toys_and_Games": (
        HubFile(224_003_119, "64c2e01a0402010477fb5fc35b43508a8df9e2bb208e0e6f763d93477bfb7a07"),
        HubFile(2_637_909_430, "caca4bc34518426d45e2924d1042923d9d3cd89eb69f4daeb0b3a9c87e278a9a"),
    ),
}


def fetch_category(category: str, folder: Path) -> Path:
    """Fetch both files of a category, those that are not there yet; ``amazon:FOLDER`` reads them.

    Args:
        category: A key of :data:`CATEGORIES`.
        folder: Where the files are to lie; made where it is absent.

    Returns:
        The folder; size and SHA-256 of both files were checked in this call.

    Raises:
        UserError: Unknown category, no connection, a download that stopped, or other bytes than are known.
    """
    if category not in CATEGORIES:
        raise UserError(
            f"wanted a category of Amazon 2023 whose files are known ({', '.join(CATEGORIES)}), got {category!r}; "
            "choose one of them, or download its files and give amazon:DIR"
        )
    folder.mkdir(parents=True, exist_ok=True)
    places = f"benchmark/5core/rating_only/{category}.csv", f"raw/meta_categories/meta_{category}.jsonl"
    for place, known in zip(places, CATEGORIES[category], strict=True):
        path = folder / Path(place).name
        if not (path.is_file() and path.stat().st_size == known.size and sha256_file(path) == known.sha256):
            _fetch(f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co')}/{_PLACE}/{place}", path, known)
    return folder


def _fetch(url: str, path: Path, known: HubFile) -> None:
    """Bring a file to its place, going on with what an earlier call left."""
    if offline():
        raise UserError(
            f"wanted {path.name}, TRIEWISE_OFFLINE=1 forbids connections; download {url} to {path}"
        )
    part = path.with_name(f"{TEMPORARY}{path.name}")
    note(f"fetching {url}")
    try:
        _append(url, part, known.size)
    except (OSError, http.client.HTTPException) as error:
        done = part.stat().st_size if part.exists() else 0
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(
            f"wanted {known.size:,} bytes of {url}, got {done:,} ({getattr(error, 'reason', error)}); run it again to "
            f"go on from there, or download it to {path}"
        ) from None
    size, digest = part.stat().st_size, sha256_file(part)
    if (size, digest) != known:
        part.unlink()
        raise UserError(
            f"wanted {known.size:,} bytes with sha256 {known.sha256} from {url}, got {size:,} with {digest}; "
            "try again later"
        )
    sync(part)
    os.replace(part, path)


def _append(url: str, part: Path, size: int) -> None:
    """Write what is missing of a file; all of it where the server does not send a part."""
    start = part.stat().st_size if part.exists() else 0
    if start >= size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
    with connect(request, CONNECT_SECONDS) as answer:
        resumed = start > 0 and answer.status == http.client.PARTIAL_CONTENT
        start = start if resumed else 0
        with (
            part.open("ab" if resumed else "wb") as handle,
            progress(part.name.removeprefix(TEMPORARY), size >> 20, "MB") as advance,
        ):
            advance(start >> 20)
            while block := answer.read(_BLOCK):
                handle.write(block)
                advance(len(block) >> 20)
        missing = size - part.stat().st_size
    if missing > 0:
        raise OSError("the connection ended")
