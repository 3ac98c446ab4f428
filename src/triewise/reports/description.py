"""The numbers behind the report: what a data set is like before any training. Nothing is drawn here.

Shape key: N nodes, I items, T positions in a title.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triewise.tokens import Trie, average_valid_tokens, forced_share, zero_gain_share

if TYPE_CHECKING:
    from triewise.data import Dataset
    from triewise.tokens import Prompts

PROMPT_SAMPLE = 200  # test rows whose prompts are encoded for their mean length

# key of `describe` -> what a person reads, and how the number is written
FACTS = {
    "source": ("data set", "text"),
    "users": ("users", "count"),
    "items": ("items", "count"),
    "interactions": ("interactions", "count"),
    "density": ("density", "share"),
    "titles": ("distinct titles", "count"),
    "duplicate_titles": ("items that share their title", "count"),
    "shared_titles": ("titles that share their tokens", "count"),
    "unknown_titles": ("titles with unknown tokens", "count"),
    "changed_titles": ("other titles that are not read back", "count"),
    "train_rows": ("training rows", "count"),
    "valid_rows": ("validation rows", "count"),
    "test_rows": ("test rows", "count"),
    "cold_targets": ("cold test targets (never trained)", "count"),
    "cold_share": ("cold test targets, share", "share"),
    "nodes": ("nodes of the trie", "count"),
    "branching": ("nodes with a decision", "count"),
    "tokens_per_title": ("tokens per title, mean", "mean"),
    "tokens_per_title_p90": ("tokens per title, 90th percentile", "count"),
    "tokens_per_title_max": ("tokens per title, longest", "count"),
    "decisions_per_title": ("decisions per title, mean", "mean"),
    "forced_share": ("forced tokens (no alternative)", "share"),
    "zero_gain_share": ("zero-gain tokens (decide nothing)", "share"),
    "AVT": ("valid next tokens, mean (AVT)", "mean"),
    "prompt_tokens": ("tokens per prompt, mean", "mean"),
}


def describe(
    dataset: Dataset, prompts: Prompts, trie: Trie, counts: ArrayLike
) -> dict[str, int | float | str | None]:
    """Numbers a reader wants before any training; None where the source does not say.

    Args:
        dataset: The prepared data.
        prompts: How it is put into tokens.
        trie: Built from ``prompts.title_tokens``.
        counts: Integers (I,), how often each item is a training target; they weigh the shares and AVT.

    Returns:
        Numbers by the keys of `FACTS`. Shares are in [0, 1]. Lengths are in tokens with the terminator, over
        distinct titles. A target is cold when its item is not the target of any training row.

    Raises:
        UserError: Counts that do not fit the trie, or that are all zero.
    """
    known, catalog, test = dataset.info["counts"], dataset.catalog, dataset.test
    users, interactions = known.get("users"), known.get("interactions")
    is_cold = ~np.isin(test.target, dataset.train.target)
    leaves = np.flatnonzero(trie.is_leaf)
    return {
        "source": dataset.info.get("source"),
        "users": users,
        "items": catalog.n_items,
        "interactions": interactions,
        "density": interactions / (users * catalog.n_items) if users and interactions else None,
        "titles": catalog.n_titles,
        "duplicate_titles": int((np.bincount(catalog.group)[catalog.group] > 1).sum()),
        "shared_titles": len(prompts.readback.shared)
        if prompts.identifier is None
        else _alike(trie, catalog.group),
        "unknown_titles": len(prompts.readback.unknown),
        "changed_titles": len(prompts.readback.changed),
        "train_rows": dataset.train.n_rows,
        "valid_rows": dataset.valid.n_rows,
        "test_rows": test.n_rows,
        "cold_targets": int(is_cold.sum()),
        "cold_share": float(is_cold.mean()) if len(is_cold) else None,
        "nodes": trie.n_nodes,
        "branching": int(trie.branching.sum()),
        "tokens_per_title": float(trie.depth[leaves].mean()),
        "tokens_per_title_p90": int(np.percentile(trie.depth[leaves], 90, method="inverted_cdf")),
        "tokens_per_title_max": int(trie.depth.max()),
        "decisions_per_title": _decisions_per_title(trie),
        "forced_share": forced_share(trie, counts),
        "zero_gain_share": zero_gain_share(trie, counts),
        "AVT": average_valid_tokens(trie, counts),
        "prompt_tokens": _prompt_tokens(prompts, dataset),
    }


def _alike(trie: Trie, group_I: NDArray[np.integer[Any]]) -> int:
    """Titles that end at a leaf with another title."""
    leaf, _ = np.unique(np.stack([trie.leaf, group_I]), axis=1)
    return int((np.bincount(leaf)[leaf] > 1).sum())


def compared(tries: Mapping[str, Trie], counts: ArrayLike) -> dict[str, int | float]:
    """What identifiers of one catalogue cost and decide, by name and fact.

    Args:
        tries: Of each identifier by its name.
        counts: Integers (I,), how often each item is a training target; they weigh what is not over items.

    Returns:
        Tokens and decisions of an item on average; nats that a decision of a target settles; items that another item
        cannot be told from; and of ranking all items: decisions that are scored, and tokens that run.
    """
    found: dict[str, int | float] = {}
    share_I = np.asarray(counts) / max(np.sum(counts), 1)
    for name, trie in tries.items():
        decisions_I = _decisions(trie)
        share_N = np.bincount(trie.leaf, share_I)
        entropy = -float((share_N[share_N > 0] * np.log(share_N[share_N > 0])).sum())
        facts = {
            "tokens an item": float(trie.depth[trie.leaf].mean()),
            "decisions an item": float(decisions_I.mean()),
            "nats a decision": entropy / max(float(share_I @ decisions_I), 1e-12),
            "items that share it": int((np.bincount(trie.leaf)[trie.leaf] > 1).sum()),
            "decisions of a ranking": int(trie.branching.sum()),
            "tokens of a ranking": int((~trie.is_leaf[trie.next_decision]).sum()),
        }
        found |= {f"{name}: {fact}": value for fact, value in facts.items()}
    return found


def forced_by_position(trie: Trie, counts: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often the token at each position of a target title has no alternative in the trie.

    Args:
        trie: The trie of the catalogue.
        counts: Integers (I,), how often each item is a training target.

    Returns:
        ``(share, weight)``, float64 (T,): ``share[t]`` of the target tokens at 0-based position t are forced,
        and ``weight[t]`` of all target tokens stand there. So ``(share * weight).sum()`` is `forced_share`.
        Positions without a target token have weight and share 0.
    """
    mass_N = trie.subtree_count(counts)[1:]
    forced_N = trie.n_children[trie.parent[1:]] == 1
    position = trie.depth[1:] - 1
    token_T = np.bincount(position, mass_N)
    forced_T = np.bincount(position, mass_N * forced_N)
    share_T = np.divide(forced_T, token_T, out=np.zeros_like(forced_T), where=token_T > 0)
    return share_T, token_T / max(token_T.sum(), 1.0)


def fact_lines(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of `describe` (and of any other numbers) as a person reads them."""
    known = [(*FACTS.get(key, (key.replace("_", " "), "other")), value) for key, value in facts.items()]
    return [(name, _written(value, kind)) for name, kind, value in known]


def percent(p: float) -> str:
    """A probability for people: two digits, since more would feign; never a false 0 or 100 %."""
    value = 100 * float(p)
    if 0 < value < 0.01:
        return "<0.01\xa0%"
    if 99.5 <= value < 100:
        return f"{min(value, 99.9):.1f}\xa0%"
    digits = 0 if value >= 9.95 or value == 0 else 1 if value >= 0.995 else 2
    return f"{value:.{digits}f}\xa0%"


def _written(value: Any, kind: str) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if kind == "share":
        return f"{100 * value:.{1 if value >= 0.1 else 2}f} %"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return f"{value:,.{1 if value >= 100 else 2}f}" if kind == "mean" else f"{value:,.4g}"
    return str(value)


def _decisions(trie: Trie) -> NDArray[np.int64]:
    """Decisions (I,) on the way to each item."""
    node_before, offsets = trie.paths()
    return np.add.reduceat(trie.branching[node_before].astype(np.int64), offsets[:-1])


def _decisions_per_title(trie: Trie) -> float:
    _, one_of_group = np.unique(trie.leaf, return_index=True)
    return float(_decisions(trie)[one_of_group].mean())


def _prompt_tokens(prompts: Prompts, dataset: Dataset) -> float | None:
    """Mean prompt length over test rows spread evenly."""
    n_rows = dataset.test.n_rows
    if not n_rows:
        return None
    # A copy, because encoding counts what it drops and this is no use of the prompts that should be counted.
    prompts = dataclasses.replace(prompts, dropped=type(prompts.dropped)())
    rows = np.unique(np.linspace(0, n_rows - 1, min(n_rows, PROMPT_SAMPLE)).astype(int))
    return float(np.mean([len(prompts.encode(dataset.test.history[int(r)].tolist())) for r in rows]))
