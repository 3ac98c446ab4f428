"""Part: the device agrees with the CPU, on a small random model; what is compared, how far off it is, what is allowed.

Float32 runs with TF32 off. Bfloat16 on the device is compared with float32 on the CPU.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.data import Options, dataset
from benchmarks.gpu.report import Report, Row, stops
from triewise.data import Dataset
from triewise.models import load_backbone
from triewise.recommenders import GenerativeRecommender
from triewise.settings import LoraSettings, TinyModel, TrainingSettings
from triewise.tokens import Trie, binary_weights, build_prompts, zero_gain
from triewise.training import (
    AdaptiveTemperature,
    Examples,
    Objective,
    along_titles,
    make_windows,
    target_counts,
    train,
)
from triewise.training.objective import MicroBatches, TitleLoss

SHAPE = TinyModel(vocabulary=400, width=64, layers=3, heads=4, feed_forward=128)
USERS = 12
EXACT, HALF = 2e-4, 0.05  # of the largest number compared: float32, bfloat16
LORA = LoraSettings(rank=4, dropout=0.0)


def run(report: Report, options: Options) -> None:
    """Decoding, losses, training, adapters, files."""
    torch.set_num_threads(1)  # small matrices: threads cost more than they give
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    data = dataset(replace(options, data=None), "smoke")
    report.run("decoding float32", partial(_decoding, data, options, "float32", EXACT))
    report.run("decoding bfloat16", partial(_decoding, data, options, "bfloat16", HALF))
    report.run("losses and gradients float32", partial(_losses, data, options, False))
    if not options.tiny:
        report.run("losses and gradients autocast", partial(_losses, data, options, True))
    report.run("training", partial(_training, data, options, None))
    report.run("training LoRA", partial(_training, data, options, LORA))
    report.run("save and load", partial(_files, data, options))
    report.run("stops", partial(_stops, data, options))
    checks = [c for row in report.value["sections"].values() for c in row.get("checks", [])]
    report.value["agrees"] = bool(checks) and all(c["ok"] for c in checks)
    report.value["disagreements"] = [c for c in checks if not c["ok"]]
    report.save()


def _check(row: Row, name: str, gap: float, allowed: float, **more: Any) -> None:
    ok = bool(np.isfinite(gap)) and gap <= allowed
    row.setdefault("checks", []).append({"name": name, "gap": gap, "allowed": allowed, "ok": ok, **more})
    row["ok"] = all(c["ok"] for c in row["checks"])


def _model(
    data: Dataset, device: Any, dtype: str = "float32", lora: LoraSettings | None = None, scale: float = 4.0
) -> Any:
    """The same weights for any device: made on the CPU, scaled up, so that rankings are far from ties."""
    backbone = load_backbone("tiny", titles=data.catalog.title, device="cpu", tiny=SHAPE, lora=lora)
    with torch.no_grad():
        for name, p in backbone.model.named_parameters():
            if p.dim() > 1 and "lora" not in name:
                p.mul_(scale)
    backbone.model.to(device=device, dtype=getattr(torch, dtype))
    return backbone


def _recommender(data: Dataset, backbone: Any) -> GenerativeRecommender:
    prompts = build_prompts(backbone.tokenizer, data.catalog, "plain", max_history=10)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    counts = np.arange(data.catalog.n_items, dtype=np.int64)
    backbone.model.requires_grad_(False)
    return GenerativeRecommender(backbone, data.catalog, prompts, trie, counts)


def _decoding(data: Dataset, options: Options, dtype: str, allowed: float, row: Row) -> None:
    n_users = 4 if options.tiny else USERS
    histories = [data.test.history[i].tolist() for i in range(n_users)]
    cpu = _recommender(data, _model(data, "cpu"))
    gpu = _recommender(data, _model(data, options.device, dtype))
    for support in ("trie",) if options.tiny and dtype != "float32" else ("trie", "vocabulary"):
        settings: Row = {"support": support, "batch_users": 8}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row[f"fast_path_{support}"] = gpu.with_settings(**settings).engine.tree_cache_works
        row[f"warnings_{support}"] = [str(w.message) for w in caught]
        every = cpu.with_settings(**settings, search="catalogue").recommend(histories, None)
        reference = np.full((n_users, data.catalog.n_items), np.nan)
        for b, (items, scores) in enumerate(zip(every.items, every.scores, strict=True)):
            reference[b, items[items >= 0]] = scores[items >= 0]
        size = float(np.nanmax(np.abs(reference)))
        for search in ("catalogue", "exact", "beam"):
            one = cpu.with_settings(**settings, search=search).recommend(histories, 10)
            two = gpu.with_settings(**settings, search=search).recommend(histories, 10)
            # Items may differ where they are tied: what counts is the CPU's score of what the device returned.
            theirs = np.take_along_axis(reference, np.maximum(two.items, 0), axis=1)
            same = float((one.items == two.items).mean())
            _check(
                row, f"{support} {search} scores", _gap(theirs, two.scores, size), allowed, same_items=same
            )
            if search != "beam":
                _check(row, f"{support} {search} best 10", _gap(theirs, one.scores, size), allowed)
            row[f"certified {support} {search}"] = float(two.certified.mean())
        lists = [[1, 2, 3, b] for b in range(n_users)]
        scores = [r.with_settings(**settings).score(histories, lists) for r in (cpu, gpu)]
        _check(row, f"{support} score", _gap(scores[0], scores[1], size), allowed)


def _gap(a: Any, b: Any, size: float) -> float:
    return float(np.nanmax(np.abs(np.asarray(a, np.float64) - b))) / size


def _examples(data: Dataset, tokenizer: Any, weighed: bool = False, supervision: str = "last") -> Examples:
    prompts = build_prompts(tokenizer, data.catalog, "plain", max_history=10)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    windows = make_windows(data.train, supervision, prompts)
    counts = target_counts(windows, data.catalog.n_items)
    weight = along_titles(trie, binary_weights(trie, counts, 0.2)) if weighed else None
    return Examples(windows, prompts, trie, weight, zero_gain(trie, counts))


def _objectives() -> dict[str, tuple[Objective, bool]]:
    ats = partial(Objective, "trie", normaliser="decisions")
    return {
        "LML": (Objective("vocabulary"), False),
        "MSL": (Objective("trie"), False),
        "MSL + ATS": (ats(AdaptiveTemperature()), False),
        "MSL + ATS token": (ats(AdaptiveTemperature(scope="token")), False),
        "IGD": (Objective("vocabulary"), True),
        "MSL + IGD": (Objective("trie"), True),
    }


def _losses(data: Dataset, options: Options, autocast: bool, row: Row) -> None:
    """Loss and gradients of one packed micro-batch, and of one of whole windows."""
    allowed = HALF if autocast else EXACT
    backbone = _model(data, "cpu", scale=1.0)
    names = ("LML", "MSL + ATS") if options.tiny else tuple(_objectives())
    for supervision in ("last", "every"):
        for name in names:
            found = []
            for device in (torch.device("cpu"), options.device):
                objective, weighed = _objectives()[name]
                model = copy.deepcopy(backbone.model).to(device)
                examples = _examples(data, backbone.tokenizer, weighed, supervision)
                module = TitleLoss(model, objective, examples.trie).train()
                batch = MicroBatches(
                    examples, objective, np.arange(16)[None] % len(examples), supervision == "last"
                )[0]
                total, _ = batch.pop("contribution"), batch.pop("counts")
                batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                half = autocast and device.type != "cpu"
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    loss = module(**batch)["loss"] / total
                loss.backward()
                grads = [p.grad.float().cpu() for p in model.parameters() if p.grad is not None]
                found.append((float(loss.detach()), grads))
            (one, a), (two, b) = found
            _check(row, f"{supervision} {name} loss", abs(one - two) / max(abs(one), 1e-9), allowed)
            gap = max(float((x - y).norm() / x.norm().clamp(min=1e-6)) for x, y in zip(a, b, strict=True))
            _check(row, f"{supervision} {name} gradients", gap, 5 * allowed)


def _training(data: Dataset, options: Options, lora: LoraSettings | None, row: Row) -> None:
    """Some optimiser steps on both; with an adapter also its merged weights."""
    backbone = _model(data, "cpu", lora=lora, scale=1.0)
    losses, weights, models = [], [], []
    for device in (torch.device("cpu"), options.device):
        ours = replace(backbone, model=copy.deepcopy(backbone.model).to(device))
        examples = _examples(data, backbone.tokenizer)
        steps = 2 if options.tiny else 5
        config = TrainingSettings(steps=steps, learning_rate=1e-3, batch_size=16, warmup_steps=1, log_every=1)
        with tempfile.TemporaryDirectory() as out:
            result = train(ours.model, examples, Objective("trie"), config, Path(out))
        losses.append([line["loss"] for line in result.history])
        trained = [p.detach().float().cpu().flatten() for p in ours.model.parameters() if p.requires_grad]
        weights.append(torch.cat(trained))
        models.append(ours)
    before = torch.cat([p.detach().flatten() for p in backbone.model.parameters() if p.requires_grad])
    moved = float((weights[0] - before).norm())
    row |= {"losses": losses, "moved": moved}
    gap = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    _check(row, "losses of the steps", gap, 10 * EXACT)
    # The first steps of Adam look at signs: where a gradient is nothing but rounding, they differ.
    _check(row, "weights", float((weights[0] - weights[1]).norm()) / moved, 0.05)
    if lora is not None:
        alone, merged = models[1], models[1].merged()
        histories = [data.test.history[i].tolist() for i in range(USERS)]
        a, b = (_recommender(data, m).recommend(histories, 10) for m in (alone, merged))
        _check(row, "merged", _gap(a.scores, b.scores, float(np.abs(a.scores).max())), 1e-3)


def _files(data: Dataset, options: Options, row: Row) -> None:
    """What was saved from the device is the same on it and on the CPU."""
    histories = [data.test.history[i].tolist() for i in range(USERS)]
    for lora in (None, LORA):
        ours = _recommender(data, _model(data, options.device, lora=lora))
        wanted = ours.recommend(histories, 10)
        size, kind = float(np.abs(wanted.scores).max()), "LoRA" if lora else "full"
        with tempfile.TemporaryDirectory() as folder:
            ours.save_pretrained(folder)
            for device, allowed in ((str(options.device), 1e-6), ("cpu", EXACT)):
                again = GenerativeRecommender.from_pretrained(folder, device=device, dtype="float32")
                gap = _gap(again.recommend(histories, 10).scores, wanted.scores, size)
                _check(row, f"{kind} on {device}", gap, allowed)


def _stops(data: Dataset, options: Options, row: Row) -> None:
    """How often the CPU waits for the device in a training step and in a search, as torch counts it."""
    if options.device.type != "cuda":
        return
    backbone = _model(data, options.device, scale=1.0)
    examples = _examples(data, backbone.tokenizer)
    steps = 10

    def training(objective: Objective) -> None:
        config = TrainingSettings(steps=steps, learning_rate=1e-3, batch_size=16, log_every=10_000)
        with tempfile.TemporaryDirectory() as out:
            train(backbone.model, examples, objective, config, Path(out))

    jobs: dict[str, Any] = {
        name: partial(training, _objectives()[name][0]) for name in ("LML", "MSL", "MSL + ATS")
    }
    ours = _recommender(data, _model(data, options.device))
    histories = [data.test.history[i].tolist() for i in range(USERS)]
    jobs["exact"] = partial(ours.with_settings(search="exact").recommend, histories, 10)
    for name, job in jobs.items():
        job()  # what is probed once is not counted
        with stops(options.device) as places:
            job()
        row[name] = {"stops": sum(places.values()), "steps": steps if name != "exact" else None}
        row[name]["places"] = dict(list(places.items())[:12])
