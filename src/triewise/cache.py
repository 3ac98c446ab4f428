"""The folder for everything that can be fetched or computed again, and wheels of the Python package index.

It is ``platformdirs.user_cache_dir("triewise")``, or ``TRIEWISE_CACHE``. ``TRIEWISE_OFFLINE=1`` forbids every
connection.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import platformdirs

from triewise.errors import UserError

CONNECT_SECONDS = 5
PIP_SECONDS = 300


def cache_folder() -> Path:
    """Folder for everything that can be fetched or computed again."""
    return Path(os.environ.get("TRIEWISE_CACHE") or platformdirs.user_cache_dir("triewise", appauthor=False))


def offline() -> bool:
    """Whether the user forbids connections (``TRIEWISE_OFFLINE=1``)."""
    return os.environ.get("TRIEWISE_OFFLINE", "") not in ("", "0")


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Download one wheel from the Python package index into ``folder``, without its dependencies.

    Raises:
        UserError: If pip fails or takes longer than ``PIP_SECONDS``; says the last line that pip wrote.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", str(CONNECT_SECONDS)]
    command += ["--dest", str(folder), f"{package}=={version}"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_SECONDS,
        )
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"no wheel after {PIP_SECONDS} s"
    wheels = sorted(folder.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
    if not wheels:
        raise UserError(
            f"wanted {package} {version} from the Python package index, pip download failed ({reason})"
        )
    return wheels[0]
