"""What the suite reads: prepared data sets, a tokenizer, and the weights of the small real model.

    python -m benchmarks.gpu.data --raw DIR --out gpu-data

prepares the data sets in DIR (amazon_books, amazon_office, amazon_games_d3) and puts the tokenizer of
``smollm2-135m-q4`` beside them; it needs the network, or that model in the cache. Without a folder the suite makes up a
small data set, for a dry run.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triewise.data import Dataset, load_dataset, prepare
from triewise.files import read_json, write_json
from triewise.models import load_tokenizer
from triewise.settings import TinyModel
from triewise.tokens import Prompts, Trie, build_prompts

SOURCES = {"amazon_books": "msl", "amazon_office": "msl", "amazon_games_d3": "d3"}
TOKENIZER = "tokenizer"
HISTORY = 10
WORDS = [
    "red",
    "blue",
    "green",
    "night",
    "day",
    "sun",
    "moon",
    "star",
    "river",
    "stone",
    "glass",
    "iron",
    "wind",
    "snow",
    "fire",
    "gold",
]


@dataclass(frozen=True)
class Options:
    """What every part is told.

    Attributes:
        data: Folder of `data`; None: data are made up.
        tiny: Whether everything is as small as it can be, for a dry run.
        device: Where things run.
        scratch: Folder for what need not stay.
    """

    data: Path | None
    tiny: bool
    device: torch.device
    scratch: Path

    @property
    def half(self) -> torch.dtype:
        """The dtype of decoding: bfloat16, and float32 where a dry run shows the way only."""
        return torch.float32 if self.tiny else torch.bfloat16


def dataset(options: Options, name: str) -> Dataset:
    """A prepared data set; made up where there is no folder."""
    if options.data is not None:
        return load_dataset(options.data / name)
    folder = options.scratch / name
    return load_dataset(folder) if (folder / "dataset.json").is_file() else _made_up(options.scratch, folder)


def _made_up(scratch: Path, folder: Path, n_users: int = 60, n_items: int = 80) -> Dataset:
    """Users who walk round a ring of titles of two to four words."""
    raw, rng = scratch / "raw", np.random.default_rng(0)
    raw.mkdir(parents=True, exist_ok=True)
    titles = [" ".join([*rng.choice(WORDS, 1 + i % 3), str(1900 + i)]) for i in range(n_items)]
    with (raw / "items.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("item_id", "title"), *enumerate(titles)])
    with (raw / "interactions.csv").open("w", encoding="utf-8", newline="") as file:
        rows: list[tuple[Any, ...]] = [("user_id", "item_id", "timestamp")]
        for user in range(n_users):
            start, step = int(rng.integers(n_items)), int(rng.integers(1, 3))
            rows += [(user, (start + step * t) % n_items, 1000 + t) for t in range(8 + user % 5)]
        csv.writer(file).writerows(rows)
    return prepare(f"csv:{raw}", folder, max_history=HISTORY)


def tokenizer(options: Options, data: Dataset) -> Any:
    """The tokenizer that was brought, else one trained on the titles."""
    if options.data is not None and (options.data / TOKENIZER).is_dir():
        return load_tokenizer(str(options.data / TOKENIZER))
    return load_tokenizer("tiny", titles=data.catalog.title, tiny=TinyModel(vocabulary=400))


def prompts_of(options: Options, data: Dataset, template: str) -> tuple[Prompts, Trie]:
    """Prompts and trie of a data set."""
    noun, verb = data.info["noun"], data.info["verb"]
    made = build_prompts(
        tokenizer(options, data), data.catalog, template, noun, verb, max_history=HISTORY, max_tokens=512
    )
    return made, Trie.from_sequences((made.title_tokens.values, made.title_tokens.offsets))


def main() -> None:
    """Prepare what is to be brought."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, required=True, help="folder of the raw data sets")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for name, kind in SOURCES.items():
        prepare(f"{kind}:{options.raw / name}", options.out / name, max_history=HISTORY)
        facts = read_json(options.out / name / "dataset.json")
        write_json(options.out / name / "dataset.json", facts | {"source": f"{kind}:{name}"})
    shutil.rmtree(options.out / TOKENIZER, ignore_errors=True)
    load_tokenizer("smollm2-135m-q4").save_pretrained(options.out / TOKENIZER)


if __name__ == "__main__":
    main()
