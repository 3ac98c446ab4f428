from .assistants import TitleTeacher as TitleTeacher
from .changes import CatalogueChange as CatalogueChange
from .generative import GenerativeRecommender as GenerativeRecommender, hashes as hashes
from .grounding import GroundedRecommender as GroundedRecommender
from .loader import load as load
from .saved import (
    CARD as CARD,
    IDENTIFIER as IDENTIFIER,
    MANIFEST as MANIFEST,
    TRIE as TRIE,
    SavedRecommender as SavedRecommender,
    card_facts as card_facts,
    check_saved as check_saved,
    hash_of as hash_of,
    local_folder as local_folder,
)
from .search_choice import choose_search as choose_search, choose_weight as choose_weight
from .search_settings import SETTINGS as SETTINGS
from .sequential import SequentialRecommender as SequentialRecommender

__all__ = [
    "GenerativeRecommender",
    "GroundedRecommender",
    "SequentialRecommender",
]
