"""What a language model adds to a sequential run, before it is trained: ``[enhance]`` of a recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from triewise.app.chains import chains_of, questions_of
from triewise.arrays import Ragged, padded
from triewise.data import Dataset, data_hash
from triewise.errors import UserError
from triewise.files import sha256_file
from triewise.models import PAD, Bank, InContext, load_tokenizer, title_encoder
from triewise.progress import note
from triewise.training import TEACHER, ItemLoss, Teacher, distilled, item_loss

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.data import Split
    from triewise.models import SequentialModel
    from triewise.recipe import Recipe
    from triewise.settings import DistilSettings, ExampleSettings, SequentialSettings
    from triewise.training import Task

AT_ONCE = 256  # texts or rows
LONGEST = 512  # tokens of a text that are read: a chain has 256, and ends in what it concludes


@dataclass(frozen=True)
class Enhancement:
    """What a sequential run gets from elsewhere; a plain one gets nothing.

    Attributes:
        vectors: float32 (I, Z) at the input, see `triewise.models.SequentialModel`; None: none.
        vector_weight: What they count.
        loss: From the model and the training targets (I,) of each item to its loss; None: as ``[sequential]`` says.
        hashes: Hex SHA-256 of what came from elsewhere, for ``run.json``.
        in_context: Reads states again after examples; None: nothing does.
        facts: More for ``run.json``.
    """

    vectors: Tensor | None = None
    vector_weight: float = 0.0
    loss: Callable[[SequentialModel, Int64], ItemLoss] | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    in_context: InContext | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def enhancement_of(recipe: Recipe, dataset: Dataset, split: Split, rows: Int64) -> Enhancement:
    """What ``[enhance]`` says.

    Args:
        recipe: Its sections.
        dataset: The data.
        split: The rows (W) that the windows are of.
        rows: int64 (W,), which of the training rows they are.
    """
    settings, sequential = recipe.enhance, recipe.sequential
    if settings is None or sequential is None:
        return Enhancement()
    if settings.kind == "llm-cf":
        return _with_examples(settings, sequential, recipe, dataset, split)
    teacher = _teacher(settings, dataset)
    items, distances = teacher.items[rows, : settings.top], teacher.distances[rows, : settings.top]

    def loss(model: SequentialModel, counts: Int64) -> ItemLoss:
        return item_loss(model, sequential, counts, distilled(items, distances, settings, sequential, counts))

    vectors = torch.from_numpy(teacher.vectors) if settings.ed_weight else None
    known = {"teacher": sha256_file(settings.teacher / TEACHER)}
    return Enhancement(vectors, settings.ed_weight, loss if settings.lam else None, known)


def _with_examples(
    settings: ExampleSettings,
    sequential: SequentialSettings,
    recipe: Recipe,
    dataset: Dataset,
    split: Split,
) -> Enhancement:
    """LLM-CF's in-context module with its bank, and the loss that finds each row's examples in it."""
    questions = questions_of(settings, dataset, split)
    chains = chains_of(settings, questions)
    by_model = sum(chain.by_model for chain in chains)
    if by_model < len(chains):
        note(f"{len(chains) - by_model} of {len(chains)} chains of thought are a template's, not a model's")
    texts = text_vectors(
        settings.text_encoder, dataset.catalog.title, [chain.text for chain in chains], recipe.seed
    )
    longest = recipe.data.max_history
    histories = padded(split.history.take(questions.row).last(longest)).astype(np.int64)
    item, label = torch.from_numpy(questions.item), torch.from_numpy(questions.label)
    bank = Bank(texts[0], torch.from_numpy(histories), item, label, texts[1])
    shape = settings.shots, settings.weight, settings.layers, settings.heads, recipe.seed
    module = InContext(bank, sequential.width, *shape)
    found = examples_of_rows(module, split, questions.row)

    def loss(model: SequentialModel, counts: Int64) -> ItemLoss:
        plain = item_loss(model, sequential, counts)

        def after_examples(states: Tensor, task: Task, rng: np.random.Generator) -> Tensor:
            row, last = np.divmod(task.place, task.ids.shape[1])
            ids = np.where(np.arange(task.ids.shape[1]) <= last[:, None], task.ids[row], PAD)
            theirs = found[torch.from_numpy(np.ascontiguousarray(task.row))].to(states.device)
            states, apart = module(model, states, torch.from_numpy(ids).to(states.device), theirs)
            total = plain(states, task, rng)
            return total + settings.reconstruct_weight * apart if settings.reconstruct_weight else total

        return after_examples

    said = "\n".join(chain.text for chain in chains)
    known = {"chains": hashlib.sha256(said.encode()).hexdigest()}
    facts = {"chains": {"by_model": by_model, "by_template": len(chains) - by_model}}
    return Enhancement(loss=loss, hashes=known, in_context=module, facts=facts)


def text_vectors(name: str, titles: Sequence[str], chains: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """Float32 vectors (I, Z) of titles and (E, Z) of chains, by one encoder of `triewise.models.title_encoder`."""
    texts = [*titles, *chains]
    tokens = Ragged.from_lists([])
    if name == "tiny":
        ids = load_tokenizer("tiny", titles=titles)(texts, add_special_tokens=False)["input_ids"]
        tokens = Ragged.from_lists(ids)
    encoder = title_encoder(name, texts, tokens, seed, LONGEST).eval()
    with torch.no_grad():
        parts = [encoder(part) for part in torch.split(torch.arange(len(texts)), AT_ONCE)]
    found = torch.cat(parts)
    return found[: len(titles)], found[len(titles) :]


def examples_of_rows(module: InContext, split: Split, row: Int64, itself: bool = False) -> Tensor:
    """The examples (W, K) that training rows read, -1 where there are fewer.

    A row sees neither itself nor what its user did later: by the time of the target, and of equal times by the order of
    rows.

    Args:
        module: Its bank is searched.
        split: The rows (W).
        row: (E,), which of them the examples are about.
        itself: Let a row see itself, with its own target and label, as the authors' code does.
    """
    n = split.n_rows
    user = np.unique(split.user_id.astype(str), return_inverse=True)[1]
    known = np.array([name is not None for name in split.user_id])
    user = np.where(known, user, -1 - np.arange(n))
    place = np.empty(n, dtype=np.int64)
    place[np.lexsort((np.arange(n), split.timestamp))] = np.arange(n)
    found = []
    for start in range(0, n, AT_ONCE):
        part = slice(start, min(start + AT_ONCE, n))
        later = place[row] > place[part, None] if itself else place[row] >= place[part, None]
        hidden = torch.from_numpy((user[row] == user[part, None]) & later)
        ids = padded(split.history[part].last(module.ids.shape[1])).astype(np.int64)
        found.append(module.retrieve(torch.from_numpy(ids), hidden))
    return torch.cat(found)


def teacher_hashes(dataset: Dataset) -> dict[str, str]:
    """Hex SHA-256 of what a teacher and its student have in common."""
    files = dataset.info["sha256"]
    return {"data": data_hash(dataset), "catalogue": files["catalog.parquet"], "rows": files["train.parquet"]}


def _teacher(settings: DistilSettings, dataset: Dataset) -> Teacher:
    """The teacher of a student; UserError where it does not belong to its data, or looked at validation rows."""
    teacher = Teacher.load(settings.teacher)
    for part, wanted in teacher_hashes(dataset).items():
        if teacher.facts["hashes"].get(part) != wanted:
            raise UserError(
                f"the {part} of the teacher {settings.teacher} is not that of {dataset.folder}; give both the same "
                "data, split and data.max_history"
            )
    if teacher.facts["trained_on"] != "train":
        raise UserError(
            f"the teacher {settings.teacher} was trained on the validation rows, by which its student is chosen; give "
            "one trained on train"
        )
    if teacher.facts["k"] < settings.top:
        raise UserError(
            f"wanted enhance.top of at most {teacher.facts['k']}, the places of {settings.teacher}, got "
            f"{settings.top}; teach with -k {settings.top}"
        )
    return teacher
