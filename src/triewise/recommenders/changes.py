"""Another catalogue for a recommender that is there: what changes, and what histories may hold all the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from triewise.errors import UserError

if TYPE_CHECKING:
    from triewise.arrays import Int64
    from triewise.data import Catalog
    from triewise.ranking import ItemLists, Items


@dataclass(frozen=True)
class CatalogueChange:
    """What becomes of a catalogue.

    Attributes:
        catalog: The items after it, J.
        counts: (J,) training targets of each; 0 for one that the model has never seen.
        former: Items that were removed, R; they are not recommended, and histories may hold them by their numbers J,
            J + 1, ...
        source: (J + R,) the number that each of these has before it, among items and former ones; -1 for a new item.
    """

    catalog: Catalog
    counts: Int64
    former: Catalog
    source: Int64


@dataclass(frozen=True, kw_only=True)
class Changeable:
    """What a recommender has whose catalogue may change.

    Attributes:
        former: Items that were removed since it was loaded, see `CatalogueChange`; None: none.
    """

    former: Catalog | None = field(default=None, repr=False)

    @property
    def n_former(self) -> int:
        """Number of former items."""
        return 0 if self.former is None else self.former.n_items

    def returned(
        self, exclude: ItemLists | str | None, histories: ItemLists, n_items: int
    ) -> ItemLists | str | None:
        """``exclude`` of `Recommender.recommend`, where a history may hold items that are not returned anyway."""
        if exclude != "history" or not self.n_former:
            return exclude
        return [items[items < n_items] for items in map(_integers, histories)]


def _integers(items: Items) -> Int64:
    return np.asarray(items, dtype=np.int64).reshape(-1)


def changed_assistant(assistant: Any, change: CatalogueChange) -> Any:
    """The assistant, if there is one, with the same catalogue.

    Raises:
        UserError: It cannot have it.
    """
    if assistant is None:
        return None
    if not hasattr(assistant, "changed"):
        raise UserError(
            f"wanted an assistant whose catalogue can change too, got a {type(assistant).__name__}; load the "
            "recommender with assistant=False"
        )
    return assistant.changed(change)
