from .compare import comparisons as comparisons, report_runs as report_runs, row as row
from .demo import run_demo as run_demo
from .folders import open_run as open_run
from .runs import evaluate_run as evaluate_run, train_run as train_run

__all__ = [
    "comparisons",
    "evaluate_run",
    "open_run",
    "report_runs",
    "row",
    "run_demo",
    "train_run",
]
