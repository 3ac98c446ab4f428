"""Exact search against beams: how many of the best ten titles beams miss, and what either costs.

A beam search keeps the best W prefixes and drops the others for good. Exact search keeps a bound for every prefix and
stops with a proof. ``certified`` says for each user that nothing better was missed; beams get it where the scores
they dropped were low enough. ``token_forwards`` counts positions that went through the model; the tree of 24 titles is
so small that the best ten touch nearly all of it, so exact search saves little here.
"""

import triewise
from shop import QUICK, trained

run = trained("demo/msl", *QUICK)
recommender = triewise.load(run)
histories = [[item, (item + 7) % 24] for item in range(24)]

exact = recommender.with_settings(search="exact").recommend(histories, k=10)
best = [set(row) for row in exact.items.tolist()]


def show(name: str, ranking: triewise.Ranking) -> None:
    """Print what a search found of the exact best ten, with what certainty and at what cost."""
    missed = sum(len(wanted - set(row)) for wanted, row in zip(best, ranking.items.tolist(), strict=True))
    work = ranking.counters
    print(
        f"{name:<10} misses {missed:3} of {10 * len(best)}, certified for {ranking.certified.sum():2} of "
        f"{len(best)} users; token-forwards {work['token_forwards']:5}, prefixes expanded {work['expansions']:4}"
    )


show("exact", exact)
for beams in (10, 15):
    found = recommender.with_settings(search="beam", beams=beams).recommend(histories, k=10)
    show(f"{beams} beams", found)
show("catalogue", recommender.with_settings(search="catalogue").recommend(histories, k=10))
