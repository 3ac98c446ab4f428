from .answers import Answer as Answer, Answers as Answers, Recommended as Recommended, answer as answer
from .versions import LiveCatalogue as LiveCatalogue, Version as Version

__all__ = ["answer"]
