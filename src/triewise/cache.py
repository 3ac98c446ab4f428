"""The folder for everything that can be fetched or computed again, and wheels of the Python package index.

It is ``platformdirs.user_cache_dir("triewise")``, or ``TRIEWISE_CACHE``. ``TRIEWISE_OFFLINE=1`` forbids every
connection.
"""

from __future__ import annotations

import http.client
import os
import queue
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import platformdirs

from triewise.errors import UserError

CONNECT_SECONDS = 5
PIP_SECONDS = 300


def cache_folder() -> Path:
    """Folder for everything that can be fetched or computed again.

    Raises:
        UserError: The system knows no home folder, and ``TRIEWISE_CACHE`` is not set.
    """
    try:
        return Path(
            os.environ.get("TRIEWISE_CACHE") or platformdirs.user_cache_dir("triewise", appauthor=False)
        )
    except RuntimeError as error:
        raise UserError(
            f"wanted a folder for the cache, the system knows no home folder ({error}); set TRIEWISE_CACHE to one"
        ) from None


def offline() -> bool:
    """Whether the user forbids connections (``TRIEWISE_OFFLINE=1``)."""
    return os.environ.get("TRIEWISE_OFFLINE", "") not in ("", "0")


def connect(url: str | urllib.request.Request, seconds: float) -> http.client.HTTPResponse:
    """Open an address within a time limit, all told.

    The connection is made in a thread: looking up a name has no time limit of its own, and a host with several
    addresses gets the limit once for each.

    Raises:
        OSError: It cannot be opened, or not in time.
        HTTPException: What answers speaks no HTTP.
    """
    answers: queue.Queue[http.client.HTTPResponse | OSError | http.client.HTTPException] = queue.Queue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(url, timeout=seconds))
        except (OSError, http.client.HTTPException) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def download_wheel(package: str, version: str, folder: Path) -> Path:
    """Download one wheel from the Python package index into ``folder``, without its dependencies.

    Raises:
        UserError: If pip fails or takes longer than ``PIP_SECONDS``; says the last line that pip wrote.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "--timeout", str(CONNECT_SECONDS)]
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
