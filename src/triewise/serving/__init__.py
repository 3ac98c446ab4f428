"""What a running recommender answers: histories as people know them in, titles with proofs out; knows no training."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
