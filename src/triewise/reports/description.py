"""The numbers behind the report: what a data set is like, and which tokens decided a recommendation.

Nothing is drawn here. `describe` and `forced_by_position` speak of a data set and its trie, `explain` of the
titles one user got, `decoding_tree` of their paths through the trie, ready to be drawn.

Shape key: N nodes, I items, T positions in a title, L tokens of one title.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from triewise.decisiveness import average_valid_tokens, forced_share, zero_gain_share
from triewise.trie import Trie

if TYPE_CHECKING:
    from triewise.catalog import Catalog
    from triewise.dataset import Dataset
    from triewise.engine import TrieEngine
    from triewise.prompts import Prompts

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


@dataclass(frozen=True)
class Token:
    """One token of a recommended title.

    Attributes:
        text: What it adds to the title; empty for the terminator and where a token ends inside a character.
        log_p: Log-probability of its edge under the engine's support, nats; 0 when forced in trie support.
        n_valid: How many tokens could have stood here: children of the node before it.
        gain: Information gain of its edge, nats.
        node: Trie node it leads to; -1 when unknown.
    """

    text: str
    log_p: float
    n_valid: int
    gain: float
    node: int = -1

    @property
    def decides(self) -> bool:
        """Whether the catalogue left an alternative."""
        return self.n_valid > 1


@dataclass(frozen=True)
class Recommendation:
    """A recommended title with its tokens.

    Attributes:
        item: Item index.
        title: Its title in the catalogue.
        score: Log-probability of the title under the engine's support, nats: the sum over its tokens.
        tokens: The tokens, the terminator last.
        is_target: Whether it lies in the group of the user's true next item.
    """

    item: int
    title: str
    score: float
    tokens: tuple[Token, ...]
    is_target: bool


@dataclass(frozen=True)
class Example:
    """One user, what came next, and what a method recommended.

    Attributes:
        user: Raw user id.
        method: Name of the method.
        history: Titles, oldest first.
        target: The true next title.
        target_rank: Its 0-based rank, -1 when it was not ranked.
        recommendations: Best first.
    """

    user: str
    method: str
    history: tuple[str, ...]
    target: str
    target_rank: int
    recommendations: tuple[Recommendation, ...]


@dataclass(frozen=True)
class Branch:
    """A decision and the forced tokens after it: one edge of a drawn decoding tree.

    Attributes:
        text: The deciding token; empty at the root and where the decision is to end the title.
        forced: Text of the forced tokens up to the next decision or the end.
        log_p: Log-probability of the deciding token, nats; 0 at the root.
        forced_log_p: That of the forced tokens; 0 in trie support.
        n_valid: Alternatives at the node it leads to; 0 at the end of a title.
        rest: Probability at that node of everything that is not drawn.
        rank: 0-based place of the title that ends here, -1 elsewhere.
        children: The drawn alternatives, the one with the best-ranked title first.
    """

    text: str
    forced: str
    log_p: float
    forced_log_p: float
    n_valid: int
    rest: float
    rank: int
    children: tuple[Branch, ...]


def explain(
    engine: TrieEngine,
    tokenizer: Any,
    catalog: Catalog,
    prompt: Sequence[int],
    items: Sequence[int],
    target: int,
    gain: ArrayLike,
) -> tuple[Recommendation, ...]:
    """Say for each recommended title which of its tokens decided, and how much.

    Args:
        engine: Model, trie and support.
        tokenizer: The tokenizer the trie was built with.
        catalog: Titles of the items.
        prompt: Token ids of the user's prompt.
        items: Recommended item indices, best first.
        target: The user's true next item.
        gain: Information gain of each node (N,), nats.

    Returns:
        One recommendation per item. ``score`` has no length penalty and no decoding weight.
    """
    from triewise.growth import edges_on_paths
    from triewise.treecache import Counters

    leaf = engine.trie.leaf[list(items)].astype(np.int64)
    node, log_p = edges_on_paths(engine, [list(prompt)], np.zeros(len(leaf), np.int64), leaf, Counters())
    edge_N = np.zeros(engine.trie.n_nodes)
    edge_N[node] = log_p
    return recommendations(engine.trie, tokenizer, catalog.title, edge_N, items, target, gain)


def recommendations(
    trie: Trie,
    tokenizer: Any,
    titles: Sequence[str],
    edge_log_p: ArrayLike,
    items: Sequence[int],
    target: int,
    gain: ArrayLike,
) -> tuple[Recommendation, ...]:
    """`explain` from log-probabilities (N,) of the edge into each node that are already there."""
    edge_N, gain_N = np.asarray(edge_log_p, np.float64), np.asarray(gain, np.float64)
    found = []
    for item in items:
        path = trie.path_to(int(trie.leaf[item]))
        texts = token_texts(tokenizer, trie.token[path].tolist())
        tokens = tuple(
            Token(text, float(edge_N[n]), int(trie.n_children[trie.parent[n]]), float(gain_N[n]), n)
            for n, text in zip(path, texts, strict=True)
        )
        score = math.fsum(token.log_p for token in tokens)
        hit = bool(trie.leaf[item] == trie.leaf[target])
        found.append(Recommendation(int(item), titles[item], score, tokens, hit))
    return tuple(found)


def token_texts(tokenizer: Any, title: Sequence[int]) -> list[str]:
    """What each token of a title shows; the terminator, which is last, shows nothing.

    A character may be spread over several tokens: the one that completes it shows it, those before it show
    nothing. Together the texts are exactly what the tokenizer decodes the title to.
    """
    ids = list(title)[:-1]
    whole = _decode(tokenizer, ids)
    shown, texts = 0, []
    for n in range(1, len(ids) + 1):
        prefix = whole if n == len(ids) else _decode(tokenizer, ids[:n])
        differ = (i for i, (a, b) in enumerate(zip(prefix, whole, strict=False)) if a != b)
        agreed = max(shown, next(differ, min(len(prefix), len(whole))))
        texts.append(whole[shown:agreed])
        shown = agreed
    return [*texts, ""]


def pieces(tokens: Sequence[Token]) -> tuple[Token, ...]:
    """The tokens as a reader sees them: one without text is joined to the next, which shows its character.

    A joined piece has the sums of the log-probabilities and gains, and the alternatives of its first
    decision. The terminator stays last, with an empty text.
    """
    found: list[Token] = []
    held: Token | None = None
    for token in tokens[:-1]:
        joined = token if held is None else _join(held, token)
        held = None if joined.text else joined
        if joined.text:
            found.append(joined)
    end = tokens[-1:] if held is None else (_join(held, tokens[-1]),)
    return (*found, *end)


def decoding_tree(recommended: Sequence[Recommendation]) -> Branch:
    """The union of the paths of some titles, forced runs folded into the decision before them.

    Args:
        recommended: The titles, best first; at least one. Titles of one group appear once.

    Returns:
        The root; its ``text`` is empty and ``forced`` is what every title of the catalogue begins with.
    """
    return _grow([(rank, pieces(r.tokens)) for rank, r in enumerate(recommended)], None)


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
    lines = []
    for key, value in facts.items():
        name, kind = FACTS.get(key, (key.replace("_", " "), "other"))
        lines.append((name, _written(value, kind)))
    return lines


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


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _join(first: Token, second: Token) -> Token:
    n_valid = first.n_valid if first.decides else second.n_valid
    log_p, gain = first.log_p + second.log_p, first.gain + second.gain
    return Token(first.text + second.text, log_p, n_valid, gain, second.node)


def _grow(paths: list[tuple[int, tuple[Token, ...]]], edge: Token | None) -> Branch:
    """The branch whose deciding token is ``edge`` and whose titles go on with ``paths``."""
    forced: list[Token] = []
    while paths[0][1] and not paths[0][1][0].decides:
        forced.append(paths[0][1][0])
        paths = [(rank, tokens[1:]) for rank, tokens in paths]
    text = "".join(token.text for token in forced)
    ahead = math.fsum(token.log_p for token in forced)
    start = ("" if edge is None else edge.text, text, 0.0 if edge is None else edge.log_p, ahead)
    if not paths[0][1]:
        return Branch(*start, n_valid=0, rest=0.0, rank=paths[0][0], children=())
    groups: dict[Token, list[tuple[int, tuple[Token, ...]]]] = {}
    for rank, tokens in paths:
        groups.setdefault(tokens[0], []).append((rank, tokens[1:]))
    children = tuple(_grow(group, token) for token, group in groups.items())
    rest = max(0.0, 1.0 - math.fsum(math.exp(token.log_p) for token in groups))
    return Branch(*start, n_valid=paths[0][1][0].n_valid, rest=rest, rank=-1, children=children)


def _decisions_per_title(trie: Trie) -> float:
    node_before, offsets = trie.paths()
    decisions_I = np.add.reduceat(trie.branching[node_before].astype(np.int64), offsets[:-1])
    _, one_of_group = np.unique(trie.leaf, return_index=True)
    return float(decisions_I[one_of_group].mean())


def _prompt_tokens(prompts: Prompts, dataset: Dataset) -> float | None:
    """Mean prompt length over test rows spread evenly."""
    n_rows = dataset.test.n_rows
    if not n_rows:
        return None
    # A copy, because encoding counts what it drops and this is no use of the prompts that should be counted.
    prompts = dataclasses.replace(prompts, dropped=type(prompts.dropped)())
    rows = np.unique(np.linspace(0, n_rows - 1, min(n_rows, PROMPT_SAMPLE)).astype(int))
    return float(np.mean([len(prompts.encode(dataset.test.history[int(r)].tolist())) for r in rows]))
