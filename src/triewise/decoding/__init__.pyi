from .engine import Support as Support, TrieEngine as TrieEngine
from .growth import edges_on_paths as edges_on_paths
from .search import (
    GainOver as GainOver,
    Scope as Scope,
    Together as Together,
    beam_search as beam_search,
    exact_search as exact_search,
    rank_catalogue as rank_catalogue,
    sample as sample,
    score as score,
)
from .treecache import Counters as Counters, TokenLists as TokenLists, pad as pad

__all__ = [
    "TrieEngine",
    "beam_search",
    "exact_search",
    "rank_catalogue",
    "score",
]
