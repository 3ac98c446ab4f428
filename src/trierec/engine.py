"""Prompts and trie nodes in, log-probabilities of trie edges out. No ranking happens here.

A prompt runs once per user. The trie is then swept in depth-first order, in chunks: a chunk is one forward
whose mask is the ancestor relation. In depth-first order every ancestor of a chunk's nodes that lies outside
the chunk is an ancestor of the chunk's *first* node, so a chunk needs the keys of the prompt, of that one
path, and its own: memory does not grow with the trie, and nothing is computed twice.

Dimension key: B users, P prompt tokens, N trie nodes, C nodes of a chunk, S nodes on the path above it, R
rows that need the head, E edges scored in a chunk, U distinct tokens on them, V vocabulary, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trierec.backbones import body, causal_lm, hand_head_matches, head_bias, head_weight
from trierec.errors import UserError
from trierec.trie import Trie

Support = Literal["trie", "vocabulary"]
TokenLists = Sequence[Sequence[int]]
CHUNK = 256  # nodes of one forward: large enough for good matrix products, small enough for the cache
LOGITS_AT_ONCE = 1 << 24  # elements of a vocabulary-sized logit block


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

    @property
    def token_forwards(self) -> int:
        """Prompt and tree positions together."""
        return self.prompt_tokens + self.tree_tokens

    def as_dict(self) -> dict[str, int]:
        """All counters by name."""
        return {"token_forwards": self.token_forwards, **vars(self)}


@dataclass(frozen=True)
class _Chunk:
    """One forward of the sweep; the same for all users."""

    node: NDArray[np.int64]  # (C,) in depth-first order
    keep: NDArray[
        np.int64
    ]  # (S,) where the path above the first node lies in [path of the last chunk | its nodes]
    mask: NDArray[np.bool_]  # (C, S + C) ancestor or self
    head_row: NDArray[np.int64]  # (R,) positions in the chunk whose children are scored
    edge_node: NDArray[np.int64]  # (E,) child node of each edge
    edge_row: NDArray[np.int64]  # (E,) index into head_row
    token: NDArray[np.int64]  # (U,) distinct tokens on the edges
    edge_column: NDArray[np.int64]  # (E,) index into token


class TrieEngine:
    """Scores the edges of one trie with one causal LM.

    Args:
        model: A causal LM (or an adapter around one) in evaluation mode.
        trie: The catalogue; its tokens are ids of the model's vocabulary.
        support: ``"trie"``: softmax over a node's children (MSL, Lemma 1); ``"vocabulary"``: over all tokens.
        chunk: Trie nodes of one forward.

    Raises:
        UserError: Unknown support, or a trie token outside the model's vocabulary.
    """

    def __init__(self, model: Any, trie: Trie, support: Support = "trie", *, chunk: int = CHUNK) -> None:
        if support not in ("trie", "vocabulary"):
            raise UserError(f"wanted support 'trie' or 'vocabulary', got {support!r}")
        n_vocabulary = head_weight(model).shape[0]
        if int(trie.token.max()) >= n_vocabulary:
            raise UserError(
                f"wanted trie tokens below {n_vocabulary}, the model's vocabulary, got {int(trie.token.max())}; "
                "build the trie with this model's tokenizer"
            )
        self.model, self.trie, self.support, self.chunk = model, trie, support, chunk

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
        if causal_lm(self.model).config._attn_implementation not in ("sdpa", "eager"):
            return self._warn("its attention implementation takes no mask of our own")
        if not hand_head_matches(self.model):
            return self._warn("its logits are not the product of the last hidden state and the head")
        if _recurrent(self.model):
            return self._warn("it has layers that are not attention")
        n_vocabulary = head_weight(self.model).shape[0]
        probe = Trie.from_sequences(
            [[t % n_vocabulary for t in s] for s in ((1, 2, 3, 0), (1, 4, 3, 0), (5, 3, 0))]
        )
        edges: list[Tensor] = []
        for sweep in (TrieEngine._plain_sweep, TrieEngine._tree_sweep):
            engine = TrieEngine(self.model, probe, "vocabulary", chunk=2)
            try:
                found = sweep(engine, [[6 % n_vocabulary, 2, 4], [3]], Counters())
                edges.append(_gather(found, 2, probe.n_nodes))
            except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
                if not edges:  # the plain path has to work
                    raise
                return self._warn(f"it does not take our cache or mask ({type(error).__name__})")
        loose = 1.0 if head_weight(self.model).dtype == torch.float32 else 100.0
        gap = float((edges[0] - edges[1]).abs().max())
        return gap <= 1e-3 * loose or self._warn(
            f"log-probabilities through the tree mask are off by {gap:.2g}"
        )

    def sweep(self, prompts: TokenLists, counters: Counters) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        """Score every edge that can matter: below branching nodes (trie support) or all of them (vocabulary).

        Args:
            prompts: Token ids of each user, at least one each.
            counters: Receives the work done.

        Yields:
            Child nodes (E,) and the log-probabilities (B, E) float32 of the edges into them, <= 0; parents
            before children. Edges of trie support that are not yielded are forced: log-probability 0.
        """
        if any(len(prompt) == 0 for prompt in prompts):
            raise UserError(
                "wanted at least one token in every prompt, got an empty one; start prompts with a BOS token"
            )
        longest = max(len(prompt) for prompt in prompts) + self.longest_path
        if self.tree_cache_works and not self._window_too_short(longest):
            return self._tree_sweep(prompts, counters)
        return self._plain_sweep(prompts, counters)

    @torch.inference_mode()
    def _tree_sweep(
        self, prompts: TokenLists, counters: Counters
    ) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
        from transformers import DynamicCache

        inner, device = body(self.model), self.device
        ids_BP, length_B = _pad(prompts, device)
        # Right padding under a causal mask: padding comes after every token that matters.
        output = inner(input_ids=ids_BP, past_key_values=DynamicCache(), use_cache=True)
        prompt_kv = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        counters.prompt_tokens += int(length_B.sum())
        hidden_B1D = output.last_hidden_state[torch.arange(len(prompts), device=device), length_B - 1][
            :, None
        ]
        n_prompt = ids_BP.shape[1]
        prompt_mask = torch.arange(n_prompt, device=device) < length_B[:, None]
        root, *chunks = self._plan
        yield root.edge_node, self._edges(root, hidden_B1D, counters)
        tree_kv = [(k[:, :, :0], v[:, :, :0]) for k, v in prompt_kv]
        for chunk in chunks:
            keep = torch.from_numpy(chunk.keep).to(device)
            tree_kv = [(k[:, :, keep], v[:, :, keep]) for k, v in tree_kv]
            cache = DynamicCache(
                [
                    (torch.cat([pk, tk], 2), torch.cat([pv, tv], 2))
                    for (pk, pv), (tk, tv) in zip(prompt_kv, tree_kv, strict=True)
                ]
            )
            n_new = len(chunk.node)
            mask = torch.cat(
                [
                    prompt_mask[:, None, None].expand(-1, -1, n_new, -1),
                    torch.from_numpy(chunk.mask).to(device)[None, None].expand(len(prompts), -1, -1, -1),
                ],
                dim=3,
            )
            output = inner(
                input_ids=self._tokens(chunk.node, len(prompts)),
                attention_mask=self._mask(mask),
                position_ids=length_B[:, None]
                + torch.from_numpy(self.trie.depth[chunk.node] - 1).to(device).long(),
                past_key_values=cache,
                use_cache=True,
            )
            grown = output.past_key_values.layers
            tree_kv = [(layer.keys[:, :, n_prompt:], layer.values[:, :, n_prompt:]) for layer in grown]
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in grown)
            counters.cache_bytes_peak = max(counters.cache_bytes_peak, held)
            counters.tree_tokens += n_new * len(prompts)
            counters.rounds += 1
            if len(chunk.edge_node):
                rows = torch.from_numpy(chunk.head_row).to(device)
                yield chunk.edge_node, self._edges(chunk, output.last_hidden_state[:, rows], counters)

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
        needed = self._needed
        for end in ends:
            path = trie.path_to(int(end))
            fresh = [n for n in (0, *path) if needed[n] and not scored[n]]
            scored[fresh] = True
            tokens = trie.token[path].tolist()
            ids, length_B = _pad([[*prompt, *tokens] for prompt in prompts], device)
            logits = self.model(input_ids=ids, use_cache=False).logits
            counters.prompt_tokens += int(length_B.sum()) - len(path) * len(prompts)
            counters.tree_tokens += len(path) * len(prompts)
            counters.rounds += 1
            for node in fresh:
                at = length_B - len(path) + int(trie.depth[node]) - 1
                row_BV = logits[torch.arange(len(prompts), device=device), at].float()
                tokens_E, nodes_E = trie.children(node)
                z_BE = row_BV[:, torch.from_numpy(tokens_E.astype(np.int64)).to(device)]
                total = z_BE if self.support == "trie" else row_BV
                counters.expansions += len(prompts)
                counters.head_rows += len(prompts)
                yield np.asarray(nodes_E, np.int64), (z_BE - total.logsumexp(1, keepdim=True)).clamp(max=0)

    def _edges(self, chunk: _Chunk, hidden_BRD: Tensor, counters: Counters) -> Tensor:
        """(B, E) float32 log-probabilities of a chunk's edges."""
        device, weight, bias = self.device, head_weight(self.model), head_bias(self.model)
        token = torch.from_numpy(chunk.token).to(device)
        row, column = (
            torch.from_numpy(chunk.edge_row).to(device),
            torch.from_numpy(chunk.edge_column).to(device),
        )
        some_bias = None if bias is None else bias[token]
        z_BRU = torch.nn.functional.linear(hidden_BRD, weight[token], some_bias)
        z_BE = z_BRU[:, row, column].float()
        n_users, n_rows = hidden_BRD.shape[:2]
        counters.expansions += n_users * n_rows
        counters.head_rows += n_users * n_rows
        if self.support == "vocabulary":
            total_BR = _log_sum_exp(hidden_BRD, weight, bias)
        else:
            index = row.expand(n_users, -1)
            top_BR = z_BE.new_full((n_users, n_rows), -torch.inf).scatter_reduce(1, index, z_BE, "amax")
            sum_BR = torch.zeros_like(top_BR).scatter_add(1, index, (z_BE - top_BR[:, row]).exp())
            total_BR = top_BR + sum_BR.log()
        # A log-sum-exp rounds differently from a gathered logit: without the clamp a sure edge can exceed 0.
        return (z_BE - total_BR[:, row]).clamp(max=0)

    @cached_property
    def _needed(self) -> NDArray[np.bool_]:
        """(N,) whether a node's children must be scored."""
        return self.trie.branching if self.support == "trie" else ~self.trie.is_leaf

    @cached_property
    def _plan(self) -> list[_Chunk]:
        """The root, then the chunks of the sweep in depth-first order."""
        trie, needed = self.trie, self._needed
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
        trie = self.trie
        where = {int(n): i for i, n in enumerate(held)}
        keys = np.concatenate([path, node])
        # Ancestor or self: the key's item range holds the node's, and it is not deeper.
        mask = (
            (trie.item_lo[keys][None] <= trie.item_lo[node][:, None])
            & (trie.item_hi[keys][None] >= trie.item_hi[node][:, None])
            & (trie.depth[keys][None] <= trie.depth[node][:, None])
        )
        head_row = np.flatnonzero(self._needed[node])
        first, last = trie.child_ptr[node[head_row]], trie.child_ptr[node[head_row] + 1]
        edge_row = np.repeat(np.arange(len(head_row)), last - first)
        offset = np.arange(len(edge_row)) - np.repeat(np.cumsum(last - first) - (last - first), last - first)
        edge_node = np.repeat(first, last - first) + offset
        token, edge_column = np.unique(trie.token[edge_node], return_inverse=True)
        return _Chunk(
            node=node,
            keep=np.array([where[int(n)] for n in path], dtype=np.int64),
            mask=mask,
            head_row=head_row,
            edge_node=edge_node.astype(np.int64),
            edge_row=edge_row.astype(np.int64),
            token=token.astype(np.int64),
            edge_column=edge_column.astype(np.int64),
        )

    def _tokens(self, node: NDArray[np.int64], n_users: int) -> Tensor:
        return (
            torch.from_numpy(self.trie.token[node].astype(np.int64)).to(self.device)[None].expand(n_users, -1)
        )

    def _mask(self, mask: Tensor) -> Tensor:
        """Boolean for sdpa, additive for eager attention."""
        if causal_lm(self.model).config._attn_implementation == "sdpa":
            return mask
        kind = head_weight(self.model).dtype
        return torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(
            ~mask, torch.finfo(kind).min
        )

    def _window_too_short(self, longest: int) -> bool:
        window = _shortest_window(self.model)
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
    engine: TrieEngine, prompts: TokenLists, counters: Counters
) -> NDArray[np.float32]:
    """(B, N) float32 log-probability of the edge into each node, <= 0; 0 at the root and on forced edges."""
    edges: NDArray[np.float32] = _gather(
        engine.sweep(prompts, counters), len(prompts), engine.trie.n_nodes
    ).numpy()
    return edges


def _pad(prompts: TokenLists, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) ids padded on the right with 0, and (B,) lengths."""
    length = np.array([len(prompt) for prompt in prompts])
    ids = np.zeros((len(prompts), int(length.max())), dtype=np.int64)
    ids[np.arange(ids.shape[1]) < length[:, None]] = np.concatenate(
        [np.asarray(p, dtype=np.int64) for p in prompts]
    )
    return torch.from_numpy(ids).to(device), torch.from_numpy(length).to(device)


def _log_sum_exp(hidden_BRD: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, R) float32 log of the sum over the vocabulary, in blocks of rows."""
    flat = hidden_BRD.reshape(-1, hidden_BRD.shape[-1])
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    parts = (flat[start : start + rows] for start in range(0, len(flat), rows))
    blocks = [torch.nn.functional.linear(part, weight, bias).float().logsumexp(1) for part in parts]
    return torch.cat(blocks).view(hidden_BRD.shape[:2])


def _text_config(model: Any) -> Any:
    return causal_lm(model).config.get_text_config(decoder=True)


def _recurrent(model: Any) -> bool:
    kinds = getattr(_text_config(model), "layer_types", None) or []
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def _shortest_window(model: Any) -> int | None:
    """Tokens the shortest-sighted attention layer sees, or None when all layers see everything."""
    config = _text_config(model)
    kinds = getattr(config, "layer_types", None)
    named = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    sizes = [int(size) for size in named if size]
    everywhere = kinds is not None and all(kind == "full_attention" for kind in kinds)
    if everywhere or getattr(config, "use_sliding_window", True) is False or not sizes:
        return None
    return min(sizes)
