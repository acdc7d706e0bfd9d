"""Requests and answers of OpenAI's completions and chat completions: what is taken, what is refused, and how."""

from __future__ import annotations

import dataclasses
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.inference import Sampling
from sparsezoo_jax.untrusted import parse_json, printable

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_MESSAGES = 4, 256, 1000
COMPLETION_TOKENS = 16
"""New tokens of a completion that names no number, as OpenAI's reference says."""
#: Parameters that change nothing here: they concern OpenAI's own bookkeeping.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
#: Parameters that are not implemented, and the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none",),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True, False),
}


class RequestError(Exception):
    """A request that is not served: status, and OpenAI's fields of an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's form of an error."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = printable(str(self), limit=500)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Request:
    """A completion that is asked for."""

    prompt: str | tuple[int, ...] | None
    """Text or token ids; None: `messages`."""
    messages: tuple[dict[str, str], ...]
    max_tokens: int | None
    """None: as many as fit, and the server allows."""
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    """Of a stream: end with the numbers of tokens."""
    is_chat: bool


def parse_request(body: bytes, *, model: str, is_chat: bool) -> Request:
    """The request in a body of JSON.

    Args:
      body: what came, whatever it is.
      model: the name of the one that is served.
      is_chat: with `messages`, not a `prompt`.

    Raises:
      RequestError: no JSON, or what is not allowed or not implemented in it.
    """
    try:
        values = parse_json(body, max_bytes=len(body), finite=True)
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(400, "the body must be a JSON object")
    given = {name: value for name, value in values.items() if value is not None}
    if given.pop("model", model) != model:
        raise RequestError(404, f"no such model; {model!r} is served here", param="model", code="model_not_found")
    take = _Fields(given)
    prompt = None if is_chat else take("prompt", _prompt, "must be a text, or a list of token ids")
    messages = take("messages", _messages, "must be a list of objects with a role and a text as content")
    request = Request(
        prompt=prompt,
        messages=messages or () if is_chat else (),
        max_tokens=_max_tokens(take, is_chat),
        sampling=_sampling(take),
        seed=take("seed", _integer, "must be an integer", secrets.randbits(31)) % 2**31,
        stop=take("stop", _stops, f"must be up to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters", ()),
        stream=take("stream", _flag, "must be true or false", False),
        include_usage=take("stream_options", _usage, "must be an object with include_usage", False),
        is_chat=is_chat,
    )
    if is_chat and not messages:
        raise RequestError(400, "messages: needed", param="messages")
    if not is_chat and prompt is None:
        raise RequestError(400, "prompt: needed", param="prompt")
    for name, value in take.left.items():
        if name in IGNORED or value in NEUTRAL.get(name, ()):
            continue
        why = "is not implemented" if name in NEUTRAL else "no such parameter"
        raise RequestError(400, f"{name}: {why}", param=printable(name, limit=50))
    return request


class _Fields:
    """Fields of a request, each taken once."""

    def __init__(self, values: dict[str, Any]):
        self.left = values

    def __call__(self, name: str, read: Callable[[Any], Any], allowed: str, default: Any = None) -> Any:
        if name not in self.left:
            return default
        try:
            return read(self.left.pop(name))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RequestError(400, f"{name}: {allowed}", param=name) from None


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _usage(value: Mapping[str, Any]) -> bool:
    return _flag(value.get("include_usage", False))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    value.encode()  # no lone surrogates, which JSON can hold and UTF-8 can't
    return value


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], int):
        (value,) = value
    return _text(value) if isinstance(value, str) else tuple(map(_integer, value))


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        raise ValueError
    return tuple({"role": _text(one["role"]), "content": _content(one["content"])} for one in value)


def _content(value: Any) -> str:
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list) or any(part["type"] != "text" for part in value):
        raise ValueError
    return "".join(_text(part["text"]) for part in value)


def _stops(value: Any) -> tuple[str, ...]:
    found = tuple(map(_text, [value] if isinstance(value, str) else value))
    if len(found) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in found):
        raise ValueError
    return found


def _max_tokens(take: _Fields, is_chat: bool) -> int | None:
    names = ("max_completion_tokens", "max_tokens") if is_chat else ("max_tokens",)
    found = [take(name, _integer, "must be an integer above 0") for name in names]
    length = next((one for one in found if one is not None), None if is_chat else COMPLETION_TOKENS)
    if length is not None and length < 1:
        raise RequestError(400, "max_tokens: must be an integer above 0", param="max_tokens")
    return length


def _sampling(take: _Fields) -> Sampling:
    temperature = take("temperature", _number, "must be a number from 0 to 2", 1.0)
    if not 0 <= temperature <= 2:
        raise RequestError(400, "temperature: must be a number from 0 to 2", param="temperature")
    top_p = take("top_p", _number, "must be a number above 0 and at most 1", 1.0)
    try:
        return Sampling(temperature, top_p=top_p)
    except ConfigError as error:
        raise RequestError(400, f"top_p: {error.allowed}", param="top_p") from None


class Answer:
    """OpenAI's objects for one completion."""

    def __init__(self, model: str, request: Request):
        kind = "chatcmpl" if request.is_chat else "cmpl"
        self._is_chat, self._include_usage = request.is_chat, request.include_usage
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, reason: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer in one piece."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        choice |= {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        name = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": name, "choices": [choice], "usage": usage}

    def piece(self, text: str | None, reason: str | None = None) -> dict[str, Any]:
        """A part of a streamed answer; None for the text is the part before the first."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
        if self._is_chat:
            choice["delta"] = (
                {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
            )
        else:
            choice["text"] = text or ""
        return self._streamed([choice])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last part of a stream that was asked for the numbers of tokens."""
        return {**self._streamed([]), "usage": usage}

    def _streamed(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self._is_chat else "text_completion"
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": name, "choices": choices, **usage}
