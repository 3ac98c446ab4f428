"""The tree cache on trial: what it makes of a chunk of nodes, and what plain forwards make of the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from triewise.decoding.treecache import Counters, Prefix, TreeCache, pad
from triewise.models import Measured, body, head_weight
from triewise.tokens import Trie

SHARED_AT_LEAST = 8  # tokens of a common beginning that are worth a forward of their own
BELOW = 5  # nodes of the path that is looked at


@torch.inference_mode()
def measured(model: Any, catalogue: Trie, chunk: int, n_prompt: int, shortest: int, seed: int) -> Measured:
    """The last path of a chunk of nodes, behind a prompt of so many tokens and a shorter one.

    Args:
        model: A causal LM.
        catalogue: Whose tokens are taken, and as many nodes, but for no more than a chunk has.
        chunk: Trie nodes of one forward.
        n_prompt: Tokens of the longer prompt; where there is room, both begin alike.
        shortest: The shorter one has at least so many.
        seed: Chooses the tokens.
    """
    random, nobody, device = np.random.default_rng(seed), Counters(), head_weight(model).device
    # Tokens of titles first: a model says little about tokens it was never trained on.
    known = np.unique(catalogue.token[1:])
    if len(known) < SHARED_AT_LEAST:
        known = np.union1d(known, np.arange(min(2 * SHARED_AT_LEAST, head_weight(model).shape[0])))
    n_titles = max(6, min(chunk, catalogue.n_nodes) // (BELOW - 1))
    titles = random.choice(known, (n_titles, BELOW + 1))
    titles[1::2, :2] = titles[: n_titles - n_titles % 2 : 2, :2]  # two have a beginning of their own
    trie = Trie.from_sequences(titles.tolist())
    text = random.choice(known, n_prompt + 1).tolist()
    n_short = max(shortest, n_prompt // 4, min(n_prompt, SHARED_AT_LEAST + 1))
    prompts = [text[1:], text[1:n_short] + text[:1]]
    node = np.flatnonzero(~trie.is_leaf)[1:]
    node = node[np.lexsort((trie.depth[node], trie.item_lo[node]))]
    path = np.array(trie.path_to(int(node[-1])))
    first = int(np.flatnonzero(node == path[0])[0])  # of the last branch
    at_path = torch.tensor([int(np.flatnonzero(node[first:] == n)[0]) for n in path], device=device)
    rows = [prompt + trie.token[path].tolist() for prompt in prompts]
    ids, length_B = pad(rows, device)
    at = length_B[:, None] - BELOW + torch.arange(BELOW, device=device)

    def plain(ids: Tensor, at: Tensor) -> Tensor:
        hidden: Tensor = body(model)(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.gather(1, at[:, :, None].expand(-1, -1, hidden.shape[2]))

    alone = [plain(ids[b : b + 1, :n], at[b : b + 1]) for b, n in enumerate(length_B.tolist())]
    shares = n_prompt > n_short > SHARED_AT_LEAST >= shortest
    prefix = Prefix.run(model, text[1 : SHARED_AT_LEAST + 1], nobody) if shares else None
    cache = TreeCache(model, trie, prompts, nobody, prefix)
    if first:
        cache.append(node[None, :first])

    def tree() -> Tensor:
        hidden = cache.append(node[None, first:])
        cache.keep(np.arange(first))
        return hidden[:, at_path]

    return Measured.of(model, torch.cat(alone), lambda: plain(ids, at), tree)
