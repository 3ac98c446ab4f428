"""A service: what `triewise serve RUN` answers, asked by the client that comes with it.

Here it runs in a thread of this process. Concurrent requests are decoded together; every answer says whether it is
proven, which tokens decided, what it cost and which version of the catalogue it is of. A new product is recommended at
once, by its title.
"""

from concurrent.futures import ThreadPoolExecutor

import triewise
from shop import QUICK, trained
from triewise.serving import in_background
from triewise.serving.client import Client

recommender = triewise.load(trained("demo/msl", *QUICK)).with_settings(search="exact")
histories = [["Pencil, HB"], ["Bicycle pump", "An unknown title"], ["Tent, 2 persons", "Tent pegs, steel"]]

with in_background(recommender, log=lambda line: None) as url, Client(url) as client:
    answer = client.recommend(histories, k=2, explain=True)
    for history, result in zip(histories, answer.results, strict=True):
        print(" + ".join(history), "(proven)" if result.certified else "", *result.unknown)
        for item in result.items:
            print(
                "   ",
                "".join(f"[{t.text}]" if t.decided else t.text for t in item.tokens),
                f"{item.score:.2f}",
            )

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda history: client.recommend([history], k=2), histories * 8))
    print("decoded together, users:", max(one.counters["users"] for one in together))

    version = client.change_catalog(add={"p99": "Tent, 4 persons"}, remove=["p7"])
    after = client.recommend([["Tent, 2 persons"]], k=24)
    print(
        f"version {version}:",
        [item.title for item in after.results[0].items if item.title.startswith("Tent")],
    )
    print("and back, version", client.rollback_catalog())
