r"""S-DPO: titles that a user chose against several that were not, relative to a frozen reference model.

The reference is the model that training starts from. What it thinks of every title that will be compared is
computed once, before the first step, and kept in a file.

Shape key: W windows, B windows of a micro-batch, n rejected titles of each, M title tokens, L tokens.
"""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softplus

from triewise.errors import UserError
from triewise.files import atomic_path
from triewise.models import check_model
from triewise.progress import note, progress
from triewise.training import processes
from triewise.training.objective import MicroBatches, Objective, TitleLoss, title_sums

if TYPE_CHECKING:
    from triewise.tokens import Trie
    from triewise.training.examples import Batch, Examples


def sdpo_loss(
    logp_theta_chosen: Tensor,
    logp_ref_chosen: Tensor,
    logp_theta_rejected: Tensor,
    logp_ref_rejected: Tensor,
    beta: float,
) -> Tensor:
    r"""Softmax-DPO: how far the chosen title is ahead of all rejected ones together.

    .. math:: \ell = \log\Big(1 + \sum_{d} e^{\beta (s_d - s_w)}\Big), \qquad s = \log \pi_\theta - \log \pi_{ref}

    With one rejected title it is DPO, ``-log sigmoid(beta (s_w - s_d))``. Log-probabilities are sums over the
    tokens of a title, its terminator included, never means.

    Args:
        logp_theta_chosen: Of the chosen titles under the model (B,), nats.
        logp_ref_chosen: The same under the reference (B,).
        logp_theta_rejected: Of the rejected titles under the model (B, n), n >= 1.
        logp_ref_rejected: The same under the reference (B, n).
        beta: How much a nat counts, > 0.

    Returns:
        A loss for each row (B,), >= 0; log(1 + n) where model and reference agree.

    Source: S-DPO, arXiv:2406.09215, and its code, which takes exp and log one after the other and overflows.

    >>> import torch
    >>> zero, rejected = torch.zeros(1), torch.tensor([[-1.0, 0.5, 0.2]])
    >>> sdpo_loss(torch.ones(1), zero, rejected, torch.zeros(1, 3), beta=1.0)
    tensor([0.7844])
    """
    chosen = logp_theta_chosen - logp_ref_chosen
    ahead = logp_theta_rejected - logp_ref_rejected - chosen[:, None]
    return softplus((beta * ahead).logsumexp(1))


@dataclass(frozen=True, eq=False)
class Preferences:
    """S-DPO with everything that stays the same while it trains.

    Attributes:
        rejected: Item indices (W, n), int32, from `examples.draw_rejected`.
        reference: Log-probabilities under the reference of the target and of the rejected titles (W, 1 + n),
            float32, nats, from `reference_logp`.
        beta: How much a nat counts, > 0.
        support: Which tokens a title's probability is among: ``vocabulary`` (its authors') or ``trie``.
        reference_key: What `reference_key` says of the reference.

    Raises:
        UserError: ``beta`` <= 0, or arrays that do not fit.
    """

    rejected: NDArray[np.int32]
    reference: NDArray[np.float32]
    beta: float = 1.0
    support: str = "vocabulary"
    reference_key: str = ""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not self.beta > 0:
            raise UserError(f"wanted a beta of S-DPO > 0, got {self.beta}")
        rows, n = self.rejected.shape
        if self.reference.shape != (rows, 1 + n):
            got = f"{self.rejected.shape} and {self.reference.shape}"
            raise UserError(f"wanted rejected (W, n) and reference (W, 1 + n), got {got}")

    @property
    def objective(self) -> Objective:
        """What gives the probability of a token."""
        return Objective(self.support)

    def settings(self) -> dict[str, Any]:
        """What training does not change."""
        rejected = hashlib.sha256(np.ascontiguousarray(self.rejected, dtype="<i4").tobytes()).hexdigest()
        known = {"beta": self.beta, "rejected": rejected, "reference": self.reference_key}
        return self.objective.settings() | {"preference": known}

    def divisor(self, total: Tensor) -> Tensor:
        """Of a sum of `PreferenceBatches` contributions: windows, so that the loss is a mean over them."""
        return total.clamp(min=1)

    def module(self, model: Any, trie: Trie) -> PreferenceLoss:
        """See `objective.Learned`."""
        return PreferenceLoss(model, self, trie)

    def batches(self, examples: Examples, rows: NDArray[np.int64], packing: bool) -> PreferenceBatches:
        """See `objective.Learned`."""
        return PreferenceBatches(examples, self, rows, packing)


class PreferenceLoss(TitleLoss):
    """A causal LM and `Preferences` as one module."""

    def __init__(self, model: Any, preferences: Preferences, trie: Trie) -> None:
        super().__init__(model, preferences.objective, trie)
        self.beta = preferences.beta

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Sum of the losses of all windows; ``sums`` are those of the chosen titles.

        Args:
            batch: Arguments of `TitleLoss.forward`; ``reference`` (B, 1 + n), log-probabilities under the reference,
                the chosen title first; ``title`` (M,), int64, the number of the title that each target token is of:
                title b * (1 + n) is a chosen one, the n after it its rejected ones; ``chosen``, int64, which of the M
                are of a chosen title.
        """
        reference, chosen = batch["reference"], batch["chosen"]
        logp, nll = _title_logp(self, batch)
        loss = sdpo_loss(logp[:, 0], reference[:, 0], logp[:, 1:], reference[:, 1:], self.beta)
        zero_gain, decision = batch["zero_gain"][chosen], batch["decision"][chosen]
        return {"loss": loss.sum(), "sums": title_sums(nll.detach()[chosen], zero_gain, decision)}


class PreferenceBatches(MicroBatches):
    """Micro-batches in a given order; ``rows`` (n, B) are window numbers, each of which makes 1 + n rows.

    Packed, the prompt of a window runs once for all its titles.
    """

    def __init__(
        self, examples: Examples, preferences: Preferences, rows: NDArray[np.int64], packing: bool = False
    ) -> None:
        self.preferences, self.windows = preferences, rows
        times = preferences.reference.shape[1]
        against = (rows[:, :, None] * times + np.arange(times)).reshape(len(rows), times * rows.shape[1])
        several = examples.with_rejected(preferences.rejected)
        super().__init__(several, preferences.objective, against, packing)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Arguments of `PreferenceLoss.forward`, what the micro-batch adds to the normaliser, and its counts."""
        item, reference = super().__getitem__(index), self.preferences.reference[self.windows[index]]
        examples, rows = self.examples, self.rows[index]
        chosen = _targets(examples, rows[:: reference.shape[1]])
        counts = {name: int(n_I[chosen].sum()) for name, n_I in examples.of_title.items()}
        return item | {
            "reference": torch.from_numpy(reference),
            "contribution": float(len(reference)),
            "counts": counts | {name: item["counts"][name] for name in ("tokens", "places")},
        }

    def more(self, rows: NDArray[np.int64], batch: Batch, keep: Any) -> dict[str, Any]:
        """``title`` and ``chosen`` of `PreferenceLoss.forward`."""
        title = batch.title[keep]
        return {"title": title, "chosen": np.flatnonzero(title % self.preferences.reference.shape[1] == 0)}


def reference_logp(
    model: Any,
    examples: Examples,
    rejected: NDArray[np.int32],
    support: str,
    at_once: int = 16,
    packing: bool = False,
) -> NDArray[np.float32]:
    """What a model thinks of the target and the rejected titles of every window; processes share the work.

    Args:
        model: The reference, a causal LM; it is in evaluation mode afterwards.
        examples: The windows, one target in each.
        rejected: Item indices (W, n).
        support: ``vocabulary`` or ``trie``.
        at_once: Windows of one forward pass, >= 1.
        packing: Whether the prompt of a window runs once for all its titles; as `trainer.packs` says.

    Returns:
        Log-probabilities (W, 1 + n), float32, nats.

    Raises:
        UserError: A model that `check_model` refuses.
    """
    check_model(model, examples.prompts.tokenizer)
    empty = np.zeros((len(rejected), 1 + rejected.shape[1]), dtype=np.float32)
    preferences, result = Preferences(rejected, empty, support=support), empty.copy()
    # Rows of like length are scored together; each process takes every P-th of them.
    ours = np.argsort(examples.size, kind="stable")[processes.rank() :: processes.count()]
    module = TitleLoss(model, preferences.objective, examples.trie).eval()
    whole = len(ours) - len(ours) % at_once
    blocks = (ours[:whole].reshape(-1, at_once), ours[whole:].reshape(-1, max(len(ours) - whole, 1)))
    what = "reference" if processes.count() == 1 else "reference, this process's share"
    with torch.no_grad(), progress(what, len(ours), "rows") as tick:
        for block in blocks:
            batches = PreferenceBatches(examples, preferences, block, packing and module.by_hand)
            for i, rows in enumerate(block):
                item = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batches[i].items()}
                logp, _ = _title_logp(module, item)
                result[rows] = logp.cpu().numpy()
                tick(len(rows))
    processes.add_up([torch.from_numpy(result)])  # where a row is another's, ours is 0
    return result


def reference_key(model: Any, examples: Examples, rejected: NDArray[np.int32], support: str) -> str:
    """Hex SHA-256 of all that `reference_logp` depends on: weights, prompts, trie, windows, rejected titles."""
    digest = hashlib.sha256(f"{support} {examples.with_rejected(rejected).fingerprint()}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if isinstance(tensor, Tensor):
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def kept_reference(
    path: Path,
    model: Any,
    examples: Examples,
    rejected: NDArray[np.int32],
    support: str,
    at_once: int = 16,
    packing: bool = False,
) -> tuple[NDArray[np.float32], str]:
    """`reference_logp` from an ``.npz`` file, or computed and written there, whole; and its `reference_key`.

    In several processes each calls it, and the first one reads and writes. A file of other weights or rows, or one
    that cannot be read, is replaced, with a note.
    """
    key = reference_key(model, examples, rejected, support)
    logp = processes.on_first(lambda: _read(path, key))
    if logp is None:
        logp = reference_logp(model, examples, rejected, support, at_once, packing)
        processes.on_first(lambda: _write(path, key, logp))
    return logp, key


def _read(path: Path, key: str) -> NDArray[np.float32] | None:
    """What `_write` wrote under this key; None, and a note where there is something else."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as handle, np.load(handle) as file:
            logp: NDArray[np.float32] = file["logp"]
            if (str(file["key"]), str(file["sha256"])) == (key, _digest(logp)):
                return logp
        reason = "is of other weights, prompts or rows, or damaged"
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        reason = f"cannot be read ({error})"
    note(f"{path} {reason}; the reference is computed again")
    return None


def _write(path: Path, key: str, logp: NDArray[np.float32]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as written:
        np.savez(written, key=np.array(key), logp=logp, sha256=np.array(_digest(logp)))


def _digest(logp: NDArray[np.float32]) -> str:
    return hashlib.sha256(logp.tobytes()).hexdigest()


def _title_logp(module: TitleLoss, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Log-probability of each title, in the shape (B, 1 + n) of the reference, and nll (M,) of each token."""
    _, nll = module.losses(batch, module.objective.parts)
    shape = batch["reference"].shape
    return -nll.new_zeros(shape).view(-1).index_add(0, batch["title"], nll).view(shape), nll


def _targets(examples: Examples, rows: NDArray[np.int64]) -> NDArray[np.int32]:
    """The last item of each window."""
    items = examples.windows.items
    return items.values[items.offsets[rows + 1] - 1]
