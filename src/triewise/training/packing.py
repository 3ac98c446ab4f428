"""Rows that begin alike run their common beginning once: prefix trees in packed sequences.

The rows of one user grow: each prompt repeats the history of the one before. A micro-batch becomes a few packed
sequences that hold every distinct prefix once, in depth-first order; a token sees its ancestors and itself, and
its position is its depth. What all rows begin with (the instruction) runs once, in front, and its keys and values
are expanded over the sequences: gradients flow back through them. Without dropout losses and gradients are those
of the rows by themselves.

Shape key: B rows, L tokens of a row, S packed sequences, T places of each, P tokens common to all, M targets.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.models import (
    Measured,
    body,
    cache_of,
    computes_again,
    head_weight,
    own_mask,
    place_limit,
    refusal,
)
from triewise.progress import note
from triewise.training import processes

Int64 = NDArray[np.int64]
SHARE_AT_LEAST = 8  # tokens: a shorter common beginning is not worth the attention it is masked out of
STRETCHES = (1.0, 1.25, 1.5, 2.0)  # widths of packed sequences that are tried, over the longest part
WIDE = 2000  # places at which masked-out attention counts as much as all the rest of a token's forward
LONGEST = 1024  # places of a packed sequence that rows are joined up to; attention is quadratic in it


@dataclass(frozen=True)
class Packed:
    """A micro-batch of rows as prefix trees.

    Attributes:
        prefix_ids: int64 (P,), what all rows begin with; may be empty.
        input_ids: int64 (S, T), 0 where a place is empty.
        position_ids: int64 (S, T), depth of each token in its row.
        subtree_end: int64 (S, T), end of the places that have this one among their ancestors, itself included;
            place j is seen by places j to ``subtree_end[j] - 1``.
        position: int64 (M,), index into the flattened (S * T) of the place that predicts each target.
    """

    prefix_ids: Int64
    input_ids: Int64
    position_ids: Int64
    subtree_end: Int64
    position: Int64

    @property
    def n_places(self) -> int:
        """Token-forwards of a body pass over it, padding included."""
        return len(self.prefix_ids) + self.input_ids.size


@dataclass
class _Sequence:
    """A packed sequence that grows row by row."""

    tokens: list[Int64]
    depths: list[Int64]
    ends: Int64
    path: Int64  # place of each token of the newest row

    def add(self, tokens: Int64, shared: int) -> None:
        """Add a row whose first ``shared`` tokens are those of the row before."""
        start, n_new = len(self.ends), len(tokens) - shared
        new = np.arange(start, start + n_new)
        self.tokens.append(tokens[shared:])
        self.depths.append(np.arange(shared, len(tokens)))
        self.path = np.concatenate([self.path[:shared], new])
        self.ends = np.concatenate([self.ends, new])
        self.ends[self.path] = start + n_new


def pack(input_ids: Int64, position: Int64, capacity: int = LONGEST) -> Packed:
    """Rows as prefix trees.

    Args:
        input_ids: int64 (B, L), padded on the right.
        position: int64 (M,), index into the flattened (B * L) of the position that predicts each target, M > 0; tokens
            behind the last one of a row are left out, and so are rows without any.
        capacity: Rows are joined while their packed sequence has at most so many places; a longer row has a
            sequence of its own.

    Returns:
        The packed rows; ``position`` in the order of the argument.
    """
    row_M, column_M = np.divmod(position, input_ids.shape[1])
    length_B = np.zeros(len(input_ids), dtype=np.int64)
    np.maximum.at(length_B, row_M, column_M + 1)
    used = np.flatnonzero(length_B)
    rows = {int(b): input_ids[b, : length_B[b]] for b in used}
    order = sorted(rows, key=lambda b: rows[b].tolist())
    shared = [0] + [_common(rows[a], rows[b]) for a, b in itertools.pairwise(order)]
    # Each row has a position of its own behind what all share: what is read there is in the packed part.
    n_prefix = min(_common(rows[order[0]], rows[order[-1]]), int(column_M.min()))
    n_prefix = n_prefix if n_prefix >= SHARE_AT_LEAST and len(order) > 1 else 0

    sequences: list[_Sequence] = []
    of_row: dict[int, tuple[int, Int64]] = {}
    for b, common in zip(order, shared, strict=True):
        tokens, common = rows[b][n_prefix:], max(common - n_prefix, 0)
        fits = sequences and len(sequences[-1].ends) + len(tokens) - common <= capacity
        if not fits or common < SHARE_AT_LEAST:
            sequences.append(_Sequence([], [], np.zeros(0, np.int64), np.zeros(0, np.int64)))
            common = 0
        sequences[-1].add(tokens, common)
        of_row[b] = (len(sequences) - 1, sequences[-1].path)

    place, n_bins, width = _fill([len(s.ends) for s in sequences])
    ids, depth = np.zeros((n_bins, width), np.int64), np.zeros((n_bins, width), np.int64)
    # An empty place sees itself: no row of a softmax is empty.
    end = np.tile(np.arange(1, width + 1), (n_bins, 1))
    for s, (bin_, start) in zip(sequences, place, strict=True):
        span = slice(start, start + len(s.ends))
        ids[bin_, span] = np.concatenate(s.tokens)
        depth[bin_, span] = np.concatenate(s.depths) + n_prefix
        end[bin_, span] = s.ends + start
    packed_at = np.empty(len(position), dtype=np.int64)
    for b, (i, path) in of_row.items():
        ours = row_M == b
        bin_, start = place[i]
        packed_at[ours] = bin_ * width + start + path[column_M[ours] - n_prefix]
    return Packed(rows[order[0]][:n_prefix], ids, depth, end, packed_at)


def _common(a: Int64, b: Int64) -> int:
    """Number of tokens that two rows begin with."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _fill(sizes: list[int]) -> tuple[list[tuple[int, int]], int, int]:
    """Bin and offset of each size, number of bins and their width: the cheapest of a few widths."""
    fits = [_first_fit(sizes, int(max(sizes) * stretch)) for stretch in STRETCHES]
    return min(fits, key=lambda fit: fit[1] * fit[2] * (1 + fit[2] / WIDE))


def _first_fit(sizes: list[int], width: int) -> tuple[list[tuple[int, int]], int, int]:
    """First-fit decreasing into bins of a width, and how wide the fullest is."""
    used: list[int] = []
    place = [(0, 0)] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        bin_ = next((k for k, n in enumerate(used) if n + sizes[i] <= width), len(used))
        if bin_ == len(used):
            used.append(0)
        place[i] = (bin_, used[bin_])
        used[bin_] += sizes[i]
    return place, len(used), max(used)


def hidden_states(
    model: Any, input_ids: Tensor, position_ids: Tensor, subtree_end: Tensor, prefix_ids: Tensor
) -> Tensor:
    """Hidden states (S, T, D) of packed rows; arguments as in `Packed`, on the model's device.

    Layers whose activations are computed again in the backward pass take no cache, and processes that share weights
    have to run each layer equally often: then each sequence has what all rows begin with as its own.
    """
    (n_sequences, width), n_prefix = input_ids.shape, len(prefix_ids)
    place = torch.arange(width, device=input_ids.device)
    sees = (place[:, None] >= place) & (place[:, None] < subtree_end[:, None, :])
    cache, own = None, bool(n_prefix and (processes.sharded() or computes_again(model)))
    if own:
        depth = torch.arange(n_prefix, device=input_ids.device)
        input_ids = torch.cat([prefix_ids.expand(n_sequences, -1), input_ids], dim=1)
        position_ids = torch.cat([depth.expand(n_sequences, -1), position_ids], dim=1)
        whole = sees.new_ones(n_prefix + width, n_prefix + width).tril().repeat(n_sequences, 1, 1)
        whole[:, n_prefix:, n_prefix:] = sees
        sees = whole
    elif n_prefix:
        prefix = body(model)(input_ids=prefix_ids[None], past_key_values=cache_of(), use_cache=True)
        shape = (n_sequences, -1, -1, -1)
        layers = prefix.past_key_values.layers
        cache = cache_of((layer.keys.expand(shape), layer.values.expand(shape)) for layer in layers)
        sees = torch.cat([sees.new_ones(n_sequences, width, n_prefix), sees], dim=2)
    hidden: Tensor = body(model)(
        input_ids=input_ids,
        attention_mask=own_mask(model, sees[:, None]),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return hidden[:, n_prefix:] if own else hidden


@torch.no_grad()
def packing_works(model: Any, tokens: Int64, longest: int) -> bool:
    """Whether packed rows give what the rows by themselves give; one printed line where they do not.

    Args:
        model: A causal LM.
        tokens: Some token ids that mean something to the model, at least one.
        longest: Tokens of the longest row.
    """
    places = longest + int(STRETCHES[-1] * max(longest, LONGEST))
    reason = refusal(
        model,
        longest,
        lambda seed: _measured(model, tokens, longest, seed),
        "hidden states of packed rows",
        places=places,
        room=place_limit(model),
    )
    if reason:
        note(f"warning: rows of this model are not packed, each runs by itself: {reason}")
    return not reason


def _measured(model: Any, tokens: Int64, longest: int, seed: int) -> Measured:
    """The last places of three rows: two long ones with a shared history, and a shorter one with their beginning."""
    random, device = np.random.default_rng(seed), head_weight(model).device
    n, n_read, n_short = max(longest, 4 * SHARE_AT_LEAST), SHARE_AT_LEAST // 2, 3 * SHARE_AT_LEAST
    text = random.choice(tokens, (3, n)).astype(np.int64)
    text[1, : n - SHARE_AT_LEAST] = text[0, : n - SHARE_AT_LEAST]
    text[2, : 2 * SHARE_AT_LEAST] = text[0, : 2 * SHARE_AT_LEAST]
    text[2, max(n_short, n // 2) :] = 0
    length = np.array([n, n, max(n_short, n // 2)])
    at = length[:, None] - n_read + np.arange(n_read)
    ids, position = torch.from_numpy(text).to(device), (np.arange(3)[:, None] * n + at).ravel()

    def plain(ids: Tensor, at: Any) -> Tensor:
        hidden: Tensor = body(model)(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[torch.arange(len(ids))[:, None], torch.from_numpy(at)]

    alone = torch.cat([plain(ids[b : b + 1, : length[b]], at[b : b + 1]) for b in range(3)])
    packed = pack(text, position)
    return Measured.of(
        model, alone, lambda: plain(ids, at), lambda: _read(model, packed, device).view(alone.shape)
    )


def _read(model: Any, packed: Packed, device: torch.device) -> Tensor:
    """Hidden states (M, D) at the positions of packed rows."""
    names = ("input_ids", "position_ids", "subtree_end", "prefix_ids")
    tensors = {name: torch.from_numpy(getattr(packed, name)).to(device) for name in names}
    at = torch.from_numpy(packed.position).to(device)
    return hidden_states(model, **tensors).flatten(0, 1).index_select(0, at)
