from .baselines import ItemKNN as ItemKNN, MostPopular as MostPopular
from .evaluation import (
    METRICS as METRICS,
    SHOWN as SHOWN,
    Evaluation as Evaluation,
    evaluate as evaluate,
    excluded_items as excluded_items,
    gain_interval as gain_interval,
    interval as interval,
    load_evaluation as load_evaluation,
    paired_interval as paired_interval,
    paired_p as paired_p,
)
from .metrics import (
    hit_rate as hit_rate,
    metrics_from_rank as metrics_from_rank,
    mrr as mrr,
    ndcg as ndcg,
    rank_of_target as rank_of_target,
)
from .ranking import (
    Groups as Groups,
    ItemLists as ItemLists,
    Items as Items,
    ItemScorer as ItemScorer,
    Ranking as Ranking,
    Recommender as Recommender,
    check_histories as check_histories,
    check_k as check_k,
    check_lists as check_lists,
    check_numbers as check_numbers,
    checked_items as checked_items,
    rank_groups as rank_groups,
    rank_items as rank_items,
    resolve_filters as resolve_filters,
)

__all__ = [
    "Groups",
    "ItemKNN",
    "MostPopular",
    "Ranking",
    "Recommender",
    "evaluate",
    "hit_rate",
    "mrr",
    "ndcg",
]
