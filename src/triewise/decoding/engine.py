"""Prompts and trie nodes in, log-probabilities of trie edges out. No ranking happens here.

A prompt runs once per user. The trie is then swept in depth-first order, in chunks: a chunk is one forward
whose mask is the ancestor relation. In depth-first order every ancestor of a chunk's nodes that lies outside
the chunk is an ancestor of the chunk's *first* node, so a chunk needs the keys of the prompt, of that one
path, and its own: memory does not grow with the trie, and nothing is computed twice.

Dimension key: B users, N trie nodes, C nodes of a chunk, S nodes on the path above it, R rows that need the
head, E edges scored in a chunk, U distinct tokens on them, V vocabulary, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.decoding.treecache import NOTHING, Counters, Prefix, TokenLists, TreeCache, common_length, pad
from triewise.errors import UserError
from triewise.models import (
    check_model,
    hand_head_matches,
    head_bias,
    head_weight,
    is_recurrent,
    max_positions,
    shortest_window,
    takes_masks,
)
from triewise.tokens import Trie

Support = Literal["trie", "vocabulary"]
AT_ONCE = 16
SHARED_AT_LEAST = 8  # tokens of a common beginning that are worth a forward of their own
CHUNK = 256  # nodes of one forward: large enough for good matrix products, small enough for the cache
LOGITS_AT_ONCE = 1 << 24  # elements of a vocabulary-sized logit block


@dataclass(frozen=True)
class Children:
    """The edges below some nodes, for the head: a row is a node.

    Attributes:
        node: int64 (E,), the child that each edge leads to.
        row: int64 (E,), ascending.
        token: int64 (U,), the distinct tokens on the edges.
        column: int64 (E,), index into ``token``.
    """

    node: NDArray[np.int64]
    row: NDArray[np.int64]
    token: NDArray[np.int64]
    column: NDArray[np.int64]

    @classmethod
    def below(cls, trie: Trie, node: NDArray[np.int64]) -> Children:
        """The edges below nodes (R,)."""
        first = trie.child_ptr[node].astype(np.int64)
        size = trie.n_children[node]
        row = np.repeat(np.arange(len(node)), size)
        child = np.arange(len(row)) + np.repeat(first - (np.cumsum(size) - size), size)
        edge_token = trie.token[child]
        # A table of tokens, because sorting the edges of many users' roots takes longer.
        known = np.zeros(int(edge_token.max(initial=-1)) + 1, dtype=bool)
        known[edge_token] = True
        column = np.cumsum(known)[edge_token] - 1
        return cls(child, row, np.flatnonzero(known), column)


@dataclass(frozen=True)
class _Chunk:
    """One forward of the sweep; the same for all users."""

    node: NDArray[np.int64]  # (C,) in depth-first order
    keep: NDArray[
        np.int64
    ]  # (S,) where the path above the first node lies in [path of the last chunk | its nodes]
    head_row: NDArray[np.int64]  # (R,) positions in the chunk whose children are scored
    children: Children  # of these


class TrieEngine:
    """Scores the edges of one trie with one causal LM.

    Args:
        model: A causal LM (or an adapter around one) in evaluation mode.
        trie: The catalogue; its tokens are ids of the model's vocabulary.
        support: ``"trie"``: softmax over a node's children (MSL, Lemma 1); ``"vocabulary"``: over all tokens.
        chunk: Trie nodes of one forward.
        at_once: Users that share a forward.

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
        n_vocabulary = head_weight(model).shape[0]
        if int(trie.token.max()) >= n_vocabulary:
            raise UserError(
                f"wanted trie tokens below {n_vocabulary}, the model's vocabulary, got {int(trie.token.max())}; "
                "build the trie with this model's tokenizer"
            )
        self.model, self.trie, self.support = model, trie, support
        self.chunk, self.at_once = chunk, at_once
        # With the version of the weights that made it, and the last prompt that was asked for.
        self._prefix: tuple[tuple[int, ...], Prefix] | None = None
        self._recent: list[int] = []

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return head_weight(self.model).device

    @cached_property
    def longest_path(self) -> int:
        """Tokens of the longest title."""
        return int(self.trie.depth.max())

    @cached_property
    def tree_cache_works(self) -> bool:
        """Whether branches through the tree mask equal plain forwards, and our head the model's own.

        Probed once, on a small trie with the same code; one warning when it fails, and the plain path is
        used.
        """
        if not takes_masks(self.model):
            return self._warn("its attention implementation takes no mask of our own")
        if not hand_head_matches(self.model):
            return self._warn("its logits are not the product of the last hidden state and the head")
        if is_recurrent(self.model):
            return self._warn("it has layers that are not attention")
        a, b, c, d, end, *rest = self._probe_tokens(6 + SHARED_AT_LEAST)
        probe = Trie.from_sequences([[a, b, c, end], [a, d, c, end], [d, c, end]])
        prompts = [[*rest, b, d], [*rest, c]]
        engine, nobody = TrieEngine(self.model, probe, "vocabulary", chunk=2), Counters()
        plain = _gather(engine._plain_sweep(prompts, nobody), 2, probe.n_nodes)  # this path has to work
        try:
            prefix = engine.shared_prefix(prompts, nobody)
            tree = _gather(engine._tree_sweep(prompts, nobody, prefix), 2, probe.n_nodes)
            leak = engine._leak(prompts)
        except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            return self._warn(f"it does not take our cache or mask ({type(error).__name__})")
        if leak > 1e-4:
            return self._warn(
                f"a branch of the tree changes another one by {leak:.2g}: its mask is not respected"
            )
        # Relative to the size of the numbers: a sound 135M model in float32 is off by 4e-3 at -30 nats on either path,
        # against float64, and in bfloat16 by more than a tenth of a nat. Wrong positions or windows: about 1.
        loose = 1e-3 if head_weight(self.model).dtype == torch.float32 else 0.1
        gap = float((plain - tree).abs().max())
        return gap <= loose * max(1.0, float(plain.abs().max())) or self._warn(
            f"log-probabilities through the tree mask are off by {gap:.2g}"
        )

    def _probe_tokens(self, n: int) -> list[int]:
        """Distinct tokens, those of titles first: a model says little about tokens it was never trained on."""
        distinct = np.unique(self.trie.token[1:])
        spread = distinct[np.linspace(0, len(distinct) - 1, min(n, len(distinct))).astype(int)]
        others = np.setdiff1d(np.arange(min(2 * n, head_weight(self.model).shape[0])), spread)
        return [int(t) for t in np.resize(np.concatenate([spread, others]), n)]

    @torch.inference_mode()
    def _leak(self, prompts: TokenLists) -> float:
        """How much a node's hidden state depends on a sibling of its parent, relative; 0 in any precision."""
        first, second, *_ = range(int(self.trie.child_ptr[0]), int(self.trie.child_ptr[1]))
        below = int(self.trie.child_ptr[first])
        found = []
        for beside in (second, below + 1):  # another branch, or the other child
            cache = TreeCache(self.model, self.trie, prompts, Counters())
            cache.append(np.array([[first, beside]]))
            found.append(cache.append(np.array([[below]]))[:, 0].float())
        return float((found[0] - found[1]).abs().max() / found[0].abs().max().clamp(min=1e-9))

    def sweep(
        self, prompts: TokenLists, counters: Counters, prefix: Prefix | None = None
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Score every edge that can matter: below branching nodes (trie support) or all of them (vocabulary).

        Args:
            prompts: Token ids of each user, at least one each.
            counters: Receives the work done.
            prefix: What `shared_prefix` gave for these prompts among others.

        Yields:
            Child nodes (E,) and the log-probabilities (B, E) float32 of the edges into them, <= 0; parents
            before children. Edges of trie support that are not yielded are forced: log-probability 0.
        """
        return (
            self._tree_sweep(prompts, counters, prefix)
            if self.fits_tree(prompts)
            else self._plain_sweep(prompts, counters)
        )

    def fits_tree(self, prompts: TokenLists) -> bool:
        """Whether these prompts and the titles behind them may go through the tree cache.

        Raises:
            UserError: An empty prompt, or one too long for the model.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError(
                "wanted at least one token in every prompt, got an empty one; start prompts with a BOS token"
            )
        n_vocabulary = head_weight(self.model).shape[0]
        largest = max((max(prompt) for prompt in prompts), default=0)
        if largest >= n_vocabulary or min((min(prompt) for prompt in prompts), default=0) < 0:
            raise UserError(
                f"wanted prompt tokens in [0, {n_vocabulary}), the model's vocabulary, got up to {largest}; "
                "encode prompts with this model's tokenizer"
            )
        longest = max((len(prompt) for prompt in prompts), default=0) + self.longest_path
        if self._positions is not None and longest > self._positions + 1:  # nothing follows the last token
            raise UserError(
                f"wanted prompt and title within the model's {self._positions} positions, got {longest - 1} tokens; "
                "lower max_tokens of the prompts"
            )
        return self.tree_cache_works and not self._window_too_short(longest)

    @cached_property
    def _positions(self) -> int | None:
        return max_positions(self.model)

    @torch.inference_mode()
    def shared_prefix(self, prompts: TokenLists, counters: Counters) -> Prefix | None:
        """The instruction that prompts start with, run once; None where they share too little.

        It is kept for later calls where no weight can be trained.

        Args:
            prompts: Token ids of every user of a call.
            counters: Receives the work done.
        """
        version = _weights_version(self.model)
        # Users who come one at a time share what this one shares with the one before.
        others = [*prompts, self._recent] if version and self._recent else prompts
        n_common = common_length(others) if len(others) > 1 else 0
        self._recent = list(prompts[-1])
        if self._prefix is not None and version and self._prefix[0] == version:
            known = self._prefix[1]
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
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        cache = TreeCache(self.model, self.trie, prompts, counters, prefix)
        root, *chunks = self._plan
        yield root.children.node, self.edges(root.children, cache.root_hidden[:, None], counters)
        for chunk in chunks:
            cache.keep(chunk.keep)
            hidden_BCD = cache.append(chunk.node[None])
            if len(chunk.head_row):
                rows = torch.from_numpy(chunk.head_row).to(self.device)
                yield chunk.children.node, self.edges(chunk.children, hidden_BCD[:, rows], counters)

    @torch.inference_mode()
    def _plain_sweep(
        self, prompts: TokenLists, counters: Counters
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """The slow, correct path for any causal LM: whole sequences, the model's own forward, no cache, no mask."""
        trie, device = self.trie, self.device
        run = np.concatenate([chunk.node for chunk in self._plan])[1:]
        inner_parent = np.zeros(trie.n_nodes, dtype=bool)
        inner_parent[trie.parent[run]] = True
        ends = run[~inner_parent[run]] if len(run) else np.array([0])
        scored = np.zeros(trie.n_nodes, dtype=bool)
        needed = self.needed
        for end in ends:
            path = trie.path_to(int(end))
            fresh = [n for n in (0, *path) if needed[n] and not scored[n]]
            scored[fresh] = True
            tokens = trie.token[path].tolist()
            ids, length_B = pad([[*prompt, *tokens] for prompt in prompts], device)
            logits = self.model(input_ids=ids, use_cache=False).logits
            counters.prompt_tokens += int(length_B.sum()) - len(path) * len(prompts)
            counters.tree_tokens += len(path) * len(prompts)
            counters.rounds += 1
            for node in fresh:
                at = length_B - len(path) + int(trie.depth[node]) - 1
                row_BV = logits[torch.arange(len(prompts), device=device), at].float()
                children = Children.below(trie, np.full(len(prompts), node, dtype=np.int64))
                counters.expansions += len(prompts)
                counters.head_rows += len(prompts)
                log_p = self.log_softmax(children, row_BV).view(len(prompts), -1)
                yield children.node[: log_p.shape[1]], log_p

    def edges(self, children: Children, hidden_BRD: Tensor, counters: Counters) -> Tensor:
        """Log-probabilities of edges from the hidden states of the nodes above them.

        Args:
            children: The edges; rows are those of ``hidden_BRD``.
            hidden_BRD: (B, R, D).
            counters: Receives the work done.

        Returns:
            (B, E) float32 on the CPU, <= 0.
        """
        device, weight, bias = self.device, head_weight(self.model), head_bias(self.model)
        token, row, column = (
            torch.from_numpy(array).to(device) for array in (children.token, children.row, children.column)
        )
        z_BRU = torch.nn.functional.linear(hidden_BRD, weight[token], None if bias is None else bias[token])
        # On the CPU, where sums have an order: atomic ones of a GPU differ in their last bits from run to run.
        z_BE, row = z_BRU[:, row, column].float().cpu(), row.cpu()
        n_users, n_rows = hidden_BRD.shape[:2]
        counters.expansions += n_users * n_rows
        counters.head_rows += n_users * n_rows
        total_BR = _log_sum_exp(hidden_BRD, weight, bias).cpu() if self.support == "vocabulary" else None
        return _normalised(z_BE, row, n_rows, total_BR)

    def log_softmax(self, children: Children, logits_RV: Tensor) -> Tensor:
        """The same from logits (R, V) float32 that the model made itself; float32 (E,), <= 0."""
        token, row, column = (
            torch.from_numpy(array).to(logits_RV.device)
            for array in (children.token, children.row, children.column)
        )
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

    def _chunk(self, node: NDArray[np.int64], path: NDArray[np.int64], held: NDArray[np.int64]) -> _Chunk:
        where = {int(n): i for i, n in enumerate(held)}
        head_row = np.flatnonzero(self.needed[node])
        return _Chunk(
            node=node,
            keep=np.array([where[int(n)] for n in path], dtype=np.int64),
            head_row=head_row,
            children=Children.below(self.trie, node[head_row]),
        )

    def _window_too_short(self, longest: int) -> bool:
        window = shortest_window(self.model)
        if window is None or window >= longest:
            return False
        self._warn(f"its attention window of {window} tokens is shorter than the longest path of {longest}")
        return True

    def _warn(self, reason: str) -> bool:
        if not self._warned:
            self._warned.append(reason)
            warnings.warn(f"this model is decoded on the plain, slower path: {reason}", stacklevel=2)
        return False

    @cached_property
    def _warned(self) -> list[str]:
        return []


def _gather(sweep: Iterator[tuple[NDArray[np.int64], Tensor]], n_users: int, n_nodes: int) -> Tensor:
    """(B, N) float32 log-probability of the edge into each node; 0 at the root and on forced edges."""
    edges = torch.zeros(n_users, n_nodes)
    for node, log_p in sweep:
        edges[:, torch.from_numpy(node)] = log_p.cpu()
    return edges


def edge_log_probabilities(
    engine: TrieEngine, prompts: TokenLists, counters: Counters, prefix: Prefix | None = None
) -> NDArray[np.float32]:
    """(B, N) float32 log-probability of the edge into each node, <= 0; 0 at the root and on forced edges."""
    edges: NDArray[np.float32] = _gather(
        engine.sweep(prompts, counters, prefix), len(prompts), engine.trie.n_nodes
    ).numpy()
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


def _log_sum_exp(hidden_BRD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, R) float32 log of the sum over the vocabulary, in blocks of rows."""
    flat = hidden_BRD.reshape(-1, hidden_BRD.shape[-1])
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    parts = (flat[start : start + rows] for start in range(0, len(flat), rows))
    blocks = [torch.nn.functional.linear(part, weight, bias).float().logsumexp(1) for part in parts]
    return torch.cat(blocks).view(hidden_BRD.shape[:2])


def _weights_version(model: Any) -> tuple[int, ...]:
    """Which weights these are; empty where that cannot be known.

    Weights that can be trained may change unseen: a fused optimiser does not raise the version of what it changes. An
    adapter can be switched off without a weight changing. Writing through ``.data`` goes unseen too: do not.
    """
    parameters = list(model.parameters())
    if hasattr(model, "get_base_model") or any(p.requires_grad or p.is_inference() for p in parameters):
        return ()
    return tuple(x for p in parameters for x in (p.data_ptr(), p._version))
