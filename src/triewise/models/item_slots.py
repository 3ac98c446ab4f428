"""Item slots: ids beyond the vocabulary that one wrapped input embedding resolves to projected vectors of items.

With V words and I items an id below V is a word, ``V + i`` the slot of item i, ``V + I`` a placeholder that says
nothing, and what lies above stands for a user: the state of a sequential model after one history. Prompts, trie,
packing and caches go on with lists of ints; only the embedding knows. Slots are never predicted: the head has no rows
for them.

Shape key: V words, I items, d width of item vectors, D width of the language model, S slots, B rows, L tokens.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triewise.errors import UserError, first_line, reading
from triewise.files import read_json, write_json
from triewise.models.anatomy import body, causal_lm, probing
from triewise.models.encoders import SequentialModel

CONFIG, WEIGHTS = "item_slots.json", "item_slots.safetensors"
USERS = 1 << 60  # numbers of histories
REMEMBERED = 1 << 20  # histories, beside those of training
# Of the module, because prompts that hold histories are copied and sent to processes.
_ONE_AT_A_TIME = threading.Lock()


class Histories:
    """What user slots stand for: histories by number, and the frozen encoder that gives their states.

    A number is a hash of the history, so it is the same in every process and every run. A process can only resolve
    what it has numbered itself; the newest `REMEMBERED` and all that are to be kept are known.
    """

    def __init__(self, encoder: SequentialModel) -> None:
        self.encoder = encoder.eval().requires_grad_(False)
        self._kept: dict[int, tuple[int, ...]] = {}
        self._recent: dict[int, tuple[int, ...]] = {}

    def __deepcopy__(self, memo: Any) -> Histories:
        """Itself: a copy of a model reads the prompts that were made for the first."""
        return self

    def number(self, history: Iterable[int], keep: bool = False) -> int:
        """The number of a history of item indices, oldest first, in [0, `USERS`); ``keep``: never forget it."""
        items = tuple(int(i) for i in history)
        digest = hashlib.blake2b(np.array(items, dtype="<i8").tobytes(), digest_size=8).digest()
        number = int.from_bytes(digest, "little") % USERS
        with _ONE_AT_A_TIME:
            if keep:
                self._kept[number] = items
            elif number not in self._kept:
                self._recent.pop(number, None)  # one that comes again is the newest
                self._recent[number] = items
                if len(self._recent) > REMEMBERED:
                    del self._recent[next(iter(self._recent))]
        return number

    def states(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Last states (S, d) of the encoder after some histories; zeros after an empty one.

        Raises:
            UserError: A number that was not given out in this process.
        """
        found = [self._kept.get(n, self._recent.get(n)) for n in numbers]
        if None in found:
            raise UserError(
                "wanted prompts of this process and of its last million histories, got the slot of an unknown user; "
                "encode the history again"
            )
        with torch.no_grad():
            return self.encoder.to(device).states_after([history or () for history in found])


@dataclass(frozen=True)
class SlotIds:
    """Which ids are slots; all that prompts need to know.

    Attributes:
        first: V, the id of the slot of item 0.
        n_items: I.
        histories: Of users; None where prompts have no user slot.
    """

    first: int
    n_items: int
    histories: Histories | None = field(default=None, repr=False, compare=False)

    @property
    def placeholder(self) -> int:
        """The id of the slot that says nothing."""
        return self.first + self.n_items

    def item(self, item: int) -> int:
        """The id of an item's slot."""
        return self.first + item

    def user(self, history: Sequence[int]) -> list[int]:
        """The id of a user's slot; nothing where there are none."""
        return [] if self.histories is None else [self.placeholder + 1 + self.histories.number(history)]


class ItemSlots(nn.Module):
    """An input embedding (words) with slots beside its rows.

    Item and user vectors are frozen; what is trained are the projections, float32, and the words as they are.

    Args:
        words: The model's own embedding.
        kind: ``llara``: item vectors through linear, GELU, linear. ``a-llmrec``: item vectors and user states, each
            through linear, layer norm, GELU (users: leaky ReLU), linear.
        table: Item vectors (I, d), float.
        catalog: Hash of the items.
        encoder: Gives user states (``a-llmrec``).
        seed: Of the projections and the placeholder.
    """

    def __init__(
        self,
        words: Any,
        kind: str,
        table: Tensor,
        catalog: str,
        encoder: SequentialModel | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.words, self.kind, self.catalog = words, kind, catalog
        device, (rows, width) = words.weight.device, words.weight.shape
        histories = None if encoder is None else Histories(encoder)
        self.ids = SlotIds(rows, len(table), histories)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.item = projection(table.shape[1], width, None if kind == "llara" else nn.GELU())
            self.user = None if encoder is None else projection(encoder.settings.width, width, nn.LeakyReLU())
            nothing = torch.randn(width)
        self.register_buffer("table", table.detach().float().clone())
        # As the authors' new rows of a frozen embedding: noise as large as words are.
        self.register_buffer("nothing", nothing * words.weight.detach().float().std().cpu(), persistent=False)
        for part in (self.item, self.user):
            if part is not None:
                part.to(device)
        self.table: Tensor = self.table.to(device)
        self.nothing: Tensor = self.nothing.to(device)

    # What is asked of an embedding.
    @property
    def weight(self) -> Tensor:
        """(V, D) of the words."""
        weight: Tensor = self.words.weight
        return weight

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.ids.first

    @property
    def n_ids(self) -> int:
        """Every id that is resolved lies below."""
        return self.ids.placeholder + 1 + (USERS if self.user is not None else 0)

    def forward(self, ids: Tensor) -> Tensor:
        """Vectors (B, L, D) of ids (B, L), int64."""
        is_slot = ids >= self.ids.first
        words: Tensor = self.words(ids.masked_fill(is_slot, 0))
        at = is_slot.nonzero(as_tuple=True)
        if not len(at[0]):
            return words
        return words.index_put(at, self.vectors(ids[at] - self.ids.first).to(words.dtype))

    def vectors(self, slot: Tensor) -> Tensor:
        """Vectors (S, D), float32, of slots (S,), counted from item 0."""
        n_items = self.ids.n_items
        made = self.nothing.expand(len(slot), -1)
        items, users = (slot < n_items).nonzero()[:, 0], (slot > n_items).nonzero()[:, 0]
        if len(items):
            made = made.index_put((items,), self.item(self.table[slot[items]]).to(made.dtype))
        if len(users) and self.user is not None and self.ids.histories is not None:
            numbers = (slot[users] - n_items - 1).tolist()
            states = self.ids.histories.states(numbers, slot.device)
            made = made.index_put((users,), self.user(states).to(made.dtype))
        return made

    def parts(self) -> dict[str, Tensor]:
        """All that is saved, by name."""
        encoder = None if self.ids.histories is None else self.ids.histories.encoder
        named = {"item": self.item, "user": self.user, "encoder": encoder}
        tensors = {
            f"{part}.{name}": tensor
            for part, module in named.items()
            if module is not None
            for name, tensor in module.state_dict().items()
        }
        return {"table": self.table} | tensors


def projection(width: int, to: int, activation: nn.Module | None = None) -> nn.Sequential:
    """From vectors (S, d) to what stands at a slot (S, D): LLaRA's two layers, or A-LLMRec's with a norm between."""
    middle = [nn.GELU()] if activation is None else [nn.LayerNorm(to), activation]
    return nn.Sequential(nn.Linear(width, to), *middle, nn.Linear(to, to))


def slots_of(model: Any) -> ItemSlots | None:
    """The slots of a causal LM (or of the one under an adapter), where it has some."""
    embedding = causal_lm(model).get_input_embeddings()
    return embedding if isinstance(embedding, ItemSlots) else None


def attach(model: Any, slots: ItemSlots) -> None:
    """Let a model read slots, in the place of those it has; its other weights and their names stay.

    Raises:
        UserError: It cannot: some models look at ids elsewhere too.
    """
    lm = causal_lm(model)
    before = lm.get_input_embeddings()
    lm.set_input_embeddings(slots)
    ids = torch.tensor([[0, slots.ids.item(0), slots.ids.placeholder]], device=slots.weight.device)
    try:
        with probing(model), torch.no_grad():
            body(model)(input_ids=ids, use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        lm.set_input_embeddings(before)
        raise UserError(
            f"wanted a model that reads ids by its input embedding alone, got {type(lm).__name__}, which fails on item "
            f"slots ({first_line(error)}); choose another backbone"
        ) from error


@contextmanager
def without_slots(model: Any) -> Iterator[ItemSlots | None]:
    """The model with its own embedding for a while, as it is saved; the slots that it has otherwise."""
    slots, lm = slots_of(model), causal_lm(model)
    if slots is not None:
        lm.set_input_embeddings(slots.words)
    try:
        yield slots
    finally:
        if slots is not None:
            lm.set_input_embeddings(slots)


def save_slots(slots: ItemSlots, folder: Path) -> None:
    """Write projections, item vectors and encoder beside the model they belong to."""
    histories = slots.ids.histories
    encoder = None if histories is None else histories.encoder.config
    config = {"kind": slots.kind, "catalog": slots.catalog, "words": slots.num_embeddings, "encoder": encoder}
    save_file({n: t.detach().cpu().contiguous() for n, t in slots.parts().items()}, folder / WEIGHTS)
    write_json(folder / CONFIG, config)


def load_slots(model: Any, folder: Path) -> None:
    """Attach what `save_slots` wrote, where there is something.

    Raises:
        UserError: It is damaged, or of another model.
    """
    if not (folder / CONFIG).is_file():
        return
    with without_slots(model):
        words = causal_lm(model).get_input_embeddings()
        config = read_json(folder / CONFIG)
        try:
            with reading(folder / WEIGHTS):
                tensors = load_file(folder / WEIGHTS)
            shape = config["encoder"]
            encoder = None if shape is None else SequentialModel.from_config(shape)
            slots = ItemSlots(words, config["kind"], tensors["table"], config["catalog"], encoder)
            ours = slots.parts()
            fits = config["words"] == slots.num_embeddings and ours.keys() == tensors.keys()
            if not fits or any(ours[name].shape != t.shape for name, t in tensors.items()):
                raise RuntimeError("its parts are of another model")
        except UserError:
            raise
        except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(
                f"the item slots in {folder} do not fit their model ({first_line(error)}); restore {WEIGHTS} and "
                f"{CONFIG}, or train again"
            ) from None
        with torch.no_grad():
            for name, tensor in tensors.items():
                ours[name].copy_(tensor)
    attach(model, slots)
