"""Shapes of published models with random weights, and what a token costs in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama kind with a tied head.

    Attributes:
        kind: ``qwen2``, ``qwen3`` or ``llama``.
        width: Of the residual stream.
        layers: Number of them.
        heads: Of queries.
        kv_heads: Of keys and values.
        head_width: Of one head.
        feed_forward: Width of the gated layer.
        vocabulary: Tokens.
    """

    kind: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Weights of the matrices of all layers: two FLOP each for a token."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_width
        return self.layers * (attention + 3 * self.width * self.feed_forward)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.width

    @property
    def cache_numbers(self) -> int:
        """Numbers of keys and values that a token leaves."""
        return 2 * self.layers * self.kv_heads * self.head_width

    def flops(self, tokens: float, context: float, head_rows: float = 0.0) -> float:
        """Of a forward: matrices, attention over ``context`` places in the mean, full rows of the head."""
        attention = 4.0 * self.layers * self.heads * self.head_width * context
        return tokens * (2.0 * self.body + attention) + 2.0 * head_rows * self.head


SHAPES = {
    "135M": Shape("llama", 576, 30, 9, 3, 64, 1536, 49152),
    "0.5B": Shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936),
    "1.5B": Shape("qwen2", 1536, 28, 12, 2, 128, 8960, 151936),
    "1.7B": Shape("qwen3", 2048, 28, 16, 8, 128, 6144, 151936),
}
PEAKED = (
    4.0  # the final norm is scaled by it: logits then spread by about 3 nats, as those of trained models do
)


def shape_of(name: str, tiny: bool, vocabulary: int = 0) -> Shape:
    """A shape by its name; ``tiny`` shrinks all but the kind, for a dry run."""
    shape = SHAPES[name]
    if not tiny:
        return shape
    return replace(
        shape, width=32, layers=2, heads=4, kv_heads=2, head_width=8, feed_forward=64, vocabulary=vocabulary
    )


def build(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0, peaked: bool = False) -> Any:
    """A model of a shape with random weights, made on its device, in evaluation mode."""
    import transformers as tf

    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
    more = {} if shape.kind == "qwen2" else {"head_dim": shape.head_width}
    config = getattr(tf, f"{names[shape.kind]}Config")(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(seed)
    with torch.device(device):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.to(device).eval()
    if peaked:
        with torch.no_grad():
            model.base_model.norm.weight.mul_(PEAKED)
    return model
