from .answers import Answer as Answer, Answers as Answers, Recommended as Recommended, answer as answer

__all__ = ["answer"]
