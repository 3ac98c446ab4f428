from .app.runs import evaluate_run as evaluate, train_run as train
from .data.catalog import Catalog as Catalog
from .data.dataset import Dataset as Dataset, load_dataset as load_dataset
from .data.sources import prepare as prepare
from .errors import UserError as UserError
from .ranking.ranking import Ranking as Ranking, Recommender as Recommender
from .recipe import Recipe as Recipe, load_recipe as load_recipe
from .recommenders.loader import load as load
from .tokens.trie import Trie as Trie

__all__ = [
    "Catalog",
    "Dataset",
    "Ranking",
    "Recipe",
    "Recommender",
    "Trie",
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "load_dataset",
    "load_recipe",
    "prepare",
    "train",
]
__version__: str
