from .compare import comparisons as comparisons, report_runs as report_runs, row as row
from .demo import run_demo as run_demo
from .folders import (
    describe_data as describe_data,
    open_run as open_run,
    what_was_prepared as what_was_prepared,
)
from .reasoning import reason as reason
from .reproduce import reproduce_table as reproduce_table
from .runs import (
    changed_evaluation as changed_evaluation,
    evaluate_run as evaluate_run,
    train_run as train_run,
)
from .studying import study as study
from .teaching import teach as teach
from .tuning import Tuned as Tuned, tune as tune
from .verifying import verify as verify

__all__ = [
    "comparisons",
    "evaluate_run",
    "open_run",
    "report_runs",
    "row",
    "run_demo",
    "train_run",
]
