"""What is learned: ``[objective]`` of a recipe, every key with its default and what it means."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, model_validator

from triewise.settings import Measure, Section, key


class AdaptiveSettings(Section):
    """ATS of MSL; the defaults are the authors' (arXiv:2504.04178 and its code)."""

    eta: float = key(0.25, "probability of the true token that the temperature aims at", gt=0, lt=1)
    initial: float = key(1.5, "temperature before the first step", gt=0)
    momentum: float = key(0.95, "share of the old temperature in the new one", ge=0, lt=1)
    clamp: tuple[float, float] = key((1.5, 5.0), "least and largest temperature")
    root: Literal["plus", "minus", "exact"] = key(
        "plus", "the paper prints minus; exact: bisection of mean P_valid = eta"
    )
    rows: Literal["widest", "root", "all"] = key(
        "widest", "tokens looked at; released code: root, paper: all"
    )
    scope: Literal["global", "token"] = key("global", "token: each token its own (Eq. 11)")

    @model_validator(mode="after")
    def _range(self) -> AdaptiveSettings:
        if not 0 < self.clamp[0] <= self.clamp[1]:
            raise ValueError(f"clamp must be two ascending temperatures > 0, got {list(self.clamp)}")
        return self


class ContrastSettings(Section):
    """CFT: what the history adds to the logits is trained to predict the target too."""

    strength: float = key(0.0, "lambda; 0: off (CFT's code 0.1, IGD's script 0.025)", ge=0)
    without_history: Literal["no-input", "unknown"] = key(
        "no-input", "the second prompt: the instruction alone (CFT), or one word as history (IGD)"
    )


class PreferenceSettings(Section):
    """S-DPO: the target against titles that were not chosen, relative to the model of an earlier run."""

    negatives: int = key(0, "rejected titles of each row; 0: off (S-DPO 3)", ge=0)
    beta: float = key(1.0, "what a nat counts (S-DPO 1)", gt=0)
    reference: Path | None = key(
        None, "folder of the run whose model is the reference and what training starts from"
    )


class BearSettings(Section):
    """BEAR: each token of a title shall be among the best of its step, or beams drop it (arXiv:2601.22925)."""

    strength: float = key(0.0, "lambda; 0: off (its code .25)", ge=0)
    form: Literal["described", "coded"] = key(
        "described", "adds a loss for tokens beams would drop (text); coded: weighs the safe ones more (code)"
    )
    xi: float = key(2.75, "nats over which a token goes from safe to dropped", gt=0)
    width: int = key(10, "beams", ge=1)


class ApaoSettings(Section):
    """APAO: all beginnings of a title shall be likely, those most that are least (arXiv:2603.02730)."""

    strength: float = key(0.0, "beta; 0: off (its code .1)", ge=0)
    form: Literal["pointwise", "pairwise"] = key(
        "pointwise",
        "pairwise: against all beginnings of a depth; pointwise in trie support with temperature 1",
    )
    levels: int = key(0, "depths that count, from the first one; 0: all but a title's last", ge=0)
    temperature: float = key(1.0, "of the probabilities of beginnings", gt=0)
    eta: float = key(0.0, "how much more the worst depth weighs", ge=0)


class FrontSettings(Section):
    """Front-greater learning: from early tokens to all, and to rare ones (arXiv:2601.17787)."""

    curriculum: float = key(1.0, "share of the run after which the front weighs no more", ge=0, le=1)
    rarity: float = key(0.4, "what the weights of rare tokens count at the end beside equal ones", ge=0)


class FlowSettings(Section):
    """Flower: titles that the model draws itself shall be as frequent as their reward (its code's defaults)."""

    strength: float = key(0.999, "theta of the objective; balance 1 - theta (.99 to .9999)", ge=0, lt=1)
    reward: Literal["div", "add", "logp"] = key(
        "div", "of a token: log q / S, log q + lam log s, or log q; q: share of the histories"
    )
    lam: float = key(1.0, "of the personal part (add)", ge=0)
    scores: Annotated[Path, AfterValidator(Path.absolute)] | None = key(
        None, "folder of a run on the same rows that knows how likely each title is, for S and s (div, add)"
    )
    prefixes: Literal["own", "coded"] = key(
        "own", "one reward each; coded: scaled by the title it becomes, -15 where a shorter one ends (code)"
    )

    @model_validator(mode="after")
    def _scored(self) -> FlowSettings:
        if (self.reward == "logp") != (self.scores is None):
            raise ValueError(f"reward 'div' and 'add' need scores, 'logp' has none, got {self.reward!r}")
        return self


class ObjectiveSettings(Section):
    """Support x temperature x weight, and what other losses add."""

    support: Literal["trie", "vocabulary"] = key(
        "trie", "what a token competes with: the valid next tokens (MSL), or all (LML)"
    )
    temperature: float | Literal["adaptive"] = key(1.0, "logits are divided by it; adaptive: ATS of MSL")
    weight: Literal["uniform", "igd", "igd-linear", "position", "front-greater"] = key(
        "uniform",
        "of a token: by its information gain (IGD), by its place in the title (Pos), or as [objective.front] says",
    )
    measure: Measure = key("information", "how much a token decides (igd, igd-linear)")
    beta: float = key(
        0.1,
        "weight of a token without information gain (igd, igd-linear) or of a title's last (position)",
        ge=0,
        le=1,
    )
    normaliser: Literal["weights", "decisions", "sum"] = key(
        "weights",
        "what a batch's loss is divided by: all weights, those where several tokens are valid, or nothing",
    )
    expand_negatives: bool = key(False, "MSL + alpha: the other valid tokens weigh as much as a vocabulary")
    adaptive: AdaptiveSettings = AdaptiveSettings()
    soft_targets: Annotated[Path, AfterValidator(Path.absolute)] | None = key(
        None, "folder of a run on the same rows that says how likely every continuation is"
    )
    soft_alpha: float = key(0.5, "its weight against the true token (TCA4Rec .1)", ge=0, le=1)
    soft_temperature: float = key(1.0, "of its distribution over titles", gt=0)
    soft_form: Literal["cross-entropy", "likelihood"] = key(
        "cross-entropy", "-sum y log p; likelihood: -log sum y p (TCA4Rec)"
    )
    soft_scope: Literal["path", "tree"] = key(
        "path", "which decisions are taught: those of the true title, or of the tree (KL over the catalogue)"
    )
    soft_share: float = key(
        0.5,
        "tree: of the teacher's mass at all decisions, which the fewest hold that are taught beside the path; 1: all",
        gt=0,
        le=1,
    )
    contrast: ContrastSettings = ContrastSettings()
    preference: PreferenceSettings = PreferenceSettings()
    bear: BearSettings = BearSettings()
    apao: ApaoSettings = ApaoSettings()
    front: FrontSettings = FrontSettings()
    flow: FlowSettings | None = None

    @property
    def objectives(self) -> tuple[tuple[str, bool], ...]:
        """Losses of which one can be learned, and whether each is chosen."""
        named = self.soft_targets is not None or self.flow is not None
        alone = named or self.bear.strength > 0 or self.apao.strength > 0
        return (
            ("soft_targets", self.soft_targets is not None),
            ("flow", self.flow is not None),
            ("preference.negatives > 0", self.preference.negatives > 0),
            ("bear.strength > 0", self.bear.strength > 0),
            ("apao.strength > 0", self.apao.strength > 0),
            ("weight = 'front-greater'", self.weight == "front-greater"),
            ("contrast.strength > 0", self.contrast.strength > 0),
            ("expand_negatives = true", self.expand_negatives and alone),
        )

    @model_validator(mode="after")
    def _positive(self) -> ObjectiveSettings:
        if self.temperature != "adaptive" and self.temperature <= 0:
            raise ValueError(f"temperature must be > 0 or 'adaptive', got {self.temperature}")
        if self.temperature == "adaptive" and self.support != "trie":
            raise ValueError("temperature = 'adaptive' needs support = 'trie'")
        if self.expand_negatives and self.support != "trie":
            raise ValueError("expand_negatives = true needs support = 'trie'")
        chosen = [name for name, on in self.objectives if on]
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]} and {chosen[1]} are two objectives; use one")
        if self.bear.strength and self.support != "trie":
            raise ValueError("bear.strength > 0 needs support = 'trie': it compares valid tokens")
        pairwise = self.apao.strength and self.apao.form == "pairwise" and self.apao.levels != 1
        if pairwise and (self.support != "trie" or self.apao.temperature != 1):
            raise ValueError(
                "apao.form = 'pairwise' below depth 1 needs support = 'trie' and apao.temperature = 1: set "
                "apao.levels = 1"
            )
        own = self.temperature == "adaptive" and self.adaptive.scope == "token"
        if self.soft_scope == "tree" and (self.support, self.soft_form, own) != (
            "trie",
            "cross-entropy",
            False,
        ):
            raise ValueError(
                "soft_scope = 'tree' is a divergence over the catalogue: it needs support = 'trie', soft_form = "
                "'cross-entropy' and one temperature for all tokens"
            )
        if self.flow is not None and self.temperature != 1:
            raise ValueError("flow is about probabilities at temperature 1; leave temperature at 1")
        return self

    @model_validator(mode="after")
    def _added(self) -> ObjectiveSettings:
        if self.contrast.strength and self.temperature == "adaptive":
            raise ValueError(
                "contrast.strength > 0 needs a fixed temperature: 'adaptive' is found for other logits"
            )
        if (self.preference.negatives > 0) != (self.preference.reference is not None):
            raise ValueError(
                "preference.negatives > 0 and preference.reference, the run to start from, go together"
            )
        if not self.preference.negatives:
            return self
        # The loss is a mean over rows of a function of whole titles: no token has a weight or temperature.
        for name in ("temperature", "weight", "normaliser", "expand_negatives"):
            default = type(self).model_fields[name].default
            if getattr(self, name) != default:
                raise ValueError(
                    f"preference.negatives > 0 compares whole titles; leave {name} at {default!r}"
                )
        return self
