"""From two CSV files to recommendations: prepare, train, evaluate, recommend.

Set ``FOLDER`` to a folder of your own with one table of purchases (user, item, timestamp) and one of items (item,
title). The model here is trained for a few seconds on a shop of 24 products; a real one wants more of everything.
"""

import tempfile
from pathlib import Path

import triewise
from shop import QUICK, write_shop

FOLDER = None  # such as Path("data/shop")

work = Path(tempfile.mkdtemp(prefix="triewise-"))
source = FOLDER or write_shop(work)

dataset = triewise.prepare(f"csv:{source}", work / "data")
print(dataset.catalog, {name: dataset.info["counts"][name] for name in ("users", "interactions")})

recipe = triewise.load_recipe(
    "demo/msl", [f"data.source=csv:{source}", f"data.folder={work / 'data'}", *QUICK]
)
result = triewise.train(recipe, work / "run")
print(f"trained {result.steps_done} steps in {result.seconds:.0f} s")

metrics = triewise.evaluate(work / "run").metrics
print("test:", ", ".join(f"{name} {metrics[name]:.2f}" for name in ("HR@1", "HR@5", "NDCG@5")))

recommender = triewise.load(work / "run")
history = [0, 1]  # or [recommender.catalog.index("a title"), ...]
ranking = recommender.recommend([history], k=3, exclude="history")
print("after", *(recommender.catalog.title[item] for item in history), sep="\n    ")
print("comes")
for title, score in zip(ranking.titles(recommender.catalog)[0], ranking.scores[0], strict=False):
    print(f"    {title}  (log-probability {score:.2f})")
