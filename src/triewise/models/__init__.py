"""What computes: causal language models with their tokenizers, adapters, and encoders of item sequences."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
