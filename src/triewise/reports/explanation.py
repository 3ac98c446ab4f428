"""Which tokens decided a recommendation, and how the paths of several titles branch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from triewise.data import Catalog
    from triewise.decoding import TrieEngine


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
        coded: Whether its tokens are codes alone, which do not say the title.
    """

    item: int
    title: str
    score: float
    tokens: tuple[Token, ...]
    is_target: bool
    coded: bool = False


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

    @property
    def place(self) -> str:
        """Where the true next title stands, in words."""
        return "not ranked" if self.target_rank < 0 else f"place {self.target_rank + 1:,} of the ranking"


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
    target: int | None,
    gain: ArrayLike,
) -> tuple[Recommendation, ...]:
    """Say for each recommended title which of its tokens decided, and how much.

    Args:
        engine: Model, trie and support.
        tokenizer: The tokenizer the trie was built with.
        catalog: Titles of the items.
        prompt: Token ids of the user's prompt.
        items: Recommended item indices, best first.
        target: The user's true next item; None where it is not known.
        gain: Information gain of each node (N,), nats.

    Returns:
        One recommendation per item. ``score`` has no length penalty and no decoding weight.
    """
    from triewise.decoding import Counters, edges_on_paths

    trie, gain_N = engine.trie, np.asarray(gain, np.float64)
    leaf = trie.leaf[list(items)].astype(np.int64)
    node, log_p = edges_on_paths(engine, [list(prompt)], np.zeros(len(leaf), np.int64), leaf, Counters())
    edge_N = np.zeros(trie.n_nodes)
    edge_N[node] = log_p
    recommended = []
    for item in items:
        path = trie.path_to(int(trie.leaf[item]))
        texts = token_texts(tokenizer, trie.token[path].tolist())
        tokens = tuple(
            Token(text, float(edge_N[n]), int(trie.n_children[trie.parent[n]]), float(gain_N[n]), n)
            for n, text in zip(path, texts, strict=True)
        )
        score = math.fsum(token.log_p for token in tokens)
        hit = target is not None and bool(trie.leaf[item] == trie.leaf[target])
        recommended.append(Recommendation(int(item), catalog.title[item], score, tokens, hit))
    return tuple(recommended)


def token_texts(tokenizer: Any, title: Sequence[int]) -> list[str]:
    """What each token of a title shows; the terminator, which is last, shows nothing.

    A character may be spread over several tokens: the one that completes it shows it, those before it show
    nothing. Together the texts are exactly what the tokenizer decodes the title to.
    """
    how = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    prefixes = [tokenizer.decode(list(title[:n]), **how) for n in range(1, len(title))]
    whole, shown, texts = prefixes[-1] if prefixes else "", 0, list[str]()
    for prefix in prefixes:
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
    whole: list[Token] = []
    for token in tokens:
        if not whole or whole[-1].text:
            whole.append(token)
            continue
        held = whole.pop()
        n_valid = held.n_valid if held.decides else token.n_valid
        whole.append(Token(token.text, held.log_p + token.log_p, n_valid, held.gain + token.gain, token.node))
    return tuple(whole)


def decoding_tree(recommended: Sequence[Recommendation]) -> Branch:
    """The union of the paths of some titles, forced runs folded into the decision before them.

    Args:
        recommended: The titles, best first; at least one. Titles of one group appear once.

    Returns:
        The root; its ``text`` is empty and ``forced`` is what every title of the catalogue begins with.
    """
    return _grow([(rank, pieces(r.tokens)) for rank, r in enumerate(recommended)], Token("", 0.0, 0, 0.0))


def _grow(paths: list[tuple[int, tuple[Token, ...]]], edge: Token) -> Branch:
    """The branch whose deciding token is ``edge`` and whose titles go on with ``paths``."""
    forced: list[Token] = []
    while paths[0][1] and not paths[0][1][0].decides:
        forced.append(paths[0][1][0])
        paths = [(rank, tokens[1:]) for rank, tokens in paths]
    text = "".join(token.text for token in forced)
    ahead = math.fsum(token.log_p for token in forced)
    start = (edge.text, text, edge.log_p, ahead)
    if not paths[0][1]:
        return Branch(*start, n_valid=0, rest=0.0, rank=paths[0][0], children=())
    groups: dict[Token, list[tuple[int, tuple[Token, ...]]]] = {}
    for rank, tokens in paths:
        groups.setdefault(tokens[0], []).append((rank, tokens[1:]))
    children = tuple(_grow(group, token) for token, group in groups.items())
    rest = max(0.0, 1.0 - math.fsum(math.exp(token.log_p) for token in groups))
    return Branch(*start, n_valid=paths[0][1][0].n_valid, rest=rest, rank=-1, children=children)
