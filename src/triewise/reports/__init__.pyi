from .card import (
    CardFacts as CardFacts,
    addressed as addressed,
    model_card as model_card,
    without_folders as without_folders,
)
from .description import compared as compared, describe as describe, forced_by_position as forced_by_position
from .explanation import (
    Example as Example,
    Recommendation as Recommendation,
    explain as explain,
    pieces as pieces,
)
from .explorer import (
    Explored as Explored,
    Explorer as Explorer,
    Method as Method,
    Ranked as Ranked,
    look as look,
)
from .pictures import standalone as standalone, to_png as to_png
from .report import Comparison as Comparison, Report as Report, Row as Row, write_report as write_report
from .run_statistics import make_statistics as make_statistics
from .statistics import (
    PLACES as PLACES,
    Statistic as Statistic,
    StudiedData as StudiedData,
    StudiedRun as StudiedRun,
)
from .terminal import (
    clean as clean,
    print_examples as print_examples,
    print_facts as print_facts,
    print_recommendations as print_recommendations,
    print_rows as print_rows,
)
from .tidy import (
    first_word_repetition as first_word_repetition,
    item_score_entropy as item_score_entropy,
    logit_density as logit_density,
    prefixes as prefixes,
)
from .trials import StepOfTrials as StepOfTrials, TrialShown as TrialShown, trials_page as trials_page

__all__ = [
    "CardFacts",
    "Comparison",
    "Example",
    "Report",
    "Row",
    "addressed",
    "clean",
    "describe",
    "explain",
    "forced_by_position",
    "model_card",
    "print_examples",
    "print_facts",
    "print_rows",
    "write_report",
]
