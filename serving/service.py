"""The BentoML service: pictures, scores and feedback for one bundle, and a page to try them on.

    browser or client ──JSON──▶ Guard ──▶ BentoML ──▶ one worker thread ──▶ Bundle ──▶ PNG
                                                 └──▶ feedback folder (append)

Everything is a POST with a JSON body; ``GET /`` is the page and ``GET /version`` the lineage. One worker, one thread
that computes: requests queue, and what one draws never depends on another. Settings come from the environment:
``COUTURIER_BUNDLE`` (folder; default: the one packed beside the code), ``COUTURIER_FEEDBACK`` (folder),
``COUTURIER_REGISTERED`` (JSON: what the registry knows of this bento), ``COUTURIER_STUDIO=off``, ``COUTURIER_HOSTS``.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import anyio.to_thread
import bentoml
from bentoml.exceptions import BentoMLException, NotFound
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from couturier.components.errors import CouturierError, LineageError, UnknownUserError
from couturier.serving.feedback import Drawn, FeedbackFullError, FeedbackLog
from couturier.serving.forms import (
    BadRequest,
    DrawnPicture,
    FeedbackAnswer,
    FeedbackForm,
    GenerateAnswer,
    GenerateForm,
    HistoryAnswer,
    HistoryForm,
    Item,
    KnownItem,
    PeopleAnswer,
    PeopleForm,
    ScoreAnswer,
    ScoredItem,
    ScoreForm,
    VersionForm,
)
from couturier.serving.guard import Guard
from couturier.serving.pictures import grid, png_bytes

if TYPE_CHECKING:
    from couturier.serving.bundle import Bundle, History, Picture

BUNDLE_SETTING = "COUTURIER_BUNDLE"
FEEDBACK_SETTING = "COUTURIER_FEEDBACK"
REGISTERED_SETTING = "COUTURIER_REGISTERED"
STUDIO_SETTING = "COUTURIER_STUDIO"
# What the page consists of. A fixed list: no path from a request ever reaches the disk.
PAGE = {"studio.html": "text/html", "studio.js": "text/javascript", "studio.css": "text/css"}


class _DayFull(BentoMLException):
    """No room for more events today. (BentoML keeps the sentences of statuses below 500 only.)"""

    error_code = HTTPStatus.TOO_MANY_REQUESTS


async def _page(request: Request) -> Response:
    """The page and its two files. Off with ``COUTURIER_STUDIO=off``."""
    if os.environ.get(STUDIO_SETTING, "on") == "off":
        return JSONResponse({"error": f"the page is switched off ({STUDIO_SETTING}=off)."}, status_code=404)
    name = request.url.path.strip("/")
    name = name if name in PAGE else "studio.html"
    return Response((Path(__file__).parent / name).read_bytes(), media_type=PAGE[name])


async def _lineage(request: Request) -> Response:
    """``GET /version``."""
    return JSONResponse(bentoml.get_current_service().lineage())


_pages = Starlette(
    routes=[
        *(Route(path, _page) for path in ("/", "/studio", *(f"/{name}" for name in PAGE if name != "studio.html"))),
        Route("/version", _lineage),
    ]
)


@bentoml.asgi_app(_pages, path="/", name="pages")
@bentoml.service(
    name="couturier",
    workers=1,
    threads=1,
    traffic={"timeout": 60, "max_concurrency": 32},
    http={"host": "127.0.0.1", "cors": {"enabled": False}},
)
class Couturier:
    """Draws the next item for one person."""

    def __init__(self) -> None:
        import torch

        from couturier.components.generator.words import Extractor, TitleConfig
        from couturier.serving.bundle import Bundle
        from couturier.serving.titles import Titles

        torch.set_num_threads(1)
        self.bundle: Bundle = Bundle.load(_bundle_folder())
        # Phrases and no language model: what is served must not depend on what else is installed.
        self.titles = Titles(self.bundle, TitleConfig(writer=Extractor.name))
        folder = os.environ.get(FEEDBACK_SETTING)
        self.log = FeedbackLog(Path(folder)) if folder else None
        self.drawn = Drawn()
        self.model = _bento_tag() or self.bundle.version["bundle"]

    @bentoml.api
    def generate(self, form: GenerateForm, /) -> GenerateAnswer:
        """Draw ``n`` pictures; the same form draws the same bytes."""
        drawn = self._draw(form)
        named = (
            self.titles.of(self._history(form.user_id, form.history), drawn) if form.titles else self.titles.own(drawn)
        )
        return GenerateAnswer(
            model=self.model,
            attribution=self.bundle.catalogue.attribution,
            pictures=[
                DrawnPicture(
                    id=picture.id,
                    png=_base64(png_bytes(picture.rgb_HWC)),
                    nearest=self._item(picture.nearest),
                    title=title.text,
                    titled_by=title.by,
                )
                for picture, title in zip(drawn, named, strict=True)
            ],
        )

    @bentoml.api(route="/generate.png")
    def generate_png(self, form: GenerateForm, /) -> Annotated[bytes, bentoml.validators.ContentType("image/png")]:
        """The same pictures as one PNG, in a grid."""
        return png_bytes(grid([picture.rgb_HWC for picture in self._draw(form)]), scale=4)

    @bentoml.api
    def score(self, form: ScoreForm, /) -> ScoreAnswer:
        """Rank catalogue items for one person with the judge."""
        with _answering():
            indices = list(dict.fromkeys(self.bundle.indices(form.item_ids, "item_ids")))
            scores = self.bundle.score(self._history(form.user_id, form.history), indices)
        order = sorted(range(len(indices)), key=lambda place: (-scores[place], indices[place]))
        items = [
            ScoredItem(**self._item(indices[place]).model_dump(), score=float(scores[place]), rank=rank)
            for rank, place in enumerate(order, 1)
        ]
        return ScoreAnswer(model=self.model, items=items)

    @bentoml.api
    async def feedback(self, form: FeedbackForm, /) -> FeedbackAnswer:
        """Keep one event. The time is the server's."""
        if self.log is None:
            raise NotFound(f"feedback is not kept: set {FEEDBACK_SETTING} to a folder and start again.")
        event: dict[str, Any] = {"user_id": form.user_id, "kind": form.kind, "value": form.value, "model": self.model}
        with _answering():
            if form.item_id is not None:
                self.bundle.indices([form.item_id], "item_id")
                event |= {"item_id": form.item_id, "generation": None}
            else:
                event |= self._generation(form)
            row = await anyio.to_thread.run_sync(self.log.append, event)
        return FeedbackAnswer(event_id=row["event_id"], timestamp=row["timestamp"], item_id=row["item_id"])

    @bentoml.api
    async def history(self, form: HistoryForm, /) -> HistoryAnswer:
        """What is known of one person, with pictures."""
        with _answering():
            known = self.bundle.history_of(form.user_id)
        items = [
            KnownItem(
                **self._item(index).model_dump(),
                png=_base64(png_bytes(self.bundle.catalogue.rgb_IHWC[index])),
                age_days=round(age, 1),
            )
            for index, age in zip(known.items, known.ages_days, strict=True)
        ]
        return HistoryAnswer(user_id=form.user_id, attribution=self.bundle.catalogue.attribution, items=items)

    @bentoml.api
    async def people(self, form: PeopleForm, /) -> PeopleAnswer:
        """Ids of known people. Off with the page: a list of ids is for trying things out."""
        if os.environ.get(STUDIO_SETTING, "on") == "off":
            raise NotFound(f"the list of people is switched off ({STUDIO_SETTING}=off).")
        found = [user for user in self.bundle.users if user.startswith(form.prefix)]
        return PeopleAnswer(total=len(found), users=found[: form.limit])

    @bentoml.api
    async def version(self, form: VersionForm, /) -> dict[str, Any]:
        """Where this model came from: commit, data, configuration, manifests, registry, bento."""
        return self.lineage()

    def lineage(self) -> dict[str, Any]:
        """What ``version`` answers."""
        return {
            **self.bundle.version,
            "bento": _bento_tag(),
            "registered": json.loads(os.environ.get(REGISTERED_SETTING, "null")),
        }

    def _history(self, user_id: str | None, item_ids: list[str] | None) -> History:
        if user_id is not None:
            return self.bundle.history_of(user_id)
        return self.bundle.history_from(item_ids or [])

    def _draw(self, form: GenerateForm) -> list[Picture]:
        with _answering():
            history = self._history(form.user_id, form.history)
            pictures = self.bundle.generate([history], form.sampling())[0]
        ids = self.bundle.catalogue.item_ids
        for place, picture in enumerate(pictures):
            recipe = {
                "id": picture.id,
                "place": place,
                "history": [ids[index] for index in history.items],
                "user_id": form.user_id,
                "nearest": ids[picture.nearest],
                **form.model_dump(include={"n", "guidance", "temperature", "seed"}),
            }
            self.drawn.remember(_key(picture.id, form.user_id), recipe)
        return pictures

    def _generation(self, form: FeedbackForm) -> dict[str, Any]:
        generation_id = form.generation_id or ""
        # Drawn for this person, or from a history that was sent along without a name.
        recipe = self.drawn.recipe(_key(generation_id, form.user_id)) or self.drawn.recipe(_key(generation_id, None))
        if recipe is None:
            raise NotFound(
                f"generation_id {generation_id!r} is not among the last {self.drawn.limit} pictures drawn here for "
                f"user_id {form.user_id!r}; draw it again with the same seed, then send the feedback."
            )
        return {"item_id": recipe["nearest"], "generation": recipe}

    def _item(self, index: int) -> Item:
        row = self.bundle.catalogue.items.row(index, named=True)
        return Item(item_id=row["item_id"], title=row["title"])


# The decorators above made a bentoml.Service of the class.
cast("bentoml.Service[Any]", Couturier).add_asgi_middleware(Guard)


@contextmanager
def _answering() -> Iterator[None]:
    """Turn what a person can mend into a sentence with a status; anything else stays a bare 500."""
    try:
        yield
    except UnknownUserError as error:
        raise NotFound(str(error)) from None
    except FeedbackFullError as error:
        raise _DayFull(str(error)) from None
    except CouturierError as error:
        raise BadRequest(str(error)) from None


def _bundle_folder() -> Path:
    named = os.environ.get(BUNDLE_SETTING)
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "model"
    if not folder.is_dir():
        raise LineageError(f"there is no bundle at {folder}; serve a bento, or set {BUNDLE_SETTING} to a bundle.")
    return folder


def _bento_tag() -> str | None:
    """The tag of the bento this process serves; None when the service runs from the source tree."""
    from bentoml import server_context

    name, version = server_context.bento_name, server_context.bento_version
    return f"{name}:{version}" if name and version and version != "not available" else None


def _key(generation_id: str, user_id: str | None) -> str:
    return json.dumps([generation_id, user_id])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
