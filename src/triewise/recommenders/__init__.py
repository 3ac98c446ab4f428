"""Models that recommend: by writing titles, by scoring items, by grounding free text."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
