"""Make a changed recommender whole again, for tests of what is checked behind the hashes of its files."""

from pathlib import Path
from typing import Any

from triewise.files import file_hashes, read_json, write_json


def sealed_again(folder: Path, **changes: Any) -> None:
    """Write the hashes of the files as they are now into ``recommender.json``, with some values changed."""
    manifest = folder / "recommender.json"
    facts: dict[str, Any] = read_json(manifest)
    now = file_hashes(folder)
    hashes = {name: now[name] for name in facts["sha256"] if name in now}
    write_json(manifest, facts | {"sha256": hashes} | changes, sealed=True)
