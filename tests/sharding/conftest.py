"""Sharding tests run the code under test in a process of their own, for eight devices must exist before jax starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import with_devices


@pytest.fixture(scope="session")
def on_eight_devices(tmp_path_factory):
    """Run a module of this folder as a script on eight forced host devices; returns the JSON that it prints."""

    def run(module: str, *arguments: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-m", f"tests.sharding.{module}", *arguments],
            env={**os.environ, "XLA_FLAGS": with_devices(8), "JAX_PLATFORMS": "cpu"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
