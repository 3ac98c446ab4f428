"""The tree of each user, grown only where a search asks: nodes in, log-probabilities of the edges below out.

Forced tokens decide what is run. Trie support: those between two decisions score 0 but later logits depend on
them, so they run in one forward with the decision they lead to; those after the last decision never run.
Vocabulary support: every token scores, but what a search foresees that it will ask for goes through the model with what
it asks for now, and is remembered until it does. So a search stays token-synchronous and does not know what was run.

Dimension key: B users, R requested nodes, N trie nodes, E edges, C nodes of one forward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from triewise.arrays import Bool, Float32, Int64, place_in_run
from triewise.decoding.engine import Children, TrieEngine
from triewise.decoding.treecache import NOTHING, Counters, Prefix, TokenLists, TreeCache, on_device

if TYPE_CHECKING:
    from triewise.tokens import Trie

Foreseen = Callable[[], tuple[Int64, Int64]]


@dataclass(frozen=True)
class Edges:
    """The edges below requested nodes, in the order of the request, children ascending.

    Attributes:
        row: int64 (E,), which requested node each edge leaves.
        node: int64 (E,), the child it leads to.
        log_p: float32 (E,), <= 0, nats; 0 for a forced edge in trie support.
    """

    row: Int64
    node: Int64
    log_p: Float32

    def take(self, chosen: Bool, first: int) -> Edges:
        """Some edges, their rows counted from ``first``."""
        return Edges(self.row[chosen] - first, self.node[chosen], self.log_p[chosen])


class Growth:
    """The trees of users that are decoded together; users come and go.

    Args:
        engine: Model, trie and support.
        prompts: Token ids of every user who will come, at least one each.
        counters: Receives the work done.

    Raises:
        UserError: An empty prompt.
    """

    def __init__(self, engine: TrieEngine, prompts: TokenLists, counters: Counters) -> None:
        self.engine, self.trie, self.prompts, self.counters = engine, engine.trie, prompts, counters
        # Longest prompts first: later ones fit where earlier ones were; users of one side of RoPE's change together.
        self._side = engine.sides(prompts)
        self._waiting = sorted(range(len(prompts)), key=lambda b: (-self._side[b], -len(prompts[b]), b))
        sides = itertools.groupby(self._waiting, key=lambda b: self._side[b])
        users = {side: [prompts[b] for b in group] for side, group in sides}
        self._fits = {side: engine.fits_tree(of_side) for side, of_side in users.items()}
        self._prefix: dict[int, Prefix | None] = {
            side: engine.shared_prefix(of_side, counters)
            for side, of_side in users.items()
            if self._fits[side]
        }
        self._cache: TreeCache | None = None
        self._rows: int | None = None  # users that its cache has room for; None: those of the first forward
        self._row = np.full(len(prompts), NOTHING, dtype=np.int64)  # of each user in the cache
        # user -> node -> log-probabilities of its edges
        self._scored: dict[int, dict[int, Float32]] = {}

    @torch.inference_mode()
    def admit(self) -> Int64:
        """Let users in: as many as the engine takes at once, when a quarter of the places are free; int64 (n,)."""
        places = self.engine.at_once - len(self._scored)
        if not self._waiting or (self._scored and places < max(1, self.engine.at_once // 4)):
            return np.zeros(0, dtype=np.int64)
        inside = next(iter(self._scored), self._waiting[0])
        side = self._side[inside]
        fresh = np.array([b for b in self._waiting[:places] if self._side[b] == side], dtype=np.int64)
        if not len(fresh):
            return fresh
        del self._waiting[: len(fresh)]
        if not self._scored:
            self._cache = None
        self._scored |= {int(b): {} for b in fresh}
        if self._fits[side]:
            prompts = [self.prompts[b] for b in fresh]
            staying = self._row[self._row >= 0]
            if self._cache is None or not len(staying):
                self._cache = None  # before the next one is made
                self._cache = TreeCache(
                    self.engine.model, self.trie, prompts, self.counters, self._prefix[side], rows=self._rows
                )
                self._row[fresh] = np.arange(len(fresh))
            else:
                self._row[fresh] = np.setdiff1d(np.arange(self._cache.rows), staying)[: len(fresh)]
                self._cache.admit(self._row[fresh], prompts)
        return fresh

    def release(self, user: Int64) -> None:
        """Let users go; what was known of them is forgotten."""
        for b in user.tolist():
            del self._scored[b]
        self._row[user] = NOTHING
        staying = np.flatnonzero(self._row >= 0)
        # Rows of users who have gone are padding: close the gaps when half of a batch that nobody joins is empty.
        if self._cache is not None and not self._waiting and 0 < 2 * len(staying) <= self._cache.n_users:
            with torch.inference_mode():
                self._row[staying] = self._cache.select(self._row[staying])

    def known(self, user: Int64, node: Int64) -> Bool:
        """(R,) whether expanding a node costs nothing: its edges are forced, or were scored with others before it."""
        known: Bool = ~self.engine.needed[node]
        ask = np.flatnonzero(~known)
        asked = zip(user[ask].tolist(), node[ask].tolist(), strict=True)
        known[ask] = [n in self._scored[b] for b, n in asked]
        return known

    @torch.inference_mode()
    def expand(self, user: Int64, node: Int64, foreseen: Foreseen | None = None) -> Edges:
        """Score the edges below some nodes; nodes that were asked for before cost nothing.

        Args:
            user: int64 (R,), users who are in.
            node: int64 (R,), no leaves. Every decision above a node was asked for before, or is here too.
            foreseen: Says which nodes will be asked for later, users and nodes, ancestors too. It is called where a
                forward is needed in vocabulary support, which then takes them along.
        """
        fresh = ~self.known(user, node)
        if fresh.any():
            first = np.unique(user[fresh] * self.trie.n_nodes + node[fresh])
            if foreseen is not None and self._cache is not None and self.engine.support == "vocabulary":
                users, nodes = foreseen()
                unknown = ~self.known(users, nodes) & np.isin(users, user[fresh])
                first = np.union1d(first, users[unknown] * self.trie.n_nodes + nodes[unknown])
            self._score(first // self.trie.n_nodes, first % self.trie.n_nodes)
        child, row = self.trie.below(node)
        nothing, forced = np.zeros(0, dtype=np.float32), np.zeros(1, dtype=np.float32)
        log_p = [self._scored[b].get(n, forced) for b, n in zip(user.tolist(), node.tolist(), strict=True)]
        return Edges(row, child, np.concatenate([nothing, *log_p]))

    def _score(self, user: Int64, node: Int64) -> None:
        if self._cache is None:
            return self._score_plainly(user, node)
        root = node == 0
        if root.any():
            hidden = self._cache.root_hidden[on_device(self.engine.device, self._row[user[root]])[0]]
            self._remember(user[root], node[root], hidden)
        if not root.all():
            user, node = user[~root], node[~root]
            self._grow(*(_led_to(self.trie, user, node) if self.engine.support == "trie" else (user, node)))
        return None

    def _grow(self, user: Int64, node: Int64) -> None:
        """Run nodes (sorted by user, ancestors first), and score those of them that are needed."""
        assert self._cache is not None
        place = place_in_run(user)
        for start in range(0, int(place.max()) + 1, self.engine.chunk):
            chosen = (place >= start) & (place < start + self.engine.chunk)
            row, column = self._row[user[chosen]], place[chosen] - start
            new = np.full((self._cache.n_users, int(column.max()) + 1), NOTHING, dtype=np.int64)
            new[row, column] = node[chosen]
            hidden_BCD = self._cache.append(new)
            scored = self.engine.needed[node[chosen]]
            at = on_device(self.engine.device, row[scored], column[scored])
            hidden_RD = hidden_BCD[at[0], at[1]]
            self._remember(user[chosen][scored], node[chosen][scored], hidden_RD)

    def _remember(self, user: Int64, node: Int64, hidden_RD: torch.Tensor) -> None:
        if len(node):
            children = Children.below(self.trie, node)
            log_p = self.engine.edges(children, hidden_RD[None], self.counters)[0].cpu().numpy()
            self._keep(user, node, log_p)

    def _keep(self, user: Int64, node: Int64, log_p: Float32) -> None:
        end = np.cumsum(self.trie.n_children[node])[:-1]
        for b, n, edges in zip(user.tolist(), node.tolist(), np.split(log_p, end), strict=True):
            self._scored[b][n] = edges

    def _score_plainly(self, user: Int64, node: Int64) -> None:
        """See `TrieEngine.plain_edges`: one sequence for each node."""
        prompts = [self.prompts[b] for b in user.tolist()]
        paths = [self.trie.token[self.trie.path_to(n)].tolist() for n in node.tolist()]
        _, log_p = self.engine.plain_edges(prompts, paths, node[:, None], self.counters)
        self._keep(user, node, log_p.numpy())


class OpenGrowth(Growth):
    """Trees of users who join while others are decoded: each has a number, which another one gets after him.

    Args:
        engine: Model, trie and support; as many users as it takes at once have a number.
        counters: Receives the work done.
    """

    def __init__(self, engine: TrieEngine, counters: Counters) -> None:
        super().__init__(engine, [], counters)
        self._rows = n = engine.at_once
        self._row = np.full(n, NOTHING, dtype=np.int64)
        self._side = [0] * n
        self.prompts: list[Sequence[int]] = [()] * n

    @property
    def inside(self) -> set[int]:
        """Users who are in, or wait for the next round."""
        return {*self._scored, *self._waiting}

    @torch.inference_mode()
    def join(self, prompt: Sequence[int]) -> int | None:
        """The number of a user more; None where he has to wait till others, or all others, have gone.

        Raises:
            UserError: An empty prompt, or one too long for the model.
        """
        engine, inside = self.engine, self.inside
        fits, side = engine.fits_tree([prompt]), engine.sides([prompt])[0]
        if not inside:
            shared = engine.shared_prefix([prompt], self.counters) if fits else None
            self._fits, self._prefix = {side: fits}, {side: shared}
        prefix = self._prefix.get(side)
        n = 0 if prefix is None else len(prefix.tokens)
        if inside:
            alike = self._fits.get(side) == fits and (prefix is None or tuple(prompt[:n]) == prefix.tokens)
            room = self._cache is None or not self._scored or len(prompt) <= self._cache.n_prompt
            if len(inside) == engine.at_once or not alike or len(prompt) == n or not room:
                return None
        number = next(b for b in range(engine.at_once) if b not in inside)
        self.prompts[number], self._side[number] = prompt, side
        self._waiting.append(number)
        return number

    def leave(self, user: int) -> None:
        """Let a user go who may not have come in yet."""
        if user in self._scored:
            self.release(np.array([user]))
        else:
            self._waiting.remove(user)


def edges_on_paths(
    engine: TrieEngine, prompts: TokenLists, user: Int64, leaf: Int64, counters: Counters
) -> tuple[Int64, Float32]:
    """Log-probabilities of the edges along the paths to leaves (R,) of users (R,); a user's paths run together.

    Returns:
        ``user * n_nodes + node`` of the edges into nodes, int64 (E,), ascending; and their log-probabilities,
        float32 (E,). Siblings of the nodes on a path are there too.
    """
    n_nodes = engine.trie.n_nodes
    node, keys = leaf, [np.zeros(0, dtype=np.int64)]
    while len(node):
        node = engine.trie.parent[node].astype(np.int64)
        keys.append(user * n_nodes + node)
        user, node = user[node > 0], node[node > 0]
    key = np.unique(np.concatenate(keys))
    growth = Growth(engine, prompts, counters)
    into, log_p = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    while len(fresh := growth.admit()):
        asked = key[np.isin(key // n_nodes, fresh)]
        edges = growth.expand(asked // n_nodes, asked % n_nodes)
        into.append((asked // n_nodes)[edges.row] * n_nodes + edges.node)
        log_p.append(edges.log_p)
        growth.release(fresh)
    keys_of_edges = np.concatenate(into)
    order = np.argsort(keys_of_edges)
    return keys_of_edges[order], np.concatenate(log_p)[order]


def _led_to(trie: Trie, user: Int64, node: Int64) -> tuple[Int64, Int64]:
    """Trie support: requested nodes and the forced tokens that lead to them, by user and depth, each once."""
    users, nodes = [user], [node]
    while len(node):
        node = trie.parent[node].astype(np.int64)
        more = (node > 0) & ~trie.branching[node]
        user, node = user[more], node[more]
        users.append(user)
        nodes.append(node)
    key = np.unique(np.concatenate(users) * trie.n_nodes + np.concatenate(nodes))
    user, node = key // trie.n_nodes, key % trie.n_nodes
    return user, node  # node ids ascend with depth: ancestors come first


def forced_runs(trie: Trie, user: Int64, node: Int64) -> tuple[Int64, Int64]:
    """Forced tokens below some nodes, as far down as their run has come already: 1, 2, 4, ... tokens.

    Up to the next decision or the last token before the leaf; for searches that cannot foresee whether they follow it.
    """
    users, nodes, left = [user[:0]], [node[:0]], trie.forced_depth[node].astype(np.int64)
    while len(node):
        child = trie.child_ptr[node].astype(np.int64)
        more = (left > 0) & ~trie.branching[node] & ~trie.is_leaf[np.where(trie.branching[node], 0, child)]
        user, node, left = user[more], child[more], left[more] - 1
        users.append(user)
        nodes.append(node)
    return np.concatenate(users), np.concatenate(nodes)


class Strategy(Protocol):
    """A way to search the trees of several users, round by round."""

    def start(self, user: Int64) -> None:
        """Begin with some users (n,)."""

    def request(self) -> tuple[Int64, Int64]:
        """Users and nodes (R,) whose edges the next round needs, users together."""

    def foreseen(self) -> tuple[Int64, Int64]:
        """Users and nodes that are asked for in later rounds whatever scores the edges get."""

    def update(self, edges: Edges) -> Int64:
        """Go on with what was asked for; the users (n,) who are done."""


def drive(growth: Growth, search: Strategy) -> None:
    """Let users in, grow their trees as the search asks, and let them go when they are done."""
    while True:
        fresh = growth.admit()
        if len(fresh):
            search.start(fresh)
        user, node = search.request()
        if not len(user):
            return
        growth.release(search.update(growth.expand(user, node, search.foreseen)))
