"""How a language model is asked for titles: the one list of search settings."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from triewise.decoding import GainOver, Scope, Support
    from triewise.settings import Measure

Search = Literal["beam", "exact", "catalogue", "grounding"]
SEARCHES: tuple[Search, ...] = ("beam", "exact", "catalogue", "grounding")
OF_GROUNDING, OF_SPEED = {"of": "grounding"}, {"of": "speed"}


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of a ranking. ``[evaluation]`` of a recipe has a key of the same name for each.

    A new one is a key there, a field here, and its use in `GenerativeRecommender.recommend`; the manifest, the card,
    ``metrics.json`` and reports take them from here.

    Attributes:
        search: How the trie is searched; ``catalogue`` scores every title, ``exact`` finds the same best ones with
            less work, ``beam`` is a beam search. ``grounding`` does not search it: the model writes freely, and the
            titles nearest to that are returned (BIGRec).
        beams: Beams of the beam search; where more titles are asked for, so many.
        support: Softmax over valid tokens (``trie``) or over the vocabulary.
        length_penalty: Exponent of the title's length that divides a score (BIGRec 1).
        alpha: Strength of IGD-decoding; 0 switches it off.
        measure: What of IGD-decoding says how much a token decides; see `tokens.gain_by`.
        scope: Where IGD-decoding scales the gain, among siblings (``node``) or (beam search only) at a ``step``.
        gain_over: What of that counts: tokens with training targets (``trained``) or ``all``.
        text_beams: Grounding: beams of the free generation.
        text_tokens: Grounding: most tokens of the free text.
        gamma: Grounding: strength with which popularity, or the assistant, is injected; 0 switches it off.
        batch_users: Users that share a forward; no ranking depends on it.
    """

    search: Search = "catalogue"
    beams: int = 10
    support: Support = "trie"
    length_penalty: float = 0.0
    alpha: float = 0.0
    measure: Measure = "information"
    scope: Scope = "node"
    gain_over: GainOver = "trained"
    text_beams: int = field(default=4, metadata=OF_GROUNDING)
    text_tokens: int = field(default=128, metadata=OF_GROUNDING)
    gamma: float = field(default=0.0, metadata=OF_GROUNDING)
    batch_users: int = field(default=16, metadata=OF_SPEED)

    @property
    def search_settings(self) -> dict[str, Any]:
        """All of them, by name."""
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def used(self) -> dict[str, Any]:
        """Those that the rankings depend on: the ones of the trie, or of grounding, which has no support."""
        kind = OF_GROUNDING if self.search == "grounding" else {}
        used = {f.name: getattr(self, f.name) for f in fields(SearchSettings) if f.metadata == kind}
        if not self.alpha:
            used.pop("gain_over", None)
        if not self.alpha or self.measure == "information":
            used.pop("measure", None)
        return {"search": self.search} | ({"support": "none"} if kind else {}) | used


SETTINGS = tuple(f.name for f in fields(SearchSettings))
