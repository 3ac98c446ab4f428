"""What is said over HTTP, as pydantic models: bodies of requests and of answers, and what the service refuses.

They make the OpenAPI document; answers are built as plain dictionaries of these shapes, which is faster.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Text = Annotated[str, Field(max_length=100_000)]
Id = Annotated[str, Field(min_length=1, max_length=1000)]
Ids = Annotated[list[Id], Field(max_length=100_000)]
SearchName = Literal["beam", "exact", "catalogue", "grounding"]


class Asked(BaseModel):
    """A body of a request: a key that is not known is a mistake."""

    model_config = ConfigDict(extra="forbid", strict=True)


class History(Asked):
    """What a user had, oldest first: by titles or by ids of the catalogue; both absent or empty for a new user."""

    titles: list[Text] | None = Field(None, max_length=10_000)
    ids: list[Id] | None = Field(None, max_length=10_000)

    @model_validator(mode="after")
    def _one_of_both(self) -> History:
        if self.titles is not None and self.ids is not None:
            raise ValueError("wanted titles or ids, got both; give one of them")
        return self


Histories = Annotated[list[History], Field(min_length=1, max_length=1000)]


class RecommendRequest(Asked):
    """Histories, and what is wanted for each."""

    histories: Histories
    k: int = Field(10, ge=1, description="Titles for each history.")
    search: SearchName | None = Field(None, description="Default: as the run's recipe says.")
    exclude: Ids | Id = Field([], description="Ids that are not returned, or the name of a set.")
    allow: Ids | Id | None = Field(None, description="The only ids that are returned, or the name of a set.")
    keep_history: bool = Field(False, description="Whether titles of a history may be returned.")
    explain: bool = Field(False, description="Also say which tokens decided.")
    compare: bool = Field(False, description="Also name what ten beams would return.")


class TokenOut(BaseModel):
    """One token of a title."""

    text: str
    probability: float
    decided: bool


class ItemOut(BaseModel):
    """One title."""

    id: str
    title: str
    score: float
    tokens: list[TokenOut] | None = Field(None, description="Where explain was asked for.")


class Result(BaseModel):
    """What one history gets, best first."""

    items: list[ItemOut]
    certified: bool = Field(description="No better title is missing.")
    unknown: list[str] = Field(description="Of the history; left out.")
    tied: int | None = Field(
        None, description="So many of the last places may be other titles' (half precision)."
    )
    beam: list[str] | None = Field(
        None, description="Ids that ten beams would return, where compare was asked for."
    )


class Answered(BaseModel):
    """What every answer of the model has."""

    request_id: str
    catalog_version: int
    took_ms: float
    counters: dict[str, int] = Field(
        description="Work of the forwards that this request had a part in; ``users`` shared them."
    )
    unknown: list[str] = Field(description="Ids of exclude, allow or candidates that the catalogue has not.")


class RecommendResponse(Answered):
    """A result for each history."""

    results: list[Result]


class ScoreRequest(Asked):
    """Histories, and the items to score: one list for all, or one for each."""

    histories: Histories
    candidates: Annotated[list[Ids], Field(min_length=1, max_length=1000)]

    @model_validator(mode="after")
    def _one_for_each(self) -> ScoreRequest:
        if len(self.candidates) not in (1, len(self.histories)):
            raise ValueError(
                f"wanted one list of candidates, or one for each of {len(self.histories)} histories, got "
                f"{len(self.candidates)}"
            )
        return self


class Score(BaseModel):
    """The score of one item; null where it is minus infinity."""

    id: str
    score: float | None


class Scores(BaseModel):
    """Scores in the order of the candidates, without those that are unknown."""

    scores: list[Score]
    unknown: list[str] = Field(description="Of the history; left out.")


class ScoreResponse(Answered):
    """Scores for each history."""

    results: list[Scores]


class Model(BaseModel):
    """What recommends."""

    id: str
    object: Literal["model"] = "model"
    kind: Literal["generative", "sequential"]
    search: str
    searches: list[str]
    explains: bool = Field(description="Whether it knows which tokens decided.")
    settings: dict[str, str | int | float | bool]
    n_items: int
    catalog_version: int
    sets: list[str] = Field(description="Names that exclude and allow may give.")
    max_k: int
    max_histories: int


class Models(BaseModel):
    """The models of this service: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Item(Asked):
    """An item of the catalogue."""

    id: Id
    title: Annotated[str, Field(max_length=10_000)]


class CatalogPage(BaseModel):
    """Some items of the catalogue."""

    catalog_version: int
    n_items: int
    items: list[Item]


class Change(Asked):
    """Items that come and go; all of it or nothing."""

    add: list[Item] = Field([], max_length=10_000_000)
    remove: list[Id] = Field([], max_length=10_000_000)


class Changed(BaseModel):
    """The catalogue that is used from now on."""

    request_id: str
    catalog_version: int
    n_items: int
    took_ms: float


class Health(BaseModel):
    """Whether it works, and if not, why."""

    status: Literal["ok", "unavailable"]
    reasons: list[str] = []


class Problem(BaseModel):
    """What went wrong."""

    code: str
    message: str


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: Problem
