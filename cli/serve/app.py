"""The HTTP face: routes, keys and errors."""

import asyncio
import hmac
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .engine import QueueFull, Stopped
from .errors import ApiError
from .metrics import Metrics
from .service import Service
from .talks import ClientLeft, EventStream, Inbox, Room, Talk, failure, now, read_body, watch_client

GONE = 499  # nobody reads it
TEXT_THREADS, MEDIA_THREADS = 4, 2  # threads that read requests without and with pictures and videos, which take memory


def create_app(service: Service, api_keys: tuple[str, ...] = ()) -> FastAPI:
    """The server's routes.

    Args:
        service: whose engine is started and stopped with the app.
        api_keys: one of which `/v1/…` asks for, if there are any.
    """
    metrics = Metrics()
    text_pool, media_pool = ThreadPoolExecutor(TEXT_THREADS, "text"), ThreadPoolExecutor(MEDIA_THREADS, "media")
    limits, engine = service.limits, service.engine
    room = Room(engine.rows + engine.queue, limits.memory)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        engine.start()
        yield
        engine.close(halt=True)
        await asyncio.to_thread(engine.join, 30.0)
        for pool in (text_pool, media_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    hidden = dict.fromkeys(("docs_url", "redoc_url", "openapi_url"))
    app = FastAPI(title="Kimi-K2.6", lifespan=lifespan, redirect_slashes=False, **hidden)

    def error_response(error: ApiError) -> Response:
        metrics.answers[error.status] += 1
        headers = {"Retry-After": str(error.retry_after)} if error.retry_after is not None else {}
        headers |= {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
        headers |= {"Connection": "close"} if error.status == 408 else {}  # the rest of the body may never come
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        code = error.detail.lower().replace(" ", "_")
        return error_response(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code))

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> Response:
        return error_response(failure("error", 0))  # the server logs it

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
        check_key(request)
        if engine.closed:
            raise failure("stopped", 0)
        arrived, loop, inbox = now(), asyncio.get_running_loop(), Inbox()
        place = room.enter()
        try:
            body = await read_body(request, place, limits.max_body, limits.body_seconds)
            draft = await loop.run_in_executor(text_pool, service.read, body)
            del body
            pool = media_pool if draft.has_media else text_pool
            prepared = await loop.run_in_executor(pool, service.prepare, draft, arrived + limits.seconds)
            del draft
            place.let_go()
            place.hold(prepared.prompt.nbytes)
            answer = service.begin(prepared, inbox.send)
        except ClientDisconnect:
            place.leave()
            return Response(status_code=GONE)
        except (QueueFull, Stopped) as error:
            place.leave()
            raise (room.full() if isinstance(error, QueueFull) else failure("stopped", 0)) from error
        except BaseException:
            place.leave()
            raise
        metrics.prompt_tokens += len(prepared.prompt.ids)
        watch = asyncio.create_task(watch_client(request.receive, inbox))
        talk = Talk(answer, inbox, watch, place, metrics, arrived, limits.seconds)
        try:
            first = await talk.first()
            if prepared.request.stream:
                return EventStream(talk, first)
            return JSONResponse(await talk.whole(first))
        except ClientLeft:
            talk.close(left=True)
            return Response(status_code=GONE)
        except BaseException:
            talk.close()
            raise

    return app
