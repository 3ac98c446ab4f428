"""The small shop that the other examples learn from: two CSV files, as any shop can export them.

Its customers mostly buy what comes next in one of four lists, so there is something to learn in seconds. Put your
own tables in its place: any names of columns that mean user, item, time and title are understood.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import polars as pl

import triewise

LISTS = [
    "Coffee beans, dark roast|Coffee grinder, manual|Coffee filter, paper|Coffee filter, steel|Milk frother, electric",
    "Tent, 2 persons|Tent pegs, steel|Sleeping bag, summer|Sleeping bag, winter|Camping stove|Gas cartridge",
    "Pencil, HB|Pencil, 2B|Pencil sharpener|Eraser, white|Drawing paper, A4|Drawing paper, A3|Ink, black",
    "Bicycle tube, 28 inch|Bicycle tyre, 28 inch|Tyre lever, set of 3|Bicycle pump|Bicycle light, front|Bicycle bell",
]
# Few steps of a very small model: enough for this shop, far too few for a real one.
TINY = "backbone.tiny.vocabulary=320 backbone.tiny.width=48 backbone.tiny.layers=1"
QUICK = [*TINY.split(), "training.steps=100", "training.accumulation=1", "training.warmup_steps=10"]


def write_shop(folder: Path, customers: int = 400, seed: int = 0) -> Path:
    """Write ``purchases.csv`` and ``products.csv``; one purchase in seven is anything at all."""
    rng, lists = random.Random(seed), [text.split("|") for text in LISTS]
    titles = [title for one in lists for title in one]
    purchases = []
    for customer in range(customers):
        wanted = rng.choice(lists)
        start = rng.randrange(len(wanted))
        for day in range(rng.randint(4, 7)):
            title = rng.choice(titles) if rng.random() < 1 / 7 else wanted[(start + day) % len(wanted)]
            purchases.append((f"customer {customer}", f"p{titles.index(title)}", 86_400 * day))
    products = [(f"p{i}", title) for i, title in enumerate(titles)]
    for name, columns, rows in [
        ("purchases.csv", ["user", "item", "timestamp"], purchases),
        ("products.csv", ["item", "title"], products),
    ]:
        pl.DataFrame(rows, schema=columns, orient="row").write_csv(folder / name)
    return folder


def trained(recipe: str = "demo/msl", *changes: str) -> Path:
    """Train a recipe on the shop and give back its run folder, which lies in a new temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="triewise-"))
    source = [f"data.source=csv:{write_shop(folder)}", f"data.folder={folder / 'data'}"]
    run = folder / recipe.replace("/", "-")
    triewise.train(triewise.load_recipe(recipe, [*source, *changes]), run)
    return run


if __name__ == "__main__":
    shop = write_shop(Path(tempfile.mkdtemp(prefix="triewise-")))
    for file in sorted(shop.iterdir()):
        print(file.name, *file.read_text(encoding="utf-8").splitlines()[:4], sep="\n    ")
