"""What people read: numbers of a data set, explained recommendations, figures, HTML, tables, model cards."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
