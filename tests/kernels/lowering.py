"""Programs lowered, not compiled, for platforms that need not be there."""

import contextlib
from typing import Any

from sparsezoo_jax.compilation.topologies import lowering_for, open_topology


def text_for(platform: str, jitted: Any, *arrays: Any) -> str:
    """The program of what `jax.jit` returned, for "cpu", "tpu" or "cuda"."""
    # Newer versions of jax ask what GPU a kernel is for, and remember it from when the call was traced.
    cuda = platform == "cuda"
    with lowering_for(open_topology("h100:1x1x1").devices[0]) if cuda else contextlib.nullcontext():
        return jitted.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()
