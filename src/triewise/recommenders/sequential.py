"""Sequential recommenders: any encoder with any loss, trained on whole users' sequences, and ranked.

Encoder, loss and supervision are independent choices. Supervision ``every`` puts a sequence through the model
once and takes each item after the context as a target; ``last`` has one row per prefix and one target per row,
as the papers. A run leaves the same log, checkpoints and best weights as `triewise.train`, and a resumed one
ends with the weights of an uninterrupted one.

Shape key: W windows, B rows of a batch, L places, M targets, N negatives, D width, I items, G groups.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from triewise.backbones import resolve_device
from triewise.catalog import Catalog
from triewise.checkpoints import clear, load_trained, random_state, set_random_state, signals_set
from triewise.course import Course, TrainConfig, TrainResult, Validate
from triewise.encoders import PAD, EncoderConfig, SequentialModel
from triewise.errors import UserError
from triewise.examples import Windows, schedule
from triewise.files import atomic_folder, read_json, write_json, write_text
from triewise.generative import CARD, FORMAT, MANIFEST, local_folder, save_catalog
from triewise.progress import progress
from triewise.ranking import Groups, ItemLists, Ranking, check_histories, rank_items
from triewise.splits import Ragged

LOSSES = ("cross-entropy", "bce", "cloze")

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Attributes:
        base: ``cross-entropy`` over all items, ``bce`` against sampled negatives, or ``cloze``: cross-entropy at
            masked places, for a bidirectional encoder.
        negatives: N uniform negatives of a target, never the target itself (``bce``).
        label_smoothing: Share of a target's probability that is spread over all items (cross-entropy, cloze).
        mask_probability: Share of masked places of a sequence (``cloze``).
        mask_last: Share of sequences that are instead cut at a random item, which alone is masked: the task of
            ranking (``cloze``).
        dros_alpha: Weight of `dros`, added to the base loss; 0: none.
        dros_beta0: Its temperature.
        optimizer: ``adamw``, or ``adam`` with weight decay as an L2 term of the gradient.
    """

    base: str = "cross-entropy"
    negatives: int = 1
    label_smoothing: float = 0.0
    mask_probability: float = 0.15
    mask_last: float = 0.5
    dros_alpha: float = 0.0
    dros_beta0: float = 1.0
    optimizer: str = "adamw"


@dataclass(frozen=True)
class Sequences:
    """Windows as one padded array.

    Attributes:
        ids: int32 (W, L), item + 1, padded on the right with 0.
        n_context: int32 (W,); so many leading items are no targets.
        weight: float32 (W,); weight of the targets of a window.
    """

    ids: NDArray[np.int32]
    n_context: NDArray[np.int32]
    weight: NDArray[np.float32]

    @classmethod
    def from_windows(cls, windows: Windows, weight: NDArray[Any] | None = None) -> Sequences:
        """Pad windows; each weighs 1 where ``weight`` (W,) is None."""
        ones = np.ones(len(windows)) if weight is None else weight
        return cls(padded(windows.items), windows.n_context, ones.astype(np.float32))

    def fingerprint(self) -> str:
        """Hex SHA-256 of all that batches depend on."""
        digest = hashlib.sha256(np.array(self.ids.shape, dtype="<i8").tobytes())
        for array, dtype in ((self.ids, "<i4"), (self.n_context, "<i4"), (self.weight, "<f4")):
            digest.update(np.ascontiguousarray(array, dtype=dtype).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Task:
    """One batch: what goes in, and what is asked where.

    Attributes:
        ids: int64 (B, L) input.
        place: int64 (M,); index into the flattened (B * L) of the state that predicts a target.
        target: int64 (M,); items, 0..I-1.
        weight: float32 (M,).
    """

    ids: NDArray[np.int64]
    place: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float32]


def padded(rows: Ragged) -> NDArray[np.int32]:
    """Item indices as int32 (R, L) of ``item + 1``, padded on the right with 0."""
    length = rows.lengths
    ids = np.zeros((len(rows), int(length.max(initial=0))), dtype=np.int32)
    ids[np.arange(ids.shape[1]) < length[:, None]] = rows.values + 1
    return ids


def shifted_task(sequences: Sequences, index: NDArray[np.int64]) -> Task:
    """Each item after the context is to be told from those before it."""
    ids = _trimmed(sequences.ids[index])
    before, after = ids[:, :-1], ids[:, 1:]
    ask: Bools = (np.arange(1, ids.shape[1]) >= sequences.n_context[index][:, None]) & (after != PAD)
    weight = np.broadcast_to(sequences.weight[index][:, None], ask.shape)[ask]
    return Task(before, np.flatnonzero(ask), after[ask] - 1, weight)


def cloze_task(
    sequences: Sequences,
    index: NDArray[np.int64],
    config: LossConfig,
    mask: int,
    rng: np.random.Generator,
) -> Task:
    """Items at some places of a sequence are to be told from all others (BERT4Rec, arXiv:1904.06690).

    Of the chosen places 80 % show the mask, 10 % a random item, 10 % the item itself; a sequence has at least one.
    A share ``mask_last`` of the sequences is cut behind a random item, which shows the mask.
    """
    ids = _trimmed(sequences.ids[index])
    n_rows, n_places = ids.shape
    place = np.arange(n_places)
    length = np.count_nonzero(ids, axis=1)
    cut: Bools = np.less(rng.random(n_rows), config.mask_last)
    # A place before the first target is never the one that is asked for.
    last = rng.integers(np.minimum(sequences.n_context[index], length - 1), length)
    ids[cut[:, None] & (place > last[:, None])] = PAD
    draw = rng.random(ids.shape) + 2.0 * (ids == PAD)
    chosen = (draw < config.mask_probability) | (place == draw.argmin(1)[:, None])
    ask: Bools = np.where(cut[:, None], place == last[:, None], chosen)
    kind = np.where(cut[:, None], 0.0, rng.random(ids.shape))
    shown = np.where(kind < 0.8, mask, np.where(kind < 0.9, rng.integers(1, mask, ids.shape), ids))
    weight = np.broadcast_to(sequences.weight[index][:, None], ask.shape)[ask]
    return Task(np.where(ask, shown, ids), np.flatnonzero(ask), ids[ask] - 1, weight)


def sampled_bce(positive: Tensor, negative: Tensor) -> Tensor:
    """``-ln sigmoid(s_t) - mean_n ln(1 - sigmoid(s_n))`` (M,) from scores (M,) and (M, N).

    Source: SASRec, arXiv:1808.09781, Eq. 6, with a mean over N where there are several negatives.
    """
    return F.softplus(-positive) + F.softplus(negative).mean(1)


def dros(scores: Tensor, target: Tensor, propensity: Tensor, beta0: float = 1.0) -> Tensor:
    """The distributionally robust term (M,) of DROS.

    ``ln( sum_i exp(p_i y_i^2 / b) - exp(p_t y_t^2 / b) + exp(p_t (y_t - 1)^2 / b) )`` with scores y, target t,
    propensities p and b = ``beta0``. Source: arXiv:2208.10879 and its code. Differs from the code: the sum is a
    log-sum-exp in which the target's term is put in its place, so large scores do not overflow.

    Args:
        scores: (M, I), any size.
        target: int64 (M,).
        propensity: (I,) of `propensities`.
        beta0: > 0.
    """
    at = target[:, None]
    terms = propensity * scores.square() / beta0
    own = propensity[at] * (scores.gather(1, at) - 1).square() / beta0
    return terms.scatter(1, at, own).logsumexp(1)


def propensities(counts: NDArray[np.int64]) -> NDArray[np.float32]:
    """``((c_i + 1) / sum_j (c_j + 1))^0.05`` (I,), as in the authors' code of DROS."""
    smooth = counts.astype(np.float64) + 1
    weight: NDArray[np.float64] = (smooth / smooth.sum()) ** 0.05
    return weight.astype(np.float32)


def task_loss(
    model: SequentialModel,
    task: Task,
    config: LossConfig,
    propensity: Tensor | None,
    rng: np.random.Generator,
) -> Tensor:
    """Weighted mean of the loss over the targets of a batch; only their states are scored."""
    device = model.bias.device
    place, target = (torch.from_numpy(a).to(device) for a in (task.place, task.target))
    states = model(torch.from_numpy(task.ids).to(device)).flatten(0, 1)[place]
    scores = model.scores(states) if config.base != "bce" or config.dros_alpha else None
    if config.base == "bce":
        drawn = rng.integers(model.config.n_items - 1, size=(len(task.target), config.negatives))
        drawn += drawn >= task.target[:, None]
        items = torch.cat([target[:, None], torch.from_numpy(drawn).to(device)], dim=1)
        some = model.scores_of(states, items)
        loss = sampled_bce(some[:, 0], some[:, 1:])
    else:
        assert scores is not None
        loss = F.cross_entropy(scores, target, reduction="none", label_smoothing=config.label_smoothing)
    if config.dros_alpha and scores is not None and propensity is not None:
        loss = loss + config.dros_alpha * dros(scores, target, propensity, config.dros_beta0)
    weight = torch.from_numpy(np.ascontiguousarray(task.weight)).to(device)
    # A batch of rows that weigh nothing, or without a target, costs nothing.
    return (weight * loss).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def fit(
    model: SequentialModel,
    sequences: Sequences,
    counts: NDArray[np.int64],
    loss: LossConfig,
    config: TrainConfig,
    out: Path,
    *,
    validate: Validate | None = None,
    resume: bool = False,
    title: str = "",
) -> TrainResult:
    """Train ``model`` in place; the weights it ends with are the best validation's, or the last ones.

    A first Ctrl-C or SIGTERM finishes the step, writes a checkpoint and returns; a second one acts at once. It is for
    one process; a recipe refuses several.

    Args:
        model: On its device.
        sequences: What is learned from.
        counts: (I,) training targets of each item, for `propensities`.
        loss: What is minimised.
        config: Budget and optimiser; ``accumulation`` and ``log_parts`` have no meaning here.
        out: Folder for the log, checkpoints and best weights.
        validate: From the model to metrics; called every ``evaluate_every`` steps.
        resume: Go on from the newest whole checkpoint in ``out``, or from the start where there is none.
        title: What the progress line calls this run.

    Raises:
        UserError: A loss that does not go with the encoder, ``evaluate_every`` without ``validate``, a checkpoint
            of another run, a metric that ``validate`` does not give, or a loss that is not finite.
    """
    if loss.base not in LOSSES or (loss.base == "cloze") != model.bidirectional:
        fitting = "cloze" if model.bidirectional else "cross-entropy or bce"
        raise UserError(f"wanted the loss {fitting} for {model.config.kind}, got {loss.base!r}")
    config.check_validate(validate)
    checkpoint = clear(out, resume)
    run = _Fit(model, sequences, counts, loss, config, Course(config, out, validate))
    if checkpoint is not None:
        run.take_up(checkpoint)
    if run.course.stopped is None:
        left = config.steps - run.step
        with signals_set(run.course.asked_to_stop), progress(title or "training", left, "steps") as advance:
            run.run(advance)
    return run.course.result(model, run.step, run.course.seconds)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of a step (the first is 0): linear warm-up, then constant, or down to 0 in a line or half a wave."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    share = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    left = {"constant": 1.0, "linear": 1 - share, "cosine": 0.5 + 0.5 * math.cos(math.pi * share)}
    return config.learning_rate * left[config.schedule]


class _Fit:
    """The state of one training run."""

    def __init__(
        self,
        model: SequentialModel,
        sequences: Sequences,
        counts: NDArray[np.int64],
        loss: LossConfig,
        config: TrainConfig,
        course: Course,
    ) -> None:
        self.model, self.sequences, self.loss = model, sequences, loss
        self.config, self.course = config, course
        self.device = model.bias.device
        self.propensity = torch.from_numpy(propensities(counts)).to(self.device) if loss.dros_alpha else None
        self.optimizer = _optimizer(model, loss.optimizer, config)
        self.step = 0
        self.sums = torch.zeros(2, device=self.device)  # loss and gradient norm since the last row
        self.summed = 0
        torch.manual_seed(config.seed)

    def run(self, advance: Callable[..., None]) -> None:
        """All steps that are left."""
        config, course = self.config, self.course
        order = schedule(len(self.sequences.ids), config.batch_size, config.steps, config.seed)
        detail = ""
        while course.stopped is None:
            self.one_step(order[self.step])
            self.step += 1
            course.see(self.step)
            if course.stopped or course.logs_at(self.step):
                detail = self.log()
            if course.validates_at(self.step):
                course.judge(self.model, self.step, self.device)
            if course.saves_at(self.step):
                self.save()
            advance(1, detail)
        if course.judges_late(self.step):
            course.judge(self.model, self.step, self.device)

    def one_step(self, index: NDArray[np.int64]) -> None:
        """One step of the optimiser; what is drawn for it depends on the seed and its number alone."""
        rng = np.random.default_rng([self.config.seed, 1, self.step])
        if self.model.bidirectional:
            task = cloze_task(self.sequences, index, self.loss, self.model.config.mask, rng)
        else:
            task = shifted_task(self.sequences, index)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.step)
        loss = task_loss(self.model, task, self.loss, self.propensity, rng)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.sums += torch.stack([loss.detach(), norm.detach()])
        self.summed += 1

    def log(self) -> str:
        """Write a row about the steps since the last one; what the progress line says."""
        loss, norm = (self.sums / max(self.summed, 1)).tolist()
        rate = learning_rate(self.config, self.step - 1)
        epoch = self.step * self.config.batch_size / len(self.sequences.ids)
        row = {"step": self.step, "loss": loss, "learning_rate": rate, "grad_norm": norm, "epoch": epoch}
        self.course.write_row(row | {"seconds": self.course.seconds})
        self.sums.zero_()
        self.summed = 0
        return f"loss {loss:.3f}"

    def learned(self) -> dict[str, Any]:
        """What a checkpoint is of; a run with anything else cannot go on from it."""
        data = self.sequences.fingerprint()
        return {"encoder": asdict(self.model.config), "loss": asdict(self.loss), "sequences": data}

    def save(self) -> None:
        """Write a checkpoint."""
        state = {"sums": self.sums.tolist(), "summed": self.summed}
        files = {"optimizer.pt": self.optimizer.state_dict(), "rng.pt": random_state(self.device)}
        self.course.save(self.model, self.step, self.learned(), state, files)

    def take_up(self, checkpoint: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: The checkpoint is of another run.
        """
        state = self.course.take_up(self.model, checkpoint, self.learned())
        self.step, self.summed = int(state["step"]), state["summed"]
        self.sums = torch.tensor(state["sums"], device=self.device)
        load = functools.partial(torch.load, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(load(checkpoint / "optimizer.pt"))
        set_random_state(load(checkpoint / "rng.pt"), self.device)


@dataclass(frozen=True)
class SequentialRecommender:
    """Ranks items by the scores of a sequential model; a group of equal titles counts as its best member.

    Attributes:
        model: Encoder and head.
        catalog: The items.
        counts: (I,) training targets of each item; decide which member represents a group.
        batch_users: Histories of one forward.
        origin: What the model is, for ``run.json`` and the card.
        card: Text of its model card; empty where there is none.
    """

    model: SequentialModel
    catalog: Catalog
    counts: NDArray[np.int64]
    batch_users: int = 256
    origin: dict[str, Any] = field(default_factory=dict)
    card: str = field(default="", repr=False)

    @cached_property
    def groups(self) -> Groups:
        """Groups of items with the same title."""
        return Groups.from_labels(self.catalog.group, self.counts)

    @property
    def hashes(self) -> dict[str, str]:
        """Hex SHA-256 of what training and ranking must have in common."""
        return {"counts": hashlib.sha256(self.counts.astype("<i8").tobytes()).hexdigest()}

    def with_settings(self, **changes: Any) -> SequentialRecommender:
        """The same: a sequential model scores every item and has no settings of its search.

        Raises:
            UserError: Any other setting than ``search = "catalogue"``.
        """
        for name, value in changes.items():
            if (name, value) != ("search", "catalogue"):
                raise UserError(
                    f"a sequential model scores every item: wanted no {name}, got {value!r}; leave it out"
                )
        return self

    def item_scores(self, histories: ItemLists) -> NDArray[np.float32]:
        """Scores of all items, float32 (B, I), higher is better, on no scale of their own.

        Args:
            histories: Item indices, oldest first; the last ``max_length`` of each are read. May be empty.

        Raises:
            UserError: An item outside the catalogue.
        """
        check_histories(histories, self.groups)
        scores = np.zeros((len(histories), self.catalog.n_items), dtype=np.float32)
        last = self.model.config.max_length
        was_training, device = self.model.training, self.model.bias.device
        self.model.eval()
        with torch.inference_mode():
            for start in range(0, len(histories), self.batch_users):
                part = [np.asarray(h)[-last:].tolist() for h in histories[start : start + self.batch_users]]
                ids = padded(Ragged.from_lists(part))
                if not ids.shape[1]:
                    ids = np.zeros((len(ids), 1), dtype=np.int32)
                found = self.model.last_scores(torch.from_numpy(ids.astype(np.int64)).to(device))
                scores[start : start + len(part)] = found.cpu().numpy()
        self.model.train(was_training)
        return scores

    def recommend(
        self,
        histories: ItemLists,
        k: int | None = 10,
        exclude: ItemLists | str | None = None,
        allow: ItemLists | None = None,
    ) -> Ranking:
        """The ``k`` best groups for each history, which may be empty; see `Recommender.recommend`.

        Raises:
            UserError: An item outside the catalogue, or ``k < 1``.
        """
        return rank_items(self, histories, k, exclude, allow)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write everything :meth:`from_pretrained` needs into ``folder``; each file is whole or absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)
        with atomic_folder(folder / "model") as model:
            save_file(self.model.state_dict(), model / "model.safetensors")
            write_json(model / "config.json", asdict(self.model.config))
        save_catalog(self.catalog, self.counts, folder / "catalog.parquet")
        if self.card:
            write_text(folder / CARD, self.card)
        facts = {"format": FORMAT, "kind": "sequential", "batch_users": self.batch_users}
        write_json(folder / MANIFEST, facts | {"origin": self.origin})

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: Path | str, *, revision: str | None = None, device: str = "auto"
    ) -> SequentialRecommender:
        """Load what :meth:`save_pretrained` wrote, from a folder or the Hugging Face hub.

        Raises:
            UserError: Something is missing, or it is no sequential recommender.
        """
        folder = local_folder(folder_or_hub_id, revision)
        facts = read_json(folder / MANIFEST)
        if (facts.get("format"), facts.get("kind")) != (FORMAT, "sequential"):
            got = f"kind {facts.get('kind')} of format {facts.get('format')}"
            raise UserError(
                f"wanted a sequential recommender of format {FORMAT} in {folder}/{MANIFEST}, got {got}; load it with "
                "triewise.load, or save it again"
            )
        for name in ("catalog.parquet", "model"):
            if not (folder / name).exists():
                raise UserError(f"wanted {name} in {folder}, which is missing; restore it or train again")
        config = EncoderConfig(**read_json(folder / "model" / "config.json"))
        model = SequentialModel(config)
        load_trained(model, folder / "model" / "model.safetensors")
        model.requires_grad_(False)
        frame = pl.read_parquet(folder / "catalog.parquet")
        return cls(
            model.to(resolve_device(device)).eval(),
            Catalog.from_frame(frame),
            frame["train_targets"].to_numpy().astype(np.int64),
            facts["batch_users"],
            facts["origin"],
            (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else "",
        )


def _trimmed(ids: NDArray[np.int32]) -> NDArray[np.int64]:
    """Without the columns that are padding in every row."""
    return ids[:, : max(int((ids != PAD).sum(1).max(initial=0)), 2)].astype(np.int64)


def _optimizer(model: SequentialModel, name: str, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW without decay of norms and biases, or Adam with an L2 term on everything."""
    parameters = list(model.parameters())
    if name == "adam":
        return torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    flat = [p for p in parameters if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": flat, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)
