"""Training examples: the ids of windows, with one trie node per target token.

Shape key: W windows, I items, N trie nodes, B batch, L tokens, M target positions, S titles, T tokens of titles.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from triewise.arrays import Ragged, ranges, within
from triewise.errors import UserError
from triewise.training.windows import Windows

if TYPE_CHECKING:
    from triewise.tokens import Prompts, Trie

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Right padding needs no attention mask with a causal model: it stands behind every token that matters.

    Attributes:
        input_ids: int64 (B, L), padded on the right with 0.
        position: int64 (M,); index into the flattened (B * L) of the position whose hidden state predicts the
            target.
        target: int64 (M,); token ids.
        node: int64 (M,); trie node before the target.
        title: int64 (M,); which of the batch's target titles the target is a token of, from 0.
        place: int64 (M,); which token of all titles of the catalogue, end to end, the target is.
        weight: float32 (M,); weight of the target in the loss.
        zero_gain: bool (M,); whether the target decides nothing.
        n_tokens: Tokens of ``input_ids`` without the padding.
    """

    input_ids: NDArray[np.int64]
    position: NDArray[np.int64]
    target: NDArray[np.int64]
    node: NDArray[np.int64]
    title: NDArray[np.int64]
    place: NDArray[np.int64]
    weight: NDArray[np.float32]
    zero_gain: NDArray[np.bool_]
    n_tokens: int


@dataclass(frozen=True)
class WithoutHistory:
    """The target titles of a `Batch` behind a prompt that is the same for all.

    Attributes:
        input_ids: int64 (U, L); one row for each different title, padded on the right with 0.
        position: int64 (M,); as in `Batch`, in the same order, but into (U * L).
        node: int64 (M,); as in `Batch`.
        n_tokens: Tokens of ``input_ids`` without the padding.
    """

    input_ids: NDArray[np.int64]
    position: NDArray[np.int64]
    node: NDArray[np.int64]
    n_tokens: int


class Examples:
    """Windows with everything that turns a few of them into a `Batch`.

    Args:
        windows: What is learned from.
        prompts: Histories to prompt ids.
        trie: Built from ``prompts.title_tokens``.
        weight: Weight of each title token in the loss, title after title, float (T,); None: 1. `along_titles`
            makes it from weights of nodes.
        zero_gain: bool (N,); whether the token into each node decides nothing.

    Raises:
        UserError: A trie of other titles, arrays of another size, or several targets in a window without the
            plain template.
    """

    def __init__(
        self,
        windows: Windows,
        prompts: Prompts,
        trie: Trie,
        weight: NDArray[Any] | None,
        zero_gain: NDArray[np.bool_],
    ) -> None:
        self.windows, self.prompts, self.trie = windows, prompts, trie
        before_T, offsets = trie.paths()
        after_T = trie.paths_after()[0]
        title = prompts.title_tokens
        if not (np.array_equal(offsets, title.offsets) and np.array_equal(trie.token[after_T], title.values)):
            raise UserError(
                "wanted the trie of the prompts' titles, got another one; build both from one catalogue"
            )
        weight_T = np.ones(len(after_T)) if weight is None else weight
        sized = (
            ("weight", weight_T, len(after_T), "title tokens"),
            ("zero_gain", zero_gain, trie.n_nodes, "nodes"),
        )
        for name, array, size, what in sized:
            if array.shape != (size,):
                raise UserError(f"wanted {name} for {size} {what}, got an array of shape {array.shape}")
        several = (windows.items.lengths - windows.n_context).max(initial=0) > 1
        if several and prompts.slots is not None and prompts.slots.histories is not None:
            raise UserError(
                "windows with several targets have several histories, and a user's slot knows one; use "
                "supervision = 'last'"
            )
        if several and not prompts.grows:
            raise UserError(
                f"windows with several targets need the plain template or prompts that grow, got {prompts.template!r}: "
                "elsewhere titles of the history are no answers; use supervision = 'last'"
            )
        self._node_T = before_T.astype(np.int64)
        self._weight_T = weight_T.astype(np.float32)
        self._zero_T = zero_gain[after_T]

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.windows)

    @cached_property
    def size(self) -> NDArray[np.int64]:
        """Tokens of the titles of each window, context included; int64 (W,)."""
        length = self.prompts.title_tokens.lengths[self.windows.items.values]
        return np.add.reduceat(length, self.windows.items.offsets[:-1])

    @cached_property
    def of_title(self) -> dict[str, NDArray[np.int64]]:
        """How many tokens of each title (I,) are ``tokens``, ``zero_gain``, ``positive_gain``, ``decisions``."""
        is_T = {
            "tokens": np.ones(len(self._zero_T), dtype=np.bool_),
            "zero_gain": self._zero_T,
            "positive_gain": ~self._zero_T,
            "decisions": self.trie.branching[self._node_T],
        }
        first = self.prompts.title_tokens.offsets[:-1]
        return {name: np.add.reduceat(is_t.astype(np.int64), first) for name, is_t in is_T.items()}

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that batches depend on."""
        digest = hashlib.sha256((self.prompts.hash + self.trie.fingerprint()).encode())
        for array in (self.windows.items.values, self.windows.items.offsets, self.windows.n_context):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        digest.update(self._weight_T.astype("<f4").tobytes() + self._zero_T.tobytes())
        return digest.hexdigest()

    def batch(self, indices: Sequence[int] | Ints) -> Batch:
        """The ids of some windows and where their target tokens are.

        Args:
            indices: Window numbers (B,).
        """
        index_B = np.asarray(indices, dtype=np.int64)
        items, title = self.windows.items, self.prompts.title_tokens
        start_B, n_context_B = items.offsets[index_B], self.windows.n_context[index_B].astype(np.int64)
        prefixes = [
            self.prompts.encode(items.values[s : s + n].tolist())
            for s, n in zip(start_B, n_context_B, strict=True)
        ]
        prefix_B = np.array([len(p) for p in prefixes], dtype=np.int64)

        n_titles_B = items.offsets[index_B + 1] - start_B - n_context_B
        item_S = items.values[ranges(start_B + n_context_B, n_titles_B).at]
        token_T = ranges(title.offsets[item_S], title.lengths[item_S])
        row_T = np.repeat(np.arange(len(index_B)), n_titles_B)[token_T.row]
        n_tokens_B = np.bincount(row_T, minlength=len(index_B))
        place_T = ranges(prefix_B, n_tokens_B).at

        length_B, slots = prefix_B + n_tokens_B, self.prompts.slots
        if slots is not None:  # behind each target but the last of a window stands its slot
            length_B += np.maximum(n_titles_B - 1, 0)
            place_T = place_T + within(n_titles_B)[token_T.row]
        input_ids = np.zeros((len(index_B), int(length_B.max(initial=0))), dtype=np.int64)
        for row, prefix in enumerate(prefixes):
            input_ids[row, : len(prefix)] = prefix
        target = title.values[token_T.at].astype(np.int64)
        input_ids[row_T, place_T] = target
        if slots is not None:
            end_S = np.cumsum(title.lengths[item_S]) - 1
            more_S = np.append(row_T[end_S[1:]] == row_T[end_S[:-1]], False)
            input_ids[row_T[end_S[more_S]], place_T[end_S[more_S]] + 1] = slots.first + item_S[more_S]
        return Batch(
            input_ids=input_ids,
            position=row_T * input_ids.shape[1] + place_T - 1,
            target=target,
            node=self._node_T[token_T.at],
            title=token_T.row,
            place=token_T.at,
            weight=self._weight_T[token_T.at],
            zero_gain=self._zero_T[token_T.at],
            n_tokens=int(length_B.sum()),
        )

    def without_history(self, indices: Sequence[int] | Ints, prompt: Sequence[int]) -> WithoutHistory:
        """The target titles of some windows, each different one once, behind a prompt without history.

        Args:
            indices: Window numbers (B,), as for `batch`.
            prompt: Ids in front of every title, at least one.
        """
        index_B = np.asarray(indices, dtype=np.int64)
        items, title = self.windows.items, self.prompts.title_tokens
        first_B = items.offsets[index_B] + self.windows.n_context[index_B]
        item_S = items.values[ranges(first_B, items.offsets[index_B + 1] - first_B).at]
        item_U, row_S = np.unique(item_S, return_inverse=True)
        ids_U, place_U = (
            ranges(start, title.lengths[item_U]) for start in (title.offsets[item_U], 0 * item_U)
        )
        input_ids = np.zeros((len(item_U), len(prompt) + int(place_U.at.max(initial=-1)) + 1), dtype=np.int64)
        input_ids[:, : len(prompt)] = prompt
        input_ids[place_U.row, len(prompt) + place_U.at] = title.values[ids_U.at]
        length_S = title.lengths[item_S]
        place_T, token_T = ranges(0 * item_S, length_S), ranges(title.offsets[item_S], length_S).at
        position = row_S[place_T.row] * input_ids.shape[1] + len(prompt) + place_T.at - 1
        n_tokens = len(item_U) * len(prompt) + len(ids_U.at)
        return WithoutHistory(input_ids, position.astype(np.int64), self._node_T[token_T], n_tokens)

    def with_rejected(self, rejected: NDArray[np.int32], rows: Ints | None = None) -> Examples:
        """Windows, each once as it is and then once with each rejected title as its last and only target.

        Args:
            rejected: Item indices (R, n), for each window.
            rows: Which windows (R,); None: all, each of which has one target.

        Returns:
            Examples of ``R * (1 + n)`` windows; window r is number ``r * (1 + n)``.
        """
        items, n = self.windows.items, rejected.shape[1]
        index = np.repeat(np.arange(len(self.windows)) if rows is None else rows, 1 + n)
        more = Ragged.windows(items.values, items.offsets[index], items.lengths[index])
        last = more.offsets[1:] - 1
        n_context = (more.lengths - 1).astype(np.int32)
        n_context[:: 1 + n] = self.windows.n_context[index[:: 1 + n]]
        more.values[last] = np.column_stack([more.values[last[:: 1 + n]], rejected]).ravel()
        other = copy.copy(self)
        other.windows = Windows(more, n_context)
        other.__dict__.pop("size", None)
        return other


def along_titles(trie: Trie, value_per_node: NDArray[Any]) -> NDArray[Any]:
    """A number per node (N,) as one per title token (T,), title after title: that of the node it leads into."""
    if value_per_node.shape != (trie.n_nodes,):
        raise UserError(
            f"wanted a value for each of {trie.n_nodes} nodes, got an array of shape {value_per_node.shape}"
        )
    return value_per_node[trie.paths_after()[0]]
