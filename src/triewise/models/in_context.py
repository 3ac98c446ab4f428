"""LLM-CF's in-context module: a user's state is read again after examples of other rows, each with a chain of thought.

A bank holds the examples: a history, an item that was bought after it or not, and the vector of a text that explains
why. Those whose histories read most alike are found, and a small decoder reads them before the row itself.

Shape key: B rows, L places of a history, K examples of a row, E of the bank, I items, D width of the model, Z of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from triewise.models.encoders import PAD, SequentialModel

if TYPE_CHECKING:
    from triewise.settings import EncoderSettings

STEP = 1e-6  # similarities that differ less are equal, so that who shares a batch decides nothing


@dataclass(frozen=True)
class Bank:
    """Examples.

    Attributes:
        texts: float32 (I, Z), of the items.
        ids: int64 (E, L) histories, item + 1, padded on the right with 0.
        item: int64 (E,), 0..I-1.
        label: int64 (E,); 1: bought, 0: not.
        chains: float32 (E, Z), of the chains of thought.
    """

    texts: Tensor
    ids: Tensor
    item: Tensor
    label: Tensor
    chains: Tensor


class InContext(nn.Module):
    """Adds to the state of a history what a decoder says after K examples.

    An example is three tokens: ``A [user; state; T t(history); item; T t(item)]``, ``T c`` of its chain and the vector
    of its label, where t are vectors of texts, a mean over a history. The row itself is one token more, as the first
    with the item unknown.

    Args:
        bank: The examples; saved with the model.
        width: D.
        shots: K, even: half of the examples are of items that were bought.
        weight: Of what is added.
        layers: Of the decoder.
        heads: Of its attention; ``D / heads`` is even.
        seed: Of the initial weights.

    Source: LLM-CF, arXiv:2403.17688, and its code (retrieval task). Differs: see docs/papers.md.
    """

    texts: Tensor
    ids: Tensor
    item: Tensor
    label: Tensor
    chains: Tensor
    keys: Tensor

    def __init__(
        self,
        bank: Bank,
        width: int,
        shots: int = 4,
        weight: float = 0.1,
        layers: int = 2,
        heads: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shots, self.weight, size = shots, weight, bank.texts.shape[1]
        self.shape = {"layers": layers, "heads": heads}
        texts = F.pad(bank.texts, (0, 0, 1, 1))  # of padding and of the item that is asked for: none
        for name, value in (("texts", texts), ("chains", F.normalize(bank.chains, dim=1))):
            self.register_buffer(name, value)
        for name in ("ids", "item", "label"):
            self.register_buffer(name, getattr(bank, name))
        self.register_buffer("keys", self.read(bank.ids))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.user = nn.Parameter(torch.zeros(width))  # of everyone: a recommender is told no users
            self.of_text, self.again = nn.Linear(size, width), nn.Linear(width, size)
            self.first, self.labels = nn.Linear(5 * width, width), nn.Embedding(2, width)
            self.decoder = Decoder(width, layers, heads)

    @property
    def config(self) -> dict[str, Any]:
        """What ``model/config.json`` says of it."""
        sizes = {"examples": len(self.item), "length": self.ids.shape[1], "size": self.texts.shape[1]}
        return {**sizes, "shots": self.shots, "weight": self.weight, **self.shape}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], n_items: int, width: int) -> InContext:
        """A module of the shape that `config` says, whose bank lies with the weights."""
        shape = dict(config)
        e, length, size = (shape.pop(name) for name in ("examples", "length", "size"))
        ids = torch.zeros(e, length, dtype=torch.int64)
        item, label = torch.zeros(2, e, dtype=torch.int64).unbind()
        bank = Bank(torch.zeros(n_items, size), ids, item, label, torch.zeros(e, size))
        return cls(bank, width, **shape)

    def read(self, ids: Tensor) -> Tensor:
        """(B, Z) means of the texts of histories (B, L); 0 without items."""
        total: Tensor = self.texts[ids].sum(1)
        return total / (ids != PAD).sum(1, keepdim=True).clamp(min=1)

    def retrieve(self, ids: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The examples with the most similar histories, int64 (B, K), -1 where there are no more; first those bought.

        Similarity is the product of the mean text vectors; of equal ones the first in the bank is taken.

        Args:
            ids: (B, L).
            hidden: bool (B, E), which examples a row may not see.
        """
        similar = self.read(ids).cpu().double() @ self.keys.cpu().double().T
        rank = (similar / STEP).round().long() * len(self.keys) - torch.arange(len(self.keys))
        never, found = torch.iinfo(torch.int64).min, []
        for label in (1, 0):
            unseen = (self.label.cpu() != label)[None, :]
            best = rank.masked_fill(unseen if hidden is None else unseen | hidden, never)
            value, place = best.topk(min(self.shots // 2, len(self.keys)), dim=1)
            place = place.masked_fill(value == never, -1)
            found.append(F.pad(place, (0, self.shots // 2 - place.shape[1]), value=-1))
        return torch.cat(found, dim=1).to(ids.device)

    def forward(
        self,
        model: ExampleModel,
        states: Tensor,
        ids: Tensor,
        found: Tensor | None = None,
        users: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States after the examples (B, D), and how far their chains are from being told from them (B,), in [0, 2].

        Args:
            model: Gives the vectors of items and the states of the examples' histories.
            states: (B, D), of the rows.
            ids: (B, L), the rows' histories.
            found: (B, K) examples; None: those of `retrieve`.
            users: (B, K + 1, D), of the examples' users and the row's own; None: one vector for all.
        """
        found = self.retrieve(ids) if found is None else found
        k, real, at = found.shape[1], found >= 0, found.clamp(min=0)
        each, which = torch.unique(at, return_inverse=True)  # rows of a batch share examples
        state = torch.cat([model.plain_states(self.ids[each])[which], states[:, None]], dim=1)
        history = torch.cat([self.keys[at], self.read(ids)[:, None]], dim=1)
        item = F.pad(self.item[at] + 1, (0, 1), value=model.mask)
        user = self.user.expand_as(state) if users is None else users
        texts = self.of_text(history), model.items(item), self.of_text(self.texts[item])
        first = self.first(torch.cat([user, state, *texts], dim=2))
        chains = self.chains[at]
        three = torch.stack([first[:, :-1], self.of_text(chains), self.labels(self.label[at])], dim=2)
        read = self.decoder(
            torch.cat([three.flatten(1, 2), first[:, -1:]], dim=1), real.repeat_interleave(3, dim=1)
        )
        told = F.cosine_similarity(self.again(read[:, : 3 * k : 3]), chains, dim=2)
        apart = ((1 - told) * real).sum(1) / real.sum(1).clamp(min=1)
        return states + self.weight * read[:, -1], apart


class ExampleModel(SequentialModel):
    """A sequential model whose states are read again after examples.

    Args:
        settings: As of `SequentialModel`, and so are ``n_items``, ``max_length`` and ``seed``.
        in_context: Holds the examples.
    """

    def __init__(
        self,
        settings: EncoderSettings,
        n_items: int,
        max_length: int,
        seed: int,
        in_context: InContext,
    ) -> None:
        super().__init__(settings, n_items, max_length, seed)
        self.in_context = in_context

    @property
    def config(self) -> dict[str, Any]:
        """That of the encoder, and ``in_context``."""
        return super().config | {"in_context": self.in_context.config}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ExampleModel:
        """A model of the shape that `config` says."""
        plain = SequentialModel.from_config(config)
        module = InContext.from_config(config["in_context"], plain.n_items, plain.settings.width)
        return cls(plain.settings, plain.n_items, plain.max_length, 0, module)

    @property
    def reads_along(self) -> bool:
        """No: examples are found for a whole row."""
        return False

    def plain_states(self, ids: Tensor) -> Tensor:
        """`last_states` before any example is read."""
        return super().last_states(ids)

    def last_states(self, ids: Tensor) -> Tensor:
        """States (B, D) that predict what comes after each row (B, L); zeros for a row without items."""
        read: Tensor = self.in_context(self, self.plain_states(ids), ids)[0]
        return read * (ids != PAD).any(1, keepdim=True)


def sequential_model(config: Mapping[str, Any]) -> SequentialModel:
    """The model of a ``model/config.json``, with or without examples."""
    return (ExampleModel if "in_context" in config else SequentialModel).from_config(config)


class Decoder(nn.Module):
    """Causal blocks as in LLaMA: norms before attention and feed-forward, places as rotations, no biases."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """States (B, T, D) of tokens (B, T, D); the first ones (B, t) are seen where they are ``real``."""
        n = x.shape[1]
        seen = F.pad(real, (0, n - real.shape[1]), value=True)[:, None, :] | torch.eye(
            n, dtype=torch.bool, device=x.device
        )
        allowed = (seen & torch.ones(n, n, dtype=torch.bool, device=x.device).tril())[:, None]
        for block in self.blocks:
            x = block(x, allowed)
        states: Tensor = self.norm(x)
        return states


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner = -(-(4 * width // 3) // 32) * 32
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)
        self.before, self.between = (nn.RMSNorm(width, eps=1e-5) for _ in range(2))

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        y = self.before(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, allowed)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.between(x)
        fed: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return fed


def _rotated(x: Tensor) -> Tensor:
    """(B, H, T, d) with neighbouring pairs turned by their place, the first by 0, over ``10000^(2 i / d)``."""
    n, half = x.shape[-2], x.shape[-1] // 2
    slow = 10000.0 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = torch.arange(n, dtype=x.dtype, device=x.device)[:, None] * slow
    even, odd = x[..., ::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, dim=-1).flatten(-2)
