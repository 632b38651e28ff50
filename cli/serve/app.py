"""The HTTP face: routes, limits, streams, and what happens when a client leaves."""

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Optional

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .engine import QueueFull, Stopped
from .errors import ApiError
from .metrics import Metrics
from .replies import Answer, Event
from .service import Inbox, Service, failure, now

logger = logging.getLogger(__name__)

GONE = 499  # nobody reads it
DESKS, STUDIOS = 4, 2  # threads that read requests without and with pictures and videos, which take memory


def create_app(service: Service, api_keys: tuple[str, ...] = ()) -> FastAPI:
    """The server's routes.

    Args:
        service: whose engine is started and stopped with the app.
        api_keys: one of which `/v1/…` asks for, if there are any.
    """
    metrics = Metrics()
    desk, studio = (ThreadPoolExecutor(count, name) for count, name in ((DESKS, "desk"), (STUDIOS, "studio")))
    limits, engine = service.limits, service.engine
    busy = 0  # requests being answered

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        engine.start()
        yield
        engine.close(halt=True)
        await asyncio.to_thread(engine.join, 30.0)
        for pool in (desk, studio):
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(title="Kimi-K2.6", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    def told(error: ApiError) -> Response:
        metrics.answers[error.status] += 1
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
        headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        # What is left of a refused body would be read as the next request.
        headers |= {"Connection": "close"} if error.status in (408, 413) else {}
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return told(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        code = error.detail.lower().replace(" ", "_")
        return told(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code))

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return told(failure("error", 0))  # the server logs it

    def check_key(request: Request) -> None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(key.strip().encode(), wanted.encode()) for wanted in api_keys]
        if api_keys and not (scheme.lower() == "bearer" and any(known)):
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def card(name: str) -> dict:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "kimi-k26",
            "max_model_len": service.max_length,
        }

    @app.get("/health")
    async def health() -> Response:
        if not engine.alive or engine.closed:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok", "running": engine.running, "waiting": engine.waiting})

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return PlainTextResponse(metrics.text(engine), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [card(name) for name in service.names]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request)
        if name not in service.names:
            raise ApiError(404, f"the model {name!r:.200} does not exist", param="model", code="model_not_found")
        return JSONResponse(card(name))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        nonlocal busy
        check_key(request)
        if engine.closed:
            raise failure("stopped", 0)
        if busy >= engine.rows + engine.queue:
            raise queue_full()
        arrived = now()
        busy += 1

        def done() -> None:
            nonlocal busy
            busy -= 1

        try:
            body = await read_body(request, limits.max_body, limits.body_seconds)
            loop, inbox = asyncio.get_running_loop(), Inbox()
            draft = await loop.run_in_executor(desk, service.read, body)
            del body
            pool = studio if draft.has_media else desk
            prepared = await loop.run_in_executor(pool, service.prepare, draft, arrived + limits.seconds)
            answer = service.begin(prepared, inbox.send)
        except ClientDisconnect:
            done()
            return Response(status_code=GONE)
        except QueueFull:
            done()
            raise queue_full() from None
        except Stopped:
            done()
            raise failure("stopped", 0) from None
        except BaseException:
            done()
            raise
        watch = asyncio.create_task(watch_client(request.receive, inbox))
        metrics.prompt_tokens += len(prepared.prompt.ids)
        talk = Talk(answer, inbox, watch, metrics, arrived, limits.seconds, done)
        try:
            first = await talk.first()
            if prepared.request.stream:
                return EventStream(talk, first)
            return JSONResponse(await talk.whole(first))
        except ClientLeft:
            talk.close()
            return Response(status_code=GONE)
        except BaseException:
            talk.close()
            raise

    def queue_full() -> ApiError:
        message = f"{engine.rows + engine.queue} requests are at work or waiting already; try again later"
        return ApiError(429, message, code="queue_full", retry_after=5)

    return app


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The body, no longer than `limit` bytes and no slower than `seconds`."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    data = bytearray()

    async def read() -> None:
        async for part in request.stream():
            data.extend(part)
            if len(data) > limit:
                raise too_large

    try:
        await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body took longer than {seconds:g} seconds", code="timeout") from None
    return bytes(data)


async def watch_client(receive: Callable, inbox: Inbox) -> None:
    """Says so when the client leaves."""
    while (await receive())["type"] != "http.disconnect":
        pass
    inbox.send(Event(0, gone=True))


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Talk:
    """The events of one answer, until it is complete or the client leaves. `close` has to be called in the end."""

    def __init__(
        self,
        answer: Answer,
        inbox: Inbox,
        watch: asyncio.Task,
        metrics: Metrics,
        arrived: float,
        seconds: float,
        done: Callable[[], None],
    ):
        self.answer, self._inbox, self._watch, self._metrics = answer, inbox, watch, metrics
        self._arrived, self._seconds, self._done = arrived, seconds, done
        self._closed = False

    async def events(self) -> list[Event]:
        """The next events. Raises `ApiError` where a reply failed, and `ClientLeft`."""
        events = await self._inbox.next()
        for event in events:
            if event.gone:
                raise ClientLeft
            if event.failure is not None:
                raise failure(event.failure, self._seconds)
        return events

    async def first(self) -> list[Event]:
        events = await self.events()
        self._metrics.first_token.add(now() - self._arrived)
        return events

    async def whole(self, events: list[Event]) -> dict:
        """The complete answer."""
        while True:
            for event in events:
                self.answer.add(event)
            if self.answer.is_over:
                break
            events = await self.events()
        self.close(200)
        return self.answer.whole()

    async def chunks(self, events: list[Event]) -> AsyncIterator[list[dict]]:
        """The answer as chunks, as many at a time as there are."""
        while True:
            made = [chunk for event in events for chunk in self.answer.chunks(event)]
            if self.answer.is_over:
                break
            yield made
            events = await self.events()
        yield [*made, *self.answer.last_chunks()]

    def close(self, status: Optional[int] = None) -> None:
        """The answer is complete, with `status`; or nothing more of it is wanted."""
        if self._closed:
            return
        self._closed = True
        self._watch.cancel()
        self._done()
        for sequence in self.answer.sequences:
            sequence.cancelled = True
        if status is not None:
            self._metrics.answers[status] += 1
            self._metrics.whole.add(now() - self._arrived)
        elif not self.answer.is_over:
            self._metrics.left += 1


class EventStream(Response):
    """Server-sent events: one `data:` line for each chunk, then `[DONE]`."""

    def __init__(self, talk: Talk, first: list[Event]):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._talk, self._first = talk, first

    async def __call__(self, scope, receive, send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunks in self._talk.chunks(self._first):
                    await write("".join(map(line, chunks)))
                self._talk.close(200)
            except ApiError as error:  # too late for a status: it goes into the stream
                self._talk.close(error.status)
                await write(line(error.body()))
            await write("data: [DONE]\n\n", more=False)
        except ClientLeft:
            pass
        finally:
            self._talk.close()


def line(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
