"""What decided a recommendation: the tokens where the catalogue left a choice, and how sure the model was there.

Most tokens of a title are forced: once "Sleeping bag, w" is written only "Sleeping bag, winter" is left. Those cost
nothing and say nothing. ``[brackets]`` are the others; behind each stands its probability and among how many it was.
"""

import math

import triewise
from shop import QUICK, trained
from triewise.reports import explain
from triewise.tokens import information_gain

recommender = triewise.load(trained("demo/msl", *QUICK))
catalog, trie = recommender.catalog, recommender.trie
decisions = int((trie.n_children > 1).sum())
print(f"{trie}: {decisions} of its nodes leave a choice")

history = [catalog.index("Tent, 2 persons"), catalog.index("Tent pegs, steel")]
ranking = recommender.recommend([history], k=3, exclude="history")
explained = explain(
    recommender.engine,
    recommender.backbone.tokenizer,
    catalog,
    prompt=recommender.prompts.encode(history),
    items=ranking.items[0],
    target=catalog.index("Sleeping bag, summer"),
    gain=information_gain(trie, recommender.counts),
)
for place, recommendation in enumerate(explained, 1):
    title = "".join(f"[{token.text}]" if token.decides else token.text for token in recommendation.tokens)
    print(f"\n{place}. {math.exp(recommendation.score):.1%}  {title}")
    for token in recommendation.tokens:
        if token.decides:
            text = token.text or "(end of title)"
            print(
                f"     {text!r}: {math.exp(token.log_p):.1%}, one of {token.n_valid}, gain {token.gain:.2f} nats"
            )
