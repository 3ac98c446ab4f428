"""Losses over titles and items, and the training runs that lower them."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
