"""A sequential model, SASRec, trained and judged beside a language model that writes titles.

A ``[sequential]`` section stands in the place of ``[backbone]`` and ``[objective]``; training, evaluation and loading
are the same. Saved recommenders are folders that stand on their own. This shop is learned in seconds by both.
"""

import triewise
from shop import QUICK, trained
from triewise.app import comparisons
from triewise.recommenders import SequentialRecommender

runs = {
    "titles": trained("demo/msl", *QUICK, "title=MSL"),
    "item ids": trained(
        "demo/sasrec", "sequential.width=32", "training.steps=80", "training.warmup_steps=10"
    ),
}
evaluations = []
for kind, run in runs.items():
    evaluation = triewise.evaluate(run)
    evaluations.append(evaluation)
    print(f"{evaluation.name}, which writes {kind}: HR@1 {evaluation.metrics['HR@1']:.3f}")
for d in comparisons(evaluations):
    print(f"{d.a} - {d.b}: {d.metric} {d.difference:+.3f} ({d.low:+.3f} to {d.high:+.3f})")

sasrec = triewise.load(runs["item ids"])
sasrec.save_pretrained(runs["item ids"].parent / "sasrec")
again = SequentialRecommender.from_pretrained(runs["item ids"].parent / "sasrec")
before, after = (r.recommend([[0, 1]], k=3).titles(r.catalog) for r in (sasrec, again))
print("saved, loaded, and the same:", before == after, before[0])
