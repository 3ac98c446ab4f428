from .generative import SETTINGS as SETTINGS, GenerativeRecommender as GenerativeRecommender, hashes as hashes
from .grounding import GroundedRecommender as GroundedRecommender
from .saved import CARD as CARD, MANIFEST as MANIFEST, local_folder as local_folder
from .search_choice import choose_search as choose_search
from .sequential import SequentialRecommender as SequentialRecommender

__all__ = [
    "GenerativeRecommender",
    "GroundedRecommender",
    "SequentialRecommender",
]
