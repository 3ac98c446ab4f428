"""Titles that a tokenizer makes equal, does not know or does not give back are counted; harmless ones are not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.model_families import SPECIAL, TITLES, UNKNOWN, tokenizer
from tests.worlds import catalog
from triewise.arrays import Ragged
from triewise.tokens import Prompts, build_prompts
from triewise.tokens.readback import ReadBack, read_back

HARD = (
    *(
        "It",
        "IT",
        "it",
        "Café",
        "Cafe",
        "CAFÉ",
        "naïve",
        "Ünder",
        "ABC",
        "ＡＢＣ",
        "½ inch",
        "1/2 inch",
        "ﬁn",
        "fin",
    ),
    *(
        "a b",
        "a  b",
        "a\tb",
        "a\nb",
        "a\u00a0b",
        "映画一",
        "映画二",
        "漢字",
        "🎬",
        "🎬🎬",
        "👩‍🚀",
        "Москва",
        "москва",
    ),
    *('"quoted"', "<b>bold</b>", "AT&amp;T", "x" * 60, "…", "A-B", "A – B", "'s", "", "0", "00"),
)


def prompts(made: Any, titles: tuple[str, ...] = HARD, template: str = "plain") -> Prompts:
    return build_prompts(made, catalog(titles), template)


def without_bytes() -> Any:
    """Byte pairs of ASCII letters: what else there is gets no token at all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"special_tokens": [*SPECIAL.values()], "vocab_size": 120, "show_progress": False}
    backend.train_from_iterator(
        [*TITLES, "It IT it Cafe ABC inch fin"], trainer=trainers.BpeTrainer(**options)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL["eos_token"])


@pytest.mark.parametrize("template", ["plain", "msl", "d3"])
@pytest.mark.parametrize("kind", ["bytes", "prefixed", "neox", "qwen2", "slow"])
def test_tokenizers_of_bytes_lose_nothing_of_hard_titles(kind: str, template: str) -> None:
    made = prompts(tokenizer(kind), HARD, template)
    assert made.readback == ReadBack()
    assert list(made.readback.warnings()) == []


def test_an_uncased_tokenizer() -> None:
    """Word pieces in small letters; what is not Latin is unknown as a whole."""
    titles = ("Silver River", "silver RIVER", "Hidden Harbour", "Silver River", "映画一", "映画二", "winter")
    found = prompts(tokenizer("words"), titles).readback
    assert found == ReadBack(
        shared=(
            ("映画一", "映画二"),
            ("映画二", "映画一"),
            ("Silver River", "silver RIVER"),
            ("silver RIVER", "Silver River"),
        ),
        unknown=("映画一", "映画二"),
        changed=(
            ("Silver River", "silver river"),
            ("silver RIVER", "silver river"),
            ("Hidden Harbour", "hidden harbour"),
        ),
    )
    equal, unknown, changed = found.warnings()
    assert equal.startswith("warning: 4 titles share their tokens with another title: '映画一' and '映画二';")
    assert unknown.startswith("warning: 2 titles contain tokens the tokenizer does not know: '映画一';")
    assert changed.startswith(
        "warning: 3 titles are not read back: 'Silver River' comes back as 'silver river';"
    )


def test_a_tokenizer_that_normalises() -> None:
    """NFKC: full-width letters and ligatures are plain ones."""
    titles = ("Silver River", "Ｓilver River", "Tide")
    found = prompts(tokenizer("unigram"), titles).readback
    assert found.shared == (("Silver River", "Ｓilver River"), ("Ｓilver River", "Silver River"))
    assert found.changed == (("Ｓilver River", "Silver River"),)
    assert list(found.warnings())[1].startswith(
        "warning: 1 title is not read back: 'Ｓilver River' comes back"
    )


def test_a_tokenizer_that_drops_what_it_has_no_bytes_for() -> None:
    found = prompts(without_bytes(), ("Cafe", "Caf\u00e9", "🎬", "漢字", "fin")).readback
    assert found.unknown == ()
    assert found.shared == (("🎬", "漢字"), ("漢字", "🎬"))
    assert found.changed == (("🎬", ""), ("漢字", ""), ("Caf\u00e9", "Caf"))


def test_rules_of_another_tokenizer_over_its_file_are_noticed() -> None:
    """What transformers 5.0 to 5.8 made of DeepSeek's and Yi's files: bytes in the vocabulary, SentencePiece around."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    right = tokenizer("bytes")
    backend = Tokenizer.from_str(right.backend_tokenizer.to_str())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wrong = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
    spaced = [title for title in TITLES if " " in title]
    assert len(prompts(wrong, TITLES).readback.changed) == len(spaced)
    assert prompts(right, TITLES).readback == ReadBack()


def test_titles_that_are_equal_and_what_no_reader_sees_are_no_fault() -> None:
    """Equal titles, white space around them, and an accent of its own."""
    titles = ["It", "It", " It ", "Caf\u00e9", "Cafe\u0301", "IT"]
    tokens = Ragged.from_lists([[1, 0], [1, 0], [1, 0], [2, 0], [2, 0], [3, 0]])
    text = {1: "  It", 2: "Caf\u00e9\n", 3: "IT"}
    read = lambda rows: [text[row[0]] for row in rows]  # noqa: E731
    assert read_back(titles, tokens, None, read) == ReadBack()
    text[3] = "I T"
    assert read_back(titles, tokens, None, read) == ReadBack(changed=(("IT", "I T"),))
    assert read_back(titles, tokens, 3, read) == ReadBack(unknown=("IT",))
    tokens.values[-2] = 2
    assert read_back(titles, tokens, None, read).shared == (("IT", "Caf\u00e9"), ("Caf\u00e9", "IT"))


def test_a_terminator_that_is_also_the_unknown_token_is_not_unknown_text() -> None:
    made = tokenizer("qwen2")
    assert made.unk_token == UNKNOWN
    rows = Ragged.from_lists([[5, 2], [6, 2]])
    assert read_back(["a", "b"], rows, 2, lambda ids: ["a", "b"]) == ReadBack()
