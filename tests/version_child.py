"""A service in a process of its own that changes its catalogue, and may be killed before its n-th file change."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from tests import attack_child, worlds
from triewise.serving import LiveCatalogue

ADD, REMOVE = [("b", "Brought")], ["raw-4", "a-2"]


def change(line: Any, folder: Path, at: int) -> None:
    """Take up the last version and change it; something is sent between the two."""
    live = LiveCatalogue(worlds.recommender(), folder)
    attack_child._count_changes({at: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    os.chdir(folder)
    line.send(None)
    live.change(ADD, REMOVE)
