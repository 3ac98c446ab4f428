"""The ``tiny`` backbone: a Qwen2-architecture model from a config, with a byte-level BPE tokenizer of the titles."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from triewise.errors import UserError
from triewise.models.loading import Backbone

if TYPE_CHECKING:
    from triewise.settings import TinyModel

PAD, START, END = "<|pad|>", "<|start|>", "<|end|>"
FREQUENT = 5  # titles with a number before it becomes a token of its own


def build_tiny(
    titles: Sequence[str], settings: TinyModel, seed: int, dtype: torch.dtype = torch.float32
) -> Backbone:
    """A Qwen2-architecture model with random weights and a byte-level BPE tokenizer trained on the titles."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

    tokenizer = train_tokenizer(titles, settings.vocabulary)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        attention_dropout=settings.dropout,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    set_seed(seed)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():  # buffers such as rotary frequencies stay as they are
        parameter.data = parameter.data.to(dtype)
    origin = {"name": "tiny", "seed": seed, "settings": settings.model_dump()}
    return Backbone(model, tokenizer, "tiny", origin)


def train_tokenizer(titles: Sequence[str], vocabulary: int) -> Any:
    """Byte-level BPE with Qwen2's rules: any script round-trips up to NFC, and there is no unknown token.

    The rules must be Qwen2's: `AutoTokenizer` gives every checkpoint of model type ``qwen2`` that class, whatever its
    ``tokenizer_config.json`` says, so another pre-tokenizer would silently be lost when the model is loaded again.
    Those rules cut numbers into digits, which makes a year four tokens; numbers that are frequent in the titles are
    therefore added as whole tokens (ml-100k: 9.8 tokens a title instead of 12.7).
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    if not titles:
        raise UserError("wanted titles to train the tokenizer of the tiny backbone, got none")
    numbers = Counter(number for title in titles for number in re.findall(r"(?<!\w)\d{2,}(?!\w)", title))
    frequent = sorted(n for n, count in numbers.most_common(vocabulary // 16) if count >= FREQUENT)
    rules = Qwen2Tokenizer().backend_tokenizer
    backend = Tokenizer(models.BPE())
    backend.normalizer, backend.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(frequent),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(titles, trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    special = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": PAD}
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, **special)
    tokenizer.add_tokens([AddedToken(number, single_word=True, normalized=False) for number in frequent])
    return tokenizer
