"""One request's way through the server: its place, its body, its events, its stream; and what happens when its client
leaves."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Optional

from fastapi import Request
from fastapi.responses import Response

from .errors import ApiError
from .metrics import Metrics
from .replies import Answer, Event

now = time.monotonic
LAST_WORDS = 5.0  # seconds to send what came in time


class Room:
    """Who is being answered, and the memory they hold: bodies until they are read, then pictures and videos.

    Args:
        places: requests at a time.
        memory: bytes. A request that is alone may hold more.
    """

    def __init__(self, places: int, memory: int):
        self.places, self.memory = places, memory
        self.taken, self.bytes = 0, 0

    def enter(self) -> "Place":
        """A place. Raises `ApiError` 429 where there is none."""
        if self.taken >= self.places:
            raise self.full()
        self.taken += 1
        return Place(self)

    def full(self) -> ApiError:
        message = f"{self.places} requests are at work or waiting already; try again later"
        return ApiError(429, message, code="queue_full", retry_after=5)


class Place:
    """What one request takes up, until it leaves."""

    def __init__(self, room: Room):
        self._room, self._bytes, self._left = room, 0, False

    def hold(self, count: int) -> None:
        """More bytes. Raises `ApiError` 429 where others hold too many."""
        room = self._room
        if room.bytes > self._bytes and room.bytes + count > room.memory:
            raise ApiError(429, "too many large requests at once; try again later", code="memory_full", retry_after=5)
        room.bytes += count
        self._bytes += count

    def let_go(self) -> None:
        """All its bytes."""
        self._room.bytes -= self._bytes
        self._bytes = 0

    def leave(self) -> None:
        if not self._left:
            self._left = True
            self.let_go()
            self._room.taken -= 1


class Inbox:
    """Events of one answer on their way from the engine's thread to the server's loop."""

    def __init__(self):
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()

    def send(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            pass

    async def next(self) -> list[Event]:
        """The events that have come, at least one."""
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events


def failure(cause: str, seconds: float) -> ApiError:
    """What a client is told when the engine gives up a reply."""
    if cause == "timeout":
        return ApiError(408, f"the answer took longer than {seconds:g} seconds", code="timeout")
    if cause == "stopped":
        return ApiError(503, "the server is stopping", code="stopping", retry_after=30)
    if cause == "schema":
        return ApiError(400, "the reply cannot be kept to its schema, which is too large or refers to itself without end", code="invalid_schema")
    return ApiError(500, "the reply failed; the server's log says why", code="internal_error")


async def read_body(request: Request, place: Place, limit: int, seconds: float) -> bytes:
    """The body, no longer than `limit` bytes and no slower than `seconds`; `place` holds its bytes."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    data = bytearray()

    async def read() -> None:
        async for part in request.stream():
            place.hold(len(part))
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
        place: Place,
        metrics: Metrics,
        arrived: float,
        seconds: float,
    ):
        self.answer, self._inbox, self._watch, self._place = answer, inbox, watch, place
        self._metrics, self._arrived, self._seconds = metrics, arrived, seconds
        self._closed = False

    def seconds_left(self) -> float:
        return max(0.0, self._arrived + self._seconds - now())

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

    def close(self, status: Optional[int] = None, left: bool = False) -> None:
        """The answer is complete, with `status`; or nothing more of it is wanted, as the client has `left` or there was an error."""
        if self._closed:
            return
        self._closed = True
        self._watch.cancel()
        self._place.leave()
        for sequence in self.answer.sequences:
            sequence.cancelled = True
        if status is not None:
            self._metrics.answers[status] += 1
            self._metrics.whole.add(now() - self._arrived)
        elif left:
            self._metrics.left += 1


class EventStream(Response):
    """Server-sent events: one `data:` line for each chunk, then `[DONE]`."""

    def __init__(self, talk: Talk, first: list[Event]):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._talk, self._first = talk, first

    async def __call__(self, scope, receive, send) -> None:
        try:
            await asyncio.wait_for(self._write_all(send), self._talk.seconds_left() + LAST_WORDS)
        except (ClientLeft, asyncio.TimeoutError):  # or it stays, and does not read what it is sent
            self._talk.close(left=True)
        finally:
            self._talk.close()

    async def _write_all(self, send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunks in self._talk.chunks(self._first):
                await write("".join(map(line, chunks)))
            self._talk.close(200)
        except ApiError as error:  # too late for a status: it goes into the stream
            self._talk.close(error.status)
            await write(line(error.body()))
        await write("data: [DONE]\n\n", more=False)


def line(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
