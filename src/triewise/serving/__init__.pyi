from .answers import Answer as Answer, Answers as Answers, Recommended as Recommended, answer as answer
from .batch import JOB as JOB, parts_of_batch as parts_of_batch, recommend_file as recommend_file
from .limits import Limits as Limits
from .server import (
    application as application,
    in_background as in_background,
    named_sets as named_sets,
    serve as serve,
)
from .versions import LiveCatalogue as LiveCatalogue, Version as Version

__all__ = ["answer"]
