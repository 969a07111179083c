"""The door of the service, as ASGI middleware: what may come in, and how answers leave.

In: JSON bodies of a bounded size, for a host name that is ours (a page elsewhere cannot reach a loopback service by
pointing its own name at 127.0.0.1). Out: security headers on every answer, and errors as ``{"error": "a sentence"}``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_BODY_BYTES = 64 * 1024
HOSTS_SETTING = "COUTURIER_HOSTS"
_LOOPBACK = "localhost,127.0.0.1,::1"
_PROBES = frozenset({"/livez", "/readyz", "/healthz"})
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


class Guard:
    """Wraps the whole app. ``COUTURIER_HOSTS`` names the hosts that requests may be addressed to (comma-separated,
    ``*`` for any); the default is loopback only. Health probes are answered under any name."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], max_body_bytes: int = MAX_BODY_BYTES
    ) -> None:
        self.app, self.max_body_bytes = app, max_body_bytes
        self.hosts = {name.strip().lower() for name in os.environ.get(HOSTS_SETTING, _LOOPBACK).split(",")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        answer = _Answer(send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        body = b""
        if refusal is None:
            body, complete = await self._read(receive)
            if not complete:
                refusal = _refuse(413, f"the body is larger than {self.max_body_bytes} bytes; send less at a time.")
        if refusal is not None:
            await refusal(scope, receive, answer)
            return
        await self.app(scope, _replay(body, receive), answer)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> JSONResponse | None:
        if (
            scope["path"] not in _PROBES
            and "*" not in self.hosts
            and _host_name(headers.get("host", "")) not in self.hosts
        ):
            return _refuse(
                421, f"this service does not answer to the host {headers.get('host', '')!r}; add it to {HOSTS_SETTING}."
            )
        if scope["method"] not in ("GET", "HEAD"):
            media_type = headers.get("content-type", "").split(";")[0].strip().lower()
            if media_type != "application/json":
                return _refuse(415, f"the media type {media_type!r} is not read here; send application/json.")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.max_body_bytes:
            return _refuse(413, f"the body has {length} bytes; at most {self.max_body_bytes} are read.")
        return None

    async def _read(self, receive: Receive) -> tuple[bytes, bool]:
        """The whole body, and whether it kept within bounds; a body without a stated length is counted as it comes."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.max_body_bytes:
                return b"", False
            if message["type"] != "http.request" or not message.get("more_body", False):
                return body, True


class _Answer:
    """Adds headers; holds errors back until they are whole, to put them into one form."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.held: Message | None = None
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            theirs = [
                (name, value) for name, value in message["headers"] if name.lower().decode("latin-1") not in _HEADERS
            ]
            message = {**message, "headers": theirs + ours}
            if message["status"] >= 400:
                self.held = message
                return
        elif self.held is not None:
            self.body += message.get("body", b"")
            if message.get("more_body", False):
                return
            body = json.dumps({"error": error_sentence(self.body, self.held["status"])}).encode()
            kept = [(n, v) for n, v in self.held["headers"] if n.lower() not in (b"content-length", b"content-type")]
            kept += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await self.send({**self.held, "headers": kept})
            message = {"type": "http.response.body", "body": body}
        await self.send(message)


def error_sentence(body: bytes, status: int) -> str:
    """The sentence inside an error answer, whichever of BentoML's and Starlette's forms it has.

    Example:
        >>> error_sentence(b'[{"error": "n is 0."}]', 400), error_sentence(b"Not Found", 404)
        ('n is 0.', 'Not Found')
    """
    text = body.decode("utf-8", "replace")
    try:
        value = json.loads(text)
    except ValueError:
        return text.strip() or f"status {status}"
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return f"status {status}"
    if isinstance(value.get("detail"), list):
        return " ".join(f"{'.'.join(map(str, part['loc'])) or 'the body'}: {part['msg']}." for part in value["detail"])
    return str(value.get("error", f"status {status}"))


def _refuse(status: int, sentence: str) -> JSONResponse:
    return JSONResponse({"error": sentence}, status_code=status)


def _host_name(host: str) -> str:
    """``[::1]:3000`` → ``::1``; ``localhost:3000`` → ``localhost``."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive channel that gives a body once, then what really comes (a disconnect)."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
