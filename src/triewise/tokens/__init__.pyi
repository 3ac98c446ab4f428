from .decisiveness import (
    average_valid_tokens as average_valid_tokens,
    binary_weights as binary_weights,
    decoding_weights as decoding_weights,
    forced_share as forced_share,
    front_weights as front_weights,
    gain_by as gain_by,
    gain_entropy as gain_entropy,
    information_gain as information_gain,
    is_trained as is_trained,
    linear_weights as linear_weights,
    position_weights as position_weights,
    rarity_weights as rarity_weights,
    scale_within as scale_within,
    zero_gain as zero_gain,
    zero_gain_share as zero_gain_share,
)
from .grafting import changed_trie as changed_trie
from .identifiers import (
    Identifier as Identifier,
    read_identifier as read_identifier,
    residual_codes as residual_codes,
    told_apart as told_apart,
)
from .prompts import (
    Dropped as Dropped,
    Prompts as Prompts,
    build_prompts as build_prompts,
    single_start as single_start,
    turns as turns,
)
from .trie import DeviceTrie as DeviceTrie, Trie as Trie

__all__ = [
    "Prompts",
    "Trie",
    "binary_weights",
    "build_prompts",
    "decoding_weights",
    "information_gain",
    "linear_weights",
    "position_weights",
    "zero_gain",
]
