"""Statistics of stored runs: what models are run for equals plain forwards, is kept, and is seen in the report."""

from __future__ import annotations

import builtins
import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tests.conftest import shared
from tests.reference.trie import DictTrie
from triewise import load, load_dataset
from triewise.app import report_runs, study
from triewise.app.studying import ALPHAS, measure, measured
from triewise.cli import main
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.reports import standalone, to_png
from triewise.tokens import zero_gain_share

STORED = Path(__file__).parent / "stored_runs"
USERS = 5


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(STORED, tmp_path / "stored")
    monkeypatch.chdir(tmp_path / "stored")
    return tmp_path / "stored"


def drawn(prepared: Path) -> Any:
    test = load_dataset(prepared).test
    return test.take(np.sort(np.random.default_rng(0).permutation(test.n_rows)[:USERS]))


def test_target_tokens_logits_and_gradients_equal_plain_forwards(here: Path) -> None:
    tables = measure(here / "generative", USERS, 0)
    recommender: Any = load(here / "generative")
    model, trie, split = recommender.backbone.model, recommender.trie, drawn(here / "prepared")
    titles = [recommender.prompts.title_tokens[i].tolist() for i in range(trie.n_items)]
    plain = DictTrie(titles)
    number = {prefix: n for n, prefix in enumerate(plain.prefixes())}
    gain = plain.gain(recommender.counts.tolist())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    invalid, choice, rows, standard = [], [], [], []
    for user in range(USERS):
        prompt = recommender.prompts.encode(split.history[user])
        title = titles[split.target[user]]
        logits = model(input_ids=torch.tensor([[*prompt, *title]])).logits[0].double()
        for t, token in enumerate(title):
            z, children = logits[len(prompt) + t - 1], sorted(plain.node(title[:t]))
            inside, outside = z[children].logsumexp(0), z.logsumexp(0)
            invalid.append(outside - inside)
            choice.append(inside - z[token])
            log_p = (z[token] - inside).item()
            rows.append((user, t + 1, gain[number[tuple(title[: t + 1])]], len(children), log_p))
            if len(children) == max(len(plain.node(p)) for p in plain.prefixes()):
                values = z[children].detach().numpy()
                standard += ((values - values.mean()) / values.std()).tolist()
    assert tables["tokens"].select("row", "step", "valid").rows() == [(r[0], r[1], r[3]) for r in rows]
    np.testing.assert_allclose(tables["tokens"]["gain"], [r[2] for r in rows], atol=1e-12)
    np.testing.assert_allclose(tables["tokens"]["log_p"], [r[4] for r in rows], atol=1e-4)
    assert tables["logits"]["logits"][0] == len(standard)
    for part, values in (("invalid", invalid), ("choice", choice)):
        model.zero_grad()
        loss = torch.stack(values).mean()
        loss.backward(retain_graph=True)
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None))
        _, found, found_norm = tables["parts"].filter(pl.col("part") == part).row(0)
        assert (found, found_norm) == (pytest.approx(loss.item(), abs=1e-4), pytest.approx(norm, rel=1e-3))
    a, b = tables["parts"]["gradient_norm"]
    assert a != pytest.approx(b, rel=0.05), "the control: one part's gradient is not the other's"


def test_rankings_at_every_alpha_are_those_of_the_recommender(here: Path) -> None:
    tables = measure(here / "generative", USERS, 0)
    recommender: Any = load(here / "generative")
    split, trie = drawn(here / "prepared"), recommender.trie
    for alpha in ALPHAS:
        ranking = recommender.with_settings(alpha=alpha).recommend(list(split.history), 10, list(split.seen))
        hit = (trie.leaf[ranking.items] == trie.leaf[split.target][:, None]) & (ranking.items >= 0)
        part = tables["decoding"].filter(pl.col("alpha") == alpha)
        assert part["HR@10"].to_list() == hit.any(1).astype(float).tolist()
        p = np.exp(ranking.scores - ranking.scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        bits = [-sum(v * math.log2(v) for v in row if v > 0) for row in p.tolist()]
        np.testing.assert_allclose(part["entropy"], bits, atol=1e-4)
    entropies = tables["decoding"].group_by("alpha").agg(pl.col("entropy").mean())["entropy"]
    assert entropies.n_unique() > 1, "the control: alpha changes rankings"


def test_what_was_measured_is_kept_until_the_run_is_another_one(here: Path, monkeypatch) -> None:
    run = here / "generative"
    assert measured(run) == {}
    first = measure(run, USERS, 0)
    with monkeypatch.context() as without:
        without.setattr("triewise.app.studying.load", None)  # no model is loaded any more
        again = measure(run, USERS, 0)
    assert all(first[kind].equals(again[kind]) for kind in first)
    assert not first["tokens"].equals(measure(run, USERS, 1)["tokens"])
    record = read_json(run / "statistics" / "measured.json")
    write_json(run / "statistics" / "measured.json", record | {"format": 0})
    assert measured(run) == {}, "tables of another format"
    write_json(run / "statistics" / "measured.json", record)
    assert measured(run)
    write_json(run / "run.json", read_json(run / "run.json") | {"commit": "another"})
    assert measured(run) == {}
    with pytest.raises(UserError, match="wanted at least 2 users to measure on, got 1; give more"):
        measure(run, 1, 0)


def test_a_run_that_cannot_be_written_is_measured_all_the_same(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of somebody else's, which may be read alone."""

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("triewise.app.studying.atomic_folder", refused)
    tables = measure(here / "generative", USERS, 0)
    assert set(tables) == {"decoding", "prefixes", "tokens", "logits", "parts"}
    assert (
        "generative cannot be written (Permission denied): what was measured is not kept"
        in capsys.readouterr().err
    )
    assert not (here / "generative" / "statistics").exists()


def test_an_adapter_has_the_gradients_of_its_own_weights(here: Path) -> None:
    found = measure(here / "adapter", USERS, 0)["parts"]
    assert (found["gradient_norm"] > 0).all()


def test_the_command_and_the_report(here: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        "statistics",
        "generative",
        "adapter",
        "sequential",
        "prepared",
        "--users",
        str(USERS),
        "--out",
        "out",
    ]
    monkeypatch.setattr("sys.argv", ["triewise", *asked, "--export", "csv,svg", "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    found = json.loads(capsys.readouterr().out)
    names = {"zero-gain", "prefix-entropy", "gain-probability", "repetition", "alpha", "lml-parts", "logits"}
    assert names < set(found) and all(one["says"].endswith(".") for one in found.values())
    page = (here / "out" / "statistics.html").read_text(encoding="utf-8")
    assert page.count("<h3>") == len(found) and "IGD figures 3, 6 and 8" in page
    with (here / "out" / "alpha.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2 * 2 * len(ALPHAS)
    assert (here / "out" / "prefix-entropy-1.svg").read_text(encoding="utf-8").startswith("<svg xmlns=")
    with monkeypatch.context() as bare:
        bare.setattr(
            "sys.argv", ["triewise", "statistics", "generative", "--only", "igd-figure-4", "--out", "two"]
        )
        with pytest.raises(SystemExit, match="0"):
            main()
    assert "Gain and log-probability: The more a target token gains" in capsys.readouterr().out
    report = report_runs([here / "generative"], here / "report.html")
    assert {one.name for one in report.statistics} >= names - {"zero-gain"}
    page = (here / "report.html").read_text(encoding="utf-8")
    assert "Figures of the papers" in page


def test_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = standalone('<svg role="img" viewBox="0 0 40 20"><path class="c0 line" d="M0 0H9"/></svg>')
    assert "var(" not in drawing and 'width="40" height="20"' in drawing
    pytest.importorskip("resvg_py", reason="the extra png is not installed")
    assert to_png(drawing).startswith(b"\x89PNG")


def test_what_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = here / "generative", here / "out"
    with pytest.raises(UserError, match="wanted a statistic among zero-gain, .* got 'igd-figure-99'"):
        study([run], out, only=["igd-figure-99"])
    with pytest.raises(UserError, match="wanted --export among csv, svg, png, got 'pdf'"):
        study([run], out, export=["pdf"])
    with pytest.raises(UserError, match="wanted a run or a prepared folder, but .* is neither"):
        study([here], out)
    with pytest.raises(UserError, match="wanted folders that give seeds, got none"):
        study([run], out, only=["msl-table-3"])
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "resvg_py":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="PNG needs the package resvg-py"):
        study([run], out, export=["png"])
    assert not out.exists()


def test_zero_gain_tokens_of_a_real_data_set_equal_a_count(tmp_path: Path) -> None:
    """IGD, Table 1, on Games: each training target is written out, and those that begin alike are counted."""
    from triewise.app.folders import titles_of
    from triewise.data import prepare

    folder = tmp_path / "games"
    dataset = prepare(f"d3:{shared('amazon_games_d3')}", folder, max_history=10)
    (one,) = study([folder], tmp_path / "out", only=["igd-table-1"])
    _, prompts, trie, counts = titles_of(folder, "tiny", None)
    titles = [tuple(prompts.title_tokens[i].tolist()) for i in range(dataset.catalog.n_items)]
    begin: dict[tuple[int, ...], int] = {}
    targets = dataset.train.target.tolist()
    for item in targets:
        for t in range(len(titles[item]) + 1):
            begin[titles[item][:t]] = begin.get(titles[item][:t], 0) + 1
    idle = sum(
        begin[titles[i][:t]] == begin[titles[i][: t + 1]] for i in targets for t in range(len(titles[i]))
    )
    n_tokens = sum(len(titles[i]) for i in targets)
    assert one.table["tokens"].to_list() == [idle, n_tokens - idle]
    assert one.table["share"][0] == pytest.approx(zero_gain_share(trie, counts))
    forced = int((trie.n_children[trie.parent[1:]] == 1) @ trie.subtree_count(counts)[1:])
    assert idle > forced, "the control: tokens without an alternative are not all that decide nothing"
