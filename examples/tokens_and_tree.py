"""The tree behind it all, without a model: titles as tokens, forced tokens, information gain, and MSL's loss.

A node of the tree is a prefix that some title begins with; its children are the valid next tokens. Here a token is a
letter, so that one can see it. The loss of a forced token is zero under MSL, whatever the model's logits are.
"""

import numpy as np
import torch

from triewise import Trie
from triewise.tokens import information_gain, zero_gain
from triewise.training import trie_nll

TITLES = ["tea", "ten", "toast"]
COUNTS = np.array([6, 2, 2])  # how often each was bought
END = 0

trie = Trie.from_sequences([[ord(letter) for letter in title] + [END] for title in TITLES])
gain, silent = information_gain(trie, COUNTS), zero_gain(trie, COUNTS)
print(trie)
for item, title in enumerate(TITLES):
    path = trie.path_to(int(trie.leaf[item]))
    for node, letter in zip(path, [*title, "end"], strict=True):
        before = trie.parent[node]
        valid = "".join(sorted(chr(t) for t in trie.token[trie.parent == before].tolist() if t > 0))
        kind = "forced" if trie.n_children[before] == 1 else f"one of {valid}"
        print(f"    {letter:<4} gain {gain[node]:.3f} nats  {kind}{', no gain' if silent[node] else ''}")
    print()

title = [*map(ord, TITLES[1]), END]
nodes = [0, *trie.path_to(int(trie.leaf[1]))[:-1]]  # the node before each token
logits = torch.randn(len(title), 128, generator=torch.Generator().manual_seed(0))
msl = trie_nll(logits, torch.tensor(title), torch.tensor(nodes), trie)
lml = torch.nn.functional.cross_entropy(logits, torch.tensor(title), reduction="none")
print("loss of each token of", TITLES[1], "with random logits")
print("    MSL", [round(x, 3) for x in msl.tolist()])
print("    LML", [round(x, 3) for x in lml.tolist()])
