"""An assistant (D3): a model over item ids helps the language model to choose, step by step.

At each step the score of a token is ``a`` times the language model's log-probability plus ``1 - a`` times the share
of the assistant's probability that lies below that token. ``a = 1`` is the language model alone. Choose ``a`` on
validation rows, as here, and never on the rows you report.
"""

import triewise
from shop import QUICK, trained
from triewise.ranking import evaluate

run = trained("demo/msl", *QUICK)
assistant = triewise.load(
    trained("demo/sasrec", "sequential.width=32", "training.steps=80", "training.warmup_steps=10")
)
dataset = triewise.load_dataset(run.parent / "data")
recommender = triewise.load(run)


def hit_rate(weight: float, split: str) -> float:
    """HR@1 with the language model's weight."""
    mixed = recommender.with_settings(assistant=assistant, assistant_weight=weight)
    return evaluate(mixed, getattr(dataset, split), name=f"a = {weight}", exclude="history").metrics["HR@1"]


valid = {weight: hit_rate(weight, "valid") for weight in (1.0, 0.75, 0.5, 0.25)}
for weight, found in valid.items():
    print(f"a = {weight:4}: HR@1 {found:.3f} on validation rows")
chosen = max(valid, key=valid.__getitem__)
test, alone = hit_rate(chosen, "test"), hit_rate(1.0, "test")
print(f"chosen a = {chosen}; HR@1 {test:.3f} on test rows, alone {alone:.3f}")
