"""Model cards and sharing: what a card says, that it stays Markdown, and that it carries nothing private."""

from __future__ import annotations

import ast
import fnmatch
import itertools
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import triewise
from tests import worlds
from tests.worlds import HISTORIES
from triewise.app import evaluate_run, train_run
from triewise.errors import UserError
from triewise.files import read_json
from triewise.models import SequentialModel, load_backbone
from triewise.recipe import parse_recipe
from triewise.recommenders import GenerativeRecommender, SequentialRecommender
from triewise.recommenders.saved import PARTS
from triewise.reports import CardFacts, addressed, model_card
from triewise.reports.card import IGD_BIBTEX, MSL_BIBTEX, escape, without_folders
from triewise.settings import LoraSettings, SequentialSettings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained and evaluated run with an adapter; every path in it is absolute."""
    home = tmp_path_factory.mktemp("secret-user")
    values = {
        "name": "cycle",
        "title": "MSL | *tiny*",
        "data": {
            "source": f"msl:{worlds.write_msl_folder(home / 'office', n_users=6)}",
            "folder": str(home / "prepared"),
            "max_history": 4,
        },
        "backbone": {
            "tiny": {"vocabulary": 300, "width": 16, "heads": 2, "feed_forward": 32},
            "lora": {"rank": 4},
        },
        "training": {"supervision": "every", "steps": 3, "batch_size": 4},
    }
    train_run(parse_recipe(values, "test"), home / "runs" / "cycle")
    evaluate_run(home / "runs" / "cycle")
    return home / "runs" / "cycle"


def code_of(card: str, language: str) -> str:
    found = re.search(rf"^```+{language}\n(.*?)\n```+$", card, re.DOTALL | re.MULTILINE)
    assert found
    return found[1]


def test_the_card_of_a_run_says_what_was_done_and_how_good_it_is(run: Path) -> None:
    text = (run / "README.md").read_text(encoding="utf-8")
    card, metrics = ModelCard(text), read_json(run / "metrics.json")
    assert card.data.library_name == "triewise"
    assert card.data.datasets == ["office"]
    assert card.data.license is None, "the choice is the user's"
    assert card.data.base_model is None, "tiny comes from nowhere"
    shown = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert shown == {name: pytest.approx(metrics[name], abs=1e-6) for name in metrics["intervals"]}
    low, high = metrics["intervals"]["NDCG@10"]
    assert f"| NDCG@10 | {metrics['NDCG@10']:.4f} | {low:.4f} to {high:.4f} |" in text
    for said in (
        "- LoRA adapter of rank 4",
        "prompt template: plain",
        "3 steps",
        "adapter = merged",
        "6 rows of the test split",
    ):
        assert said in text, said
    assert "nothing is excluded" in text
    assert MSL_BIBTEX in text
    assert IGD_BIBTEX in text
    recipe = parse_recipe(tomllib.loads(code_of(text, "toml")), "card")
    assert recipe.backbone.lora.rank == 4
    assert recipe.data.source == "msl:office"


def test_the_usage_example_works(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    exec(code_of((run / "README.md").read_text(encoding="utf-8"), "python"), {})
    titles = triewise.load(run).catalog.title
    assert set(ast.literal_eval(capsys.readouterr().out)) < set(titles)


def test_a_card_names_no_place_of_this_machine(run: Path) -> None:
    text = (run / "README.md").read_text(encoding="utf-8")
    assert "secret-user" not in text
    assert str(run.parents[1]) not in text


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("msl:/home/me/data/office", "msl:office"),
        (r"d3:C:\Users\me\games", "d3:games"),
        ("/models/mine", "mine"),
        (r"C:\models\mine", "mine"),
        ("~/models/mine", "mine"),
        ("../mine", "mine"),
        ("msl:data/office", "msl:data/office"),
        ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-1.5B"),
        ("ml-100k", "ml-100k"),
        ("MSL: a title", "MSL: a title"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_absolute_paths_keep_their_last_part(text: str, kept: str) -> None:
    assert without_folders(text) == kept


AWKWARD = [
    '# "x" | y\n\n- z',
    "```\n</details>",
    "*a* _b_ [c](d) <b>&amp;</b> `e` \\ $f$",
    "---",
    "漢字 🎬",
    "a\u2028b",
]


@pytest.mark.parametrize("title", AWKWARD)
def test_titles_stay_text(title: str) -> None:
    facts = CardFacts(title, 3, title, {"name": title}, {"search": title})
    text = model_card(facts)
    body = text.split("---\n", 2)[2]
    tokens = MarkdownIt().enable("table").parse(body)
    heads = [b.content for a, b in itertools.pairwise(tokens) if a.type == "heading_open"]
    assert heads == [escape(title), "Use", "Model", "Recipe", "Limits", "Citing"]
    assert [t.info for t in tokens if t.type == "fence"] == ["python", "bibtex"]
    shown = MarkdownIt().renderInline(escape(title))
    plain = " ".join(title.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert shown == plain.replace('"', "&quot;")
    example = next(t.content for t in tokens if t.info == "python")
    calls = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Call)]
    assert title in [a.value for call in calls for a in call.args if isinstance(a, ast.Constant)]
    assert ModelCard(text).data.library_name == "triewise"


def test_the_papers_are_cited_alike_everywhere() -> None:
    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert MSL_BIBTEX in papers
    assert IGD_BIBTEX in papers


# --- sharing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that is a folder."""
    place = tmp_path / "hub"

    class LocalApi:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, private: bool | None = None, exist_ok: bool = False) -> str:
            assert exist_ok
            (place / repo_id).mkdir(parents=True, exist_ok=True)
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            shutil.copytree(folder_path, place / repo_id, dirs_exist_ok=True)

    def snapshot(
        repo_id: str, *, revision: str | None, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        source, copy = place / repo_id, tmp_path / "cache" / repo_id
        if not source.is_dir():
            raise OSError(f"401 Client Error: no repository {repo_id}\nmore about it")
        for file in source.rglob("*"):
            name = file.relative_to(source).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy / name)
        return str(copy)

    monkeypatch.setattr("huggingface_hub.HfApi", LocalApi)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("triewise.models.hub.hub_answers", lambda: True)
    return place


def everything(folder: Path) -> bytes:
    """All bytes below a folder, uncompressed enough to search for text."""
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def test_pushed_and_pulled_it_ranks_the_same_and_tells_nothing_private(run: Path, hub: Path) -> None:
    recommender = triewise.load(run, device="cpu")
    address = recommender.push_to_hub("someone/cycle", private=True, license="apache-2.0")
    assert address == "https://hub.example/someone/cycle"
    files = {file.relative_to(hub / "someone/cycle").parts[0] for file in (hub / "someone/cycle").rglob("*")}
    assert files == {*PARTS["generative"], "README.md", "recommender.json"}
    assert b"secret-user" not in everything(hub)
    pulled = triewise.load("someone/cycle", device="cpu")
    wanted, found = recommender.recommend([[0, 1], [3]], k=12), pulled.recommend([[0, 1], [3]], k=12)
    assert found.items.tolist() == wanted.items.tolist()
    assert found.scores == pytest.approx(wanted.scores, abs=1e-6)
    card = ModelCard(pulled.card)
    assert card.data.license == "apache-2.0"
    assert 'triewise.load("someone/cycle")' in pulled.card
    assert ModelCard(recommender.card).data.license is None


def test_without_a_run_the_card_is_short(hub: Path) -> None:
    recommender = worlds.recommender()
    recommender.push_to_hub("someone/short")
    pulled = GenerativeRecommender.from_pretrained("someone/short", device="cpu")
    assert pulled.recommend(HISTORIES).items.tolist() == recommender.recommend(HISTORIES).items.tolist()
    for said in ("# short", "No metrics are recorded", "support = trie", "```python\nimport triewise"):
        assert said in pulled.card


def test_a_sequential_recommender_is_pushed_whole_and_pulled(hub: Path) -> None:
    shape = SequentialSettings(encoder="sasrec", width=8, blocks=1)
    model = SequentialModel(shape, worlds.catalog().n_items, 5, 1).eval()
    recommender = SequentialRecommender(model, worlds.catalog(), np.arange(worlds.catalog().n_items))
    address = recommender.push_to_hub("someone/steps", license="mit")
    assert address == "https://hub.example/someone/steps"
    files = {file.relative_to(hub / "someone/steps").parts[0] for file in (hub / "someone/steps").rglob("*")}
    assert files == {*PARTS["sequential"], "README.md", "recommender.json"}
    pulled = triewise.load("someone/steps", device="cpu")
    assert isinstance(pulled, SequentialRecommender)
    wanted, found = recommender.recommend(HISTORIES, k=5), pulled.recommend(HISTORIES, k=5)
    assert found.items.tolist() == wanted.items.tolist()
    assert found.scores.tolist() == wanted.scores.tolist()
    assert ModelCard(pulled.card).data.license == "mit"
    for said in ('triewise.load("someone/steps")', "- encoder of item ids: sasrec"):
        assert said in pulled.card


def test_a_base_in_a_local_folder_is_named_not_shared(hub: Path, tmp_path: Path) -> None:
    base = tmp_path / "secret-user" / "my-base"
    worlds.backbone().save(base)
    backbone = load_backbone(str(base), device="cpu", lora=LoraSettings(rank=2))
    shown = worlds.recommender()
    recommender = GenerativeRecommender(backbone, shown.catalog, shown.prompts, shown.trie, shown.counts)
    recommender.push_to_hub("someone/over-mine")
    assert b"secret-user" not in everything(hub)
    with pytest.raises(UserError, match="wanted 'my-base', the base model .*; give its folder as base"):
        triewise.load("someone/over-mine", device="cpu")
    pulled = triewise.load("someone/over-mine", device="cpu", base=base)
    assert pulled.recommend([[0]]).items.tolist() == recommender.recommend([[0]]).items.tolist()
    assert 'base="FOLDER"' in pulled.card


def test_a_hub_that_cannot_be_had_is_one_line(
    hub: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    line = (
        "wanted the recommender 'someone/nothing' .*, got: 401 Client Error: no repository .*; check the name"
    )
    with pytest.raises(UserError, match=line):
        triewise.load("someone/nothing")
    with pytest.raises(UserError, match="is no folder; train one first"):
        triewise.load(Path("someone/nothing"))

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError("403 Forbidden\nmore about it")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refused)
    with pytest.raises(
        UserError, match="wanted to write 'a/b' on the hub, got: 403 Forbidden; check the name"
    ):
        worlds.recommender().push_to_hub("a/b")
    monkeypatch.undo()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="wanted to write 'a/b' on the hub, which does not answer"):
        worlds.recommender().push_to_hub("a/b")


def test_a_model_trained_in_full_forgets_where_it_came_from(hub: Path, tmp_path: Path) -> None:
    base = tmp_path / "secret-user" / "my-base"
    worlds.backbone().save(base)
    shown = worlds.recommender()
    backbone = load_backbone(str(base), device="cpu")
    recommender = GenerativeRecommender(backbone, shown.catalog, shown.prompts, shown.trie, shown.counts)
    recommender.push_to_hub("someone/whole")
    assert b"secret-user" not in everything(hub)
    pulled = triewise.load("someone/whole", device="cpu")
    assert pulled.backbone.origin["name"] == "my-base"
    assert "base=" not in pulled.card


def test_an_addressed_card_is_otherwise_the_same() -> None:
    card = model_card(CardFacts("x", 1, "t", {"name": "tiny"}, {}), "runs/x")
    assert addressed(card, "a/b") == card.replace('triewise.load("runs/x")', 'triewise.load("a/b")')
    assert addressed(addressed(card, "a/b", "mit"), "c/d").startswith('---\nlicense: "mit"\n')


def test_more_training_takes_the_old_card_away(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    recipe = parse_recipe(tomllib.loads((copy / "recipe.toml").read_text(encoding="utf-8")), "copy")
    train_run(recipe, copy, overwrite=True)
    assert not (copy / "README.md").exists()
