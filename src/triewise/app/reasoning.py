"""Chains of thought about the training rows of a recipe, written ahead of its training: ``triewise reason``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triewise.app.assemble import training_rows
from triewise.app.chains import best_chain, chain_of, keep_chains, kept_chains, questions_of
from triewise.app.folders import open_data
from triewise.app.writers import writer_of
from triewise.errors import UserError
from triewise.progress import progress

if TYPE_CHECKING:
    from triewise.recipe import Recipe


def reason(recipe: Recipe, out: Path | str) -> dict[str, Any]:
    """Write the chains of thought that a recipe's training reads; what is there already is left alone.

    Args:
        recipe: With ``[enhance] kind = "llm-cf"``.
        out: Folder of ``chains.jsonl``. One may serve several recipes: a chain is known by a hash of what was asked, of
            whom and how.

    Returns:
        ``chains``, how many the recipe has, ``by_model`` and ``by_template``; the latter where no candidate of the
        model could be used, or where no model was asked.

    Raises:
        UserError: No such recipe, or the model or service cannot be had.
    """
    out, settings = Path(out), recipe.enhance
    if settings is None or settings.kind != "llm-cf":
        raise UserError(
            f"wanted a recipe with [enhance] kind = 'llm-cf', got {recipe.name}; chains of thought are for such a one"
        )
    writer, dataset = settings.writer, open_data(recipe)
    questions = questions_of(settings, dataset, training_rows(recipe, dataset))
    keys, kept, size = questions.keys(writer), kept_chains(out), writer.batch_size
    written = functools.cache(lambda: writer_of(writer, dataset.catalog.title))
    with progress(f"chains of thought by {writer.model}", len(keys), "rows") as advance:
        for start in range(0, len(keys), size):
            batch = range(start, min(start + size, len(keys)))
            if any(keys[e] not in kept for e in batch):  # all are asked, so that what is drawn is the same
                answers = written()([questions.prompts[e] for e in batch], int(keys[start][:12], 16))
                entries: dict[str, dict[str, Any]] = {}
                for e, candidates in zip(batch, answers, strict=True):
                    label, row = int(questions.label[e]), int(questions.row[e])
                    text = best_chain(candidates, questions.titles[e], label)
                    by = "template" if text is None else writer.model
                    entry = {"key": keys[e], "row": row, "item": int(questions.item[e]), "label": label}
                    entries.setdefault(keys[e], entry | {"by": by, "text": text or questions.templates[e]})
                new = {key: entry for key, entry in entries.items() if key not in kept}
                keep_chains(out, new.values())
                kept |= {key: chain_of(entry) for key, entry in new.items()}
            advance(len(batch))
    by_model = sum(kept[key].by_model for key in keys)
    return {
        "chains": len(keys),
        "by_model": by_model,
        "by_template": len(keys) - by_model,
        "model": writer.model,
    }
