"""What every benchmark needs: its command line with ``--quick``, and the memory of its process. Imports little."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any


def parsed(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """The options of the command line; with ``--quick`` their defaults are ``quick``."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only to see that it runs: seconds on one core, with small data made on the spot",
    )
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def peak_bytes() -> float:
    """Highest resident memory of this process so far; NaN where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():  # rather than getrusage, whose maximum a child process inherits from its parent
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
