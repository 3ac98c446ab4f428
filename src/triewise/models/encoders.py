"""Sequential encoders: item numbers to states, and states to scores of all items.

Items are 0..I-1 outside. Inside, a row holds ``item + 1``; 0 is padding and I + 1 the mask of BERT4Rec, so
padding is never an item and the first item is one like any other. Rows are padded on the right: the state at
a place depends on that place and those before it (GRU4Rec, SASRec, eSASRec, LRURec), or on all that is no padding
(BERT4Rec), so padding changes nothing.

Shape key: B rows, L places, D width, H state of a recurrence, I items, M target places.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triewise.arrays import Ragged, padded
from triewise.settings import EncoderSettings

PAD = 0
# Keys of a model's shape that came later; a model without one is as their default says.
_LATER = ("norm", "last_norm", "scaled", "positions", "initial", "item_std", "position_std")


class SequentialModel(nn.Module):
    """An encoder with item embeddings and a head.

    Args:
        settings: Its shape: which encoder, D and so on.
        n_items: Items I.
        max_length: Items of a history that are read, the last ones.
        seed: Of the initial weights.
        vectors: float32 (I, Z) of another model; see `ItemOffset`. None: there are none.
        vector_weight: What they count at the input.
    """

    def __init__(
        self,
        settings: EncoderSettings,
        n_items: int,
        max_length: int,
        seed: int = 0,
        vectors: Tensor | None = None,
        vector_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.settings, self.n_items, self.max_length = settings, n_items, max_length
        self.mask = n_items + 1
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.items = nn.Embedding(n_items + 2, settings.width, padding_idx=PAD)
            self.body = BODIES[settings.encoder](settings, max_length)
            self.bias = nn.Parameter(torch.zeros(n_items))
            self.head = nn.Linear(settings.width, n_items, bias=False) if settings.head == "linear" else None
            self._start()
            self.offset = None if vectors is None else ItemOffset(vectors, settings.width, vector_weight)

    @torch.no_grad()
    def _start(self) -> None:
        """The weights training starts from."""
        kind = self.settings.initial
        nn.init.normal_(self.items.weight, std=self.settings.item_std)
        for name, weight in self.named_parameters() if kind != "normal" else ():
            if kind == "xavier" and weight.dim() > 1:
                nn.init.xavier_normal_(weight)
            elif kind == "truncated" and not re.search(r"norm|\.(nu|theta|gamma)$", name):
                nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
        self.items.weight[PAD] = 0

    @property
    def config(self) -> dict[str, Any]:
        """What ``model/config.json`` says: kind, n_items, max_length, width, blocks, heads, dropout, head, ..."""
        fields = EncoderSettings.model_fields
        shape = self.settings.model_dump(include=set(fields))
        shape = {n: v for n, v in shape.items() if n not in _LATER or v != fields[n].default}
        kind, offset = shape.pop("encoder"), self.offset
        if offset is not None:
            shape["vectors"] = {"size": offset.linear.in_features, "weight": offset.weight}
        return {"kind": kind, "n_items": self.n_items, "max_length": self.max_length, **shape}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SequentialModel:
        """A model of the shape that `config` says."""
        shape = {name: value for name, value in config.items() if name in EncoderSettings.model_fields}
        settings = EncoderSettings(encoder=config["kind"], **shape)
        n_items, given = config["n_items"], config.get("vectors")
        if given is None:
            return cls(settings, n_items, config["max_length"])
        vectors = torch.zeros(n_items, given["size"])  # they lie with the weights
        return cls(settings, n_items, config["max_length"], 0, vectors, given["weight"])

    @property
    def bidirectional(self) -> bool:
        """Whether a state sees what comes after it; such a model reads its prediction at a mask."""
        return self.settings.encoder == "bert4rec"

    @property
    def reads_along(self) -> bool:
        """Whether the state at a place of a row is the one after a row that ends there.

        Not where places are counted from the row's newest item.
        """
        from_newest = self.settings.encoder in ("sasrec", "esasrec") and self.settings.positions == "newest"
        return not (self.bidirectional or from_newest)

    @property
    def weight(self) -> Tensor:
        """(I, D) weights of the head."""
        return self.items.weight[1:-1] if self.head is None else self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        """States (B, L, D) of rows of numbers (B, L), int64."""
        states: Tensor = self.body(self.inputs(ids), ids != PAD)
        return states

    def inputs(self, ids: Tensor) -> Tensor:
        """What the encoder reads, (B, L, D), before places are added."""
        x: Tensor = self.items(ids)
        if self.settings.scaled:
            x = x * math.sqrt(self.settings.width)
        return x if self.offset is None else x + self.offset(ids)

    def scores(self, states: Tensor) -> Tensor:
        """Scores (M, I) of all items for states (M, D)."""
        return F.linear(states, self.weight, self.bias)

    def scores_of(self, states: Tensor, items: Tensor) -> Tensor:
        """Scores (M, C) of some items (M, C), 0..I-1, for states (M, D)."""
        return torch.einsum("md,mcd->mc", states, self.weight[items]) + self.bias[items]

    def last_scores(self, ids: Tensor) -> Tensor:
        """Scores (B, I) of what comes after each row (B, L); a row without items is scored by the bias alone."""
        return self.scores(self.last_states(ids))

    def states_after(self, histories: Sequence[Sequence[int]]) -> Tensor:
        """States (B, D) that predict what comes after histories of item indices, oldest first, of any length."""
        ids = padded(Ragged.from_lists([list(history)[-self.max_length :] for history in histories]))
        ids = ids if ids.shape[1] else np.zeros((len(ids), 1), dtype=np.int32)
        return self.last_states(torch.from_numpy(ids.astype(np.int64)).to(self.bias.device))

    def last_states(self, ids: Tensor) -> Tensor:
        """States (B, D) that predict what comes after each row (B, L); zeros for a row without items.

        A bidirectional model gets a mask behind each row.
        """
        length = (ids != PAD).sum(1)
        rows = torch.arange(len(ids), device=ids.device)
        if self.bidirectional:
            ids = F.pad(ids, (0, 1))
            ids[rows, length] = self.mask
            states: Tensor = self(ids)[rows, length]
            return states
        last: Tensor = self(ids)[rows, (length - 1).clamp(min=0)]
        return last * (length > 0)[:, None]


class ItemOffset(nn.Module):
    """``weight (W z_i + c)``: what another model knows of an item, beside the item's own embedding.

    Args:
        vectors: float32 (I, Z), not trained; saved with the model. Padding and the mask have the vector 0.
        width: D.
        weight: Of all of it.

    Source: DLLM2Rec, arXiv:2405.00338, whose items' own embeddings are offsets from this one.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor, width: int, weight: float) -> None:
        super().__init__()
        self.weight, self.linear = weight, nn.Linear(vectors.shape[1], width)
        self.register_buffer("vectors", F.pad(vectors, (0, 0, 1, 1)))

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L, D) for rows of numbers (B, L)."""
        offset: Tensor = self.weight * self.linear(self.vectors[ids])
        return offset


class _GRU(nn.Module):
    """GRU4Rec as recommenders of this field compare with it: an embedding, a GRU, a head (no session batches)."""

    def __init__(self, settings: EncoderSettings, max_length: int) -> None:
        super().__init__()
        drop = settings.dropout if settings.blocks > 1 else 0.0
        self.dropout = nn.Dropout(settings.dropout)
        self.gru = nn.GRU(settings.width, settings.width, settings.blocks, batch_first=True, dropout=drop)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        states: Tensor = self.gru(self.dropout(x))[0]
        dropped: Tensor = self.dropout(states)
        return dropped


class _Attention(nn.Module):
    """Multi-head attention; queries may be another tensor than keys and values."""

    def __init__(self, settings: EncoderSettings) -> None:
        super().__init__()
        self.heads, self.p, d = settings.heads, settings.dropout, settings.width
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.out = nn.Identity() if settings.norm == "inner" else nn.Linear(d, d)

    def forward(self, query: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` (B, L): the keys that may be looked at; None: those up to the query's place."""
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, t in ((self.q, query), (self.k, x), (self.v, x))
        )
        allowed = None if mask is None else mask[:, None, None, :]
        p = self.p if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, allowed, dropout_p=p, is_causal=mask is None)
        mixed: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return mixed


class _Positions(nn.Module):
    """Adds a learned vector to each place, then dropout."""

    def __init__(self, settings: EncoderSettings, places: int) -> None:
        super().__init__()
        self.position = nn.Embedding(places, settings.width)
        self.dropout, self.from_newest = nn.Dropout(settings.dropout), settings.positions == "newest"
        nn.init.normal_(self.position.weight, std=settings.position_std)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        places = self.position.weight[: x.shape[1]]
        if self.from_newest:
            first = len(self.position.weight) - real.sum(1, keepdim=True)
            places = self.position((first + real.cumsum(1) - 1).clamp(min=0))
        summed: Tensor = self.dropout(x + places)
        return summed


class _SASRec(nn.Module):
    """Causal attention; where its norms stand is said by ``settings.norm``."""

    def __init__(self, settings: EncoderSettings, max_length: int) -> None:
        super().__init__()
        d, n = settings.width, settings.blocks
        self.positions = _Positions(settings, max_length)
        self.attention = nn.ModuleList(_Attention(settings) for _ in range(n))
        self.query_norm, self.norm = (nn.ModuleList(nn.LayerNorm(d) for _ in range(n)) for _ in range(2))
        self.feed_forward = _feed_forward(settings, d, nn.ReLU)
        self.last_norm = nn.LayerNorm(d)
        self.dropout, self.kind = nn.Dropout(settings.dropout), settings.norm
        inner = n if self.kind == "inner" else 0
        self.inner_norm = nn.ModuleList(nn.LayerNorm(d) for _ in range(inner))

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.positions(x, real)
        for n, attention in enumerate(self.attention):
            if self.kind == "post":
                x = self.query_norm[n](x + self.dropout(attention(x, x, None)))
                x = self.norm[n](x + self.feed_forward[n](x))
                continue
            query = self.query_norm[n](x)
            if self.kind == "pre":
                x = x + self.dropout(attention(query, query, None))
                x = x + self.feed_forward[n](self.norm[n](x))
                continue
            x = self.norm[n](query + self.dropout(attention(query, x, None)))
            x = x + self.feed_forward[n](x)
            if self.kind == "inner":
                x = self.inner_norm[n](x)
        states: Tensor = self.last_norm(x)
        return states


class _ESASRec(nn.Module):
    """Causal attention and SwiGLU, each after a norm; what either adds passes a gate, a sigmoid of what came in.

    The LiGR layer (arXiv:2502.03417) as eSASRec has it (arXiv:2508.06450), with a feed-forward width of 4 D.
    """

    def __init__(self, settings: EncoderSettings, max_length: int) -> None:
        super().__init__()
        d, n = settings.width, settings.blocks
        self.positions = _Positions(settings, max_length)
        self.attention = nn.ModuleList(_Attention(settings) for _ in range(n))
        self.before, self.between = (nn.ModuleList(nn.LayerNorm(d) for _ in range(n)) for _ in range(2))
        self.attention_gate, self.feed_gate = (
            nn.ModuleList(nn.Linear(d, d) for _ in range(n)) for _ in range(2)
        )
        self.up = nn.ModuleList(nn.Linear(d, 8 * d, bias=False) for _ in range(n))  # values, then their gates
        self.down = nn.ModuleList(nn.Linear(4 * d, d, bias=False) for _ in range(n))
        self.last_norm = nn.LayerNorm(d) if settings.last_norm else nn.Identity()
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.positions(x, real)
        for n, attention in enumerate(self.attention):
            y = self.before[n](x)
            x = x + self.attention_gate[n](x).sigmoid() * self.dropout(attention(y, y, None))
            value, gate = self.up[n](self.between[n](x)).chunk(2, dim=-1)
            fed = self.down[n](self.dropout(F.silu(gate) * value))
            x = x + self.feed_gate[n](x).sigmoid() * self.dropout(fed)
        states: Tensor = self.last_norm(x)
        return states


class _BERT4Rec(nn.Module):
    """Attention to every place that is no padding; one place more than a history, for the mask."""

    def __init__(self, settings: EncoderSettings, max_length: int) -> None:
        super().__init__()
        d, n = settings.width, settings.blocks
        self.positions = _Positions(settings, max_length + 1)
        self.attention = nn.ModuleList(_Attention(settings) for _ in range(n))
        self.before, self.between = (nn.ModuleList(nn.LayerNorm(d) for _ in range(n)) for _ in range(2))
        self.feed_forward = _feed_forward(settings, 4 * d, nn.GELU)
        self.last_norm = nn.LayerNorm(d) if settings.last_norm else nn.Identity()
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.positions(x, real)
        for n, attention in enumerate(self.attention):
            y = self.before[n](x)
            x = x + self.dropout(attention(y, y, real))
            x = x + self.feed_forward[n](self.between[n](x))
        states: Tensor = self.last_norm(x)
        return states


class _LRURec(nn.Module):
    """Blocks of a linear recurrent unit and a feed-forward layer, each followed by its norm."""

    def __init__(self, settings: EncoderSettings, max_length: int) -> None:
        super().__init__()
        d, n = settings.width, settings.blocks
        self.first_norm = nn.LayerNorm(d)
        self.unit = nn.ModuleList(_LinearRecurrence(d) for _ in range(n))
        self.norm, self.last_norm = (nn.ModuleList(nn.LayerNorm(d) for _ in range(n)) for _ in range(2))
        self.feed_forward = _feed_forward(settings, 4 * d, nn.GELU)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        x = self.first_norm(self.dropout(x))
        for n, unit in enumerate(self.unit):
            x = self.norm[n](x + self.dropout(unit(x)))
            x = self.last_norm[n](x + self.feed_forward[n](x))
        return x


class _LinearRecurrence(nn.Module):
    """``h_k = lambda h_{k-1} + gamma B x_k`` with complex diagonal lambda, ``y = Re(C h)``; H = 2 D.

    ``lambda = exp(-exp(nu) + i exp(theta))``; at the start its modulus is drawn from the ring [.8, .99], its
    phase from [0, 2 pi), and gamma is ``sqrt(1 - |lambda|^2)`` (arXiv:2310.02367).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        low, high = 0.8, 0.99
        modulus = (torch.rand(2 * width) * (high**2 - low**2) + low**2).sqrt()
        self.nu = nn.Parameter((-modulus.log()).log())
        self.theta = nn.Parameter((2 * math.pi * torch.rand(2 * width).clamp(min=1e-6)).log())
        self.gamma = nn.Parameter((1 - modulus**2).sqrt().log())
        self.into, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        eigenvalue = torch.polar((-self.nu.exp()).exp(), self.theta.exp())
        h = torch.view_as_complex(self.into(x).unflatten(-1, (-1, 2))) * self.gamma.exp()
        step = 1
        while step < x.shape[1]:  # each place has the sum of the last ``step`` ones
            h = h + F.pad(h[:, :-step] * eigenvalue, (0, 0, step, 0))
            eigenvalue, step = eigenvalue * eigenvalue, 2 * step
        mixed: Tensor = self.out(torch.view_as_real(h).flatten(-2))
        return mixed


def _feed_forward(
    settings: EncoderSettings, inner: int, activation: Callable[[], nn.Module]
) -> nn.ModuleList:
    """One for each block."""
    d, p = settings.width, settings.dropout
    return nn.ModuleList(
        nn.Sequential(nn.Linear(d, inner), activation(), nn.Dropout(p), nn.Linear(inner, d), nn.Dropout(p))
        for _ in range(settings.blocks)
    )


BODIES = {"gru4rec": _GRU, "sasrec": _SASRec, "esasrec": _ESASRec, "bert4rec": _BERT4Rec, "lrurec": _LRURec}
