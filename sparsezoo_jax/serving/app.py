"""The HTTP application: OpenAI's paths, over Starlette."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sparsezoo_jax.errors import UserError
from sparsezoo_jax.serving.protocol import Answer, Request, RequestError, parse_request
from sparsezoo_jax.serving.worker import Ended, Event, Job, Worker
from sparsezoo_jax.text_model import TextModel

SEND_SECONDS = 30.0
"""That a client may take to send its request."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 1 << 20
    prompt_tokens: int | None = None
    """None: what the model can take."""
    new_tokens: int | None = None
    """None: what the model can take."""
    seconds: float = 120.0
    """From its arrival to its end."""


class Service:
    """The model, its worker, and the answers to requests.

    Args:
      model: the run.
      name: what the model is called.
      waiting: requests that may wait, besides the one under way.
      limits: of one request.
      key: what requests have to bring as their bearer token; None: nothing.
    """

    def __init__(self, model: TextModel, name: str, *, waiting: int, limits: Limits, key: str | None = None):
        self._model, self._name, self._limits, self._key = model, name, limits, key
        self._created = int(time.time())
        self.worker = Worker(model, waiting=waiting)
        self._tokenizing = asyncio.Lock()  # the tokenizer has a state while it reads special tokens

    async def models(self, request: HTTPRequest) -> Response:
        """The list of the one model, or the model itself."""
        self._check_key(request)
        model = {"id": self._name, "object": "model", "created": self._created, "owned_by": "sparsezoo"}
        asked = request.path_params.get("name")
        if asked is None:
            return JSONResponse({"object": "list", "data": [model]})
        if asked != self._name:
            raise RequestError(404, f"no such model; {self._name!r} is served here", code="model_not_found")
        return JSONResponse(model)

    async def health(self, request: HTTPRequest) -> Response:
        """That the server answers."""
        return JSONResponse({"status": "ok"})

    async def completions(self, request: HTTPRequest) -> Response:
        """`/v1/completions`."""
        return await self._complete(request, is_chat=False)

    async def chat(self, request: HTTPRequest) -> Response:
        """`/v1/chat/completions`."""
        return await self._complete(request, is_chat=True)

    def _check_key(self, request: HTTPRequest) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self._key is not None and not hmac.compare_digest(given.encode(), self._key.encode()):
            raise RequestError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _complete(self, http: HTTPRequest, *, is_chat: bool) -> Response:
        deadline = time.monotonic() + self._limits.seconds
        self._check_key(http)
        # A page of another site can have a browser send anything else without asking first.
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the body must have the type application/json")
        request = parse_request(await self._body(http), model=self._name, is_chat=is_chat)
        ids = await self._tokenize(request)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = Job(ids, self._new_tokens(request, ids), request.sampling, request.seed, request.stop, deadline, tell)
        if not self.worker.submit(job):
            raise RequestError(429, "too many requests wait; try again later", code="rate_limit_exceeded")
        answer = Answer(self._name, request)
        if request.stream:
            # The first event is waited for, so that what fails before it has a status of its own.
            first = await self._or_gone(http, events.get(), job)
            if isinstance(first, RequestError):
                raise first
            body = self._stream(answer, request, job, first, events)
            return StreamingResponse(body, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        text, ended = await self._or_gone(http, _collected(events), job)
        return JSONResponse(answer.whole(text, ended.reason, _usage(job, ended)))

    async def _body(self, http: HTTPRequest) -> bytes:
        limit = self._limits.body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(SEND_SECONDS):
                async for piece in http.stream():
                    body += piece
                    if len(body) > limit:
                        raise RequestError(413, f"the body has more than {limit} bytes")
        except TimeoutError:
            raise RequestError(408, f"the body took more than {SEND_SECONDS:.0f} s to come") from None
        return bytes(body)

    async def _tokenize(self, request: Request) -> list[int]:
        name = "messages" if request.is_chat else "prompt"
        if isinstance(request.prompt, tuple):
            vocabulary = self._model.tokenizer.vocab_size
            if not all(0 <= token < vocabulary for token in request.prompt):
                raise RequestError(400, f"prompt: must have token ids from 0 to {vocabulary - 1}", param=name)
            ids = list(request.prompt)
        else:
            try:
                async with self._tokenizing:
                    if request.prompt is not None:
                        ids = await asyncio.to_thread(self._model.encode, request.prompt)
                    else:
                        ids = await asyncio.to_thread(self._model.encode_chat, request.messages)
            except UserError as error:
                text = str(error).replace(str(self._model.directory), "the model")
                raise RequestError(400, text, param=name) from None
        if not ids:
            raise RequestError(400, f"{name}: is empty", param=name)
        most = self._model.max_seq_len - 1
        most = most if self._limits.prompt_tokens is None else min(most, self._limits.prompt_tokens)
        if len(ids) > most:
            text = f"{name}: has {len(ids)} tokens; at most {most} are taken"
            raise RequestError(400, text, param=name, code="context_length_exceeded")
        return ids

    def _new_tokens(self, request: Request, ids: list[int]) -> int:
        room, limit = self._model.max_seq_len - len(ids), self._limits.new_tokens
        most = room if limit is None else min(room, limit)
        if request.max_tokens is None:
            return most
        if request.max_tokens > most:
            text = f"max_tokens: {request.max_tokens} are asked for; at most {most} fit after this prompt"
            raise RequestError(400, text, param="max_tokens", code="context_length_exceeded")
        return request.max_tokens

    async def _or_gone(self, http: HTTPRequest, result: Awaitable[Any], job: Job) -> Any:
        """What comes of `result`, unless the client leaves before: then the job is cancelled."""

        async def gone() -> None:
            while (await http.receive())["type"] != "http.disconnect":
                pass

        wanted, left = asyncio.ensure_future(result), asyncio.ensure_future(gone())
        try:
            await asyncio.wait((wanted, left), return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                raise ClientDisconnect
            return wanted.result()
        except BaseException:
            job.cancelled.set()
            raise
        finally:
            for task in (wanted, left):
                task.cancel()

    async def _stream(
        self, answer: Answer, request: Request, job: Job, event: Event, events: asyncio.Queue[Event]
    ) -> AsyncIterator[bytes]:
        try:
            if request.is_chat:
                yield _sent(answer.piece(None))
            while isinstance(event, str):
                yield _sent(answer.piece(event))
                event = await events.get()
            if isinstance(event, RequestError):
                yield _sent(event.body())
                return
            yield _sent(answer.piece("", event.reason))
            if request.include_usage:
                yield _sent(answer.usage(_usage(job, event)))
            yield b"data: [DONE]\n\n"
        finally:
            job.cancelled.set()  # where the client left, this generator is closed


async def _collected(events: asyncio.Queue[Event]) -> tuple[str, Ended]:
    pieces: list[str] = []
    while isinstance(event := await events.get(), str):
        pieces.append(event)
    if isinstance(event, RequestError):
        raise event
    return "".join(pieces), event


def _sent(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def _usage(job: Job, ended: Ended) -> dict[str, int]:
    prompt, new = len(job.prompt), ended.tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def application(service: Service, hosts: list[str] | None = None) -> Starlette:
    """The application of a service.

    Args:
      service: what answers.
      hosts: names that requests may call the server by; None: any. On a loopback address, where no other machine
        reaches it, a page in a browser could, by a name of its own that it lets point there.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    async def refused(request: HTTPRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = RequestError(error.status_code, str(error.detail))
        if not isinstance(error, RequestError):  # a fault of ours; Starlette raises it again, for the log
            error = RequestError(500, "internal error")
        headers = {"retry-after": "1"} if error.status == 429 else None
        return JSONResponse(error.body(), error.status, headers)

    async def gone(request: HTTPRequest, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    handlers: dict[Any, Callable[..., Any]] = {
        RequestError: refused,
        HTTPException: refused,
        ClientDisconnect: gone,
        Exception: refused,
    }
    routes = [
        Route("/v1/models", service.models),
        Route("/v1/models/{name:path}", service.models),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
        Route("/health", service.health),
    ]
    middleware = [] if hosts is None else [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]
    return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=lifespan)
