"""What a micro-batch goes through: window numbers to tensors, body and head to a loss, sums for the log.

Shape key: B batch, L tokens, D width, V vocabulary, M target positions.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from triewise.models import body, hand_head_matches, head_bias, head_rows, head_weight
from triewise.progress import note
from triewise.tokens import Trie
from triewise.training import processes
from triewise.training.examples import Batch, Examples
from triewise.training.losses import Columns, Objective, Parts, gradient_weight, lml_parts
from triewise.training.packing import hidden_states, pack

LOGITS_AT_ONCE = 1 << 26  # logits of the whole vocabulary that are held at one time
WORTH_PACKING = 0.9  # share of the places that packing has to leave


class TitleLoss(nn.Module):
    """A causal LM and an objective as one module, so that what is wrapped is what is called.

    The head sees target positions only, and of its rows, in trie support, those of tokens that are valid somewhere in
    the micro-batch: one product of (M, D) and (D, C), nothing as wide as the vocabulary. Vocabulary support takes the
    positions in blocks and computes a block's logits again in the backward pass. Where head and hidden states put
    together by hand are not the model's own logits (soft-capping, scaling), the model's whole forward is used instead,
    with one printed warning.
    """

    accepts_loss_kwargs = True  # tells the Trainer that the loss it gets is normalised already

    def __init__(self, model: Any, objective: Objective, trie: Trie) -> None:
        super().__init__()
        self.model, self.objective, self.trie = model, objective, trie
        self.by_hand = hand_head_matches(model)
        if not self.by_hand:
            note(
                "warning: these logits are more than hidden states times head; the model's whole forward runs"
            )

    def logits(self, batch: Mapping[str, Any], tokens: Tensor | None = None) -> Tensor:
        """Next-token logits (M, V) at the positions of a micro-batch, or (M, C) of some tokens (C,)."""
        if self.by_hand:
            return self.head(self.hidden(batch), tokens)
        full: Tensor = self.model(input_ids=batch["input_ids"], use_cache=False).logits
        chosen = full.flatten(0, 1).index_select(0, batch["position"])
        return chosen if tokens is None else chosen.index_select(1, tokens)

    def hidden(self, batch: Mapping[str, Any]) -> Tensor:
        """Hidden states (M, D) at the positions of a micro-batch, packed or not."""
        ids = batch["input_ids"]
        if batch.get("subtree_end") is not None:
            packed = ("position_ids", "subtree_end", "prefix_ids")
            hidden = hidden_states(self.model, ids, *(batch[name] for name in packed))
        else:
            hidden = body(self.model)(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch["position"])

    def head(self, hidden: Tensor, tokens: Tensor | None) -> Tensor:
        """Logits (M, V) of hidden states (M, D), or (M, C) of some tokens (C,)."""
        weight, bias = head_weight(self.model), head_bias(self.model)
        if tokens is not None:
            weight = head_rows(weight, tokens)
            bias = None if bias is None else bias.index_select(0, tokens)
        return nn.functional.linear(hidden, weight, bias)

    def forward(
        self,
        input_ids: Tensor,
        position: Tensor,
        target: Tensor,
        node: Tensor,
        weight: Tensor,
        zero_gain: Tensor,
        decision: Tensor,
        n_edges: int,
        tokens: Tensor | None = None,
        position_ids: Tensor | None = None,
        subtree_end: Tensor | None = None,
        prefix_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Sum of the weighted losses of a micro-batch, not normalised, and sums for the log.

        Args:
            input_ids: (B, L) rows, or (S, T) packed ones with the last three arguments; see `packing.Packed`.
            position: (M,) where each target is predicted, in the flattened ``input_ids``.
            target: (M,) token ids.
            node: (M,) trie node before each target.
            weight: (M,) weight of each target.
            zero_gain: (M,) whether the target decides nothing.
            decision: (M,) whether several tokens are valid.
            n_edges: Number of children of all nodes of ``node`` together.
            tokens: (C,) the tokens that logits are needed of, ascending; None: all.
            position_ids: (S, T) of packed rows.
            subtree_end: (S, T) of packed rows.
            prefix_ids: (P,) of packed rows.

        Returns:
            ``loss``, a scalar; ``sums`` (3,), detached: nll of tokens without and with gain, and the gradient
            weight w = 1 - P(target) of the decisions.
        """
        batch = {"input_ids": input_ids, "position": position, "n_edges": n_edges, "tokens": tokens}
        batch |= {"target": target, "node": node, "weight": weight}
        batch |= {"position_ids": position_ids, "subtree_end": subtree_end, "prefix_ids": prefix_ids}
        loss, nll = self.losses(batch, self.objective.parts)
        return {"loss": loss.sum(), "sums": title_sums(nll.detach(), zero_gain, decision)}

    def losses(
        self, batch: Mapping[str, Any], score: Callable[..., Parts], *more: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Loss and nll (M,) of the targets of a micro-batch.

        Args:
            batch: Arguments of `forward`, those for the log left out.
            score: As `Objective.parts`; it is given the logits of ``batch``, then those of each of ``more``, then
                target and what follows.
            more: Further passes over other inputs (``input_ids`` and ``position``) for the same targets.
        """
        tokens, passes = batch.get("tokens"), (batch, *more)
        n_vocabulary = head_weight(self.model).shape[0]
        columns = None if tokens is None else Columns(tokens, n_vocabulary)
        arguments = (batch["target"], batch["node"], batch["weight"])
        at_once = max(1, LOGITS_AT_ONCE // n_vocabulary)
        if self.by_hand and tokens is None and len(batch["target"]) > at_once:
            arrays = (*(self.hidden(one) for one in passes), *arguments)
            blocks = zip(*(torch.split(a, at_once) for a in arrays), strict=True)
            done = [checkpoint(self._block, score, *block, use_reentrant=False) for block in blocks]
            loss, nll = (torch.cat(pieces) for pieces in zip(*done, strict=True))
            return loss, nll
        logits = [self.logits(one, tokens) for one in passes]
        if self.training:
            self.objective.observe(logits[0], *arguments[:2], self.trie, columns)
        parts = score(*logits, *arguments[:2], self.trie, arguments[2], batch["n_edges"], columns)
        return parts.loss, parts.nll

    def _block(self, score: Callable[..., Parts], *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and nll (m,) of some positions over the whole vocabulary; run again for the backward pass."""
        *hidden, target, node, weight = arrays
        parts = score(*(self.head(states, None) for states in hidden), target, node, self.trie, weight)
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
    """

    def __init__(
        self, examples: Examples, objective: Objective, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        self.examples, self.objective, self.rows, self.packing = examples, objective, rows, packing

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Arguments of `TitleLoss.forward`, what the micro-batch adds to the normaliser, and its counts."""
        batch, trie = self.examples.batch(self.rows[index]), self.examples.trie
        decision = trie.branching[batch.node]
        weight = torch.from_numpy(batch.weight.astype(np.float64))
        share = self.objective.contribution(weight, torch.from_numpy(decision))
        counts = {
            "tokens": batch.n_tokens,
            "zero_gain": int(batch.zero_gain.sum()),
            "positive_gain": int((~batch.zero_gain).sum()),
            "decisions": int(decision.sum()),
        }
        # In trie support the loss of a forced token is 0 whatever its logits: it needs none.
        keep = np.flatnonzero(decision) if self.objective.support == "trie" else np.arange(len(decision))
        arrays: dict[str, Any] = {"decision": decision[keep]} | self._inputs(batch, keep)
        arrays |= {name: getattr(batch, name)[keep] for name in ("target", "node", "weight", "zero_gain")}
        if self.objective.support == "trie":
            arrays["tokens"] = trie.continuations(arrays["node"])
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
        counts["places"] = arrays["input_ids"].size + len(arrays.get("prefix_ids", ()))
        n_edges = int(trie.n_children[arrays["node"]].sum())
        return tensors | {"n_edges": n_edges, "contribution": float(share.sum()), "counts": counts}

    def _inputs(self, batch: Batch, keep: Any) -> dict[str, Any]:
        """What the body is given, and where the targets that are kept are predicted in it."""
        input_ids, position = _shorten(batch, keep)
        if self.packing and len(keep):
            packed = pack(input_ids, position)
            if packed.n_places <= WORTH_PACKING * input_ids.size:
                return {part.name: getattr(packed, part.name) for part in fields(packed)}
        return {"input_ids": input_ids, "position": position}


def _shorten(batch: Batch, keep: Any) -> tuple[Any, Any]:
    """Leave out the columns behind the last position that is needed: their hidden states serve nothing."""
    row, column = np.divmod(batch.position[keep], batch.input_ids.shape[1])
    width = int(column.max(initial=0)) + 1
    return np.ascontiguousarray(batch.input_ids[:, :width]), row * width + column


PARTS = ("loss_invalid", "loss_choice", "grad_norm_invalid", "grad_norm_choice")


def measure_parts(module: TitleLoss, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Both parts of the language-modelling loss over some micro-batches, and the norms of their gradients.

    Each part is a mean over all target tokens, unweighted, at temperature 1; its gradient is that of the mean
    with respect to all trained parameters. Nothing is changed but random states: no gradient is kept and no
    temperature moves. Costs a forward and two backward passes, and twice the memory of the gradients.

    Args:
        module: The model, in the mode to measure it in.
        batches: Items of a `MicroBatches` of vocabulary support, on the module's device.

    Returns:
        A number for each name of ``PARTS``: nats, and nats per unit of weight; of the batches of all
        processes. MSL, Figure 3.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    gradients = [[torch.zeros_like(p, dtype=torch.float32) for p in parameters] for _ in range(2)]
    losses, n_tokens = torch.zeros(2, device=parameters[0].device), 0
    for batch in batches:
        logits = module.logits(batch)
        parts = lml_parts(logits, batch["target"], batch["node"], module.trie, batch["n_edges"])
        sums = torch.stack(parts).sum(1)
        for i in range(2):
            found = torch.autograd.grad(sums[i], parameters, retain_graph=i == 0, allow_unused=True)
            for gradient, add in zip(gradients[i], found, strict=True):
                gradient += 0 if add is None else add
        losses += sums.detach()
        n_tokens += len(batch["target"])
    processes.add_up([*gradients[0], *gradients[1], losses])
    n_tokens = int(sum(theirs for (theirs,) in processes.gather([n_tokens])))
    norms = [nn.utils.get_total_norm(gradient) for gradient in gradients]
    values = torch.cat([losses, torch.stack(norms)]) / n_tokens
    return dict(zip(PARTS, values.tolist(), strict=True))


@dataclass
class Meter:
    """Sums since the last row of the log; they stay on the device, so that no step waits for them."""

    sums: Tensor  # (4,): loss, then the three of TitleLoss
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    since: float = field(default_factory=time.monotonic)

    def add(self, loss: Tensor, sums: Tensor, counts: dict[str, int]) -> None:
        """Take in a micro-batch."""
        self.sums += torch.cat([loss.detach()[None], sums])
        self.counts.update(counts)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave a block out of the training time."""
        self.seconds += time.monotonic() - self.since
        try:
            yield
        finally:
            self.since = time.monotonic()

    def row(self) -> dict[str, float | None]:
        """Means since the last row, over all processes; then it starts anew.

        ``tokens_per_place`` are tokens of rows for each position that went through the body: below 1 where rows are
        padded, above 1 where what they share runs once.
        """
        with self.pause():
            n, (loss, zero, positive, w) = self.totals()
        values = {
            "loss": loss / n["steps"],
            "loss_zero_gain": zero / n["zero_gain"] if n["zero_gain"] else None,
            "loss_positive_gain": positive / n["positive_gain"] if n["positive_gain"] else None,
            "w": w / n["decisions"] if n["decisions"] else None,
            "tokens_per_place": n["tokens"] / n["places"] if n["places"] else None,
            "tokens_per_second": n["tokens"] / max(self.seconds, 1e-9),
        }
        self.sums.zero_()
        self.counts, self.seconds = Counter(), 0.0
        return values

    def totals(self) -> tuple[Counter[str], list[float]]:
        """Counts and sums of all processes; every one of them counts each step, the first one for all."""
        ours = self.counts if processes.is_first() else Counter({**self.counts, "steps": 0})
        found = processes.gather_objects((ours, self.sums.tolist()))
        counts = sum((theirs for theirs, _ in found), Counter[str]())
        return counts, [sum(values) for values in zip(*(sums for _, sums in found), strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The sums of all processes as JSON values."""
        counts, sums = self.totals()
        return {"sums": sums, "counts": dict(counts), "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.sums.copy_(torch.tensor(state["sums"]))
        self.counts, self.seconds = Counter(state["counts"]), state["seconds"]
