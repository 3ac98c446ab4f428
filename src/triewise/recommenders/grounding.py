r"""Free text to nearest titles: the model writes what it likes, and the catalogue is ordered by the distance to that.

.. math:: D_i = \lVert h(\text{text}) - h(\text{title}_i) \rVert_2, \qquad
          \tilde D_i = \frac{D_i - \min D}{\max D - \min D} (1 + W_i)^{-\gamma}

where h is the model's last hidden state at the last token of a text, and W in [0, 1] the popularity of a title or
the score that another recommender gives it. The nearest title stays the first one for every gamma.

Source: BIGRec (two steps of grounding, statistics injection) and its code.

Dimension key: B users, I items, G groups (titles), D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from triewise.decoding import Counters, TokenLists, pad
from triewise.errors import UserError
from triewise.models import Backbone, as_if_alone, body, causal_lm, head_weight, max_positions
from triewise.ranking import (
    Groups,
    ItemLists,
    ItemScorer,
    Ranking,
    check_histories,
    check_k,
    rank_groups,
    resolve_filters,
)

if TYPE_CHECKING:
    from triewise.tokens import Prompts

TOKENS_AT_ONCE = 8192  # of texts that are embedded in one forward
POPULARITY_GAMMAS = tuple(float(g) for g in range(100))  # the grids of BIGRec's code
COLLABORATIVE_GAMMAS = tuple(g / 100 for g in range(1, 101)) + tuple(float(g) for g in range(1, 100))


@dataclass(frozen=True)
class GroundedRecommender:
    """Ranks titles by how near they are to what the language model writes without any constraint.

    The scores of its rankings are minus the distance: of hidden states (L2) where ``gamma`` is 0, else scaled to
    [0, 1] for each user and divided by ``(1 + W) ** gamma``. The whole catalogue is ranked, so every ranking is
    certified. Counters: ``prompt_tokens`` are those of prompts (once for each beam) and of embedded texts,
    ``tree_tokens`` those of generated text.

    Attributes:
        backbone: The language model; it writes, and embeds what was written and the titles.
        prompts: How histories become token ids.
        groups: Items of equal titles; ``priority`` is the popularity W.
        beams: Beams of the generation, of which the best text is used; 1 is greedy.
        max_tokens: Most tokens of a generated text.
        gamma: Strength of the injection, >= 0; 0 switches it off.
        batch_users: Users that share a forward.
        collaborator: Gives W instead of popularity: its scores, scaled to [0, 1] for each user.
        kept: Embeddings of the titles once they were made; shared by copies with other settings.

    Source: BIGRec. Differs from the authors' code: the fine-tuned model embeds (theirs loads the base model), the
    template is undone exactly instead of stripping quotes, and an empty text is the terminator alone.
    """

    backbone: Backbone
    prompts: Prompts
    groups: Groups
    beams: int = 4
    max_tokens: int = 128
    gamma: float = 0.0
    batch_users: int = 16
    collaborator: ItemScorer | None = None
    kept: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def recommend(
        self,
        histories: ItemLists,
        k: int | None = 10,
        exclude: ItemLists | str | None = None,
        allow: ItemLists | None = None,
    ) -> Ranking:
        """The ``k`` titles nearest to what the model writes; see `Recommender.recommend`."""
        check_k(k)
        if self.beams < 1 or self.max_tokens < 1 or not 0 <= self.gamma < np.inf:
            raise UserError(
                "wanted at least 1 beam and 1 token and a finite gamma >= 0, got "
                f"{self.beams}, {self.max_tokens} and {self.gamma}"
            )
        excluded, allowed = resolve_filters(histories, exclude, allow)
        counters = Counters()
        distance = self.distances(histories, counters)
        if self.gamma:
            distance = inject(distance, self.weights(histories), self.gamma)
        items, scores = rank_groups(-distance, self.groups, k, excluded, allowed)
        return Ranking(items, scores, np.ones(len(histories), dtype=bool), counters.as_dict())

    def distances(self, histories: ItemLists, counters: Counters | None = None) -> NDArray[np.floating]:
        """L2 distances between the text for each history and every title, float32 (B, G)."""
        check_histories(histories, self.groups, len(self.prompts.title) - self.groups.n_items)
        counters = counters or Counters()
        titles = self.title_embeddings(counters)
        texts = self.write(histories, counters)
        written = self._embed(texts, counters)
        # The faster way over a matrix product loses the digits of small distances, and these decide.
        exactly = "donot_use_mm_for_euclid_dist"
        found: NDArray[np.float32] = torch.cdist(written, titles, compute_mode=exactly).cpu().numpy()
        return found

    def weights(self, histories: ItemLists) -> NDArray[np.float64]:
        """W of each title in [0, 1]: (G,) popularity, or (B, G) scores of the collaborator.

        A title's popularity is the sum over its items, its score that of its best item.
        """
        groups = self.groups
        if self.collaborator is None:
            counts = np.bincount(groups.of_item, weights=groups.priority, minlength=groups.n_groups)
            return _to_unit(counts.astype(np.float64))
        scores = np.asarray(self.collaborator.item_scores(histories), dtype=np.float64)
        if scores.shape != (len(histories), groups.n_items) or not np.isfinite(scores).all():
            raise UserError(
                f"wanted finite scores of {groups.n_items} items for {len(histories)} users from the collaborator, "
                f"got shape {scores.shape}; train both on one catalogue"
            )
        return _to_unit(groups.scores(scores))

    def write(self, histories: ItemLists, counters: Counters | None = None) -> list[str]:
        """What the model writes for each history, without the quotes or the newline of the template."""
        counters = counters or Counters()
        prompts = [self.prompts.encode(history) for history in histories]
        texts = [""] * len(prompts)
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")  # so little is padded
        for start in range(0, len(prompts), self.batch_users):
            users = order[start : start + self.batch_users]
            tokens = generate(
                self.backbone, [prompts[b] for b in users], self.beams, self.max_tokens, counters
            )
            for b, text in zip(users, self.prompts.read_titles(tokens), strict=True):
                texts[b] = text
        return texts

    def title_embeddings(self, counters: Counters | None = None) -> Tensor:
        """float32 (G, D), of codes where there are some; made once where no weight can be trained."""
        if "titles" in self.kept:
            return self.kept["titles"]
        first = np.unique(self.groups.of_item, return_index=True)[1]
        counters = counters or Counters()
        if self.prompts.identifier is None:
            made = self._embed([self.prompts.title[i] for i in first], counters)
        else:
            rows = [[*self.prompts.bos, *self.prompts.title_tokens[i][:-1].tolist()] for i in first]
            made = last_states(self.backbone.model, rows, counters)
        if not any(p.requires_grad for p in self.backbone.model.parameters()):
            self.kept["titles"] = made
        return made

    def _embed(self, texts: Sequence[str], counters: Counters) -> Tensor:
        terminator = int(self.prompts.tokenizer.eos_token_id)
        rows = [[*self.prompts.bos, *ids] or [terminator] for ids in self.prompts.encode_texts(texts)]
        return last_states(self.backbone.model, rows, counters)


def inject(distance: NDArray[np.floating], weight: NDArray[np.floating], gamma: float) -> NDArray[np.float64]:
    """Statistics injected into distances.

    Args:
        distance: (B, G), >= 0.
        weight: (G,) or (B, G) in [0, 1].
        gamma: >= 0; 0 leaves the order as it is.

    Returns:
        (B, G) in [0, 1]; 0 at the nearest title of each user, whatever gamma is.

    Source: BIGRec, ``adjust_pda.py`` (popularity) and ``adjust_ci.py`` (collaborative).

    >>> inject(np.array([[1.0, 3.0, 2.0]]), np.array([0.0, 1.0, 0.0]), 2.0).tolist()
    [[0.0, 0.25, 0.5]]
    """
    injected: NDArray[np.float64] = _to_unit(distance) * (1.0 + weight) ** -gamma
    return injected


@torch.inference_mode()
def last_states(model: Any, texts: TokenLists, counters: Counters | None = None) -> Tensor:
    """The last hidden state (after the final norm) of a causal LM at the last token of each text, float32 (T, D).

    ``texts`` are token ids, at least one each; ``counters`` receive the work done. UserError where one is longer than
    the model's table of positions.
    """
    device, width = (
        head_weight(model).device,
        head_weight(model).shape[1],
    )  # of no text; a body may give another
    longest = max(map(len, texts), default=0)
    _check_length(model, longest, f"a text of {longest} tokens")
    order = np.argsort([len(ids) for ids in texts], kind="stable")
    states = [torch.zeros(0, width, device=device)] if not texts else []
    for rows in _chunks(order, [len(ids) for ids in texts]):
        # Padding on the right stands behind all that a causal model sees.
        ids, length = pad([texts[i] for i in rows], device)
        run = lambda ids: body(model)(input_ids=ids, use_cache=False).last_hidden_state  # noqa: E731
        hidden = as_if_alone(model, run, ids, length)
        states.append(hidden[torch.arange(len(rows)), length - 1].float())
        if counters is not None:
            counters.prompt_tokens += int(length.sum())
    return torch.cat(states)[torch.from_numpy(np.argsort(order)).to(device)]


@torch.inference_mode()
def generate(
    backbone: Backbone, prompts: TokenLists, beams: int, max_tokens: int, counters: Counters | None = None
) -> list[list[int]]:
    """Unconstrained beam search of ``transformers.generate``: the best text of each prompt, without terminator.

    Sums of log-probabilities are divided by the length (``length_penalty`` 1), as the authors' settings do. No
    setting of the model's own ``generation_config`` has any effect. ``prompts`` are token ids of each user, ``beams``
    and ``max_tokens`` those of `GroundedRecommender`; ``counters`` receive the work done. UserError where a prompt and
    its text are longer than the model's table of positions.
    """
    from transformers import GenerationConfig

    model, end = causal_lm(backbone.model), int(backbone.tokenizer.eos_token_id)
    longest = max(map(len, prompts), default=0)
    _check_length(
        model, longest + max_tokens - 1, f"a prompt of {longest} tokens and up to {max_tokens} of text"
    )
    config = GenerationConfig(
        num_beams=beams,
        max_new_tokens=max_tokens,
        do_sample=False,
        length_penalty=1.0,
        early_stopping=False,
        eos_token_id=end,
        pad_token_id=end,
        use_cache=True,
    )
    ids, length = pad([prompt[::-1] for prompt in prompts], head_weight(model).device)
    ids = ids.flip(1)  # padded on the left, where nothing of it is generated from
    mask = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - length[:, None]
    with _own_settings(model, config), _counted(model, int(length.sum()), len(prompts), counters):
        out = model.generate(ids, attention_mask=mask.long(), generation_config=config)
    rows = out[:, ids.shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def _check_length(model: Any, n: int, what: str) -> None:
    """Refuse more tokens than the model has positions for; nothing follows the last token of a text."""
    positions = max_positions(model)
    if positions is not None and n > positions:
        raise UserError(
            f"wanted texts within the model's {positions} positions, got {what}; lower text_tokens, or max_tokens of "
            "the prompts"
        )


@contextlib.contextmanager
def _own_settings(model: Any, config: Any) -> Iterator[None]:
    """``generate`` fills what a config leaves open from the model's own one, so that is put aside meanwhile."""
    before, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = before


@contextlib.contextmanager
def _counted(model: Any, n_tokens: int, n_users: int, counters: Counters | None) -> Iterator[None]:
    """Count positions where they enter the body; ``n_tokens`` of all prompts together, without padding."""
    counters = counters or Counters()
    forwards = 0

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal forwards
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        if forwards == 0:
            counters.prompt_tokens += n_tokens * (len(ids) // n_users)
        else:
            counters.tree_tokens += ids.numel()
            counters.rounds += 1
        forwards += 1

    handle = body(model).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _chunks(order: NDArray[np.intp], length: Sequence[int]) -> Iterator[NDArray[np.intp]]:
    """Slices of ``order``, whose lengths ascend, of at most `TOKENS_AT_ONCE` tokens with padding."""
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * length[order[stop]] <= TOKENS_AT_ONCE:
            stop += 1
        yield order[start:stop]
        start = stop


def _to_unit(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Each row scaled to [0, 1]; zeros where all are equal."""
    low = values.min(-1, keepdims=True)
    span = (values.max(-1, keepdims=True) - low).astype(np.float64)
    scaled: NDArray[np.float64] = np.divide(values - low, span, out=np.zeros(values.shape), where=span > 0)
    return scaled
