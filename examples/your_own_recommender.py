"""Your own recommender under the shipped contract, beside the models of the package.

A recommender needs ``groups`` and ``recommend``; with ``item_scores`` the rest is ``rank_items``. ``triewise.testing``
holds what it owes its users as tests to inherit. This one recommends what was bought after the last item.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import triewise
from shop import write_shop
from triewise.data import Split
from triewise.ranking import Groups, MostPopular, check_histories, evaluate, rank_items
from triewise.testing import RecommenderContract, broken_promises


@dataclass(frozen=True)
class WhatComesNext:
    """Scores are how often an item followed the last one of the history."""

    groups: Groups
    followed: np.ndarray  # (I, I) counts: row the item before, column the item after

    @classmethod
    def fit(cls, train: Split, groups: Groups) -> "WhatComesNext":
        """Count pairs in the training rows."""
        followed = np.zeros((groups.n_items, groups.n_items), np.float32)
        for history, target in zip(train.history, train.target, strict=True):
            followed[history[-1], target] += 1
        return cls(groups, followed)

    def item_scores(self, histories):
        """Scores (B, I) of all items, higher is better."""
        check_histories(histories, self.groups)
        return np.stack([self.followed[h[-1]] if len(h) else self.followed.sum(0) for h in histories])

    def recommend(self, histories, k=10, exclude=None, allow=None):
        """The best ``k`` groups for each history."""
        return rank_items(self, histories, k, exclude, allow)


folder = Path(tempfile.mkdtemp(prefix="triewise-"))
dataset = triewise.prepare(f"csv:{write_shop(folder)}", folder / "data")
groups = Groups.from_labels(dataset.catalog.group, dataset.train_targets)
mine = WhatComesNext.fit(dataset.train, groups)


class TestMine(RecommenderContract):
    make = staticmethod(lambda: mine)  # in a file of tests pytest finds this class and runs its 13 checks


print("broken promises:", broken_promises(TestMine) or "none")
for recommender in (mine, MostPopular(groups, dataset.train_targets)):
    name = type(recommender).__name__
    print(name, "HR@1", evaluate(recommender, dataset.test, name=name, exclude="history").metrics["HR@1"])
tent = dataset.catalog.index("Tent, 2 persons")
print("after a tent:", mine.recommend([[tent]], k=2).titles(dataset.catalog)[0])
