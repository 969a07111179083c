import anyio
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from couturier.serving.guard import Guard, error_sentence


async def _echo(request: Request):
    return JSONResponse({"bytes": len(await request.body())})


async def _fail(request: Request):
    return JSONResponse([{"error": "n is 0."}], status_code=400)


APP = Starlette(
    routes=[
        Route("/echo", _echo, methods=["GET", "POST"]),
        Route("/fail", _fail, methods=["POST"]),
        Route("/readyz", lambda request: PlainTextResponse("\n")),
    ]
)


def ask(method="POST", path="/echo", chunks=(b"{}",), app=APP, **headers):
    """Drive the middleware as a server would; ``(status, headers, body)``."""
    headers = {"host": "127.0.0.1:3000", "content-type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    coming = [
        {"type": "http.request", "body": chunk, "more_body": place + 1 < len(chunks)}
        for place, chunk in enumerate(chunks)
    ]
    sent = []

    async def receive():
        return coming.pop(0) if coming else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "http_version": "1.1", "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip

    async def drive():
        await Guard(app, max_body_bytes=100)(scope, receive, send)

    anyio.run(drive)
    answered = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:])


def test_a_good_question_passes_with_its_body_whole():
    assert ask(chunks=(b"a" * 40, b"b" * 60))[::2] == (200, b'{"bytes":100}')


def test_every_answer_has_security_headers():
    for answer in (ask(), ask(path="/fail"), ask(content_type="text/plain"), ask(path="/nowhere")):
        headers = answer[1]
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "default-src 'none'" in headers["content-security-policy"] and headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.bentoml+pickle",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "text/plain",
        "",
    ],
)
def test_only_json_is_read(media_type):
    status, _, body = ask(content_type=media_type)
    assert status == 415 and b"send application/json" in body


def test_the_pickle_media_type_is_refused_however_it_is_written():
    assert ask(content_type="Application/VND.BentoML+Pickle; charset=x")[0] == 415


def test_a_stated_length_that_is_too_large_is_refused_unread():
    status, _, body = ask(content_length="101", chunks=(b"",))
    assert status == 413 and b"101 bytes" in body


def test_an_unstated_length_is_counted():
    assert ask(chunks=(b"a" * 60, b"b" * 60))[0] == 413


def test_foreign_host_names_are_refused_but_probes_answer(monkeypatch):
    assert ask(host="evil.example:3000")[0] == 421
    assert ask(host="localhost")[0] == 200 and ask(host="[::1]:3000")[0] == 200
    assert ask(method="GET", path="/readyz", host="10.0.0.7")[0] == 200
    monkeypatch.setenv("COUTURIER_HOSTS", "couturier.example, localhost")
    assert ask(host="couturier.example:80")[0] == 200 and ask(host="127.0.0.1")[0] == 421
    monkeypatch.setenv("COUTURIER_HOSTS", "*")
    assert ask(host="evil.example")[0] == 200


def test_errors_have_one_form():
    status, headers, body = ask(path="/fail")
    assert (status, body) == (400, b'{"error": "n is 0."}') and int(headers["content-length"]) == len(body)
    assert ask(path="/nowhere")[2] == b'{"error": "Not Found"}'


def test_validation_details_become_a_sentence():
    body = (
        b'{"error": "1 validation error", "detail": [{"loc": [], "msg": "Invalid JSON: EOF", "type": "json_invalid"}]}'
    )
    assert error_sentence(body, 400) == "the body: Invalid JSON: EOF."
    assert error_sentence(b"", 502) == "status 502" and error_sentence(b"[1, 2]", 500) == "status 500"


def test_websockets_are_closed():
    sent = []

    async def drive():
        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "websocket.connect"}

        await Guard(APP)({"type": "websocket", "path": "/", "headers": []}, receive, send)

    anyio.run(drive)
    assert sent == [{"type": "websocket.close", "code": 1003}]
