"""Keys and values with free places behind them: a forward writes its own there, and copies nothing that is held.

Nor are they repeated for the query heads that share them, as transformers does wherever there is a mask: those heads
are made queries of one head. So transformers' ``sdpa`` is registered anew; without a mask of `shared` it is as it was.

Dimension key: B users, S places of a user, H heads, G query heads that share keys and values, D width of a head; n
users, L tokens, C nodes of one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Layers = Sequence[tuple[Tensor, Tensor]]  # keys and values (n, H, L, D) of each layer


@dataclass(frozen=True)
class Target:
    """Where new keys and values (n, H, L, D) go.

    Attributes:
        place: The places of all users that hold them; or int64 (T,), where tokens go, counted through all users.
        token: int64 (T,), which tokens, counted through all users of the forward.
    """

    place: slice | Tensor
    token: Tensor | None = None

    def write(self, held_BSHD: Tensor, new: Tensor) -> None:
        """Copy what is new into what is held."""
        new = new.transpose(1, 2)
        if isinstance(self.place, slice):
            held_BSHD[: len(new), self.place] = new
        else:
            held_BSHD.view(-1, *held_BSHD.shape[2:]).index_copy_(0, self.place, new.flatten(0, 1)[self.token])


class Room(DynamicLayer):  # type: ignore[misc]
    """One layer of a transformers cache: keys and values (B, S, H, D) of some users, with free places.

    Attributes:
        target: Where the forward that runs writes.
        seen: What it reads: the users and places, as slices.
        n_before: Places that it reads and does not write.
    """

    target: Target
    seen: tuple[slice, slice]
    n_before: int

    def __init__(self, keys: Tensor, values: Tensor, n_users: int, n_places: int) -> None:
        """Free places for keys and values like these; zeros, because a mask hides only what is finite."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = (
            like.new_zeros(n_users, n_places, like.shape[1], like.shape[3]) for like in (keys, values)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write what is new; all that the forward reads, (n, H, S', D)."""
        self.write(self.target, key_states, value_states)
        return self.keys[self.seen].transpose(1, 2), self.values[self.seen].transpose(1, 2)

    def write(self, target: Target, keys: Tensor, values: Tensor) -> None:
        """Write keys and values (n, H, L, D)."""
        target.write(self.keys, keys)
        target.write(self.values, values)

    def get_seq_length(self) -> int:
        """Places that the forward reads and does not write."""
        return self.n_before


class Rooms:
    """The rooms of all layers.

    Args:
        like: Keys and values of all layers, for their shapes but for users and places.
        n_users: Rows.
        n_places: Places of each.
    """

    def __init__(self, like: Layers, n_users: int, n_places: int) -> None:
        self.rooms = [Room(keys, values, n_users, n_places) for keys, values in like]
        self.n_users, self.n_places = n_users, n_places

    @property
    def nbytes(self) -> int:
        """Bytes of all places, free ones too."""
        return sum(room.keys.nbytes + room.values.nbytes for room in self.rooms)

    def cache(self, target: Target, n_users: int, places: slice, n_new: int) -> DynamicCache:
        """A cache for one forward of ``n_new`` tokens of the first users, which reads these places."""
        cache = DynamicCache()
        cache.layers = self.rooms
        for room in self.rooms:
            room.target, room.seen = target, (slice(n_users), places)
            room.n_before = places.stop - places.start - n_new
        return cache

    def write(self, target: Target, layers: Layers) -> None:
        """Write keys and values of all layers."""
        for room, (keys, values) in zip(self.rooms, layers, strict=True):
            room.write(target, keys, values)

    def move(self, row: Tensor, to: Tensor, seen: slice) -> None:
        """Copy some places of rows (n,) to other rows (n,)."""
        for held in self._all():
            held[to, seen] = held[row, seen]

    def gather(self, place: Tensor, first: int) -> None:
        """Copy places (n,) of all users to those from ``first`` on."""
        for held in self._all():
            held[:, first : first + len(place)] = held[:, place]

    def widen(self, *, n_users: int | None = None, n_places: int | None = None) -> None:
        """Make all places anew, for so many users, so many for each: the one copy of all that is held."""
        n_users, n_places = n_users or self.n_users, n_places or self.n_places
        for room in self.rooms:
            for name in ("keys", "values"):
                held = getattr(room, name)
                more = held.new_zeros(n_users, n_places, *held.shape[2:])
                more[: self.n_users, : self.n_places] = held
                setattr(room, name, more)
        self.n_users, self.n_places = n_users, n_places

    def _all(self) -> list[Tensor]:
        return [held for room in self.rooms for held in (room.keys, room.values)]


def shared(mask: Tensor) -> Tensor:
    """A mask (n, 1, C, S), marked as one under which keys and values are read by all heads that share them."""
    mask.shared = True  # type: ignore[attr-defined]
    return mask


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """Attention (n, C, HG, D) of queries (n, HG, C, D) to keys and values (n, H, S, D)."""
    n, n_heads, n_new, _ = query.shape
    n_groups = n_heads // key.shape[1]
    biased = kwargs.get("position_bias") is not None
    # The mask is repeated instead: (n, 1, GC, S) against (n, HD, S).
    worth = 1 < n_groups <= key.shape[1] * key.shape[3] / n_new
    if biased or not worth or not getattr(attention_mask, "shared", False):
        return _SDPA(module, query, key, value, attention_mask, *args, **kwargs)
    query = query.reshape(n, key.shape[1], n_groups * n_new, -1)
    mask = attention_mask.repeat(1, 1, n_groups, 1)
    found = _SDPA(_OWN_KEYS, query, key, value, mask, *args, **kwargs)[0]
    return found.unflatten(1, (n_groups, n_new)).permute(0, 2, 3, 1, 4).flatten(2, 3), None


_OWN_KEYS = SimpleNamespace(is_causal=False)  # an attention module whose heads share nothing
_SDPA: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
AttentionInterface.register("sdpa", _attention)
