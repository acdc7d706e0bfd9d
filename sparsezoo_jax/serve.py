"""Serve a run by OpenAI's interface: `python -m sparsezoo_jax.serve DIR`.

/v1/models, /v1/completions and /v1/chat/completions on this machine's port 8000, for any client of OpenAI's
(docs/serve.md). Needs the extra [serve].
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sparsezoo_jax import cli, platforms
from sparsezoo_jax.errors import UserError, require
from sparsezoo_jax.mesh_flags import MeshFlags
from sparsezoo_jax.path_flags import IN_RUN_STORES
from sparsezoo_jax.untrusted import printable
from sparsezoo_jax.weight_formats import WeightFormats

KEY = "SPARSEZOO_API_KEY"


@dataclass(frozen=True, kw_only=True)
class Serve(WeightFormats, MeshFlags):
    """Flags of the command."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR"), IN_RUN_STORES]
    """Run directory."""
    host: str = "127.0.0.1"
    """Address to listen at. Other machines reach others than this one: then set SPARSEZOO_API_KEY."""
    port: int = 8000
    """Port to listen at; 0 takes one that is free."""
    name: str | None = None
    """What the model is called. None: the directory's name."""
    waiting: int = 8
    """Requests that may wait for the one under way; more get the status 429."""
    max_body_bytes: int = 1 << 20
    """Bytes of a request."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt. None: what the model can take."""
    max_new_tokens: int | None = None
    """Tokens of an answer. None: what the model can take."""
    max_seconds: float = 120.0
    """From a request's arrival to the end of its answer, which is cut off then."""
    grace: int = 10
    """Seconds that answers under way have to end in when the server is told to stop."""
    stop_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside those that the tokenizer and generation_config.json name."""
    step: int | None = None
    """Checkpoint to load; none is the newest."""
    base: Annotated[Path | None, IN_RUN_STORES] = None
    """Of a run of adapters: the run that they were trained for. None: where its configuration says."""


def main(args: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT."""
    platforms.keep_freed_memory()
    command = cli.parse(Serve, args, prog="serve", description=(__doc__ or "").strip())
    for field in ("waiting", "grace"):
        require(getattr(command, field) >= 0, f"--{field}", getattr(command, field), "must be at least 0")
    for field in ("max_body_bytes", "max_prompt_tokens", "max_new_tokens", "max_seconds"):
        value = getattr(command, field)
        require(value is None or value > 0, f"--{field.replace('_', '-')}", value, "must be above 0")
    require(0 <= command.port < 1 << 16, "--port", command.port, "must be from 0 to 65535")
    if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn")):
        raise UserError("the libraries of the server are not installed: pip install 'sparsezoo-jax[serve]'")
    listener = listen(command.host, command.port)
    with listener:
        serve(command, listener)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine.

    Raises:
      UserError: there is no such address, or the port is taken.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: can't listen there: {error.strerror}") from None


def serve(command: Serve, listener: socket.socket) -> None:
    """Load the run, and answer requests at `listener` until the process is told to stop.

    Raises:
      UserError: as `TextModel.load`.
    """
    import uvicorn

    from sparsezoo_jax.serving.app import Limits, Service, application
    from sparsezoo_jax.text_model import TextModel

    model = TextModel.load(
        command.directory,
        step=command.step,
        base=command.base,
        formats=command.formats,
        stop_ids=command.stop_ids,
        mesh=command.build_mesh(),
    )
    name = command.name or command.directory.absolute().name
    limits = Limits(command.max_body_bytes, command.max_prompt_tokens, command.max_new_tokens, command.max_seconds)
    key = os.environ.get(KEY) or None
    service = Service(model, name, waiting=command.waiting, limits=limits, key=key)
    local = is_loopback(command.host)
    if not local and key is None:
        print(f"warning: --host={command.host}: whoever reaches it may use it, for {KEY} is not set", file=sys.stderr)
    config = uvicorn.Config(
        application(service, ["localhost", "127.0.0.1", "[::1]", "::1", command.host] if local else None),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=command.grace,
        timeout_keep_alive=5,
        # Connections of clients that wait, and some that are refused in words.
        limit_concurrency=command.waiting + 64,
    )
    server = uvicorn.Server(config)
    # The server's own handlers stop it, and then pass the signal on to these.
    signal.signal(signal.SIGTERM, _ignore)
    shown = f"[{command.host}]" if ":" in command.host else command.host
    port = listener.getsockname()[1]
    print(f"serving {printable(name)} at http://{shown}:{port}/v1", file=sys.stderr, flush=True)
    server.run(sockets=[listener])


def is_loopback(host: str) -> bool:
    """Whether no other machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ignore(number: int, frame: Any) -> None:
    """Leave the process to end by itself."""


if __name__ == "__main__":
    cli.run(main)
