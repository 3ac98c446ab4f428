"""Prompts: concatenated ids, whole titles dropped, untrusted text, hashes."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import triewise
from tests.model_families import tokenizer as tokenizer_like
from tests.worlds import TITLES, backbone, catalog, recommender
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.tokens import build_prompts
from triewise.tokens.prompts import tokenizer_hash


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return backbone().tokenizer


def test_plain_prompts_are_the_titles_each_closed_by_the_terminator(tokenizer) -> None:
    prompts = build_prompts(tokenizer, catalog(), max_history=2)
    a, b = (prompts.title_tokens[i].tolist() for i in (3, 0))
    assert prompts.encode([1, 3, 0]) == [tokenizer.bos_token_id, *a, *b]
    assert prompts.encode([]) == [tokenizer.bos_token_id]


@pytest.mark.parametrize("template", ["plain", "msl", "d3"])
def test_every_title_ends_in_the_only_terminator_and_decodes_to_itself(tokenizer, template: str) -> None:
    prompts = build_prompts(tokenizer, catalog(), template)
    shown = {"plain": "{}", "msl": '"{}"', "d3": "{}\n"}[template]
    for title, ids in zip(TITLES, prompts.title_tokens, strict=True):
        *body, last = ids.tolist()
        assert last == tokenizer.eos_token_id
        assert last not in body
        assert tokenizer.decode(body) == shown.format(title)


@pytest.mark.parametrize("template", ["msl", "d3"])
def test_instruction_prompts_name_the_things_and_never_hold_a_special_token(tokenizer, template: str) -> None:
    prompts = build_prompts(tokenizer, catalog(), template, "films", "watched")
    ids = prompts.encode([6, 0])  # item 6 spells the terminator
    assert not {tokenizer.eos_token_id, tokenizer.pad_token_id} & set(ids)
    text = tokenizer.decode(ids)
    assert "films" in text
    assert text.index("x <|end|> y") < text.index("Alien (1979)")
    assert text.rstrip().endswith("### Response:")
    assert ("palyed" in text) == (template == "d3")


def test_the_prompt_of_d3_is_its_authors(tokenizer) -> None:
    """IGD's copy of D3: their spelling, one line between instruction and input, blanks at the ends of two lines."""
    prompts = build_prompts(tokenizer, catalog(), "d3", "video games", "enjoyed")
    assert tokenizer.decode(prompts.encode([0, 1])) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request. \n\n### Instruction:\nGiven a list of video games the user "
        "recetenly enjoy, please write a new video games that the user may bought\n### User Input: \nThe user has "
        "palyed the following video gamess before: Alien (1979), Aliens (1986)\n\n### Response: \n"
    )
    unknown = tokenizer.decode(prompts.without_history("unknown"))
    assert unknown.endswith("may bought\n### User Input: \nUnknow\n\n### Response: \n")
    assert tokenizer.decode(prompts.without_history()).endswith("may bought\n\n### Response: \n")


def test_what_was_saved_with_the_former_words_of_d3_keeps_them(tmp_path: Path) -> None:
    old = recommender(template="d3-reworded")
    old.save_pretrained(tmp_path)
    manifest = read_json(tmp_path / "recommender.json")
    manifest["prompt"]["template"] = "d3"  # as it was written then
    write_json(tmp_path / "recommender.json", manifest)
    loaded: Any = triewise.load(tmp_path)
    assert loaded.prompts.template == "d3-reworded"
    assert loaded.prompts.encode([0, 1]) == old.prompts.encode([0, 1])
    assert loaded.prompts.hash == old.prompts.hash != recommender(template="d3").prompts.hash


def test_a_long_prompt_loses_whole_titles_oldest_first(tokenizer) -> None:
    prompts = build_prompts(
        tokenizer, catalog(), max_tokens=len(build_prompts(tokenizer, catalog()).encode([0, 1]))
    )
    assert prompts.encode([5, 0, 1]) == prompts.encode([0, 1])
    assert (prompts.n_dropped, prompts.dropped.prompts) == (1, 1)
    short = build_prompts(tokenizer, catalog(), "msl", max_tokens=20)
    with pytest.raises(
        UserError, match=r"at most 20 tokens, the instruction alone has \d+; raise max_tokens"
    ):
        short.encode([0])


def test_threads_encode_and_count_together_as_one_does_alone(tokenizer) -> None:
    length = len(build_prompts(tokenizer, catalog(), "msl").encode([0, 1]))
    alone, together = (build_prompts(tokenizer, catalog(), "msl", max_tokens=length) for _ in range(2))
    histories = [[i % 6, 5, i % 4, 0, 1] for i in range(200)]
    wanted = [alone.encode(history) for history in histories]
    tokenizer("x")  # leaves other settings behind than a prompt wants
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(together.encode, histories)) == wanted
    finally:
        sys.setswitchinterval(interval)
    assert (together.n_dropped, together.dropped.prompts) == (alone.n_dropped, alone.dropped.prompts)
    assert pickle.loads(pickle.dumps(together.dropped)) == together.dropped
    assert together.dropped.prompts == 200


def test_the_hash_knows_everything_a_prompt_depends_on(tokenizer) -> None:
    base = build_prompts(tokenizer, catalog())
    assert base.hash == build_prompts(tokenizer, catalog(), **base.settings).hash
    others = [
        build_prompts(tokenizer, catalog(), max_history=3),
        build_prompts(tokenizer, catalog(), max_tokens=99),
        build_prompts(tokenizer, catalog(), "msl"),
        build_prompts(tokenizer, catalog(), "msl", "films", "watched"),
        build_prompts(backbone(TITLES[:4]).tokenizer, catalog()),
    ]
    assert len({base.hash, *(other.hash for other in others)}) == len(others) + 1


def test_the_tokenizer_hash_does_not_depend_on_what_was_tokenised(tokenizer) -> None:
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before


def framed(front: str, behind: str = "") -> Any:
    """A byte-level tokenizer that puts special tokens around a text; its start token is one of them or not."""
    from tokenizers import processors

    made = copy.deepcopy(tokenizer_like("bytes"))
    marks = [*front.split(), *behind.split()]
    made.add_tokens(marks, special_tokens=True)
    ids = [(mark, made.convert_tokens_to_ids(mark)) for mark in marks]
    around = f"{front} $A {behind}".strip()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return made


@pytest.mark.parametrize("template", ["plain", "msl", "d3"])
@pytest.mark.parametrize(
    ("front", "behind"),
    [
        ("[gMASK] <sop>", ""),  # GLM
        ("<end>", ""),  # XGLM
        ("[CLS]", "[SEP]"),
        ("<start>", "<end>"),
        ("<start>", ""),
        ("", "<end>"),  # T5
        ("", ""),
    ],
)
def test_a_prompt_starts_with_what_the_tokenizer_puts_in_front(
    front: str, behind: str, template: str
) -> None:
    made = framed(front, behind)
    first = made.convert_tokens_to_ids(front.split() or (["<start>"] if template == "plain" else []))
    prompts = build_prompts(made, catalog(), template)
    rest = build_prompts(made, catalog(), template, start=[])
    assert list(prompts.bos) == first
    assert prompts.encode([0, 6]) == first + rest.encode([0, 6])
    assert "start" not in prompts.settings or front not in ("", "<start>"), "as before where one token does"
    for again in (prompts, rest):
        assert build_prompts(made, catalog(), **json.loads(json.dumps(again.settings))).hash == again.hash


def test_chat_starts_as_its_template_does() -> None:
    made = framed("[gMASK] <sop>")
    made.chat_template = "{% for m in messages %}[gMASK]<sop>{{ m.content }}{% endfor %}"
    ids = build_prompts(made, catalog(), "msl", chat=True).encode([0])
    assert made.convert_ids_to_tokens(ids[:2]) == ["[gMASK]", "<sop>"]
    assert "[gMASK]" not in made.convert_ids_to_tokens(ids[2:])


# ---------------------------------------------------------------- tokenizers whose rules are code
def ctrl(folder: Path, merges: str) -> Any:
    from transformers import CTRLTokenizer

    pieces = [
        "<unk>",
        "<end>",
        *(c + end for c in "Alien3" for end in ("", "@@")),
        "A@@",
        "li@@",
        "en",
        "Al@@",
    ]
    folder.mkdir()
    (folder / "vocab.json").write_text(
        json.dumps({piece: i for i, piece in enumerate(dict.fromkeys(pieces))})
    )
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return CTRLTokenizer(folder / "vocab.json", folder / "merges.txt", eos_token="<end>")


def test_a_tokenizer_without_fast_backend_is_known_by_all_that_it_is(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, ByT5Tokenizer

    made = ctrl(tmp_path / "a", "e n</w>\nl i\n")
    others = [ctrl(tmp_path / "b", "l i\n"), tokenizer_like("slow"), ByT5Tokenizer(extra_ids=3)]
    for number, one in enumerate((made, *others)):
        one.save_pretrained(tmp_path / str(number))
        assert tokenizer_hash(AutoTokenizer.from_pretrained(tmp_path / str(number))) == tokenizer_hash(one)
    assert len({tokenizer_hash(one) for one in (made, *others)}) == 4
    prompts = build_prompts(made, catalog(("Alien", "Alien 3", "Alien <end>")), "plain")
    assert prompts.read_titles([ids.tolist()[:-1] for ids in prompts.title_tokens])[:2] == [
        "Alien",
        "Alien 3",
    ]
    assert prompts.readback.unknown == ("Alien <end>",)


def test_a_tokenizer_that_cannot_split_special_tokens_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """mistral-common's, which knows no other way to read text."""
    made = copy.deepcopy(tokenizer_like("slow"))
    assert build_prompts(made, catalog()).n_dropped == 0

    def refuse(self: Any, *texts: Any, split_special_tokens: bool = False, **rest: Any) -> None:
        raise ValueError("does not support `split_special_tokens`.")

    monkeypatch.setattr(type(made), "__call__", refuse)
    with pytest.raises(
        UserError, match=r"special tokens, got ByT5Tokenizer \(does not .*tokens`\); use the model's"
    ):
        build_prompts(made, catalog())


def test_chat_wraps_the_users_turn_and_leaves_titles_inert(tokenizer) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}<|start|>{{ m.content }}<|end|>{% endfor %}answer:"
    ids = build_prompts(chatty, catalog(), "msl", chat=True).encode([6])
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1  # the template's own, not the title's
    assert tokenizer.decode(ids).endswith("answer:")


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('a system turn first') }}", r"fails \(TemplateError: a system turn first\)"),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}answer:", "shows it 0 times"),
        ("{% for m in messages %}{{ m.content }}, that is {{ m.content }}{% endfor %}", "shows it 2 times"),
    ],
)
def test_a_chat_template_has_to_show_the_users_turn(tokenizer, template: str, problem: str) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = template
    with pytest.raises(
        UserError, match=f"a chat template that shows a user's turn once, got one that {problem}"
    ):
        build_prompts(chatty, catalog(), "msl", chat=True)


def test_user_errors(tokenizer) -> None:
    with pytest.raises(UserError, match="prompt template among plain, msl, d3, d3-reworded, got 'alpaca'"):
        build_prompts(tokenizer, catalog(), "alpaca")
    with pytest.raises(UserError, match="chat = true needs an instruction template"):
        build_prompts(tokenizer, catalog(), "plain", chat=True)
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence token"):
        build_prompts(endless, catalog())
