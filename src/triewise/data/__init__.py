"""Raw interactions to histories, targets and a catalogue."""

from triewise.lazy import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
