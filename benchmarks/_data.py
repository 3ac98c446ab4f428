"""What benchmarks are measured on: data sets, prepared where they are not yet, and a small trained run."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.prepare import write
from triewise.app import train_run
from triewise.data import Dataset, load_dataset, prepare
from triewise.data.splits import NAMES
from triewise.recipe import load_recipe

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # real data sets beside the project
SYNTHETIC = "synthetic"  # a source for `prepared`: 20,000 interactions of 200 users with 50 items


def prepared(source: str, folder: Path | None = None, max_history: int = 10) -> Dataset:
    """The data set in ``folder``, prepared there where it is not; without a folder every row is in memory."""
    if folder is not None and (folder / "dataset.json").is_file():
        return load_dataset(folder)
    with tempfile.TemporaryDirectory() as scratch:
        if source == SYNTHETIC:
            source = f"csv:{write(Path(scratch, 'raw'), 20_000, 'csv').parent}"
        dataset = prepare(source, folder or Path(scratch, "data"), max_history=max_history)
        for name in NAMES:
            getattr(dataset, name)  # a split is read when it is first asked for, and the scratch folder goes
    return dataset


def quick_run(folder: Path) -> Path:
    """A run of a small ``tiny`` backbone on the synthetic data, trained for 20 steps in ``folder``."""
    source = prepared(SYNTHETIC, folder / "data").info["source"]
    changes = [f"data.source={source}", f"data.folder={folder / 'data'}", "data.max_history=10"]
    changes += ["backbone.device=cpu", "backbone.tiny.width=32", "backbone.tiny.feed_forward=64"]
    changes += ["training.steps=20", "training.warmup_steps=2"]
    train_run(load_recipe("demo/msl", changes), folder / "run")
    return folder / "run"
