"""Identifiers other than titles: a few code tokens an item, made from vectors or read from a file.

Codes are written as MiniOneRec and LETTER write theirs: ``<a_12>`` is code 12 of the first level, ``<b_7>`` of the
second. They are tokens like any other, so the tree, searches and objectives know nothing of them.

Shape key: I items, G groups of equal titles, d width of vectors, K codes of a level.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from triewise.data import read_index
from triewise.errors import UserError
from triewise.files import write_json

if TYPE_CHECKING:
    from triewise.arrays import Float64, Int64, Ints
    from triewise.data import Catalog

LARGEST = 256  # codes of a level, where the recipe names no numbers
ROUNDS = 50  # of Lloyd's algorithm
AT_ONCE = 1 << 24  # distances held at one time


@dataclass(frozen=True)
class Identifier:
    """What stands for each item of a catalogue.

    Attributes:
        codes: For each item the names of its code tokens, in their order.
        titled: Whether the title follows the codes.
    """

    codes: tuple[tuple[str, ...], ...] = field(repr=False)
    titled: bool = False

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every code token once: by its place in an identifier, then by number."""
        place = {name: (at, len(name), name) for codes in self.codes for at, name in enumerate(codes)}
        return tuple(sorted(place, key=place.__getitem__))

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the codes and of whether titles follow."""
        return hashlib.sha256(json.dumps([self.codes, self.titled]).encode()).hexdigest()

    @property
    def collisions(self) -> int:
        """Items whose codes another item has too."""
        return sum(n for n in Counter(self.codes).values() if n > 1)

    @property
    def sequences(self) -> list[list[int]]:
        """The codes of each item as places in ``names``, from 1, closed by 0: what a tree is built of."""
        number = {name: n + 1 for n, name in enumerate(self.names)}
        return [[*(number[name] for name in codes), 0] for codes in self.codes]

    def save(self, path: Path, item_id: Sequence[str]) -> None:
        """Write the codes as JSON by raw item id, whole or not at all."""
        write_json(path, dict(zip(item_id, map(list, self.codes), strict=True)))


def read_identifier(path: Path, catalog: Catalog, titled: bool = False) -> Identifier:
    """Codes from a file such as MiniOneRec's ``index.json`` or LETTER's ``.index.json.gz``.

    Raises:
        UserError: No such file, no table of codes, or an item without codes.
    """
    table = read_index(path)
    missing = [item for item in catalog.item_id if item not in table]
    if missing:
        raise UserError(
            f"wanted codes for every item in {path}, got none for {missing[0]!r} ({len(missing)} of "
            f"{catalog.n_items} items); its keys are raw item ids, see item_id in catalog.parquet"
        )
    rows = (enumerate(table[item]) for item in catalog.item_id)
    return Identifier(tuple(tuple(c if "<" in c else _name(n, c) for n, c in row) for row in rows), titled)


def residual_codes(
    vectors_ID: Float64,
    group_I: Ints,
    levels: Sequence[int] | None,
    titled: bool,
    seed: int,
    met_I: Ints | None = None,
) -> Identifier:
    """Codes by residual quantisation: k-means of the vectors, of what is left of them, and so on.

    Vectors are centred and scaled to length 1 first: item vectors of popular items are short, and k-means would spend
    its codes on the others. Items with equal titles, which nothing tells apart, get the mean of their vectors and so
    the same codes. A level whose vectors are fewer than its codes has a code for each.

    Args:
        vectors_ID: Of the items, float (I, d).
        group_I: Which items share a title, int (I,).
        levels: Codes of each level; None: by the number of titles, see `default_levels`.
        titled: Whether the title follows the codes.
        seed: Of the first centres.
        met_I: How often training rows have each item, int (I,): so much, and one, a vector weighs; None: all alike.
    """
    _, group = np.unique(group_I, return_inverse=True)
    weight = (1 + np.bincount(group, met_I)).astype(np.float64)
    left = np.zeros((len(weight), vectors_ID.shape[1]))
    np.add.at(left, group, vectors_ID)
    left /= np.bincount(group)[:, None]
    left -= left.mean(0)
    length = np.linalg.norm(left, axis=1, keepdims=True)
    left /= np.where(length > 0, length, 1)
    rng, codes = np.random.default_rng(seed), []
    for n_codes in levels or default_levels(len(left)):
        centre, code = k_means(left, n_codes, rng, weight)
        left = left - centre[code]
        codes.append(code[group])
    return Identifier(_named(np.stack(codes, axis=1)), titled)


def told_apart(identifier: Identifier, group_I: Ints, rank_I: Ints) -> Identifier:
    """One level more, by which equal codes of different titles are told apart; the same where there are none.

    Args:
        identifier: Codes, of which some may be equal.
        group_I: Which items share a title, int (I,).
        rank_I: Numbers (I,); of equal codes the title with the highest gets the first code.
    """
    order = sorted(range(len(rank_I)), key=lambda item: (-rank_I[item], item))
    met: dict[tuple[str, ...], dict[int, int]] = {}
    for item in order:
        places = met.setdefault(identifier.codes[item], {})
        places.setdefault(int(group_I[item]), len(places))
    if all(len(places) == 1 for places in met.values()):
        return identifier
    codes = (
        (*codes, _name(len(codes), met[codes][int(group)]))
        for codes, group in zip(identifier.codes, group_I, strict=True)
    )
    return replace(identifier, codes=tuple(codes))


def default_levels(n_titles: int) -> tuple[int, ...]:
    """Two levels of about the root of the number of titles, in eights, or three of 256 for more than 65,536 titles.

    >>> default_levels(1682), default_levels(20000), default_levels(100000)
    ((40, 40), (136, 136), (256, 256, 256))
    """
    size = min(max(math.isqrt(n_titles) // 8 * 8, 8), LARGEST)
    return (size,) * (2 if n_titles <= LARGEST**2 else 3)


def k_means(
    points_ND: Float64, n_codes: int, rng: np.random.Generator, weight_N: Float64 | None = None
) -> tuple[Float64, Int64]:
    """Centres (K, d) and the nearest of them to each point (N,): Lloyd's algorithm from k-means++.

    A centre that loses all its points takes the one that adds most to what is minimised. Points may have weights > 0.
    """
    n_codes = min(n_codes, len(points_ND))
    weight_N = np.ones(len(points_ND)) if weight_N is None else weight_N
    centre_KD = points_ND[[rng.choice(len(points_ND), p=weight_N / weight_N.sum())]]
    near_N = ((points_ND - centre_KD) ** 2).sum(1)
    for _ in range(1, n_codes):
        total = (weight_N * near_N).sum()
        chosen = rng.choice(len(points_ND), p=weight_N * near_N / total if total > 0 else None)
        centre_KD = np.vstack([centre_KD, points_ND[chosen]])
        near_N = np.minimum(near_N, ((points_ND - points_ND[chosen]) ** 2).sum(1))
    code_N = np.full(len(points_ND), -1)
    for _ in range(ROUNDS):
        before, (code_N, far_N) = code_N, _nearest(points_ND, centre_KD)
        if np.array_equal(before, code_N):
            break
        for empty in np.flatnonzero(np.bincount(code_N, minlength=n_codes) == 0):
            alone = int((weight_N * far_N).argmax())
            code_N[alone], far_N[alone] = empty, -1.0
        sums_KD = np.zeros_like(centre_KD)
        np.add.at(sums_KD, code_N, weight_N[:, None] * points_ND)
        centre_KD = sums_KD / np.maximum(np.bincount(code_N, weight_N, n_codes), 1e-300)[:, None]
    return centre_KD, code_N


def _nearest(points_ND: Float64, centre_KD: Float64) -> tuple[Int64, Float64]:
    """The nearest centre to each point (N,), and the squared distance."""
    block, found = max(1, AT_ONCE // len(centre_KD)), []
    for low in range(0, len(points_ND), block):
        some = points_ND[low : low + block]
        distance = (some**2).sum(1)[:, None] - 2 * some @ centre_KD.T + (centre_KD**2).sum(1)
        found.append((distance.argmin(1), distance.min(1)))
    return np.concatenate([code for code, _ in found]), np.concatenate([far for _, far in found])


def _named(code_IL: Int64) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(_name(level, code) for level, code in enumerate(row)) for row in code_IL.tolist())


def _name(level: int, code: int | str) -> str:
    return f"<{chr(ord('a') + level)}_{code}>"
