"""Requests as they come from anywhere, without a server."""

import json
import threading
import time

import pytest

from sparsezoo_jax.inference import Sampling
from sparsezoo_jax.serving.protocol import Answer, RequestError, parse_request
from sparsezoo_jax.serving.worker import Ended, Job, StopFilter, Worker


def parsed(is_chat=False, **values):
    base = {"messages": [{"role": "user", "content": "hello"}]} if is_chat else {"prompt": "the state"}
    return parse_request(json.dumps({"model": "m", **base, **values}).encode(), model="m", is_chat=is_chat)


def test_what_is_left_out_is_as_the_reference_says():
    request = parsed()
    assert (request.prompt, request.max_tokens, request.sampling) == ("the state", 16, Sampling(1.0))
    assert (request.stop, request.stream, request.include_usage) == ((), False, False)
    assert parsed(is_chat=True).max_tokens is None
    assert parsed(seed=None).seed != parsed(seed=None).seed
    assert parsed(seed=-3).seed == parsed(seed=2**31 - 3).seed


def test_forms_of_prompts_and_messages():
    assert parsed(prompt=["one"]).prompt == "one"
    assert parsed(prompt=[5, 6]).prompt == (5, 6)
    assert parsed(prompt=[[5, 6]]).prompt == (5, 6)
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert parsed(is_chat=True, messages=[{"role": "user", "content": parts}]).messages[0]["content"] == "one two"
    assert parsed(is_chat=True, max_completion_tokens=3, max_tokens=5).max_tokens == 3
    assert parsed(stop="\n", user="me", n=1, frequency_penalty=0.0, response_format={"type": "text"}).stop == ("\n",)


BAD = [
    ({"prompt": 7}, "prompt"), ({"prompt": ["a", "b"]}, "prompt"), ({"prompt": [1.5]}, "prompt"),
    ({"prompt": [True]}, "prompt"), ({"prompt": "\ud800"}, "prompt"), ({"prompt": None}, "prompt"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "9"}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
    ({"temperature": -1}, "temperature"), ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 1.5}, "top_p"),
    ({"top_p": [1]}, "top_p"),
    ({"stop": ["a"] * 5}, "stop"), ({"stop": [""]}, "stop"), ({"stop": ["x" * 300]}, "stop"), ({"stop": 3}, "stop"),
    ({"seed": "s"}, "seed"), ({"stream": 1}, "stream"), ({"stream_options": 1}, "stream_options"),
    ({"n": 2}, "n"), ({"logprobs": 3}, "logprobs"), ({"echo": True}, "echo"), ({"wat": 1}, "wat"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "param"), BAD, ids=range(len(BAD)))
def test_bad_values_name_the_field(values, param):
    with pytest.raises(RequestError) as found:
        parsed(**values)
    assert found.value.status == 400
    error = found.value.body()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [3],
        [{"role": "user"}],
        [{"role": 3, "content": "x"}],
        [{"role": "user", "content": [{"type": "image"}]}],
        [{"role": "user", "content": "x"}] * 1001,
    ],
)
def test_bad_messages(messages):
    with pytest.raises(RequestError, match="messages"):
        parsed(is_chat=True, messages=messages)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 10**6, b'{"prompt": 1e999}', b"null", b"9" * 10**5])
def test_what_is_no_request(body):
    with pytest.raises(RequestError) as found:
        parse_request(body, model="m", is_chat=False)
    assert found.value.status == 400


def test_another_model_is_not_found():
    with pytest.raises(RequestError) as found:
        parsed(model="gpt-x")
    assert (found.value.status, found.value.code) == (404, "model_not_found")


def test_answers_have_the_forms_of_the_reference():
    request = parsed(is_chat=True, stream=True, stream_options={"include_usage": True})
    answer = Answer("m", request)
    first, piece, last = answer.piece(None), answer.piece("word"), answer.piece("", "stop")
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert piece["choices"][0]["delta"] == {"content": "word"}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert {one["object"] for one in (first, piece, last)} == {"chat.completion.chunk"}
    assert answer.usage({"total_tokens": 3})["choices"] == []
    whole = Answer("m", parsed()).whole("text", "length", {"total_tokens": 3})
    assert (whole["object"], whole["choices"][0]["text"]) == ("text_completion", "text")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("one\ntwo\n", ["\n\n"], "one\ntwo\n"),
        ("aaab", ["aab"], "a"),
        ("stop it", ["top", "st"], ""),
        ("nothing", [], "nothing"),
        ("ends in ST", ["STOP"], "ends in ST"),
    ],
)
def test_text_ends_before_the_first_stop(text, stop, expected, size):
    stops, pieces = StopFilter(stop), []
    for start in range(0, len(text), size):
        pieces.append(stops.push(text[start : start + size]))
        if stops.found:
            break
    assert "".join([*pieces, stops.flush()]) == expected


class Slow:
    """A model whose tokens come when they are let."""

    directory = "/secret/place"

    def __init__(self, fails=None):
        self.go, self.asked, self.fails = threading.Semaphore(0), [], fails
        self.tokenizer = self

    def generate(self, prompts, *, max_new_tokens, sampling, seed):
        self.asked.append(prompts[0])
        self.rows, self.most = [[]], max_new_tokens
        return self

    def __iter__(self):
        for token in range(self.most):
            self.go.acquire()
            if self.fails:
                raise self.fails
            self.rows[0].append(token)
            yield [[token]]

    def stream_decoder(self, context):
        return self

    def push(self, token):
        return f"{token} "

    def flush(self):
        return ""


def job(said, *, stop=(), tokens=4, seconds=60.0, prompt=(1,)):
    return Job(prompt, tokens, Sampling(0.0), 0, stop, time.monotonic() + seconds, said.append)


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture
def slow():
    model = Slow()
    worker = Worker(model, waiting=1)
    worker.start()
    yield model, worker
    for _ in range(100):
        model.go.release()
    worker.stop()


def test_jobs_wait_in_order_and_no_more_than_may(slow):
    model, worker = slow
    said = [[], [], []]
    assert worker.submit(job(said[0], prompt=(1,)))
    until(lambda: model.asked)
    assert worker.submit(job(said[1], prompt=(2,)))
    assert not worker.submit(job(said[2], prompt=(3,)))
    for _ in range(8):
        model.go.release()
    until(lambda: said[1] and isinstance(said[1][-1], Ended))
    assert said[0] == ["0 ", "1 ", "2 ", "3 ", Ended("length", 4)]
    assert model.asked == [(1,), (2,)]
    until(lambda: worker.submit(job(said[2], prompt=(4,))))


def test_a_job_that_is_cancelled_ends_at_its_next_token(slow):
    model, worker = slow
    said, later = [], []
    first, second = job(said), job(later)
    worker.submit(first)
    until(lambda: model.asked)
    worker.submit(second)
    first.cancelled.set()
    second.cancelled.set()
    model.go.release()
    until(lambda: said and isinstance(said[-1], Ended))
    assert said[-1] == Ended("length", 1)
    until(lambda: worker.submit(job([])))
    assert later == []
    assert len(model.asked) <= 2


def test_stops_and_time_limits_end_a_job(slow):
    model, worker = slow
    for _ in range(4):
        model.go.release()
    stopped, late = [], []
    worker.submit(job(stopped, stop=["1"]))
    until(lambda: stopped and isinstance(stopped[-1], Ended))
    assert stopped == ["0 ", Ended("stop", 2)]
    worker.submit(job(late, seconds=-1.0))
    until(lambda: late)
    assert (late[0].status, late[0].code) == (503, "timeout")


def test_faults_are_said_without_their_insides(capsys):
    model = Slow(fails=KeyError("/secret/place"))
    worker = Worker(model, waiting=1)
    worker.start()
    model.go.release()
    said = []
    worker.submit(job(said))
    until(lambda: said)
    assert (said[0].status, str(said[0])) == (500, "internal error")
    worker.stop()
    assert "KeyError" in capsys.readouterr().err
