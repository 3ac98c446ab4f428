"""Histories and items as tokens: prompts, the prefix tree of the titles, and what each token decides."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
