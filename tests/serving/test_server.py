"""The server as clients meet it: OpenAI's own, and worse ones."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from sparsezoo_jax import cli, serve
from sparsezoo_jax.errors import UserError

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from sparsezoo_jax.inference import Sampling  # noqa: E402
from sparsezoo_jax.serving.app import Limits, Service, application  # noqa: E402
from sparsezoo_jax.text_model import TextModel  # noqa: E402
from tests.serving.test_protocol import Slow, until  # noqa: E402
from tests.test_docs import values_of  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


class Served:
    """A server in a thread, for as long as the context."""

    def __init__(self, model, **options):
        self.service = Service(model, "small", **{"waiting": 1, "limits": Limits(), **options})
        config = uvicorn.Config(
            application(self.service, ["127.0.0.1"]), log_level="warning", timeout_graceful_shutdown=2
        )
        self.server, self.socket = uvicorn.Server(config), serve.listen("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(30)

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(self, method, path, body=None, **headers):
        connection = self.connect()
        if body is not None:
            headers = {"content-type": "application/json", **headers}
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        found = json.loads(response.read())
        connection.close()
        return response.status, found


@pytest.fixture(scope="module")
def text_model(text_run, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "run"
    shutil.copytree(text_run, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return TextModel.load(directory)


@pytest.fixture(scope="module")
def served(text_model):
    with Served(text_model, limits=Limits(body_bytes=10_000, new_tokens=20)) as server:
        yield server


@pytest.fixture
def client(served):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="any", max_retries=0) as client:
        yield client


def greedy(text_model, ids, tokens):
    return text_model.texts(text_model.generate([ids], max_new_tokens=tokens, sampling=Sampling(0.0)))[0]


def test_the_python_of_the_documentation(served, capsys):
    pytest.importorskip("openai")
    values_of("docs/serve.md", {":8000": f":{served.port}", "spark-tiny": "small", "max_tokens=40": "max_tokens=4"})
    assert capsys.readouterr().out, "what was streamed"


def test_openai_completes(client, text_model):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    options = {"model": "small", "prompt": "the state of", "max_tokens": 12, "temperature": 0}
    found = client.completions.create(**options)
    ids = text_model.encode("the state of")
    expected = greedy(text_model, ids, 12)
    assert found.choices[0].text == expected
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (len(ids), 12)
    assert found.choices[0].finish_reason == "length"
    stream = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in stream if part.choices) == expected
    assert stream[-1].usage == found.usage
    assert stream[-2].choices[0].finish_reason == "length"
    assert client.completions.create(**{**options, "prompt": ids}).choices[0].text == expected
    stop = expected[4:6]
    cut = client.completions.create(**options, stop=[stop]).choices[0]
    assert (cut.text, cut.finish_reason) == (expected[: expected.find(stop)], "stop")


def test_openai_chats(client, text_model):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the union?"}]
    expected = greedy(text_model, text_model.encode_chat(messages), 8)
    options = {"model": "small", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    assert client.chat.completions.create(**options).choices[0].message.content == expected
    stream = list(client.chat.completions.create(**options, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in stream) == expected


def test_seeds_and_programs(client, text_model):
    def drawn(**options):
        return client.completions.create(model="small", prompt="the", max_tokens=12, **options).choices[0].text

    assert drawn(seed=3) == drawn(seed=3)
    assert len({drawn(seed=seed) for seed in range(4)}) > 1
    programs = len(text_model.engine._programs)
    drawn(temperature=0.7)
    drawn(temperature=1.3)
    assert len(text_model.engine._programs) == programs, "a client's temperature compiles nothing"


def test_errors_are_openais(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.completions.create(model="other", prompt="the")
    with pytest.raises(openai.BadRequestError, match="at most 63 are taken") as found:
        client.completions.create(model="small", prompt="peace " * 100, max_tokens=1)
    assert found.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens: 21 are asked for; at most 20 fit"):
        client.completions.create(model="small", prompt="the", max_tokens=21)
    with pytest.raises(openai.BadRequestError, match="prompt: must have token ids from 0 to"):
        client.completions.create(model="small", prompt=[10**9])


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("GET", "/health", None, {}, 200),
        ("GET", "/v1/models/other", None, {}, 404),
        ("GET", "/nothing", None, {}, 404),
        ("GET", "/v1/completions", None, {}, 405),
        ("POST", "/v1/completions", b"{", {}, 400),
        ("POST", "/v1/completions", b"\xff\x00", {}, 400),
        ("POST", "/v1/completions", {"prompt": "the"}, {"content_type": "text/plain"}, 415),
        ("POST", "/v1/completions", {"prompt": "x" * 20_000}, {}, 413),
        ("POST", "/v1/completions", {"prompt": []}, {}, 400),
        ("POST", "/v1/chat/completions", {"prompt": "the"}, {}, 400),
    ],
)
def test_bad_requests_have_a_status_and_a_reason(served, method, path, body, headers, status):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    found, answer = served.ask(method, path, body, **headers)
    assert found == status
    assert status == 200 or answer["error"]["message"]


def test_a_name_that_others_let_point_here_is_refused(served):
    connection = served.connect()
    connection.request("GET", "/v1/models", headers={"host": "evil.example"})
    assert connection.getresponse().status == 400


def test_bytes_that_are_no_http_end_a_connection_alone(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(b"\x00\xff" * 2000 + b"\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert served.ask("GET", "/health") == (200, {"status": "ok"})


def test_a_key_is_asked_for():
    with Served(Slow(), key="secret") as server:
        status, answer = server.ask("GET", "/v1/models")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert server.ask("GET", "/v1/models", authorization="Bearer secret")[0] == 200


@pytest.fixture
def slow():
    model = Slow()
    model.encode, model.max_seq_len, model.vocab_size = lambda text: [1, 2], 64, 10
    with Served(model) as server:
        yield model, server
        for _ in range(100):
            model.go.release()


def asked(server, **options):
    connection = server.connect()
    body = json.dumps({"prompt": "the", "max_tokens": 4, **options})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    return connection


def test_a_full_queue_says_so(slow):
    model, server = slow
    first = asked(server)
    until(lambda: model.asked)
    second = asked(server)
    until(lambda: server.service.worker._queue.qsize() == 1)
    status, answer = server.ask("POST", "/v1/completions", {"prompt": "the"})
    assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
    for _ in range(8):
        model.go.release()
    for connection in (first, second):
        assert json.loads(connection.getresponse().read())["choices"][0]["text"] == "0 1 2 3 "


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_worker(slow, stream):
    model, server = slow
    connection = asked(server, max_tokens=40, stream=stream)
    until(lambda: model.asked)
    model.go.release()
    if stream:
        assert connection.getresponse().read(5) == b"data:"
    until(lambda: len(model.rows[0]) == 1)
    connection.sock.close()
    if stream:
        connection.close()
    tokens = len(model.rows[0])
    deadline = time.monotonic() + 60
    while server.service.worker._free._value < 2 and time.monotonic() < deadline:
        model.go.release()
        time.sleep(0.05)
    assert server.service.worker._free._value == 2
    assert tokens <= len(model.rows[0]) < 40


@pytest.mark.slow
def test_the_command_serves_and_ends_with_sigterm(text_run):
    command = [sys.executable, "-m", "sparsezoo_jax.serve", str(text_run), "--port", "0", "--name", "own"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            line = next(line for line in process.stderr if line.startswith("serving "))
            assert line.startswith("serving own at http://127.0.0.1:")
            port = int(line.rpartition(":")[2].split("/")[0])
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/v1/models")
            assert json.loads(connection.getresponse().read())["data"][0]["id"] == "own"
            connection.close()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_flags(text_run, capsys):
    for flags, message in (
        (["--waiting", "-1"], "--waiting=-1: must be at least 0"),
        (["--max-seconds", "0"], "--max-seconds=0.0: must be above 0"),
        (["--port", "70000"], "--port=70000: must be from 0 to 65535"),
        (["--stop-ids", "9999", "--port", "0"], "--stop-ids=9999: must be a token"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.run(serve.main, [str(text_run), *flags])
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    with serve.listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="can't listen there: "):
        serve.listen("127.0.0.1", taken.getsockname()[1])
    assert serve.is_loopback("::1")
    assert not serve.is_loopback("0.0.0.0")
