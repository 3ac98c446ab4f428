"""Filters: what may not be returned (exclude), and what alone may be (allow), user by user.

Filters take titles out of the ranking and change no score, so a title has the same score with and without them.
Where fewer than k titles are left the places behind them hold -1 with a score of -inf; ``titles`` leaves them out.
"""

import triewise
from shop import QUICK, trained

recommender = triewise.load(trained("demo/msl", *QUICK))
catalog = recommender.catalog
histories = [[catalog.index("Pencil, HB")], [catalog.index("Bicycle pump")]]


def show(what: str, ranking: triewise.Ranking) -> None:
    """Print the titles of each user."""
    print(what)
    for titles, scores in zip(ranking.titles(catalog), ranking.scores, strict=True):
        print("   ", ", ".join(f"{title} {score:.2f}" for title, score in zip(titles, scores, strict=False)))


show("all products", recommender.recommend(histories, k=3))
show('exclude="history": not what the user has', recommender.recommend(histories, k=3, exclude="history"))

sold_out = [item for item, title in enumerate(catalog.title) if title.startswith(("Pencil", "Bicycle l"))]
show("exclude, for each user a list", recommender.recommend(histories, k=3, exclude=[sold_out, sold_out]))

in_stock = [catalog.index("Eraser, white"), catalog.index("Bicycle bell")]
ranking = recommender.recommend(histories, k=3, allow=[in_stock, in_stock])
show("allow: two products are in stock, three were asked for", ranking)
print("    items", ranking.items.tolist())
