"""Prompts and trie tokens through a model's body: one cache, whose mask is the ancestor relation.

A prompt runs once per user. Trie nodes are appended behind it, in any number and from any branch: a node sees
the prompt, its ancestors and itself, whatever else lies in the cache. Nothing is reordered or copied per beam.
Prompts end at one place, so that the nodes of all users begin at one: [free | prompt | nodes | free].

Dimension key: B users, P places of prompts, T places of nodes, C nodes of one forward, D width, n some users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from triewise.arrays import Int64, place_in_run
from triewise.decoding.rooms import Rooms, Target, shared
from triewise.models import body, cache_of, head_weight, own_mask

if TYPE_CHECKING:
    from triewise.tokens import Trie

TokenLists = Sequence[Sequence[int]]
NOTHING = -1  # a place of a forward that holds no node
ROOM = 64  # places for nodes; a search that needs more makes twice as many
FREE = torch.iinfo(torch.int64).max  # comes after every node
# What a forward costs beside its positions, in positions: weights are read, kernels launched.
START = {"cpu": 64, "cuda": 512}


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
        cache_bytes_peak: Largest size of the keys and values held at one time, with the places kept free for nodes.
        padding: Positions of the tree cache's forwards that hold no token, because rows have one length.
    """

    prompt_tokens: int = 0
    shared_prompt_tokens: int = 0
    tree_tokens: int = 0
    expansions: int = 0
    rounds: int = 0
    head_rows: int = 0
    cache_bytes_peak: int = 0
    padding: int = 0

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
        n_nodes: Places for nodes to begin with.
        rows: Users that there is room for, longer prompts than these too; None: these alone.

    Attributes:
        root_hidden: (B, D) hidden states after the prompts: what the root's children are scored with.
        length: int64 (B,), tokens of the prompts.
        held: int64 (B,), nodes of each user, or (1,) while all users hold the same nodes.
    """

    def __init__(
        self,
        model: Any,
        trie: Trie,
        prompts: TokenLists,
        counters: Counters,
        prefix: Prefix | None = None,
        n_nodes: int = ROOM,
        rows: int | None = None,
    ) -> None:
        self.model, self.trie, self.counters, self.prefix = model, trie, counters, prefix
        self.device = head_weight(model).device
        self.n_prompt, self.n_users = max(map(len, prompts)), len(prompts)
        self.rows = rows or self.n_users
        if rows is not None:
            self.n_prompt = 1 << self.n_prompt.bit_length()
        self.length: Int64 = np.zeros(self.n_users, dtype=np.int64)
        self.held: Int64 = np.zeros(1, dtype=np.int64)
        # (B, T) of each node held: where it comes in depth-first order, and where the items under it end.
        self._order = torch.full((1, n_nodes), FREE, device=self.device)
        self._end = torch.zeros_like(self._order)
        self._rooms: Rooms | None = None
        self.root_hidden: Tensor
        self.admit(np.arange(self.n_users), prompts)

    def admit(self, row: Int64, prompts: TokenLists) -> None:
        """Run prompts, no longer than there is room for, and forget who had these rows (n,) before."""
        n_shared = 0 if self.prefix is None else len(self.prefix.tokens)
        length = np.array([len(prompt) for prompt in prompts])
        assert length.max() <= self.n_prompt
        if row.max() >= self.n_users:
            self._more(int(row.max()) + 1 - self.n_users)
        for users in blocks(length - n_shared, START.get(self.device.type, START["cuda"])):
            self._run(row[users], [prompts[u][n_shared:] for u in users.tolist()], n_shared)
        self.length[row] = length
        (length_B,) = on_device(self.device, self.length)
        before = torch.arange(self.n_prompt, 0, -1, device=self.device)
        self._sees_prompt = before <= length_B[:, None]
        if self.held.any():
            self._part()
            (rows,) = on_device(self.device, row)
            self.held[row], self._order[rows] = 0, FREE
        self.counters.prompt_tokens += int(length.sum()) - n_shared * len(prompts)
        self.counters.shared_prompt_tokens += n_shared * len(prompts)

    def _run(self, row: Int64, prompts: TokenLists, n_shared: int) -> None:
        """Push prompts without their shared beginning through the body, padded on the right."""
        n, rest = len(prompts), np.array([len(prompt) for prompt in prompts])
        ids, _ = pad(prompts, self.device)
        beginning = () if self.prefix is None else self.prefix.layers
        cache = cache_of((k.expand(n, -1, -1, -1), v.expand(n, -1, -1, -1)) for k, v in beginning)
        # Right padding under a causal mask: padding comes after every token that matters.
        output = body(self.model)(input_ids=ids, past_key_values=cache, use_cache=True)
        layers, hidden = _layers(output.past_key_values), output.last_hidden_state
        if self._rooms is None:
            self._rooms = Rooms(layers, self.n_users, self.n_prompt + self._order.shape[1])
            self.root_hidden = hidden.new_zeros(self.n_users, hidden.shape[2])
            self._see_bytes()
        width = n_shared + ids.shape[1]
        user, token = np.nonzero(np.arange(width) < n_shared + rest[:, None])
        place = row[user] * self._rooms.n_places + self.n_prompt - n_shared - rest[user] + token
        last = np.arange(n) * ids.shape[1] + rest - 1
        place_T, token_T, row_n, last_n = on_device(self.device, place, user * width + token, row, last)
        self._rooms.write(Target(place_T, token_T), layers)
        self.root_hidden[row_n] = hidden.flatten(0, 1)[last_n]
        self.counters.padding += ids.numel() - int(rest.sum())

    def append(self, node: Int64) -> Tensor:
        """Run nodes behind what the cache holds.

        Args:
            node: int64 (B, C), -1 where a user has fewer, or (1, C) for the same nodes for all users. Every
                ancestor of a node is in the cache or among them; none is there already.

        Returns:
            Hidden states (B, C, D).
        """
        trie, n_users, n_new = self.trie, self.n_users, node.shape[1]
        if len(node) > 1 or (node < 0).any():
            self._part()
        n_rows = len(self.held)
        node = np.broadcast_to(node, (n_rows, n_new))
        row, column = np.nonzero(node >= 0)
        place = self.held[row] + place_in_run(row)
        self.held = self.held + np.bincount(row, minlength=n_rows)
        width = int(self.held.max())
        rooms = self._with_room(width)
        inside = np.maximum(node, 0)
        depth = trie.depth[inside].astype(np.int64)
        order, end, token, position, column_T, place_T, room_T = on_device(
            self.device,
            trie.item_lo[inside] * (len(trie.level_ptr) - 1) + depth,
            trie.item_hi[inside].astype(np.int64),
            np.maximum(trie.token[inside], 0).astype(np.int64),
            self.length[:, None] + np.maximum(depth - 1, 0),
            row * n_new + column,
            row * self._order.shape[1] + place,
            row * rooms.n_places + self.n_prompt + place,
        )
        for held, new in ((self._order, order), (self._end, end)):
            held.view(-1).index_copy_(0, place_T, new.view(-1)[column_T])
        same = n_rows == 1 and len(place) == n_new
        at = slice(self.n_prompt + width - n_new, self.n_prompt + width)
        first = self.n_prompt - int(self.length.max())
        prompt = self._sees_prompt[:, None, first:].expand(-1, n_new, -1)
        tree = _sees(order, end, self._order[:, :width], self._end[:, :width]).expand(n_users, -1, -1)
        output = body(self.model)(
            input_ids=token.expand(n_users, -1),
            attention_mask=shared(own_mask(self.model, torch.cat([prompt, tree], dim=2)[:, None])),
            position_ids=position,
            past_key_values=rooms.cache(
                Target(at) if same else Target(room_T, column_T), n_users, slice(first, at.stop), n_new
            ),
            use_cache=True,
        )
        n_nodes = len(place) * (n_users // n_rows)
        self.counters.tree_tokens += n_nodes
        self.counters.padding += n_users * n_new - n_nodes
        self.counters.rounds += 1
        hidden: Tensor = output.last_hidden_state
        return hidden

    def keep(self, place: Int64) -> None:
        """Forget all nodes but those at these places, (T',), of a cache that is the same for all users."""
        (at,) = on_device(self.device, place)
        for held in (self._order, self._end):
            held[:, : len(place)] = held[:, at]
        self._order[:, len(place) :] = FREE
        if self._rooms is not None and len(place):
            self._rooms.gather(at + self.n_prompt, self.n_prompt)
        self.held = np.full(1, len(place))

    def select(self, row: Int64) -> Int64:
        """Keep some users (n,), each where it is or in the row of one who has gone, so that none is empty.

        Returns:
            int64 (n,), the rows that they have now.
        """
        self._part()
        n, now = len(row), row.copy()
        now[row >= n] = np.setdiff1d(np.arange(n), row)
        moved = now != row
        if moved.any() and self._rooms is not None:
            source, to = on_device(self.device, row[moved], now[moved])
            first, stop = (
                self.n_prompt - int(self.length[row].max()),
                self.n_prompt + int(self.held[row].max()),
            )
            self._rooms.move(source, to, slice(first, stop))
            for on in (self.root_hidden, self._sees_prompt, self._order, self._end):
                on[to] = on[source]
            self.length[now], self.held[now] = self.length[row], self.held[row]
        self.n_users, self.length, self.held = n, self.length[:n], self.held[:n]
        self.root_hidden, self._sees_prompt = self.root_hidden[:n], self._sees_prompt[:n]
        self._order, self._end = self._order[:n], self._end[:n]
        return now

    def _more(self, n: int) -> None:
        """Rows for users more."""
        self._part()
        self.n_users += n
        if self._rooms is not None and self.n_users > self._rooms.n_users:
            self._rooms.widen(n_users=min(self.rows, max(self.n_users, 2 * self._rooms.n_users)))
            self._see_bytes()
        nobody, places = np.zeros(n, dtype=np.int64), self._order.shape[1]
        self.length, self.held = np.append(self.length, nobody), np.append(self.held, nobody)
        free = torch.full((n, places), FREE, device=self.device)
        self._order = torch.cat([self._order, free])
        self._end = torch.cat([self._end, torch.zeros_like(free)])
        self.root_hidden = torch.cat(
            [self.root_hidden, self.root_hidden.new_zeros(n, self.root_hidden.shape[1])]
        )

    def _part(self) -> None:
        """From here on users may hold different nodes."""
        if len(self.held) < self.n_users:
            self.held = np.repeat(self.held, self.n_users)
            self._order, self._end = (held.repeat(self.n_users, 1) for held in (self._order, self._end))

    def _with_room(self, n_nodes: int) -> Rooms:
        """The rooms, wide enough for so many nodes of a user."""
        assert self._rooms is not None
        more = max(n_nodes, 2 * self._order.shape[1]) - self._order.shape[1]
        if n_nodes > self._order.shape[1]:
            self._order = torch.nn.functional.pad(self._order, (0, more), value=FREE)
            self._end = torch.nn.functional.pad(self._end, (0, more))
            self._rooms.widen(n_places=self._rooms.n_places + more)
            self._see_bytes()
        return self._rooms

    def _see_bytes(self) -> None:
        if self._rooms is not None:
            self.counters.cache_bytes_peak = max(self.counters.cache_bytes_peak, self._rooms.nbytes)


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
    on_it = on_device(device, ids, length)
    return on_it[0], on_it[1]


def on_device(device: torch.device, *arrays: Int64) -> list[Tensor]:
    """int64 arrays as tensors; off the CPU in one copy, for which nobody waits where memory can be pinned."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
    parts = torch.split(flat, [array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def blocks(length: Int64, start_cost: int) -> list[Int64]:
    """Users (B,) in groups of similar length for one forward each, so that all cost the least.

    A forward costs its positions, padding too, and ``start_cost``.
    """
    order = np.argsort(-length, kind="stable")
    longest, n = length[order], len(length)
    cost, cut = np.zeros(n + 1), np.zeros(n + 1, dtype=np.int64)
    for stop in range(1, n + 1):  # the best way to group the longest so many
        start = np.arange(stop)
        total = cost[:stop] + (stop - start) * longest[:stop] + start_cost
        cut[stop] = total.argmin()
        cost[stop] = total[cut[stop]]
    found, stop = [], n
    while stop:
        found.append(order[cut[stop] : stop])
        stop = int(cut[stop])
    return found[::-1]


def _sees(order: Tensor, end: Tensor, key_order: Tensor, key_end: Tensor) -> Tensor:
    """(B, C, T) whether a key (B, T) is an ancestor of a node (B, C) or the node itself.

    An ancestor comes first in depth-first order, and its items end no earlier.
    """
    return (key_order[:, None] <= order[:, :, None]) & (key_end[:, None] >= end[:, :, None])
