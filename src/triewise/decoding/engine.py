"""Prompts and trie nodes in, log-probabilities of trie edges out. No ranking happens here.

A prompt runs once per user. The trie is then swept in depth-first order, in chunks: a chunk is one forward
whose mask is the ancestor relation. In depth-first order every ancestor of a chunk's nodes that lies outside
the chunk is an ancestor of the chunk's *first* node, so a chunk needs the keys of the prompt, of that one
path, and its own: memory does not grow with the trie, and nothing is computed twice.

Dimension key: B users, N trie nodes, C nodes of a chunk, S nodes on the path above it, R rows that need the
head, E edges scored in a chunk, U distinct tokens on them, V vocabulary, D width.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.decoding.treecache import (
    NOTHING,
    Counters,
    Prefix,
    TokenLists,
    TreeCache,
    common_length,
    on_device,
    pad,
)
from triewise.decoding.trial import BELOW, SHARED_AT_LEAST, measured
from triewise.errors import UserError
from triewise.models import (
    LOGIT_BLOCK,
    Head,
    as_if_alone,
    body,
    causal_lm,
    check_model,
    hand_head,
    head_weight,
    max_positions,
    n_inputs,
    place_limit,
    refusal,
    rope_switch,
    shortest_window,
    slots_of,
    take_turns,
)

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.tokens import Trie

Support = Literal["trie", "vocabulary"]
AT_ONCE = 16
SHORTEST = 32  # tokens of the prompts of a probe, at least
CHUNK = 256  # nodes of one forward: large enough for good matrix products, small enough for the cache


@dataclass(frozen=True)
class Children:
    """The edges below some nodes, for the head: a row is a node.

    Attributes:
        node: int64 (E,), the child that each edge leads to.
        row: int64 (E,), ascending.
        token: int64 (U,), the distinct tokens on the edges.
        column: int64 (E,), index into ``token``.
    """

    node: Int64
    row: Int64
    token: Int64
    column: Int64

    @classmethod
    def below(cls, trie: Trie, node: Int64) -> Children:
        """The edges below nodes (R,)."""
        child, row = trie.below(node)
        edge_token = trie.token[child]
        # A table of tokens, because sorting the edges of many users' roots takes longer.
        known = np.zeros(int(edge_token.max(initial=-1)) + 1, dtype=bool)
        known[edge_token] = True
        column = np.cumsum(known)[edge_token] - 1
        return cls(child, row, np.flatnonzero(known), column)

    def to(self, device: torch.device) -> Iterator[Tensor]:
        """Tokens (U,), rows (E,) and columns (E,) as tensors on a device."""
        return iter(on_device(device, self.token, self.row, self.column))


@dataclass(frozen=True)
class _Chunk:
    """One forward of the sweep; the same for all users.

    Attributes:
        node: int64 (C,), in depth-first order.
        keep: int64 (S,), where the path above the first node lies in [path of the last chunk | its nodes].
        head_row: int64 (R,), positions in the chunk whose children are scored.
        children: Of these.
    """

    node: Int64
    keep: Int64
    head_row: Int64
    children: Children


class TrieEngine:
    """Scores the edges of one trie with one causal LM; may be used by several threads at once.

    Everywhere ``prompts`` are token ids of each user, at least one each, and ``counters`` receive the work done.

    Args:
        model: A causal LM (or an adapter around one) in evaluation mode.
        trie: The catalogue; its tokens are ids of the model's vocabulary.
        support: ``"trie"``: softmax over a node's children (MSL, Lemma 1); ``"vocabulary"``: over all tokens.
        chunk: Trie nodes of one forward.
        at_once: Users that share a forward.

    Attributes:
        tolerance: Nats by which the gap between two titles changes with what shares their forwards; None until a
            search has measured it.

    Raises:
        UserError: Unknown support, or a trie token outside the model's vocabulary.
    """

    def __init__(
        self, model: Any, trie: Trie, support: Support = "trie", *, chunk: int = CHUNK, at_once: int = AT_ONCE
    ) -> None:
        if support not in ("trie", "vocabulary"):
            raise UserError(f"wanted support 'trie' or 'vocabulary', got {support!r}")
        if at_once < 1 or chunk < 1:
            raise UserError(f"wanted at_once and chunk of at least 1, got {at_once} and {chunk}")
        check_model(model)
        take_turns(model)
        n_vocabulary = head_weight(model).shape[0]
        if int(trie.token.max()) >= n_vocabulary:
            raise UserError(
                f"wanted trie tokens below {n_vocabulary}, the model's vocabulary, got {int(trie.token.max())}; "
                "build the trie with this model's tokenizer"
            )
        self.model, self.trie, self.support = model, trie, support
        self.chunk, self.at_once = chunk, at_once
        self.tolerance: float | None = None
        # What calls leave for later ones: each is read once in a call and replaced as a whole, so threads may share it.
        # The last prompt that was asked for, and the prefix with the version of the weights that made it.
        self._recent: list[int] = []
        self._prefix: tuple[tuple[int, ...], Prefix] | None = None
        self._warned, self._lock = False, threading.Lock()
        self._misfits: dict[int, str | None] = {}  # of each number of prompt tokens that was tried
        self._probing = threading.Lock()

    def over(self, trie: Trie) -> TrieEngine:
        """The same over another catalogue; what was found of the model with as many nodes holds there too."""
        other = TrieEngine(self.model, trie, self.support, chunk=self.chunk, at_once=self.at_once)
        if min(trie.n_nodes, self.chunk) == min(self.trie.n_nodes, self.chunk):
            other._misfits.update(self._misfits)
        return other

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return head_weight(self.model).device

    @cached_property
    def longest_path(self) -> int:
        """Tokens of the longest title."""
        return len(self.trie.level_ptr) - 2

    @cached_property
    def head(self) -> Head | None:
        """The model's head by hand; None where only its own forward gives its logits."""
        return hand_head(self.model)

    @property
    def tree_cache_works(self) -> bool:
        """Whether branches behind short prompts equal plain forwards, and our head the model's own.

        One warning where they do not: the plain path is used.
        """
        return self._accepts(self._other_head or self._misfit(SHORTEST, 1))

    @cached_property
    def _other_head(self) -> str | None:
        matches = self.head is not None
        return None if matches else "its logits are not the product of the last hidden state and the head"

    def _misfit(self, n_prompt: int, shortest: int) -> str | None:
        """What a measurement says against the tree cache for prompts of so many tokens.

        It is made once for each power of two, with as many nodes as a chunk has.
        """
        switch = rope_switch(self.model)
        ends = [shortest_window(self.model), self._positions]
        if switch is not None and shortest <= switch.tokens:
            ends.append(switch.tokens)
        room = min((end for end in ends if end is not None), default=1 << 30) - BELOW - 1
        size = max(1, min(1 << (max(n_prompt, SHORTEST) - 1).bit_length(), room))
        with self._probing:
            if size not in self._misfits:
                least = switch.tokens + 1 if switch is not None and shortest > switch.tokens else 1
                self._misfits[size] = refusal(
                    self.model,
                    measure=lambda seed: measured(
                        self.model, self.trie, self.chunk, size, min(least, size), seed
                    ),
                    what="hidden states through the tree mask",
                )
            return self._misfits[size]

    def sweep(
        self, prompts: TokenLists, counters: Counters, prefix: Prefix | None = None
    ) -> Iterator[tuple[Int64, Tensor]]:
        """Score every edge that can matter: below branching nodes (trie support) or all of them (vocabulary).

        ``prefix`` is what `shared_prefix` gave for these prompts among others.

        Yields:
            Child nodes (E,) and the log-probabilities (B, E) float32 of the edges into them, <= 0; parents
            before children. Edges of trie support that are not yielded are forced: log-probability 0.
        """
        if self.fits_tree(prompts):
            return self._tree_sweep(prompts, counters, prefix)
        return self._plain_sweep(prompts, counters)

    def fits_tree(self, prompts: TokenLists) -> bool:
        """Whether these prompts and the titles behind them may go through the tree cache.

        Raises:
            UserError: An empty prompt, or one too long for the model.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError(
                "wanted at least one token in every prompt, got an empty one; start prompts with a BOS token"
            )
        n_ids = n_inputs(self.model)
        largest = max((max(prompt) for prompt in prompts), default=0)
        if largest >= n_ids or min((min(prompt) for prompt in prompts), default=0) < 0:
            raise UserError(
                f"wanted prompt tokens in [0, {n_ids}), the model's vocabulary, got up to {largest}; "
                "encode prompts with this model's tokenizer"
            )
        longest = max((len(prompt) for prompt in prompts), default=0) + self.longest_path
        if self._positions is not None and longest > self._positions + 1:  # nothing follows the last token
            raise UserError(
                f"wanted prompt and title within the model's {self._positions} positions, got {longest - 1} tokens; "
                "lower max_tokens of the prompts"
            )
        shortest = min(map(len, prompts), default=0)
        places = longest + self.at_once * self.trie.n_nodes
        said = refusal(self.model, longest, shortest=shortest, places=places, room=self._room)
        reason = self._other_head or said
        return self._accepts(reason or self._misfit(longest - self.longest_path, shortest))

    def sides(self, prompts: TokenLists) -> list[int]:
        """For each prompt the side it is on of the length at which RoPE changes; those of one side share forwards."""
        switch = rope_switch(self.model)
        if switch is None:
            return [0] * len(prompts)
        return [switch.side(len(prompt), len(prompt) + self.longest_path) for prompt in prompts]

    @cached_property
    def _positions(self) -> int | None:
        return max_positions(self.model)

    @cached_property
    def _room(self) -> int | None:
        return place_limit(self.model)

    def forget(self) -> None:
        """Drop what earlier calls left, so that the next one's results depend on it alone, to the last bit."""
        self._recent, self._prefix = [], None

    @torch.inference_mode()
    def shared_prefix(self, prompts: TokenLists, counters: Counters) -> Prefix | None:
        """The instruction that prompts start with, run once; None where they share too little.

        It is kept for later calls where no weight can be trained.
        """
        if any(self.sides(prompts)):  # by itself it would have other frequencies
            return None
        version = _weights_version(self.model)
        # Users who come one at a time share what this one shares with the one before.
        recent, kept = self._recent, self._prefix
        others = [*prompts, recent] if version and recent else prompts
        n_common = common_length(others) if len(others) > 1 else 0
        self._recent = list(prompts[-1])
        if kept is not None and version and kept[0] == version:
            known = kept[1]
            n = common_length([[*known.tokens, NOTHING], *prompts])
            if n >= max(SHARED_AT_LEAST, n_common // 2):
                return known.first(n)
        if n_common < SHARED_AT_LEAST:
            return None
        prefix = Prefix.run(self.model, prompts[0][:n_common], counters)
        if version:
            self._prefix = version, prefix
        return prefix

    @torch.inference_mode()
    def _tree_sweep(
        self, prompts: TokenLists, counters: Counters, prefix: Prefix | None = None
    ) -> Iterator[tuple[Int64, Tensor]]:
        root, *chunks = self._plan
        n_nodes = max((len(chunk.keep) + len(chunk.node) for chunk in chunks), default=0)
        cache = TreeCache(self.model, self.trie, prompts, counters, prefix, n_nodes)
        yield root.children.node, self.edges(root.children, cache.root_hidden[:, None], counters)
        for chunk in chunks:
            cache.keep(chunk.keep)
            hidden_BCD = cache.append(chunk.node[None])
            if len(chunk.head_row):
                (rows,) = on_device(self.device, chunk.head_row)
                yield chunk.children.node, self.edges(chunk.children, hidden_BCD[:, rows], counters)

    @torch.inference_mode()
    def _plain_sweep(self, prompts: TokenLists, counters: Counters) -> Iterator[tuple[Int64, Tensor]]:
        """See `plain_edges`: one forward for each title, users together."""
        trie = self.trie
        run = np.concatenate([chunk.node for chunk in self._plan])[1:]
        inner_parent = np.zeros(trie.n_nodes, dtype=bool)
        inner_parent[trie.parent[run]] = True
        ends = run[~inner_parent[run]] if len(run) else np.array([0])
        scored = np.zeros(trie.n_nodes, dtype=bool)
        needed, crossing = self.needed, 1 in self.sides(prompts)
        # Where RoPE changes with the length, what a node's children get is said by a forward that ends with it.
        for end in np.flatnonzero(needed) if crossing else ends:
            path = trie.path_to(int(end))
            fresh = [n for n in (0, *path) if needed[n] and not scored[n]]
            fresh = [int(end)] if crossing else fresh
            scored[fresh] = True
            node = np.broadcast_to(np.array(fresh, dtype=np.int64), (len(prompts), len(fresh)))
            paths = [trie.token[path].tolist()] * len(prompts)
            if fresh:
                children, log_p = self.plain_edges(prompts, paths, node, counters)
                yield np.split(children.node, len(prompts))[0], log_p.view(len(prompts), -1)

    def edges(self, children: Children, hidden_BRD: Tensor, counters: Counters) -> Tensor:
        """Log-probabilities (B, E) float32 of edges, <= 0, on the CPU, from hidden states above them (B, R, D)."""
        assert self.head is not None
        token, row, column = children.to(hidden_BRD.device)
        z_BRU = self.head.scores(self.model, hidden_BRD, token)
        # On the CPU, where sums have an order: atomic ones of a GPU differ in their last bits from run to run.
        z_BE, row = z_BRU[:, row, column].cpu(), torch.from_numpy(children.row)
        n_users, n_rows = hidden_BRD.shape[:2]
        counters.add_scored(n_users * n_rows)
        total_BR = None
        if self.support == "vocabulary":
            total_BR = self.head.log_totals(self.model, hidden_BRD.flatten(0, 1)).view(n_users, n_rows).cpu()
        return _normalised(z_BE, row, n_rows, total_BR)

    def plain_edges(
        self, prompts: TokenLists, paths: TokenLists, node: Int64, counters: Counters
    ) -> tuple[Children, Tensor]:
        """The slow, correct path for any causal LM: whole sequences, no cache, no mask of ours.

        Args:
            prompts: Token ids of T users.
            paths: Tokens of a path along the trie behind each prompt.
            node: int64 (T, F), nodes on these paths.
            counters: Receives the work done.

        Returns:
            The edges below the nodes, and their log-probabilities, float32 (E,), <= 0, on the CPU.
        """
        texts = [[*prompt, *path] for prompt, path in zip(prompts, paths, strict=True)]
        last = np.array([len(prompt) - 1 for prompt in prompts], dtype=np.int64)
        place = last[:, None] + self.trie.depth[node]
        counters.prompt_tokens += sum(map(len, prompts))
        counters.tree_tokens += sum(map(len, paths))
        kept = max(map(len, texts)) if self.head is not None or not self._keeps else len(np.unique(place))
        width = head_weight(self.model).shape[0 if self.head is None else 1]
        at_once, done = max(1, LOGIT_BLOCK // (kept * width)), []
        for start in range(0, len(texts), at_once):
            some = slice(start, start + at_once)
            done.append(self._plain_block(texts[some], place[some], node[some], counters))
        children = Children.below(self.trie, node.reshape(-1))
        if self.head is None:
            return children, torch.cat(done)
        return children, self.edges(children, torch.cat(done)[None], counters)[0]

    def _plain_block(self, texts: TokenLists, place: Int64, node: Int64, counters: Counters) -> Tensor:
        """Hidden states (T * F, D) at places (T, F) of texts; without head by hand log-probabilities of edges (E,)."""
        ids, length_B = pad(texts, self.device)
        counters.rounds += 1
        row, column = (
            torch.arange(len(texts), device=self.device)[:, None],
            torch.from_numpy(place).to(self.device),
        )
        wanted, at = torch.unique(column, return_inverse=True)
        keep = {"logits_to_keep": wanted} if self.head is None and self._keeps else {}

        def run(ids: Tensor) -> Tensor:
            if self.head is not None:
                hidden: Tensor = body(self.model)(input_ids=ids, use_cache=False).last_hidden_state
                return hidden
            logits: Tensor = self.model(input_ids=ids, use_cache=False, **keep).logits
            return logits

        made = run(ids) if keep else as_if_alone(self.model, run, ids, length_B)
        made = made[row, at if keep else column].flatten(0, 1)
        if self.head is not None:
            return made
        counters.add_scored(node.size)
        children = Children.below(self.trie, node.reshape(-1))
        return self.log_softmax(children, made.float())

    @cached_property
    def _keeps(self) -> bool:
        """Whether the model's forward makes logits of some positions only, where it is told which."""
        told = "logits_to_keep" in inspect.signature(causal_lm(self.model).forward).parameters
        return told and rope_switch(self.model) is None

    def log_softmax(self, children: Children, logits_RV: Tensor) -> Tensor:
        """The same from logits (R, V) float32 that the model made itself; float32 (E,), <= 0."""
        token, row, column = children.to(logits_RV.device)
        z_E, row = logits_RV[row, token[column]].cpu(), row.cpu()
        total_BR = logits_RV.logsumexp(1)[None].cpu() if self.support == "vocabulary" else None
        return _normalised(z_E[None], row, len(logits_RV), total_BR)[0]

    @cached_property
    def needed(self) -> NDArray[np.bool_]:
        """(N,) whether a node's children must be scored: decisions, and in vocabulary support every inner node."""
        return self.trie.branching if self.support == "trie" else ~self.trie.is_leaf

    @cached_property
    def _plan(self) -> list[_Chunk]:
        """The root, then the chunks of the sweep in depth-first order."""
        trie, needed = self.trie, self.needed
        run = needed.copy()
        for depth in range(len(trie.level_ptr) - 2, 0, -1):  # ancestors of what is needed run too
            level = np.arange(trie.level_ptr[depth], trie.level_ptr[depth + 1])
            run[trie.parent[level[run[level]]]] = True
        run[0] = False
        nodes = np.flatnonzero(run)
        nodes = nodes[np.lexsort((trie.depth[nodes], trie.item_lo[nodes]))]
        plan = [self._chunk(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))]
        path = np.zeros(0, np.int64)
        held = path
        for start in range(0, len(nodes), self.chunk):
            node = nodes[start : start + self.chunk]
            path = np.asarray(trie.path_to(int(node[0]))[:-1], np.int64)
            plan.append(self._chunk(node, path, held))
            held = np.concatenate([path, node])
        return plan

    def _chunk(self, node: Int64, path: Int64, held: Int64) -> _Chunk:
        where = {int(n): i for i, n in enumerate(held)}
        head_row = np.flatnonzero(self.needed[node])
        return _Chunk(
            node=node,
            keep=np.array([where[int(n)] for n in path], dtype=np.int64),
            head_row=head_row,
            children=Children.below(self.trie, node[head_row]),
        )

    def _accepts(self, reason: str | None) -> bool:
        """Whether nothing speaks against the tree cache; of an engine's first reason against it one warning tells."""
        with self._lock:
            first, self._warned = bool(reason) and not self._warned, self._warned or bool(reason)
        if first:
            warnings.warn(f"this model is decoded on the plain, slower path: {reason}", stacklevel=2)
        return not reason


def _gather(sweep: Iterator[tuple[Int64, Tensor]], n_users: int, n_nodes: int) -> Tensor:
    """(B, N) float32 log-probability of the edge into each node; 0 at the root and on forced edges."""
    edges = torch.zeros(n_users, n_nodes)
    for node, log_p in sweep:
        edges[:, torch.from_numpy(node)] = log_p.cpu()
    return edges


def edge_log_probabilities(
    engine: TrieEngine, prompts: TokenLists, counters: Counters, prefix: Prefix | None = None
) -> NDArray[np.float32]:
    """(B, N) float32 log-probability of the edge into each node, <= 0; 0 at the root and on forced edges."""
    sweep = engine.sweep(prompts, counters, prefix)
    edges: NDArray[np.float32] = _gather(sweep, len(prompts), engine.trie.n_nodes).numpy()
    return edges


def _normalised(z_BE: Tensor, row: Tensor, n_rows: int, total_BR: Tensor | None) -> Tensor:
    """Logits of edges minus the log-sum-exp of their row: the one given, or that over the row's edges."""
    if total_BR is None:
        index = row.expand(len(z_BE), -1)
        top_BR = z_BE.new_full((len(z_BE), n_rows), -torch.inf).scatter_reduce(1, index, z_BE, "amax")
        sum_BR = torch.zeros_like(top_BR).scatter_add(1, index, (z_BE - top_BR[:, row]).exp())
        total_BR = top_BR + sum_BR.log()
    # A log-sum-exp rounds differently from a gathered logit: without the clamp a sure edge can exceed 0.
    return (z_BE - total_BR[:, row]).clamp(max=0)


def _weights_version(model: Any) -> tuple[int, ...]:
    """Which weights these are; empty where that cannot be known.

    Weights that can be trained may change unseen: a fused optimiser does not raise the version of what it changes. An
    adapter can be switched off without a weight changing. Writing through ``.data`` goes unseen too: do not.
    """
    slots = slots_of(model)
    weights = [*model.parameters(), *([] if slots is None else [slots.table])]
    if hasattr(model, "get_base_model") or any(w.requires_grad or w.is_inference() for w in weights):
        return ()
    return tuple(x for w in weights for x in (w.data_ptr(), w._version))
