"""MSL, IGD and LML on one data set, with paired differences.

The three objectives differ in two settings: over which tokens the softmax of the loss runs (those that continue a
title, or the vocabulary), and what a token weighs (all the same, or less where it decides nothing). The intervals
are over users; a shop of 24 products with 400 customers says nothing about how the methods compare on your data.
"""

import triewise
from shop import QUICK, trained
from triewise.app import comparisons

METHODS = {
    "MSL": ["objective.support=trie"],
    "IGD": ["objective.support=vocabulary", "objective.weight=igd", "objective.beta=0.2"],
    "LML": ["objective.support=vocabulary"],
}

evaluations = []
for name, settings in METHODS.items():
    run = trained("demo/msl", *QUICK, *settings, f"title={name}", "training.steps=60")
    evaluations.append(triewise.evaluate(run))

for evaluation in evaluations:
    low, high = evaluation.metrics["intervals"]["HR@5"]
    print(f"{evaluation.name}: HR@5 {evaluation.metrics['HR@5']:.3f} ({low:.3f} to {high:.3f})")
print()
for d in comparisons(evaluations):
    print(f"{d.a} - {d.b}: {d.metric} {d.difference:+.3f} ({d.low:+.3f} to {d.high:+.3f}), p = {d.p:.3f}")
