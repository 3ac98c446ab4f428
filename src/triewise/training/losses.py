r"""Token losses and what they are made of: support x temperature x weight x normaliser.

The *support* of the softmax is the whole vocabulary (language-modelling loss, LML) or the valid next tokens,
which are the children of the trie node before the target (masked softmax loss, MSL). Nothing here stores a
mask: a ragged gather reads the logits of the children. Everything is in nats, float32, with the maximum
subtracted.

Shape key: M target positions, V vocabulary, N trie nodes, E (row, child) pairs of M positions, R reference
rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from triewise.errors import UserError
from triewise.tokens import DeviceTrie, Trie
from triewise.training.temperature import of_rows


class Columns(NamedTuple):
    """Which tokens the columns of logits belong to, where they are not the whole vocabulary.

    Attributes:
        token: int64 (C,), ascending, distinct.
        n_vocabulary: Size V of the vocabulary they are from.
    """

    token: Tensor
    n_vocabulary: int


def trie_nll(
    logits: Tensor,
    target: Tensor,
    node: Tensor,
    trie: Trie | DeviceTrie,
    temperature: float | Tensor = 1.0,
    n_edges: int | None = None,
    expand_negatives: bool = False,
    columns: Columns | None = None,
) -> Tensor:
    r"""Negative log-likelihood of each target token among its valid continuations.

    .. math:: \ell_m = -z_{m,y_m}/\tau + \log \sum_{v \in \mathcal{C}(n_m)} a_{m,v} \exp(z_{m,v}/\tau)

    where :math:`\mathcal{C}(n)` are the tokens on the edges that leave trie node :math:`n`, and a is 1 or, with
    ``expand_negatives``, :math:`V / |\mathcal{C}(n_m)|` for all of them but the target.

    Args:
        logits: Next-token logits (M, V), any float dtype.
        target: Target token ids (M,), int64; each continues its node (``Trie.walk`` has checked that: a check
            here would stop a GPU at every step).
        node: Trie node before each target (M,), int64; no leaf.
        trie: The trie of all items.
        temperature: Divides the logits, > 0; tau of the paper. The loss is *not* multiplied by it. A tensor is of
            all targets (), or has one for each (M,).
        n_edges: Number of children of all nodes of ``node`` together, where it is known; spares a GPU one
            stop.
        expand_negatives: Let the valid tokens other than the target weigh as much as a whole vocabulary (MSL
            + alpha).
        columns: The tokens of the columns of ``logits``, then (M, C); they must hold all children of all
            nodes of ``node`` (``Trie.continuations``). None: column v is token v.

    Returns:
        float32 (M,), nats, >= 0. Exactly 0, with zero gradient, where only one continuation is valid.

    Raises:
        UserError: ``temperature`` is a number <= 0.

    Source: MSL, arXiv:2504.04178. The authors' code stores a (T, V) mask per example and does not subtract
    the maximum; it has no MSL + alpha.

    >>> trie = Trie.from_sequences([[7, 2], [9, 2]])
    >>> logits = torch.zeros(1, 10)
    >>> logits[0, 5] = 50.0  # token 5 continues no title here
    >>> trie_nll(logits, torch.tensor([7]), torch.tensor([0]), trie).exp()
    tensor([2.])
    """
    if not isinstance(temperature, Tensor):
        check_temperature(temperature)
    trie = on_device(trie, logits.device)
    edge_row, edge_token, z_E, z_M = edge_logits(logits, target, node, trie, n_edges, columns)
    z_E, z_M = z_E / of_rows(temperature, edge_row), z_M / temperature
    if expand_negatives:
        n_vocabulary = logits.shape[1] if columns is None else columns.n_vocabulary
        log_a_M = (n_vocabulary / trie.n_children.index_select(0, node)).log()
        negative_E = edge_token != target.index_select(0, edge_row)
        z_E = z_E + log_a_M.index_select(0, edge_row) * negative_E
    top_M, rest_M = _log_sum_exp(z_E, edge_row, len(node))
    return (top_M - z_M) + rest_M  # in this order small losses of large logits keep their digits


def vocabulary_nll(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """Negative log-likelihood of each target token among all tokens: cross-entropy, unreduced.

    Args:
        logits: Next-token logits (M, V), any float dtype.
        target: Target token ids (M,), int64.
        temperature: Divides the logits, > 0.

    Returns:
        float32 (M,), nats, >= 0; float64 from logits of float64.

    Raises:
        UserError: ``temperature`` <= 0.
    """
    check_temperature(temperature)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(exact / temperature, target, reduction="none")


class LmlParts(NamedTuple):
    """The two parts of the language-modelling loss per token, float32 (M,), nats; their sum is the loss."""

    invalid: Tensor
    choice: Tensor


def lml_parts(
    logits: Tensor, target: Tensor, node: Tensor, trie: Trie | DeviceTrie, n_edges: int | None = None
) -> LmlParts:
    r"""What the language-modelling loss pays for invalid tokens, and what for the wrong valid ones.

    .. math::
        \mathrm{invalid} = -\log \frac{\sum_{v \in \mathcal{C}(n)} e^{z_v}}{\sum_{v \in V} e^{z_v}}, \qquad
        \mathrm{choice} = -\log \frac{e^{z_y}}{\sum_{v \in \mathcal{C}(n)} e^{z_v}}

    Args:
        logits: Next-token logits (M, V), any float dtype.
        target: Target token ids (M,), int64.
        node: Trie node before each target (M,), int64.
        trie: The trie of all items.
        n_edges: As in `trie_nll`.

    Returns:
        ``invalid``, >= 0 but for rounding, not 0 for forced tokens; ``choice`` is `trie_nll` at temperature 1.

    Source: MSL, arXiv:2504.04178, Section 3 and Figure 3.
    """
    edge_row, _, z_E, z_M = edge_logits(logits, target, node, trie, n_edges)
    top_M, rest_M = _log_sum_exp(z_E, edge_row, len(node))
    return LmlParts((logits.float() - top_M[:, None]).logsumexp(1) - rest_M, (top_M - z_M) + rest_M)


def gradient_weight(nll: Tensor) -> Tensor:
    """The factor ``1 - P(target)`` that every token's gradient carries (w of MSL), from its loss in nats."""
    return -torch.expm1(-nll)


def widest_node(trie: Trie) -> tuple[int, int]:
    """The node with the most children (lowest id on ties) and their number."""
    node = int(np.argmax(trie.n_children))
    return node, int(trie.n_children[node])


def on_device(trie: Trie | DeviceTrie, device: Any) -> DeviceTrie:
    """A trie, or its copy on a device."""
    return trie.to(device) if isinstance(trie, Trie) else trie


def child_edges(node: Tensor, trie: DeviceTrie, n_edges: int | None) -> tuple[Tensor, Tensor]:
    """Row of ``node`` and token of every child, row by row: two int64 tensors (E,)."""
    n_M = trie.n_children.index_select(0, node)
    row_E = torch.repeat_interleave(n_M, output_size=n_edges)
    shift_M = trie.child_ptr.index_select(0, node) - (n_M.cumsum(0) - n_M)
    child_E = torch.arange(len(row_E), device=node.device) + shift_M.index_select(0, row_E)
    return row_E, trie.token.index_select(0, child_E)


def column_of(token: Tensor, columns: Columns | None) -> Tensor:
    """The column of each token."""
    return token if columns is None else torch.searchsorted(columns.token, token)


class EdgeLogits(NamedTuple):
    """Valid tokens of all rows, as of `child_edges`, with their logits (E,), and those of the targets (M,); float32."""

    row: Tensor
    token: Tensor
    z_E: Tensor
    z_M: Tensor


def edge_logits(
    logits: Tensor,
    target: Tensor,
    node: Tensor,
    trie: Trie | DeviceTrie,
    n_edges: int | None = None,
    columns: Columns | None = None,
) -> EdgeLogits:
    """Logits of the children of the nodes and of the targets; arguments as of `trie_nll`."""
    edge_row, edge_token = child_edges(node, on_device(trie, logits.device), n_edges)
    # One gather for both: each one costs a zero-filled (M, V) gradient in the backward pass.
    first = torch.arange(len(target), device=target.device) * logits.shape[1]
    flat = torch.cat(
        [first.index_select(0, edge_row) + column_of(edge_token, columns), first + column_of(target, columns)]
    )
    z = logits.reshape(-1).index_select(0, flat).float()
    return EdgeLogits(edge_row, edge_token, z[: len(edge_row)], z[len(edge_row) :])


def _log_sum_exp(z_E: Tensor, row: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each row of a ragged array as two summands (n_rows,): the maximum, detached, and the rest."""
    top = z_E.new_full((n_rows,), -torch.inf).scatter_reduce(0, row, z_E.detach(), "amax")
    total = z_E.new_zeros(n_rows).index_add(0, row, (z_E - top.index_select(0, row)).exp())
    return top, total.log()


def check_temperature(temperature: float) -> None:
    """UserError where it is not > 0."""
    if not temperature > 0:
        raise UserError(f"wanted a temperature > 0, got {temperature}; 1 leaves the logits as they are")
