"""A language model behind an OpenAI-compatible API as explainer and judge."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from sparsezoo_jax.errors import UserError, require
from sparsezoo_jax.evaluation.interpretability.windows import Window
from sparsezoo_jax.untrusted import parse_json

#: Bytes of an answer that are read: one sentence, or some numbers, and what servers add to them.
MAX_ANSWER_BYTES = 1 << 22

_EXPLAIN = """You study one feature of a language model. Below are passages in which it is active; the tokens that \
activate it stand between << and >>. Say in one short sentence what the feature responds to: its content, its role in \
the text, or the words themselves. Answer with that sentence only.

{passages}"""
_JUDGE = """A feature of a language model is described as: {explanation}

{question} Answer with a JSON list of {count} numbers, 1 for yes and 0 for no, in the order of the passages, and with \
nothing else.

{passages}"""
_DETECT = "For each of these passages decide whether the feature is active in it."
_FUZZ = "In each of these passages some tokens stand between << and >>. Decide whether those activate the feature."


def parsed_answer(text: str, count: int) -> list[bool] | None:
    """The first [...] of an answer as `count` yes or no; None if it is not that."""
    match = re.search(r"\[(.*?)\]", text, re.DOTALL)
    values = [] if match is None else [item.strip() for item in match[1].split(",")]
    if len(values) != count or any(value not in ("0", "1") for value in values):
        return None
    return [value == "1" for value in values]


class EndpointJudge:
    """Explains from marked windows, and judges windows by the explanation; see `judges.Judge`."""

    kind = "model"

    def __init__(
        self, model: str, base_url: str | None = None, key: str | None = None, *, timeout: float = 120, retries: int = 3
    ):
        """Nothing is asked yet.

        Args:
          model: name that the endpoint knows.
          base_url: up to and without /chat/completions; None is $OPENAI_BASE_URL.
          key: None is $OPENAI_API_KEY; many local servers need none.
          timeout: seconds to wait for one answer.
          retries: further attempts after an error of the network or the server.

        Raises:
          ConfigError: no address, or one that is not http or https.
        """
        url = base_url or os.environ.get("OPENAI_BASE_URL")
        require(bool(url), "interpret.base_url", url, "must be given, or OPENAI_BASE_URL set, for judge=endpoint")
        allowed = str(url).startswith(("http://", "https://"))
        require(allowed, "interpret.base_url", url, "must begin with http:// or https://")
        self.url = f"{str(url).rstrip('/')}/chat/completions"
        self.model, self.timeout, self.retries = model, timeout, retries
        self._key = key or os.environ.get("OPENAI_API_KEY")

    def explain(self, train: Sequence[Window], others: Sequence[Window]) -> str:
        return self._ask(_EXPLAIN.format(passages=_numbered(train))).strip()

    def answer(self, explanation: str, windows: Sequence[Window]) -> list[bool] | None:
        question = _FUZZ if any(window.marks for window in windows) else _DETECT
        prompt = _JUDGE.format(
            explanation=explanation, question=question, count=len(windows), passages=_numbered(windows)
        )
        return parsed_answer(self._ask(prompt), len(windows))

    def _ask(self, prompt: str) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        for attempt in range(self.retries + 1):
            try:
                with _OPENER.open(request, timeout=self.timeout) as response:
                    answer = parse_json(response.read(MAX_ANSWER_BYTES), max_bytes=MAX_ANSWER_BYTES)
                    return str(answer["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                # Overloaded and broken servers may recover; a refused request will not.
                why, temporary = f"{error.code} {error.reason}", error.code == 429 or error.code >= 500
            except (OSError, TimeoutError) as error:
                why, temporary = str(getattr(error, "reason", error)), True
            except (ValueError, KeyError, IndexError, TypeError):
                why, temporary = "its answer is no chat completion", False
            if not temporary or attempt == self.retries:
                raise UserError(f"{self.url}: {why}")
            time.sleep(2**attempt)
        raise AssertionError


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection would send the key to wherever it points."""

    def redirect_request(self, *_: object) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _numbered(windows: Sequence[Window]) -> str:
    return "\n".join(f"Passage {i}: {window.text}" for i, window in enumerate(windows, 1))
