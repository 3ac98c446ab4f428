"""What is asked of every family of language models, each answer a cell of the table in docs/models.md.

The yardstick is independent of the package: the same folder loaded by transformers in the same dtype, and one plain,
unpadded forward for each whole sequence. What two orders of rounding may differ by is measured on the model, see
`Reference`. A cell is fine, says in a few words why something is not done, or names a fault: ``wrong`` (another
result, without a line) or ``traceback`` (an exception that is no `UserError`).
"""

from __future__ import annotations

import contextlib
import copy
import csv
import gc
import io
import json
import math
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.model_families import TITLES, family, quiet, save, tokenizer
from tests.reference import beam
from tests.reference.losses import dense_trie_nll
from tests.reference.trie import DictTrie
from triewise import load
from triewise.app.assemble import Assembly, assemble
from triewise.data import Dataset, prepare
from triewise.errors import UserError
from triewise.models import load_backbone
from triewise.ranking import Ranking
from triewise.recipe import parse_recipe
from triewise.recommenders import GenerativeRecommender
from triewise.settings import TrainingSettings
from triewise.tokens import Trie, build_prompts, zero_gain
from triewise.training import Examples, Objective, packs, train
from triewise.training.objective import MicroBatches, TitleLoss

COLUMNS = ("load", "path", "beams", "exact", "reload", "packing", "lora")
DTYPES = ("float32", "bfloat16")
# Prompts of about 6, 16, 40 and 90 tokens; the second and the third begin alike.
HISTORIES = ([4], [0, 5, 9], [0, 5, 9, 14, 3, 21, 17, 2], list(range(26, 8, -1)))
SCORED = range(0, len(TITLES), 3)  # titles whose sums are compared with the reference, one forward each
# The first three rows grow, as one user's do; two long ones part after 75 tokens, and a short one is beside them.
LONG = tuple(range(27, 9, -1))
ROWS = ((0, 5, 9, 14), (0, 5, 9, 14, 3), (0, 5, 9, 14, 3, 21), LONG, (*LONG[:15], 1, 2, 3), (7, 8))
SLACK = {"float32": 1e-4, "bfloat16": 5e-3}  # nats, beside the measured noise
NOISES = 4.0  # so many times its noise may a result be off
BEAMS = 4


@dataclass(frozen=True)
class Cell:
    """An answer.

    Attributes:
        text: What happens, in a few words.
        fault: ``wrong``, ``traceback``, or empty.
        reason: Why the fast way is not taken; empty where it is.
        numbers: Differences that were measured, in words.
    """

    text: str
    fault: str = ""
    reason: str = ""
    numbers: str = ""

    def __str__(self) -> str:
        said = f"{self.text} ({self.reason})" if self.reason else self.text
        return " ".join(
            part for part in (f"**{self.fault}**" if self.fault else "", said, self.numbers) if part
        )


def answered(question: Callable[[], Cell]) -> Cell:
    """A cell, or how it could not be had."""
    try:
        return question()
    except UserError as error:
        line = re.sub(r"/\S*/(model|adapter)\b", "FOLDER", str(error))
        return Cell(f"refused: {line}", "" if "\n" not in line else "traceback")
    except Exception as error:  # the table says what it was
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/triewise/" in f.filename]
        place = f" in {Path(frames[-1].filename).stem}.{frames[-1].name}" if frames else ", not in triewise"
        said = (str(error).strip() or "no text").splitlines()[0]
        return Cell(f"{type(error).__name__}{place}: {said[:80].rstrip(' (')}", "traceback")


def listened(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What a call returns, and the lines it printed to stderr or warned with."""
    printed = io.StringIO()
    with quiet(), contextlib.redirect_stderr(printed), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = call()
    return result, [*printed.getvalue().splitlines(), *(str(w.message) for w in warned)]


def amount(value: float) -> str:
    """A difference, to one digit; small ones as the power of ten above, which does not change from run to run."""
    if value == 0 or value >= 1e-3:
        return f"{value:.1g}"
    return f"<1e{math.ceil(math.log10(value))}"


def dataset(folder: Path, titles: Sequence[str] = TITLES) -> Dataset:
    """A prepared data set of `ROWS`."""
    source = folder / "source"
    source.mkdir(parents=True)
    names = {str(i + 1): title for i, title in enumerate(titles)}
    (source / "id2name4Rec.json").write_text(json.dumps(names), encoding="utf-8")
    for name in ("train", "valid", "test"):
        with (source / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "item_ids", "timestamp"])
            for number, row in enumerate(ROWS):
                ids = [item % len(titles) + 1 for item in (*row, (row[-1] + 7) % len(titles))]
                writer.writerow([min(max(number - 2, 0), 2), str(ids), 1000 + number])
    return listened(lambda: prepare(f"msl:{source}", folder / "data", max_history=20))[0]


def assembled(model: Path, dtype: str, data: Dataset, lora: bool = False, **backbone: Any) -> Assembly:
    """What a recipe with this model becomes before anything is trained or ranked."""
    settings = {"name": str(model), "template": "plain", "device": "cpu", "dtype": dtype, **backbone}
    if lora:
        settings["lora"] = {"rank": 4}
    recipe = parse_recipe(
        {"name": "families", "data": {"source": "msl:x", "max_history": 20}, "backbone": settings}, "families"
    )
    return assemble(recipe, data)


def recommender(parts: Assembly, data: Dataset) -> GenerativeRecommender:
    """The language model as a recommender."""
    return GenerativeRecommender(parts.backbone, data.catalog, parts.prompts, parts.trie, parts.counts)


def examples(parts: Assembly) -> Examples:
    """Training examples with weight 1."""
    return Examples(parts.windows, parts.prompts, parts.trie, None, zero_gain(parts.trie, parts.counts))


def scores(ranking: Ranking) -> np.ndarray:
    """Scores (B, I) in the order of the catalogue, of a ranking of all of it; titles stand for themselves here."""
    return np.take_along_axis(ranking.scores, np.argsort(ranking.items, axis=1), axis=1).astype(np.float64)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference; infinite where something is not a number."""
    gap = float(np.abs(a - b).max())
    return gap if np.isfinite(gap) else np.inf


@dataclass(frozen=True)
class Reference:
    """A model as transformers loads it, asked one unpadded sequence at a time.

    Attributes:
        model: In the dtype of the check.
        exact: The same weights in float64, or for half precision in float32.
        prompts: Token ids of each user of `HISTORIES`.
        titles: Token ids of each title with terminator.
    """

    model: Any
    exact: Any
    prompts: list[list[int]]
    titles: list[list[int]]

    @classmethod
    def of(cls, folder: Path, dtype: str, made: GenerativeRecommender) -> Reference:
        """The reference for what was loaded from a folder."""
        from transformers import AutoModelForCausalLM

        with quiet():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            more = torch.float64 if dtype == "float32" else torch.float32
            exact = AutoModelForCausalLM.from_pretrained(folder, dtype=more).eval()
        with torch.no_grad():
            for ours, theirs in zip(exact.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs)
        titles = [ids.tolist() for ids in made.prompts.title_tokens]
        return cls(model, exact, [made.prompts.encode(history) for history in HISTORIES], titles)

    @cached_property
    def trie(self) -> DictTrie:
        return DictTrie(self.titles)

    @cached_property
    def valid(self) -> list[list[list[int]]]:
        """For each title the valid tokens at each of its tokens."""
        return [[sorted(self.trie.node(t[:i])) for i in range(len(t))] for t in self.titles]

    def sums(self, logits: Tensor, start: int, item: int) -> list[float]:
        """Path sums of a title in both supports, from the logits (L, V) of prompt and title."""
        title = self.titles[item]
        rows = logits[start - 1 : start - 1 + len(title)].double()
        chosen = rows[torch.arange(len(title)), torch.tensor(title)]
        within = torch.stack(
            [row[valid].logsumexp(0) for row, valid in zip(rows, self.valid[item], strict=True)]
        )
        return [float((chosen - total).sum()) for total in (within, rows.logsumexp(1))]

    def logits(self, model: Any, ids: Tensor) -> Tensor:
        """Logits (B, L, V) of rows, as a model gives them that was not asked before."""
        if self.remembers:
            model(input_ids=ids[:1, :1], use_cache=False)
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    @cached_property
    def remembers(self) -> bool:
        """Whether RoPE's frequencies are those of the longest row so far; a row below the limit resets them."""
        return any(getattr(m, "rope_type", None) == "dynamic" for m in self.model.modules())

    @cached_property
    def by_length(self) -> bool:
        """Whether RoPE's frequencies depend on the length: then a token is what a forward says that ends before it."""
        return any(getattr(m, "rope_type", None) in ("dynamic", "longrope") for m in self.model.modules())

    @torch.no_grad()
    def ask(self, model: Any, user: int, item: int, copies: int = 1) -> list[float]:
        """Path sums of a title for a user, both supports; with ``copies`` as one of a batch of equal rows."""
        prompt, title = self.prompts[user], self.titles[item]
        if self.by_length:
            rows = [torch.tensor([prompt + title[:i]] * copies) for i in range(len(title))]
            return self.sums(torch.stack([self.logits(model, ids)[-1, -1] for ids in rows]), 1, item)
        return self.sums(self.logits(model, torch.tensor([prompt + title] * copies))[-1], len(prompt), item)

    @cached_property
    def path_sums(self) -> np.ndarray:
        """(2, B, C) of `SCORED`: trie support, then vocabulary support."""
        users = range(len(self.prompts))
        found = [[self.ask(self.model, user, item) for item in SCORED] for user in users]
        return np.moveaxis(np.array(found), -1, 0)

    @cached_property
    def noise(self) -> float:
        """What rounding alone does to a path sum, nats.

        The largest of: a batch of equal rows against one row, and one row against the same weights in more precision.
        Rows of one batch are equal, so that what padding does to a model is not taken for noise.
        """
        found = []
        half = self.model.dtype != torch.float32
        for user in range(len(self.prompts)):
            # In half precision an expert more or less is chosen here and there: a few rows would not show it.
            for place in range(len(SCORED)) if half else (0, len(SCORED) // 2, len(SCORED) - 1):
                alone = self.path_sums[:, user, place]
                others = [self.ask(self.model, user, SCORED[place], copies=3)]
                with contextlib.suppress(
                    RuntimeError
                ):  # some families compute in float32 whatever they are told
                    others.append(self.ask(self.exact, user, SCORED[place]))
                found += [apart(np.array(other), alone) for other in others]
        return max(found)

    def train(self, model: Any, parts: Assembly, made: Examples) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of all windows in trie support, one unpadded row after the other, summed."""
        model.zero_grad()
        total = 0.0
        for window in range(len(made)):
            batch = made.batch([window])
            logits = self.logits(model, torch.from_numpy(batch.input_ids))[0]
            at = torch.from_numpy(batch.position)
            target, node = torch.from_numpy(batch.target), torch.from_numpy(batch.node)
            loss = dense_trie_nll(logits[at].float(), target, node, parts.trie, 1.0).sum()
            loss.backward()
            total += float(loss.detach())
        return total, _gradients(model)


@dataclass(frozen=True)
class Subject:
    """One model in one dtype, and where it lies."""

    folder: Path
    dtype: str
    data: Dataset
    scratch: Path
    parts: Assembly
    made: GenerativeRecommender
    said: list[str]

    @classmethod
    def of(cls, folder: Path, dtype: str, data: Dataset, scratch: Path) -> Subject:
        """Assemble it."""
        parts, said = listened(lambda: assembled(folder, dtype, data))
        made = recommender(parts, data)
        return cls(folder, dtype, data, scratch, parts, made, said)

    @cached_property
    def reference(self) -> Reference:
        return Reference.of(self.folder, self.dtype, self.made)

    @cached_property
    def decoder(self) -> GenerativeRecommender:
        """The saved recommender, loaded to decode in this dtype."""
        with quiet():
            self.made.save_pretrained(self.scratch / "saved")
            return load(self.scratch / "saved", device="cpu", dtype=self.dtype)  # type: ignore[return-value]

    @cached_property
    def catalogue(self) -> tuple[Ranking, list[str]]:
        """Every title ranked in trie support, and what was said meanwhile."""
        return listened(lambda: self.decoder.recommend(HISTORIES, k=None))

    @cached_property
    def tolerance(self) -> float:
        return SLACK[self.dtype] + NOISES * self.reference.noise

    # -- the questions ------------------------------------------------------------------------------------------------

    def load(self) -> Cell:
        """Whether weights and buffers have the values of those that transformers loads."""
        ours, theirs = self.decoder.backbone.model, self.reference.model
        for what in ("parameters", "buffers"):
            found, wanted = (dict(getattr(m, f"named_{what}")()) for m in (ours, theirs))
            if found.keys() != wanted.keys():
                return Cell(f"other {what}", "wrong")
            other = sorted(
                {n.rpartition(".")[2] for n in wanted if not found[n].double().equal(wanted[n].double())}
            )
            if other:
                return Cell(f"other {', '.join(other)}", "wrong")
        return Cell("ok")

    def path(self) -> Cell:
        """Which path decoding takes, and how far its sums are from the reference's."""
        ranking, said = self.catalogue
        vocabulary = self.decoder.with_settings(support="vocabulary")
        every = [ranking, listened(lambda: vocabulary.recommend(HISTORIES, k=None))[0]]
        gap = max(
            apart(scores(found)[:, SCORED], wanted)
            for found, wanted in zip(every, self.reference.path_sums, strict=True)
        )
        fast = bool(ranking.counters["cache_bytes_peak"])
        return Cell(
            "tree" if fast else "plain",
            "" if gap <= self.tolerance else "wrong",
            "" if fast else _reason(said),
            f"{amount(gap)} ({amount(self.reference.noise)})",
        )

    def beams(self) -> Cell:
        """Whether beams along the trie are those of `transformers.generate`."""
        users, reference = (1, 3), self.reference
        chosen = self.decoder.with_settings(search="beam", beams=BEAMS)
        ranking, _ = listened(lambda: chosen.recommend([HISTORIES[u] for u in users], k=BEAMS))
        notes = set()
        for place, user in enumerate(users):
            items = ranking.items[place].tolist()
            found = {
                tuple(reference.titles[i]): float(s)
                for i, s in zip(items, ranking.scores[place], strict=True)
            }
            true = [reference.ask(reference.model, user, i)[0] for i in items]
            if apart(ranking.scores[place].astype(np.float64), np.array(true)) > self.tolerance:
                return Cell("other scores", "wrong")
            prompt, end = reference.prompts[user], reference.titles[0][-1]
            try:
                with quiet():
                    wanted = beam.generate(reference.model, prompt, reference.trie, BEAMS, 0.0, "trie", end)
            except Exception as error:  # generate of this family does not work in this release
                notes.add(f"generate fails ({type(error).__name__}), as plain forwards")
                wanted = {}
            if self._same(found, wanted):
                continue
            forgets = lambda input_ids, use_cache: SimpleNamespace(  # noqa: E731
                logits=reference.logits(reference.model, input_ids)
            )
            log_p = beam.model_log_p(forgets, prompt, reference.trie, "trie")
            plain, margin = beam.beam(log_p, reference.trie, BEAMS)
            if self._same(found, plain):
                notes.add("as plain forwards, not as generate" if wanted else "")
            elif margin <= self.tolerance:
                notes.add("tied")
            else:
                same = len(set(found) & set(wanted or plain))
                return Cell(f"{same} of {BEAMS}", "wrong")
        return Cell(", ".join(["ok", *sorted(notes - {""})]))

    def _same(self, found: dict[Any, float], wanted: dict[Any, float]) -> bool:
        return found.keys() == wanted.keys() and all(
            abs(found[t] - s) <= self.tolerance for t, s in wanted.items()
        )

    def exact(self) -> Cell:
        """Whether the exact search finds the best of the whole catalogue, ties within the noise apart."""
        whole, k = scores(self.catalogue[0]), 5
        ranking, _ = listened(lambda: self.decoder.with_settings(search="exact").recommend(HISTORIES, k=k))
        best = np.sort(whole, axis=1)[:, ::-1][:, :k]
        theirs = np.take_along_axis(whole, ranking.items.astype(np.int64), axis=1)
        gap = max(apart(ranking.scores, theirs), apart(theirs, best))
        same = (ranking.items == self.catalogue[0].items[:, :k]).mean()
        if not ranking.certified.all() or gap > self.tolerance:
            return Cell(f"{same:.0%} of places, off {amount(gap)}", "wrong")
        return Cell("ok" if same == 1 else f"ok, {1 - same:.0%} tied")

    def reload(self) -> Cell:
        """Whether what was saved and loaded gives the scores it gave before."""
        if self.dtype == "float32":
            again = self.made
        else:  # trained in float32, decoded in this dtype
            with quiet():
                self.decoder.save_pretrained(self.scratch / "again")
                again = load(self.scratch / "again", device="cpu", dtype=self.dtype)  # type: ignore[assignment]
        gap = apart(
            scores(listened(lambda: again.recommend(HISTORIES, k=None))[0]), scores(self.catalogue[0])
        )
        limit = 1e-6 if self.dtype == "float32" else self.tolerance
        return Cell("ok") if gap <= limit else Cell(f"off {amount(gap)}", "wrong")

    def packing(self) -> Cell:
        """Whether rows are packed, and how far loss and gradients are from the reference's, packed and not."""
        made, model = examples(self.parts), self.parts.backbone.model
        module, before = listened(lambda: TitleLoss(model, Objective("trie"), self.parts.trie))
        packed, said = listened(lambda: bool(module.by_hand and packs(model, made)))
        reference = self.reference
        wanted = reference.train(reference.model, self.parts, made)
        noise = SLACK[self.dtype]
        if self.dtype != "float32":
            rounded = (reference.exact, *(_shaken(reference.exact, seed) for seed in range(3)))
            noise += NOISES * max(max(_differ(reference.train(m, self.parts, made), wanted)) for m in rounded)
        off = {
            how: _differ(self._loss(module, made, how == "packed"), wanted)
            for how in (("alone", "packed") if packed else ("alone",))
        }
        wrong = [how for how, gaps in off.items() if max(gaps) > noise]
        loss, gradient = (max(gaps) for gaps in zip(*off.values(), strict=True))
        return Cell(
            " and ".join(wrong or list(off)[-1:]),
            "wrong" if wrong else "",
            "" if packed else _reason([*before, *said]),
            f"{amount(loss)} / {amount(gradient)}",
        )

    def _loss(self, module: TitleLoss, made: Examples, packing: bool) -> tuple[float, dict[str, Tensor]]:
        """Summed loss and gradients of all windows as one micro-batch."""
        rows = np.arange(len(made))[None]
        batch = MicroBatches(made, Objective("trie"), rows, packing)[0]
        if packing and batch.get("subtree_end") is None:
            raise AssertionError("nothing was packed")
        batch = {name: value for name, value in batch.items() if name not in ("contribution", "counts")}
        module.model.zero_grad()
        loss = module(**batch)["loss"]
        loss.backward()
        return float(loss.detach()), _gradients(module.model)

    def lora(self) -> Cell:
        """Whether ``all-linear`` trains, merges and survives saving; how many of the matrix weights it adapts."""
        parts, _ = listened(lambda: assembled(self.folder, self.dtype, self.data, lora=True))
        model = parts.backbone.model
        made = recommender(parts, self.data)
        config = TrainingSettings(
            steps=1, learning_rate=0.02, batch_size=len(ROWS), warmup_steps=0, schedule="constant"
        )
        with light_heap():
            listened(lambda: train(model, examples(parts), Objective("trie"), config, self.scratch / "lora"))
        second = [p for n, p in model.named_parameters() if ".lora_B." in n or n.endswith("lora_embedding_B")]
        still = sum(not bool(p.any()) for p in second)
        if still == len(second):
            return Cell("nothing is trained", "wrong")
        ask = lambda some: scores(listened(lambda: some.recommend(HISTORIES, k=None))[0])  # noqa: E731
        trained = ask(made)
        limit = 2 * self.tolerance  # merged weights are rounded: as much again as the noise of a forward
        listened(lambda: made.save_pretrained(self.scratch / "adapter"))
        loaded, _ = listened(lambda: load(self.scratch / "adapter", device="cpu", dtype=self.dtype))
        for what, other in (("merged", made.merged()), ("loaded", loaded)):
            gap = apart(ask(other), trained)
            if gap > limit:
                return Cell(f"{what} off {amount(gap)}", "wrong")
        text = f"ok, {share_adapted(model):.0%}"
        return Cell(text + (f", {still} of {len(second)} without gradient" if still else ""))


@contextlib.contextmanager
def light_heap() -> Iterator[None]:
    """The Trainer collects garbage before it starts; what is there already is not looked at again (a second here)."""
    gc.collect(0)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def share_adapted(model: Any) -> float:
    """Share of the body's matrix weights that have an adapter; embeddings and head are not counted."""
    base = model.get_base_model()
    no_matrix = (torch.nn.Embedding, torch.nn.modules.conv._ConvNd)
    apart_from = {id(m.weight) for m in base.modules() if isinstance(m, no_matrix)}
    apart_from.add(id(base.get_output_embeddings().weight))
    whole = {
        id(p): p.numel()
        for name, p in base.named_parameters()
        if p.dim() > 1 and id(p) not in apart_from and ".lora_" not in name
    }
    adapted = [m for m in base.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]
    weights = {id(getattr(m.get_base_layer(), getattr(m, "parameter_name", "weight"))) for m in adapted}
    return sum(whole[weight] for weight in weights) / sum(whole.values())


def _shaken(model: Any, seed: int) -> Any:
    """The same model with weights off by half a unit of bfloat16's last place: what rounding otherwise could give."""
    shaken, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in shaken.parameters():
            parameter.mul_(1 + 2.0**-9 * torch.randn(parameter.shape, generator=generator))
    return shaken


def _gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.detach().double().clone() for n, p in model.named_parameters() if p.grad is not None}


def _differ(a: tuple[float, dict[str, Tensor]], b: tuple[float, dict[str, Tensor]]) -> tuple[float, float]:
    """Relative difference of two losses, and of two gradients (norm of the difference over norm)."""
    loss = abs(a[0] - b[0]) / abs(b[0])
    zero = torch.zeros(1, dtype=torch.float64)
    apart_2 = sum(float(((a[1].get(n, zero) - b[1].get(n, zero)) ** 2).sum()) for n in {*a[1], *b[1]})
    norm_2 = sum(float((g**2).sum()) for g in b[1].values())
    gap = (apart_2 / norm_2) ** 0.5
    return (loss, gap) if np.isfinite(loss + gap) else (np.inf, np.inf)


def _reason(said: Sequence[str]) -> str:
    """Why a fast path is not taken: the part of a printed line behind its colon."""
    lines = [line for line in said if "path" in line or "packed" in line or "forward runs" in line]
    if not lines:
        return "no line says why"
    return re.sub(r"^(warning: )?[^:]*: ", "", lines[-1])


# -- whole families --------------------------------------------------------------------------------------------------


def check(
    name: str, dtype: str, data: Dataset, scratch: Path, columns: Sequence[str] = COLUMNS
) -> dict[str, Cell]:
    """All cells of a family in a dtype.

    Args:
        name: A family of `FAMILIES`.
        dtype: ``float32`` or ``bfloat16``.
        data: What `dataset` made.
        scratch: A folder for the model and what is saved; removed at the end.
        columns: Which of `COLUMNS` are wanted.
    """
    torch.manual_seed(0)
    folder = scratch / "model"
    try:
        save(name, folder)
        try:
            subject = Subject.of(folder, dtype, data, scratch)
        except Exception as error:
            failed = error

            def again() -> Cell:
                raise failed

            return {column: answered(again) for column in columns}
        return {column: answered(getattr(subject, column)) for column in columns}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# What a line that refuses has to speak of.
SPEAKS_OF = {
    "bert": "future|causal|is_decoder",
    "roberta": "future|causal|is_decoder",
    "bart": "encoder-decoder|encoder|newly|missing|head",
    "t5": "encoder-decoder",
    "qwen2_vl": "causal|language model of text|text-only",
    "reformer": "trains on texts of any length",
    "llama_without_head": "head|missing|newly",
    "gpt2_short": "position",
    "llama_small_embedding": "vocabulary|embedding",
    "llama_slow_tokenizer": "fast|tokenizer",
}


def check_refused(name: str, data: Dataset, scratch: Path) -> Cell:
    """What happens with a model of `REFUSED`, up to one step of training; one line before that is what is wanted.

    A model that is accepted and then gives what the reference gives is fine, too.
    """
    torch.manual_seed(0)
    folder = scratch / "model"

    def outcome() -> Cell:
        subject = Subject.of(folder, "float32", data, scratch)
        if name in ("bart", "llama_without_head"):
            return Cell("accepted with a new, random head", "wrong")
        config = TrainingSettings(steps=1, learning_rate=1e-3, batch_size=len(ROWS), warmup_steps=0)
        cells = [answered(subject.path), answered(subject.exact)]
        step = lambda: train(  # noqa: E731
            subject.parts.backbone.model, examples(subject.parts), Objective("trie"), config, scratch / "run"
        )
        trained = answered(lambda: (listened(step), Cell("trained"))[1])
        faults = [cell for cell in (*cells, trained) if cell.fault]
        if faults:
            return replace(faults[0], text=f"accepted; {faults[0].text}")
        late = [cell.text for cell in (*cells, trained) if cell.text.startswith("refused")]
        return Cell(late[0] if late else "works")

    try:
        save(name, folder)
        found = answered(outcome)
        if found.text.startswith("refused") and not re.search(SPEAKS_OF[name], found.text):
            return replace(found, fault="another line")
        return found
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# -- one thing each ----------------------------------------------------------------------------------------------------


def half_precision_training(scratch: Path) -> Cell:
    """Full training in float16 has no scaler: it has to be refused."""
    data = dataset(scratch / "data")
    parts, _ = listened(lambda: assembled(save("llama", scratch / "model"), "float16", data))
    config = TrainingSettings(steps=2, learning_rate=1e-3, batch_size=len(ROWS), warmup_steps=0)
    listened(lambda: train(parts.backbone.model, examples(parts), Objective("trie"), config, scratch / "run"))
    return Cell("trained", "wrong")


def bf16_training(scratch: Path) -> Cell:
    """Full training with dtype = bfloat16 moves the weights as far as with float32, every tensor of them."""
    data, folder, moved = dataset(scratch / "data"), save("llama", scratch / "model"), {}
    config = TrainingSettings(
        steps=20, learning_rate=2e-5, batch_size=len(ROWS), warmup_steps=0, schedule="constant"
    )
    for dtype in DTYPES:
        parts, _ = listened(lambda dtype=dtype: assembled(folder, dtype, data))
        model = parts.backbone.model
        before = {n: p.detach().float().clone() for n, p in model.named_parameters()}
        with light_heap():
            listened(
                lambda parts=parts, dtype=dtype: train(
                    parts.backbone.model,
                    examples(parts),
                    Objective("trie"),
                    config,
                    scratch / dtype,
                    autocast=parts.autocast,
                )
            )
        moved[dtype] = {
            n: float((p.detach().float() - before[n]).abs().sum()) for n, p in model.named_parameters()
        }
    share = sum(moved["bfloat16"].values()) / sum(moved["float32"].values())
    still = sum(not moved["bfloat16"][n] and bool(moved["float32"][n]) for n in moved["float32"])
    text = f"weights move {share:.0%} of what they move in float32, {still} of {len(moved['float32'])} not at all"
    return Cell(text, "wrong" if share < 0.95 or share > 1.05 or still else "")


def equal_titles(scratch: Path) -> Cell:
    """A tokenizer that makes titles equal: a line with their number and an example before training."""
    titles = (*TITLES, "silver RIVER", "HIDDEN Harbour", "映画一", "映画二")
    data = dataset(scratch / "data", titles)
    parts, said = listened(lambda: assembled(save("bert_decoder", scratch / "model"), "float32", data))
    n_equal = len(titles) - len(np.unique(parts.trie.leaf))
    lines = [line for line in said if re.search(r"\d+ titles? .*(same tokens|share)", line)]
    return Cell("said: " + lines[0]) if lines else Cell(f"{n_equal} titles merged without a line", "wrong")


def front_of_prompt(scratch: Path) -> Cell:
    """What GLM's tokenizer puts in front of an empty text starts an instruction prompt."""
    data = dataset(scratch / "data")
    parts, _ = listened(lambda: assembled(save("glm", scratch / "model"), "float32", data, template="msl"))
    wanted = parts.prompts.tokenizer("")["input_ids"]
    found = parts.prompts.encode([0, 1])[: len(wanted)]
    return (
        Cell("ok")
        if found == wanted
        else Cell(f"prompts lack {parts.prompts.tokenizer.decode(wanted)}", "wrong")
    )


def peft_folder(scratch: Path, base: str = "llama", **settings: Any) -> Cell:
    """An adapter's folder of PEFT as backbone.name gives the scores of what was saved, or is refused."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    data, folder = dataset(scratch / "data"), save(base, scratch / "base")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.config._name_or_path = model.name_or_path = str(folder)
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        adapted.save_pretrained(scratch / "adapter")
        tokenizer(family(base).tokenizer).save_pretrained(scratch / "adapter")
    backbone, _ = listened(lambda: load_backbone(str(scratch / "adapter"), device="cpu", dtype="float32"))
    prompts = build_prompts(backbone.tokenizer, data.catalog)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    made = GenerativeRecommender(backbone, data.catalog, prompts, trie, np.ones(len(TITLES), dtype=np.int64))
    titles = [ids.tolist() for ids in prompts.title_tokens]
    ask = Reference(adapted.eval(), adapted, [prompts.encode(history) for history in HISTORIES], titles)
    gap = apart(scores(listened(lambda: made.recommend(HISTORIES, k=None))[0])[:, SCORED], ask.path_sums[0])
    return Cell("ok") if gap < SLACK["float32"] else Cell(f"off {amount(gap)}", "wrong")


def narrow_embedding(scratch: Path) -> Cell:
    """Grounding with a model whose embeddings are narrower than its body, as OPT-350m's."""
    data = dataset(scratch / "data")
    parts, _ = listened(lambda: assembled(save("opt_350m", scratch / "model"), "float32", data))
    made = recommender(parts, data).with_settings(search="grounding", text_beams=2, text_tokens=8)
    ranking, _ = listened(lambda: made.recommend(HISTORIES[:2], k=3))
    return Cell("ok" if (ranking.items >= 0).all() else "no titles")


CASES: dict[str, Callable[[Path], Cell]] = {
    "full training in float16": half_precision_training,
    "full training in bfloat16": bf16_training,
    "titles that a tokenizer makes equal": equal_titles,
    "GLM's two tokens in front": front_of_prompt,
    "grounding with OPT-350m's shape": narrow_embedding,
    "PEFT folder, LoRA": peft_folder,
    "PEFT folder, DoRA": partial(peft_folder, use_dora=True),
    "PEFT folder, trained head": partial(peft_folder, modules_to_save=["lm_head"]),
    "PEFT folder, trained tokens": partial(peft_folder, base="qwen2", trainable_token_indices=[5, 6, 7]),
}


def check_case(name: str, scratch: Path) -> Cell:
    """What happens in one of `CASES`."""
    torch.manual_seed(0)
    try:
        return answered(lambda: CASES[name](scratch))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
