"""Run the GPU suite; see README.md beside this.

    python -m benchmarks.gpu --minutes 8 --out DIR [--data DIR] [--parts smoke decoding ...] [--dry-run]

Each part is a process of its own, so that a crash of one spares the next. All are started at once and load their
libraries; then they get the device one after the other, the most valuable first. What a part does not use of its time
goes to those behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Part: (share of the minutes, most seconds or None).
PARTS: dict[str, tuple[float, float | None]] = {
    "smoke": (0.125, 60.0),
    "decoding": (0.26, None),
    "training": (0.2, None),
    "codes": (0.1, None),
    "methods": (0.315, None),
}
GRACE = 15.0  # seconds after its limit before a part is ended


def main() -> int:
    """Run the parts; 0 when each wrote its file and no section failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="what `python -m benchmarks.gpu.data` wrote")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--dry-run", action="store_true", help="shapes as small as they can be, made-up data, any device"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + 60 * options.minutes
    chosen = [name for name in PARTS if name in options.parts]
    processes = {name: _start(name, options) for name in chosen}
    for i, name in enumerate(chosen):
        stdout = processes[name].stdout
        assert stdout is not None
        stdout.readline()  # it says that its libraries are loaded, or ends
        left = ends - time.monotonic()
        share, most = PARTS[name]
        limit = left * share / sum(PARTS[other][0] for other in chosen[i:])
        _finish(name, processes[name], min(limit, most or limit), options.out)
    return _summary(chosen, options.out)


def _start(name: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu.part", name, "--out", str(options.out)]
    command += ["--device", options.device, *(["--dry-run"] if options.dry_run else [])]
    command += ["--data", str(options.data)] if options.data else []
    paths = [str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false"}
    # As `accelerate launch --mixed_precision` says it to the Trainer: float32 weights under bfloat16 autocast.
    mixed = name in ("training", "methods") and not options.dry_run
    environment |= {"ACCELERATE_MIXED_PRECISION": "bf16" if mixed else "no"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment)


def _finish(name: str, process: subprocess.Popen[str], limit: float, out: Path) -> None:
    print(f"{name}: at most {limit:.0f} s", file=sys.stderr, flush=True)
    started, note = time.monotonic(), ""
    try:
        process.communicate(f"{limit:.1f}\n", timeout=limit + GRACE)
        note = f"exit status {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        note = f"ended {GRACE:.0f} s after its limit"
    except OSError as error:
        note = f"it was gone before its turn ({error})"
    print(f"{name}: {time.monotonic() - started:.0f} s {note}", file=sys.stderr, flush=True)
    if note:
        file = out / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"part": name}
        file.write_text(json.dumps(found | {"ended": note}, indent=1), encoding="utf-8")


def _summary(chosen: list[str], out: Path) -> int:
    failed = []
    for name in chosen:
        file = out / f"{name}.json"
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"ended": "no file"}
        bad = [section for section, row in found.get("sections", {}).items() if "error" in row]
        failed += bad + ([name] if "ended" in found else [])
        state = f"{len(found.get('sections', {}))} sections, failed: {bad}, skipped: {found.get('skipped')}"
        print(f"{name}: {state} {found.get('ended', '')}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
