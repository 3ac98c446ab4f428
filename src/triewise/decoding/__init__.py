"""The best titles along the trie: beams, exact search with a proof, the whole catalogue, given titles."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
