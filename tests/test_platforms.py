"""What is set up before jax computes."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from sparsezoo_jax import platforms
platforms.keep_freed_memory()
import jax
import jax.numpy as jnp

@jax.jit
def program(x):  # its product is a temporary of 64 MB
    return jnp.tanh(x @ x.T) @ x

x = jnp.ones((4096, 8))
faults = [(program(x).block_until_ready(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt)[1] for _ in range(8)]
print(min(after - before for before, after in zip(faults, faults[1:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("own", [False, True])
def test_freed_memory_is_kept_unless_the_environment_says_otherwise(own):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"MALLOC_ARENA_MAX": "8"} if own else {}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, check=True)
    faults = int(done.stdout)
    assert faults > 10_000 if own else faults < 100
