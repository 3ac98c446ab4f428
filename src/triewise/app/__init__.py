"""What the commands do: recipes to runs, runs to reports."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
