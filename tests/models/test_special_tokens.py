"""Titles that spell a tokenizer's special tokens are text like any other, whatever the family of the tokenizer."""

from __future__ import annotations

import json
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose

from tests.reference.search import catalogue
from tests.tiny_models import tiny_model
from tests.worlds import backbone, catalog
from triewise.cache import cache_folder
from triewise.errors import UserError
from triewise.files import read_json, write_json
from triewise.models import Backbone, load_tokenizer
from triewise.models.loading import tokenizer_of as tokenizer_from
from triewise.models.smollm2 import know_special
from triewise.recommenders import GenerativeRecommender
from triewise.tokens import Prompts, Trie, build_prompts
from triewise.tokens.prompts import TEMPLATES

ORDINARY = ("Red", "Red Dawn", "Blue Moon 🎬", "Night Train (1991)", "漢字の映画", "Cafe\u0301")
SHOWN = {"plain": "{}", "msl": '"{}"', "d3": "{}\n", "d3-reworded": "{}\n"}
CHATML = (
    "{% for m in messages %}{{ START + m['role'] + '\n' + m['content'] + END + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ START + 'assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = "{% for m in messages %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"


# ---------------------------------------------------------------- five tokenizers
def tiny() -> Any:
    """Qwen2's rules, trained on the very titles that spell its special tokens."""
    tokenizer = backbone((*ORDINARY, "x <|end|> y", "<|start|>", "<|pad|> <|end|>") * 3).tokenizer
    start, end = repr(tokenizer.bos_token), repr(tokenizer.eos_token)
    tokenizer.chat_template = CHATML.replace("START", start).replace("END", end)
    return tokenizer


def smollm2() -> Any:
    """SmolLM2's own where it is in the cache, else a GPT-2-style one with the same special tokens."""
    if (cache_folder() / "models" / "smollm2-135m-q4" / "tokenizer.json").is_file():
        return load_tokenizer("smollm2-135m-q4")
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>")
    tokenizer = byte_level(names, bos_token=names[1], eos_token=names[2], pad_token=names[2])
    tokenizer.chat_template = CHATML.replace("START", "'<|im_start|>'").replace("END", "'<|im_end|>'")
    return tokenizer


def llama3() -> Any:
    """Byte-level, whole words looked up before merges, a begin token in front of every text."""
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id", "python_tag")
    bos, eos, *_ = marks = tuple(f"<|{name}|>" for name in names)
    tokenizer = byte_level(marks, whole_words=True, begin=bos, bos_token=bos, eos_token=eos)
    tokenizer.chat_template = LLAMA3
    return tokenizer


def byte_level(
    names: Sequence[str], whole_words: bool = False, begin: str | None = None, **roles: str
) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(names),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(ORDINARY, trainer)
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, backend.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def metaspace() -> Any:
    """SentencePiece's rules as in Llama 2: spaces are letters, no splitting into words, unknown bytes by number."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>"]
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    learned.train_from_iterator(
        [*ORDINARY, "<a>s</a>"],
        trainers.BpeTrainer(vocab_size=120, special_tokens=names, show_progress=False),
    )
    model = json.loads(learned.to_str())["model"]
    pieces = [*names, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in model["vocab"] if piece not in names]
    backend = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = learned.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = LLAMA2
    return tokenizer


def unigram() -> Any:
    """SentencePiece's other model: its special tokens are pieces, found in any text that spells them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ("<unk>", "<s>", "</s>", "<pad>")
    letters = sorted({*string.printable, *"".join(ORDINARY)} - {" "})
    pieces = [(name, 0.0) for name in names] + [("▁", -2.0), ("▁Red", -4.0), ("▁D", -4.0)]
    backend = Tokenizer(models.Unigram([*pieces, *((letter, -5.0) for letter in letters)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = LLAMA2
    return tokenizer


MAKERS = {"tiny": tiny, "smollm2": smollm2, "llama3": llama3, "metaspace": metaspace, "unigram": unigram}


FAMILIES = tuple(MAKERS)


@cache
def tokenizer_of(family: str) -> Any:
    return MAKERS[family]()


# ---------------------------------------------------------------- a catalogue that spells them
def marks(tokenizer: Any) -> dict[str, int]:
    """Every special token with its id."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))


@dataclass(frozen=True)
class World:
    """A tokenizer and titles that spell its special tokens, and those of the others.

    A unigram model's token for unknown text is not among ``special``: to it the spelling ``<unk>`` is unknown text.
    """

    tokenizer: Any
    titles: tuple[str, ...]
    special: frozenset[int]

    def among(self, ids: Sequence[int]) -> list[int]:
        return [i for i in ids if i in self.special]

    def of_template(self, chat: bool) -> list[int]:
        """The special tokens of an instruction prompt: those of a harmless one."""
        if not chat:
            return self.among(self.tokenizer("harmless")["input_ids"])
        turn = [{"role": "user", "content": "harmless"}]
        text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return self.among(self.tokenizer(text, add_special_tokens=False)["input_ids"])


@cache
def world(family: str) -> World:
    tokenizer = tokenizer_of(family)
    own = marks(tokenizer)
    every = dict.fromkeys(mark for name in FAMILIES for mark in marks(tokenizer_of(name)))
    titles = [*ORDINARY, f"All of {''.join(every)} in one"]
    for mark in own:
        titles += (
            [f"Red {mark} Dawn", f"{mark} Dawn", f"Red{mark}"]
            if mark in tokenizer.all_special_tokens
            else [mark]
        )
    titles += [tokenizer.eos_token, tokenizer.eos_token * 2]
    special = {*own.values()} - ({tokenizer.unk_token_id} if family == "unigram" else set())
    return World(tokenizer, tuple(titles), frozenset(special))


@cache
def prompts_of(family: str, template: str = "plain", chat: bool = False) -> Prompts:
    here = world(family)
    return build_prompts(here.tokenizer, catalog(here.titles), template, max_tokens=4096, chat=chat)


SPELLS = len(ORDINARY)  # the titles from here on spell special tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_worlds_are_what_they_say(family: str) -> None:
    here = world(family)
    assert len(here.special) >= 3
    assert len({*here.titles}) == len(here.titles)
    readback = prompts_of(family).readback
    assert readback.shared == readback.changed == ()
    assert readback.unknown == () or family == "unigram"
    for mark, number in marks(here.tokenizer).items():
        assert here.tokenizer(mark, add_special_tokens=False)["input_ids"][-1] == number, (
            "unguarded it is special"
        )
        assert sum(mark in title for title in here.titles) >= 2


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("family", FAMILIES)
def test_titles_hold_no_special_token_and_decode_to_themselves(family: str, template: str) -> None:
    """Up to Unicode's NFC, which Qwen2's rules apply before anything else."""
    here = world(family)
    for title, ids in zip(here.titles, prompts_of(family, template).title_tokens, strict=True):
        *body, last = ids.tolist()
        assert last == here.tokenizer.eos_token_id
        assert here.among(body) == []
        text = SHOWN[template].format(title)
        assert here.tokenizer.decode(body) == (
            unicodedata.normalize("NFC", text) if family == "tiny" else text
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_prompts_hold_a_terminator_a_title(family: str) -> None:
    here = world(family)
    history = list(range(SPELLS, SPELLS + 5))
    assert here.among(prompts_of(family).encode(history)) == [
        here.tokenizer.bos_token_id,
        *[here.tokenizer.eos_token_id] * len(history),
    ]


@pytest.mark.parametrize(("template", "chat"), [("msl", False), ("d3", False), ("msl", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_histories_add_no_special_token_to_an_instruction(family: str, template: str, chat: bool) -> None:
    here = world(family)
    prompts = prompts_of(family, template, chat)
    history = [SPELLS, SPELLS + 2, len(here.titles) - 1]
    ids = prompts.encode(history)
    assert here.among(ids) == here.of_template(chat)
    text = here.tokenizer.decode(ids)
    places = [text.index(here.titles[item]) for item in history]
    assert places == sorted(places)


# ---------------------------------------------------------------- ranked and scored
@cache
def recommender(family: str, template: str) -> GenerativeRecommender:
    here = world(family)
    model = tiny_model("qwen2" if family == "tiny" else "llama", vocabulary=len(here.tokenizer))
    prompts = prompts_of(family, template)
    trie = Trie.from_sequences((prompts.title_tokens.values, prompts.title_tokens.offsets))
    counts = np.ones(len(here.titles), dtype=np.int64)
    return GenerativeRecommender(
        Backbone(model, here.tokenizer, family, {}), catalog(here.titles), prompts, trie, counts
    )


HISTORIES = [[SPELLS + 2], [1, SPELLS + 3, 0]]


@pytest.mark.parametrize(
    ("support", "template"), [("trie", "plain"), ("vocabulary", "plain"), ("trie", "msl")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_title_is_recommended_with_its_score(family: str, support: str, template: str) -> None:
    rec = recommender(family, template).with_settings(support=support)
    n = rec.groups.n_groups
    assert n == len(world(family).titles), "no two titles became one"
    by_catalogue = rec.recommend(HISTORIES, k=None)
    by_beam = rec.with_settings(search="beam", beams=n).recommend(HISTORIES, k=n)
    scores = rec.score(HISTORIES, [range(n)] * len(HISTORIES))
    assert np.isfinite(scores).all()
    for found in (by_catalogue, by_beam):
        assert (np.sort(found.items, 1) == np.arange(n)).all()
        assert_allclose(found.scores, np.take_along_axis(scores, found.items, 1), rtol=2e-6, atol=2e-4)
    assert (by_beam.items == by_catalogue.items).all()
    if support == "trie":
        assert_allclose(np.exp(scores.astype(np.float64)).sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("support", ["trie", "vocabulary"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranking_is_that_of_a_forward_for_each_title(family: str, support: str) -> None:
    rec = recommender(family, "plain").with_settings(support=support)
    titles = [ids.tolist() for ids in rec.prompts.title_tokens]
    history = HISTORIES[0]
    wanted = np.array(catalogue(rec.backbone.model, rec.prompts.encode(history), titles, support))
    found = rec.recommend([history], k=None)
    assert_allclose(found.scores[0], wanted[found.items[0]], rtol=2e-6, atol=2e-4)
    assert found.items[0].tolist() == np.argsort(-wanted, kind="stable").tolist()


@pytest.mark.parametrize("end", ["<|im_start|>", "<|im_end|>"])
def test_a_converted_smollm2_closes_titles_with_its_own_terminator(end: str, tmp_path: Path) -> None:
    """transformers 5.17 reads its start token as terminator, and no padding token; 5.23 what the file says."""
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made = byte_level(names, bos_token=names[1], eos_token=end, pad_token=end, unk_token=names[0])
    made.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    if end == "<|im_start|>":
        write_json(file, {k: v for k, v in read_json(file).items() if k != "pad_token"} | {"eos_token_id": 1})
    before = file.read_bytes()
    know_special(tmp_path)
    found = tokenizer_from(str(tmp_path))
    ids = [getattr(found, f"{role}_token_id") for role in ("unk", "bos", "eos", "pad")]
    assert ids == [0, 1, 2, 2]
    assert (file.read_bytes() == before) is (end == "<|im_end|>")
    assert found("Red Dawn")["input_ids"] == made("Red Dawn")["input_ids"]


def test_a_tokenizer_that_knows_no_other_way_is_refused() -> None:
    """Unknown text becomes the terminator: what closes a title and what is in it cannot be told apart."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<end>": 0, "Red": 1}, unk_token="<end>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<end>", eos_token="<end>")
    with pytest.raises(UserError, match=r"writes its terminator \(id 0\) inside the title 'Blue'"):
        build_prompts(tokenizer, catalog(("Red", "Blue")))
