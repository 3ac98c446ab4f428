"""One part of the suite as a process: loads its libraries, waits for its seconds on stdin, runs."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from benchmarks.gpu.data import Options
from benchmarks.gpu.report import Report
from triewise.models import resolve_device


def main() -> None:
    """Wait for the seconds, run the part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dry-run", action="store_true")
    chosen = parser.parse_args()
    module = importlib.import_module(f"benchmarks.gpu.{chosen.part}")
    print("ready", flush=True)
    line = sys.stdin.readline()
    if not line.strip():
        return
    device = resolve_device(chosen.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda:0")
    warnings.simplefilter("default")  # the plain path is announced by a warning, each time
    with tempfile.TemporaryDirectory() as scratch:
        options = Options(chosen.data, chosen.dry_run, device, Path(scratch))
        facts = {"dry_run": chosen.dry_run, "data": "brought" if chosen.data else "made up"}
        report = Report(chosen.part, chosen.out, float(line), device, facts)
        module.run(report, options)
        report.save()


if __name__ == "__main__":
    main()
