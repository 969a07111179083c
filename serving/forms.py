"""What the service takes: one pydantic model a question, and one sentence for each way it can be wrong."""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Any, Literal

from bentoml.exceptions import BentoMLException
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import ErrorDetails

from couturier.serving.sampling import GUIDANCE, MAX_HISTORY, MAX_PICTURES, MAX_SEED, TEMPERATURE, Sampling

# Ids are people's own and only ever looked up in a table; control characters are refused, as in the event contract.
Id = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


class BadRequest(BentoMLException):
    """The question cannot be answered as it was put; the sentence says why and what to send instead."""

    error_code = HTTPStatus.BAD_REQUEST


class _Form(BaseModel):
    """Unknown fields are refused, numbers are not guessed from text, and errors are sentences."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _in_sentences(cls, value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            fields = ", ".join(cls.model_fields)
            raise BadRequest(" ".join(_sentence(detail, fields) for detail in error.errors())) from None


class _About(_Form):
    """Whom it is about: a known person, or a history of item ids."""

    user_id: Id | None = Field(default=None, description="A person whose history the model knows.")
    history: list[Id] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_HISTORY,
        description="Item ids, the favourite first; instead of user_id.",
    )

    @model_validator(mode="after")
    def _one_of_the_two(self) -> _About:
        if (self.user_id is None) == (self.history is None):
            raise BadRequest("Send either user_id or history (a list of item ids), and not both.")
        return self


class GenerateForm(_About):
    """Draw pictures for one person."""

    n: int = Field(default=4, ge=1, le=MAX_PICTURES, description="How many pictures.")
    guidance: float = Field(
        default=1.0, ge=GUIDANCE[0], le=GUIDANCE[1], description="0 ignores the history, 1 follows it."
    )
    temperature: float = Field(default=1.0, ge=TEMPERATURE[0], le=TEMPERATURE[1], description="Higher is more varied.")
    seed: int = Field(default=0, ge=0, le=MAX_SEED, description="The same seed draws the same pictures.")
    likeliest: bool = Field(
        default=False,
        description="The likeliest pictures, all different, the surest first, instead of random draws; temperature "
        "and seed change nothing then.",
    )
    new: bool = Field(default=False, description="With likeliest: pass over pictures of the history's own items.")
    titles: bool = Field(default=False, description="Choose each picture's title for this person.")

    def sampling(self) -> Sampling:
        return Sampling(
            n=self.n,
            guidance=self.guidance,
            temperature=self.temperature,
            seed=self.seed,
            likeliest=self.likeliest,
            new=self.new,
        )


class ScoreForm(_About):
    """Rank real items for one person."""

    item_ids: list[Id] = Field(min_length=1, max_length=1000, description="Items of the catalogue to rank.")


class FeedbackForm(_Form):
    """One event: what a person did with a real item or with a picture that was drawn here."""

    user_id: Id
    item_id: Id | None = Field(default=None, description="An item of the catalogue.")
    generation_id: Id | None = Field(
        default=None, description="The id of a picture that this service drew; instead of item_id."
    )
    kind: Literal["like", "dislike", "view", "purchase", "save", "share"]
    value: float = Field(default=1.0, ge=-1000.0, le=1000.0)

    @model_validator(mode="after")
    def _one_of_the_two(self) -> FeedbackForm:
        if (self.item_id is None) == (self.generation_id is None):
            raise BadRequest("Send either item_id or generation_id, and not both.")
        return self


class HistoryForm(_Form):
    """Show what is known of one person."""

    user_id: Id


class PeopleForm(_Form):
    """List people whose history is known."""

    prefix: Annotated[str, StringConstraints(max_length=128)] = ""
    limit: int = Field(default=50, ge=1, le=200)


class VersionForm(_Form):
    """Nothing to say."""


class Item(BaseModel):
    """A real item of the catalogue."""

    item_id: str
    title: str


class DrawnPicture(BaseModel):
    """A picture that was drawn; ``png`` is base64. ``title`` is that of the nearest item (``titled_by`` is ``item``)
    or, if titles were asked for, a phrase of what is said of it that the judge prefers for this person."""

    id: str
    png: str
    nearest: Item
    title: str
    titled_by: str


class GenerateAnswer(BaseModel):
    """Pictures, and what to show beside them."""

    model: str
    attribution: str
    pictures: list[DrawnPicture]


class ScoredItem(Item):
    """``score`` is the judge's logit in SDs over random items; ``rank`` 1 is the best."""

    score: float
    rank: int


class ScoreAnswer(BaseModel):
    """Items, the best first."""

    model: str
    items: list[ScoredItem]


class FeedbackAnswer(BaseModel):
    """The event as it was kept."""

    event_id: str
    timestamp: str
    item_id: str


class KnownItem(Item):
    """An item of somebody's history; ``png`` is base64."""

    png: str
    age_days: float


class HistoryAnswer(BaseModel):
    """What is known of a person, the favourite first."""

    user_id: str
    attribution: str
    items: list[KnownItem]


class PeopleAnswer(BaseModel):
    """The first ``limit`` ids that begin with the prefix, and how many do."""

    total: int
    users: list[str]


def _sentence(detail: ErrorDetails, fields: str) -> str:
    where = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"{where} is not a field here; the fields are: {fields or 'none'}."
    if detail["type"] == "missing":
        return f"{where} is missing; send it."
    if detail["type"] == "string_pattern_mismatch":
        return f"{where} is {_short(detail['input'])}, which is no id: it holds control characters."
    return f"{where or 'the body'} is {_short(detail['input'])}. {detail['msg']}."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
