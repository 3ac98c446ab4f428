"""What a recommender gives, and how good it is."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
