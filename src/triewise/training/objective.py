"""What is learned from titles, and what a micro-batch goes through: window numbers to tensors, body and head to a loss.

Shape key: B batch, L tokens, D width, V vocabulary, C of its tokens, M target positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from triewise.errors import UserError
from triewise.models import as_if_alone, body, hand_head, head_weight, whole_rows
from triewise.progress import note
from triewise.training import processes
from triewise.training.losses import (
    Columns,
    check_temperature,
    child_edges,
    column_of,
    edge_logits,
    gradient_weight,
    on_device,
    trie_nll,
    vocabulary_nll,
    widest_node,
)
from triewise.training.packing import hidden_states, pack
from triewise.training.temperature import AdaptiveTemperature

if TYPE_CHECKING:
    from triewise.tokens import DeviceTrie, Trie
    from triewise.training.examples import Batch, Examples
    from triewise.training.frozen import KeptStates

SUPPORTS = ("trie", "vocabulary")
NORMALISERS = ("weights", "decisions", "sum")
LOGITS_AT_ONCE = 1 << 26  # logits of the whole vocabulary that are held at one time
WORTH_PACKING = 0.9  # share of the places that packing has to leave


class Learned(Protocol):
    """What `trainer.train` lowers: an `Objective`, `contrast.Contrast` or `preferences.Preferences`."""

    @property
    def objective(self) -> Objective:
        """What gives the loss of a token."""

    def settings(self) -> dict[str, Any]:
        """What training does not change, as JSON values."""

    def divisor(self, total: Tensor) -> Tensor:
        """What a sum of losses is divided by, from the sum of what all micro-batches of the step contribute."""

    def module(self, model: Any, trie: Trie) -> TitleLoss:
        """What is wrapped and called."""

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> MicroBatches:
        """Its arguments, for each of ``rows`` (n, B) those of a micro-batch."""


class TokenLosses(NamedTuple):
    """Per token, float32 (M,): the weighted loss, what it adds to the normaliser, the plain nll in nats."""

    loss: Tensor
    contribution: Tensor
    nll: Tensor


@dataclass(frozen=True)
class Objective:
    """A training loss put together from choices.

    Attributes:
        support: ``trie`` (MSL) or ``vocabulary`` (LML): which tokens the softmax runs over.
        temperature: A number > 0, or an `AdaptiveTemperature` (trie support only). In trie support the loss
            is multiplied by it, as in the paper: ``sum -tau log softmax(z / tau)``, each token by its own where
            it has one; in vocabulary support it is not, as in the authors' LML + tau.
        normaliser: What the sum of weighted losses is divided by. ``weights``: the sum of the weights of all
            target tokens (LML, IGD); ``decisions``: the same over tokens with more than one valid choice (the
            released MSL with ATS); ``sum``: 1.
        expand_negatives: MSL + alpha, trie support only; see `trie_nll`. An adaptive temperature is found
            without it.

    Raises:
        UserError: An unknown choice, a temperature <= 0, or an adaptive one or ``expand_negatives`` without
            trie support.
    """

    support: str = "trie"
    temperature: float | AdaptiveTemperature = 1.0
    normaliser: str = "weights"
    expand_negatives: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not exist."""
        for name, known in (("support", SUPPORTS), ("normaliser", NORMALISERS)):
            if getattr(self, name) not in known:
                raise UserError(f"wanted {name} among {', '.join(known)}, got {getattr(self, name)!r}")
        if not self.is_adaptive:
            check_temperature(self.tau)
        elif self.support != "trie":
            raise UserError(
                f"an adaptive temperature needs trie support, got {self.support!r}; give a number instead"
            )
        if self.expand_negatives and self.support != "trie":
            raise UserError(f"expand_negatives needs trie support, got {self.support!r}; set it to False")

    @property
    def objective(self) -> Objective:
        """Itself; see `Learned`."""
        return self

    @property
    def is_adaptive(self) -> bool:
        """Whether the temperature changes while training."""
        return isinstance(self.temperature, AdaptiveTemperature)

    @property
    def tau(self) -> float:
        """The temperature now as a number; an adaptive one is waited for."""
        t = self.temperature
        return t.value if isinstance(t, AdaptiveTemperature) else float(t)

    def tau_of(self, positive: Tensor, valid: Tensor, row: Tensor) -> float | Tensor:
        """The temperature, or that of each token (M,) where each has its own; see `AdaptiveTemperature.per_token`."""
        t = self.temperature
        if not isinstance(t, AdaptiveTemperature):
            return t
        return (
            t.per_token(positive.detach(), valid.detach(), row) if t.scope == "token" else t.on(valid.device)
        )

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        t = self.temperature
        return vars(self) | {"temperature": t.settings() if isinstance(t, AdaptiveTemperature) else t}

    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        node: Tensor,
        trie: Trie | DeviceTrie,
        weight: Tensor | None = None,
    ) -> Tensor:
        """The normalised loss of one batch, a scalar; see `parts` for the arguments.

        It changes nothing: an adaptive temperature moves by `observe` alone.
        """
        parts = self.parts(logits, target, node, trie, weight)
        return parts.loss.sum() / self.divisor(parts.contribution.sum())

    def parts(
        self,
        logits: Tensor,
        target: Tensor,
        node: Tensor,
        trie: Trie | DeviceTrie,
        weight: Tensor | None = None,
        n_edges: int | None = None,
        columns: Columns | None = None,
    ) -> TokenLosses:
        """Losses of single tokens, for callers that normalise over more than one batch.

        Args:
            logits: Next-token logits (M, V).
            target: Target token ids (M,), int64.
            node: Trie node before each target (M,), int64.
            trie: The trie of all items.
            weight: Token weights (M,) >= 0; None: 1.
            n_edges: As in `trie_nll`.
            columns: As in `trie_nll`; trie support only.
        """
        device_trie = on_device(trie, logits.device)
        weight = torch.ones_like(target, dtype=torch.float32) if weight is None else weight.float()
        contribution = self.contribution(weight, device_trie.n_children[node] > 1)
        if self.support == "vocabulary":
            nll = vocabulary_nll(logits, target, self.tau)
            return TokenLosses(weight * nll, contribution, nll)
        tau: float | Tensor
        if not isinstance(self.temperature, AdaptiveTemperature):
            tau = self.temperature
        elif self.temperature.scope == "token":
            row, _, valid, positive = edge_logits(
                logits.detach(), target, node, device_trie, n_edges, columns
            )
            tau = self.temperature.per_token(positive, valid, row)
        else:
            tau = self.temperature.on(logits.device)
        nll = trie_nll(logits, target, node, device_trie, tau, n_edges, self.expand_negatives, columns)
        return TokenLosses(weight * nll * tau, contribution, nll)

    def contribution(self, weight: Tensor, decision: Tensor) -> Tensor:
        """What each token adds to the normaliser (M,); ``decision``: whether several tokens are valid."""
        return weight * decision if self.normaliser == "decisions" else weight

    def divisor(self, total: Tensor) -> Tensor:
        """The divisor for a sum of contributions; 1 where nothing contributes: the loss is 0, not NaN."""
        return torch.where(total > 0, total, 1.0) if self.normaliser != "sum" else torch.ones_like(total)

    def module(self, model: Any, trie: Trie) -> TitleLoss:
        """See `Learned`."""
        return TitleLoss(model, self, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> MicroBatches:
        """See `Learned`."""
        return MicroBatches(examples, self, rows, packing)

    def looked_at(self, node: NDArray[np.int64], trie: Trie) -> NDArray[np.int64]:
        """Which rows of some nodes (M,) an adaptive temperature looks at, int64 (R,), ascending."""
        reference = self._reference(trie)
        return np.flatnonzero(trie.branching[node] if reference is None else node == reference)

    def _reference(self, trie: Trie) -> int | None:
        """The node whose rows are looked at; None: all decisions."""
        ats = self.temperature
        if not isinstance(ats, AdaptiveTemperature) or ats.rows == "all" or ats.scope == "token":
            return None
        return 0 if ats.rows == "root" else widest_node(trie)[0]

    @torch.no_grad()
    def observe(
        self,
        logits: Tensor,
        target: Tensor,
        node: Tensor,
        trie: Trie,
        columns: Columns | None = None,
        look: Tensor | None = None,
        n_edges: int | None = None,
    ) -> None:
        """Let an adaptive temperature see one micro-batch of a training forward; arguments as in `parts`.

        In several processes, each of which has to call it, the rows of all are seen as one micro-batch, process
        after process: one update, and the same value everywhere. ``look`` (R,), int64, is what `looked_at` gives, and
        ``n_edges`` the number of children of those rows: where they are known nothing waits for the device.
        """
        ats = self.temperature
        if not isinstance(ats, AdaptiveTemperature):
            return
        device_trie, reference = trie.to(logits.device), self._reference(trie)
        if look is None:
            look = torch.from_numpy(self.looked_at(node.numpy(force=True), trie)).to(logits.device)
        node = node.index_select(0, look)
        row, token = child_edges(node, device_trie, n_edges)
        positive = processes.concatenate(logits[look, column_of(target[look], columns)].float())
        valid = processes.concatenate(logits[look[row], column_of(token, columns)].float())
        if reference is not None:
            ats.update(positive, valid, int(trie.n_children[reference]))
            return
        n_valid = processes.concatenate(device_trie.n_children.index_select(0, node))
        if len(positive):
            row = torch.arange(len(positive), device=valid.device)
            row = row.repeat_interleave(n_valid, output_size=len(valid))
            ats.update(positive, valid, len(valid) / len(positive), row)


class TitleLoss(nn.Module):
    """A causal LM and an objective as one module, so that what is wrapped is what is called.

    The head sees target positions only, and of its rows, in trie support, those of tokens that are valid somewhere in
    the micro-batch: one product of (M, D) and (D, C), nothing as wide as the vocabulary. Vocabulary support takes the
    positions in blocks and computes a block's logits again in the backward pass. Where head and hidden states put
    together by hand are not the model's own logits (see `Head`), the model's whole forward is used instead, with one
    printed warning.

    Attributes:
        head: The model's head by hand, or None.
        kept: What frozen layers gave for each window, or None.
    """

    accepts_loss_kwargs = True  # tells the Trainer that the loss it gets is normalised already
    per_target: tuple[
        str, ...
    ] = ()  # further arrays (M,) of a micro-batch that `losses` gives to ``score``, last
    many_rows = False  # whether a window becomes several rows, which have their beginnings in common

    def __init__(self, model: Any, objective: Objective, trie: Trie) -> None:
        super().__init__()
        self.model, self.objective, self.trie = model, objective, trie
        self.kept: KeptStates | None = None
        self.head = hand_head(model)
        self.by_hand = self.head is not None
        if not self.by_hand:
            note(
                "warning: these logits are more than hidden states times head; the model's whole forward runs"
            )

    def logits(self, batch: Mapping[str, Any], tokens: Tensor | None = None) -> Tensor:
        """Next-token logits (M, V) at the positions of a micro-batch, or (M, C) of some tokens (C,)."""
        if self.head is not None:
            return self.head.logits(self.model, self.hidden(batch), tokens)
        full = self._alone(lambda ids: self.model(input_ids=ids, use_cache=False).logits, batch)
        chosen = full.flatten(0, 1).index_select(0, batch["position"])
        return chosen if tokens is None else chosen.index_select(1, tokens)

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Hidden states (M, D) at the positions of a micro-batch, packed or not."""
        ids = batch["input_ids"]
        if self.kept is not None and "window" in batch:
            with self.kept.instead(batch["window"], ids, batch["position"]):
                hidden: Tensor = body(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        elif batch.get("subtree_end") is not None:
            packed = ("position_ids", "subtree_end", "prefix_ids")
            hidden = hidden_states(self.model, ids, *(batch[name] for name in packed))
        else:
            run = lambda ids: body(self.model)(input_ids=ids, use_cache=False).last_hidden_state  # noqa: E731
            hidden = self._alone(run, batch)
        return hidden.flatten(0, 1).index_select(0, batch["position"])

    def _alone(self, run: Callable[[Tensor], Tensor], batch: Mapping[str, Any]) -> Tensor:
        """States or logits (B, L, X) of rows that are not packed, each as it is by itself."""
        with whole_rows():
            return as_if_alone(self.model, run, batch["input_ids"], batch["length"])

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Sum of the weighted losses of a micro-batch, not normalised, and sums for the log.

        Args:
            batch: ``input_ids`` (B, L) and ``length`` (B,) of rows, or of packed rows that and ``position_ids``,
                ``subtree_end`` and ``prefix_ids`` of `packing.Packed`; ``position`` (M,), where each target is
                predicted in the flattened ``input_ids``; ``target``, ``node``, ``weight`` (M,) and ``n_edges`` of
                `Objective.parts`;
                ``tokens`` (C,), those that logits are needed of, ascending; where it is left out, all; ``zero_gain``
                and ``decision`` (M,), whether the target decides nothing, and whether several tokens are valid.

        Returns:
            ``loss``, a scalar; ``sums`` (3,), detached: nll of tokens without and with gain, and the gradient
            weight w = 1 - P(target) of the decisions.
        """
        loss, nll = self.losses(batch, self.score(batch))
        total = loss.sum() + self.added(batch, nll)
        return {"loss": total, "sums": title_sums(nll.detach(), batch["zero_gain"], batch["decision"])}

    def score(self, batch: Mapping[str, Any]) -> Callable[..., TokenLosses]:
        """What gives the loss of each token, as `Objective.parts` does."""
        return self.objective.parts

    def added(self, batch: Mapping[str, Any], nll: Tensor) -> Tensor | float:
        """What is added to the sum of the losses, from the nll (M,) of the targets."""
        return 0.0

    def losses(
        self, batch: Mapping[str, Any], score: Callable[..., TokenLosses], *more: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Loss and nll (M,) of the targets of a micro-batch.

        Args:
            batch: Arguments of `forward`, those for the log left out.
            score: As `Objective.parts`; it is given the logits of ``batch``, then those of each of ``more``, then
                target and what follows.
            more: Further passes over other inputs (``input_ids``, ``position``, ``length``) for the same targets.
        """
        tokens, passes = batch.get("tokens"), (batch, *more)
        n_vocabulary = head_weight(self.model).shape[0]
        columns = None if tokens is None else Columns(tokens, n_vocabulary)
        arguments = (batch["target"], batch["node"], batch["weight"])
        extra = [batch[name] for name in self.per_target]
        at_once = max(1, LOGITS_AT_ONCE // n_vocabulary)
        if self.head is not None and tokens is None and len(batch["target"]) > at_once:
            arrays = (*(self.hidden(one) for one in passes), *arguments, *extra)
            blocks = zip(*(torch.split(a, at_once) for a in arrays), strict=True)
            done = [checkpoint(self._block, score, *block, use_reentrant=False) for block in blocks]
            loss, nll = (torch.cat(pieces) for pieces in zip(*done, strict=True))
            return loss, nll
        logits = [self.logits(one, tokens) for one in passes]
        if self.training:
            look = (batch.get("look"), batch.get("n_looked"))
            self.objective.observe(logits[0], *arguments[:2], self.trie, columns, *look)
        parts = score(*logits, *arguments[:2], self.trie, arguments[2], batch["n_edges"], columns, *extra)
        return parts.loss, parts.nll

    def _block(self, score: Callable[..., TokenLosses], *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and nll (m,) of some positions over the whole vocabulary; run again for the backward pass."""
        assert self.head is not None
        n_hidden = len(arrays) - 3 - len(self.per_target)
        logits = [self.head.logits(self.model, states) for states in arrays[:n_hidden]]
        target, node, weight, *extra = arrays[n_hidden:]
        parts = score(*logits, target, node, self.trie, weight, None, None, *extra)
        return parts.loss, parts.nll


def title_sums(nll: Tensor, zero_gain: Tensor, decision: Tensor) -> Tensor:
    """What the log wants to know of tokens (M,): sums (3,) of nll without and with gain, and of w in decisions."""
    groups = torch.stack([zero_gain, ~zero_gain, decision]).to(nll.dtype)
    return (groups * torch.stack([nll, nll, gradient_weight(nll)])).sum(1)


class MicroBatches(Dataset[dict[str, Any]]):
    """Micro-batches in a given order.

    Args:
        examples: Windows to ids.
        objective: Says what positions and tokens are needed.
        rows: int64 (n, B), window numbers.
        packing: Whether tokens that rows begin with alike run once, where that leaves out enough of them.

    Attributes:
        asks_a_model: Whether building one asks a model, which a worker, the copy of a process, cannot where it is on
            a GPU.
        numbered: Whether a micro-batch says which windows its rows are, as ``window`` (B,).
    """

    asks_a_model = False
    numbered = False

    def __init__(
        self, examples: Examples, objective: Objective, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        self.examples, self.objective, self.rows, self.packing = examples, objective, rows, packing

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Arguments of `TitleLoss.forward`, what the micro-batch adds to the normaliser, and its counts."""
        batch, trie = self.batch(index), self.examples.trie
        decision, learned = trie.branching[batch.node], ~self.drawn(batch)
        weight = torch.from_numpy(batch.weight.astype(np.float64))
        share = self.objective.contribution(weight, torch.from_numpy(decision))
        counts = {
            "tokens": batch.n_tokens,
            "zero_gain": int((batch.zero_gain & learned).sum()),
            "positive_gain": int((~batch.zero_gain & learned).sum()),
            "decisions": int((decision & learned).sum()),
        }
        # In trie support the loss of a forced token is 0 whatever its logits: it needs none.
        all_of_them = self.objective.support != "trie"
        keep = np.arange(len(decision)) if all_of_them else np.flatnonzero(decision | ~learned)
        arrays: dict[str, Any] = {"decision": decision[keep]} | self._inputs(batch, keep)
        arrays |= {name: getattr(batch, name)[keep] for name in ("target", "node", "weight", "zero_gain")}
        arrays |= self.more(self.rows[index], batch, keep)
        if self.numbered and len(self.rows[index]) == len(arrays["input_ids"]):
            arrays["window"] = self.rows[index]
        if self.objective.support == "trie":
            arrays["tokens"] = trie.continuations(arrays["node"])
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        counts["places"] = arrays["input_ids"].size + len(arrays.get("prefix_ids", ()))
        n_edges = trie.n_children[arrays["node"]]
        if self.objective.is_adaptive:
            look = self.objective.looked_at(arrays["node"], trie)
            tensors |= {"look": torch.from_numpy(look), "n_looked": int(n_edges[look].sum())}
        numbers = {"n_edges": int(n_edges.sum()), "contribution": float(share.sum()), "counts": counts}
        return tensors | numbers

    def batch(self, index: int) -> Batch:
        """Windows of one micro-batch as ids, nodes and weights."""
        return self.examples.batch(self.rows[index])

    def drawn(self, batch: Batch) -> NDArray[np.bool_]:
        """Which of its targets (M,) are of titles that were drawn: they are looked at, and are no true ones."""
        return np.zeros(len(batch.target), dtype=np.bool_)

    def more(self, rows: NDArray[np.int64], batch: Batch, keep: Any) -> dict[str, Any]:
        """Further arrays of a micro-batch of some windows, for a loss that needs them; ``keep``: its targets."""
        return {}

    def _inputs(self, batch: Batch, keep: Any) -> dict[str, Any]:
        """What the body is given, and where the targets that are kept are predicted in it."""
        input_ids, position = _shorten(batch, keep)
        if self.packing and len(keep):
            packed = pack(input_ids, position)
            if packed.n_places <= WORTH_PACKING * input_ids.size:
                return {part.name: getattr(packed, part.name) for part in fields(packed)}
        return {
            "input_ids": input_ids,
            "position": position,
            "length": lengths(batch.input_ids, batch.position),
        }


def lengths(input_ids: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tokens (B,) of rows that end with a target, from where each target is predicted."""
    row, column = np.divmod(position, input_ids.shape[1])
    length = np.zeros(len(input_ids), dtype=np.int64)
    np.maximum.at(length, row, column + 2)
    return length


def _shorten(batch: Batch, keep: Any) -> tuple[Any, Any]:
    """Leave out the columns behind the last position that is needed: their hidden states serve nothing."""
    row, column = np.divmod(batch.position[keep], batch.input_ids.shape[1])
    width = int(column.max(initial=0)) + 1
    return np.ascontiguousarray(batch.input_ids[:, :width]), row * width + column
