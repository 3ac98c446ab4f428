from .catalog import Catalog as Catalog, allowed_items as allowed_items
from .coded import read_index as read_index
from .dataset import (
    Dataset as Dataset,
    changed_raw_files as changed_raw_files,
    data_hash as data_hash,
    load_dataset as load_dataset,
)
from .fetch import RELEASES as RELEASES, is_whole as is_whole
from .fetch_amazon import fetch_category as fetch_category
from .findings import said_of_ties as said_of_ties
from .interactions import Interactions as Interactions
from .sources import new_raw_file as new_raw_file, prepare as prepare, settings_of as settings_of
from .splits import Split as Split, first_rows as first_rows

__all__ = [
    "Catalog",
    "Dataset",
    "Interactions",
    "Split",
    "load_dataset",
    "prepare",
]
