"""Prompts and trie tokens through a model's body: one cache, whose mask is the ancestor relation.

A prompt runs once per user. Trie nodes are appended behind it, in any number and from any branch: a node sees
the prompt, its ancestors and itself, whatever else lies in the cache. Nothing is reordered or copied per beam.

Dimension key: B users, P prompt tokens, T nodes in the cache, C nodes of one forward, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.arrays import Int64
from triewise.models import body, cache_of, head_weight, own_mask
from triewise.tokens import Trie

TokenLists = Sequence[Sequence[int]]
NOTHING = -1  # a place of the cache that holds no node


@dataclass
class Counters:
    """Work, counted where it is done.

    Attributes:
        token_forwards: Positions pushed through the transformer's body, without padding.
        prompt_tokens: Those of prompts.
        shared_prompt_tokens: Prompt positions reused from another user's forward.
        tree_tokens: Those of trie nodes.
        expansions: Nodes whose children were scored.
        rounds: Forwards after the prompt.
        head_rows: Hidden states pushed through the head.
        cache_bytes_peak: Largest size of the keys and values held at one time.
    """

    prompt_tokens: int = 0
    shared_prompt_tokens: int = 0
    tree_tokens: int = 0
    expansions: int = 0
    rounds: int = 0
    head_rows: int = 0
    cache_bytes_peak: int = 0

    def add_scored(self, n: int) -> None:
        """Some nodes more whose children are scored, each from a row of the head."""
        self.expansions += n
        self.head_rows += n

    @property
    def token_forwards(self) -> int:
        """Prompt and tree positions together."""
        return self.prompt_tokens + self.tree_tokens

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        return {"token_forwards": self.token_forwards, **vars(self)}


@dataclass(frozen=True)
class Prefix:
    """Tokens that many prompts start with, and their keys and values.

    Attributes:
        tokens: The ids, S of them.
        layers: Keys and values (1, H, S, D) of each layer.
    """

    tokens: tuple[int, ...]
    layers: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def run(cls, model: Any, tokens: Sequence[int], counters: Counters) -> Prefix:
        """Push the tokens through the body, once."""
        ids = torch.tensor([list(tokens)], device=head_weight(model).device)
        cache = body(model)(input_ids=ids, past_key_values=cache_of(), use_cache=True).past_key_values
        counters.prompt_tokens += len(tokens)
        return cls(tuple(tokens), tuple(_layers(cache)))

    def first(self, n: int) -> Prefix:
        """The first ``n`` tokens: what comes later changes nothing before it."""
        return Prefix(self.tokens[:n], tuple((k[:, :, :n], v[:, :, :n]) for k, v in self.layers))


class TreeCache:
    """The keys and values of some users' prompts and of the trie nodes that were run behind them.

    Args:
        model: A causal LM (or an adapter around one) in evaluation mode.
        trie: The catalogue.
        prompts: Token ids of each user, at least one each, and more than ``prefix``.
        counters: Receives the work done.
        prefix: What every prompt starts with; reused, not run.

    Attributes:
        root_hidden: (B, D) hidden states after the prompts: what the root's children are scored with.
        node: int64 (B, T), or (1, T) while all users hold the same nodes; -1 where a place is empty.
    """

    def __init__(
        self, model: Any, trie: Trie, prompts: TokenLists, counters: Counters, prefix: Prefix | None = None
    ) -> None:
        self.model, self.trie, self.counters = model, trie, counters
        self.device = head_weight(model).device
        n_shared = 0 if prefix is None else len(prefix.tokens)
        ids_BP, rest_B = pad([prompt[n_shared:] for prompt in prompts], self.device)
        shape = (len(prompts), -1, -1, -1)
        layers = () if prefix is None else prefix.layers
        cache = cache_of((k.expand(shape), v.expand(shape)) for k, v in layers)
        # Right padding under a causal mask: padding comes after every token that matters.
        output = body(model)(input_ids=ids_BP, past_key_values=cache, use_cache=True)
        self.layers = _layers(output.past_key_values)
        self.length_B = rest_B + n_shared
        row = torch.arange(len(prompts), device=self.device)
        self.root_hidden: Tensor = output.last_hidden_state[row, rest_B - 1]
        self.node: Int64 = np.zeros((1, 0), dtype=np.int64)
        self._set_prompt(n_shared + ids_BP.shape[1])
        counters.prompt_tokens += int(rest_B.sum())
        counters.shared_prompt_tokens += n_shared * len(prompts)

    def _set_prompt(self, n_prompt: int) -> None:
        self.n_prompt = n_prompt
        self.prompt_mask = torch.arange(n_prompt, device=self.device) < self.length_B[:, None]

    @property
    def n_users(self) -> int:
        """Number of users B."""
        return len(self.length_B)

    def append(self, node: Int64) -> Tensor:
        """Run nodes behind what the cache holds.

        Args:
            node: int64 (B, C), -1 where a user has fewer, or (1, C) for the same nodes for all users. Every
                ancestor of a node is in the cache or among them; none is there already.

        Returns:
            Hidden states (B, C, D).
        """
        trie, n_users = self.trie, self.n_users
        held = np.broadcast_to(self.node, (max(len(self.node), len(node)), self.node.shape[1]))
        node = np.broadcast_to(node, (len(held), node.shape[1]))
        keys = np.concatenate([held, node], axis=1)
        tree = torch.from_numpy(_sees(trie, node, keys)).to(self.device).expand(n_users, -1, -1)
        prompt = self.prompt_mask[:, None].expand(-1, node.shape[1], -1)
        inside = np.maximum(node, 0)
        depth = torch.from_numpy(trie.depth[inside].astype(np.int64)).to(self.device)
        token = torch.from_numpy(np.maximum(trie.token[inside], 0).astype(np.int64)).to(self.device)
        output = body(self.model)(
            input_ids=token.expand(n_users, -1),
            attention_mask=own_mask(self.model, torch.cat([prompt, tree], dim=2)[:, None]),
            position_ids=self.length_B[:, None] + (depth - 1).clamp(min=0),
            past_key_values=cache_of(self.layers),
            use_cache=True,
        )
        self.layers, self.node = _layers(output.past_key_values), keys
        self.counters.tree_tokens += int((node >= 0).sum()) * (n_users // len(node))
        self.counters.rounds += 1
        bytes_held = sum(k.nbytes + v.nbytes for k, v in self.layers)
        self.counters.cache_bytes_peak = max(self.counters.cache_bytes_peak, bytes_held)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def keep(self, place: Int64) -> None:
        """Forget all nodes but those at these places, (T',), of a cache that is the same for all users."""
        prompt = torch.arange(self.n_prompt, device=self.device)
        kept = torch.cat([prompt, torch.from_numpy(place).to(self.device) + self.n_prompt])
        self.layers = [(k[:, :, kept], v[:, :, kept]) for k, v in self.layers]
        self.node = self.node[:, place]

    def select(self, row: Int64) -> None:
        """Keep some users (B',), in this order; empty places are closed up."""
        node = np.broadcast_to(self.node, (self.n_users, self.node.shape[1]))[row]
        rows = torch.from_numpy(row).to(self.device)
        self.length_B, self.root_hidden = self.length_B[rows], self.root_hidden[rows]
        before, n_prompt = self.n_prompt, int(self.length_B.max())
        width = int((node >= 0).sum(1).max(initial=0))
        place = np.argsort(node < 0, axis=1, kind="stable")[:, :width]
        self.node = np.take_along_axis(node, place, axis=1)
        at = torch.from_numpy(place).to(self.device)[:, None, :, None]

        def moved(values: Tensor) -> Tensor:
            values = values[rows]
            tree = values[:, :, before:]
            tree = tree.gather(2, at.expand(-1, tree.shape[1], -1, tree.shape[3]))
            return torch.cat([values[:, :, :n_prompt], tree], 2)

        self.layers = [(moved(k), moved(v)) for k, v in self.layers]
        self._set_prompt(n_prompt)

    def join(self, other: TreeCache) -> None:
        """Take in the users of another cache, behind these."""
        n_prompt = max(self.n_prompt, other.n_prompt)
        node = [np.broadcast_to(c.node, (c.n_users, c.node.shape[1])) for c in (self, other)]
        width = max(n.shape[1] for n in node)
        missing = [((0, 0), (0, width - n.shape[1])) for n in node]
        self.node = np.concatenate(
            [np.pad(n, m, constant_values=NOTHING) for n, m in zip(node, missing, strict=True)]
        )

        def widened(values: Tensor, cache: TreeCache) -> Tensor:
            wide = values.new_zeros((*values.shape[:2], n_prompt + width, values.shape[3]))
            tree = values[:, :, cache.n_prompt :]
            wide[:, :, : cache.n_prompt] = values[:, :, : cache.n_prompt]
            wide[:, :, n_prompt : n_prompt + tree.shape[2]] = tree
            return wide

        self.layers = [
            tuple(torch.cat([widened(a, self), widened(b, other)]) for a, b in zip(ours, theirs, strict=True))
            for ours, theirs in zip(self.layers, other.layers, strict=True)
        ]
        self.length_B = torch.cat([self.length_B, other.length_B])
        self.root_hidden = torch.cat([self.root_hidden, other.root_hidden])
        self._set_prompt(n_prompt)


def common_length(prompts: TokenLists) -> int:
    """Number of tokens that all prompts start with, at least one token less than the shortest has."""
    lists = [list(prompt) for prompt in prompts]
    shortest, longest = min(lists), max(lists)  # in lexicographic order; what lies between shares no less
    limit = min(map(len, lists)) - 1
    return next((i for i in range(limit) if shortest[i] != longest[i]), limit)


def _layers(cache: Any) -> list[Any]:
    """Keys and values (B, H, S, D) of each layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def pad(prompts: TokenLists, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) ids padded on the right with 0, and (B,) lengths."""
    length = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), int(length.max())), dtype=np.int64)
    ids[np.arange(ids.shape[1]) < length[:, None]] = [token for prompt in prompts for token in prompt]
    return torch.from_numpy(ids).to(device), torch.from_numpy(length).to(device)


def _sees(trie: Trie, node: Int64, key: Int64) -> NDArray[np.bool_]:
    """(B, C, S) whether a key (B, S) is an ancestor of a node (B, C) or the node itself."""
    a, q = np.maximum(key, 0), np.maximum(node, 0)
    # An ancestor's item range holds the node's, and it is not deeper.
    sees: NDArray[np.bool_] = (
        (trie.item_lo[a][:, None] <= trie.item_lo[q][:, :, None])
        & (trie.item_hi[a][:, None] >= trie.item_hi[q][:, :, None])
        & (trie.depth[a][:, None] <= trie.depth[q][:, :, None])
        & (key >= 0)[:, None]
    )
    return sees
