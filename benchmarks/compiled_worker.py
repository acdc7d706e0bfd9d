"""Another library's grouped product or attention, compiled for absent hardware: `benchmarks.compiled_peers` runs it.

This file imports nothing of this project, so any Python with what a form needs can run it: tokamax, jax with its
compilers for TPUs and GPUs, and for cuDNN that library. Its argument is a `Job` as JSON; the answer is a file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile, and for which device."""

    form: str
    """A library, and which of its implementations: "tokamax triton"."""
    shape: Sequence[int]
    """A product's rows, inner width, groups and outer width; attention's tokens, heads, heads of keys and width."""
    softcap: float | None
    """Of attention, which None leaves without."""
    gradient: bool
    """Forward and backward."""
    target: dict[str, Any]
    """Arguments of jax's `get_topology_desc`."""
    answer: str
    """The file to write."""
    attention: bool = False
    """Causal attention of one sequence, rather than a grouped product."""
    tiles: Sequence[int] | None = None
    """Of tokamax's kernels for TPUs, which it would otherwise choose: three sides for a product, one for attention."""
    minutes: float = 10
    """It is ended by then."""


def program(job: Job, operation: Callable[..., Any]) -> tuple[Callable[..., Any], list[Any]]:
    """The function to compile and the shapes and dtypes of its arguments, for an `operation` on arrays."""
    import jax
    import jax.numpy as jnp

    if job.attention:
        length, heads, kv_heads, width = job.shape
        shapes = [(1, length, count, width) for count in (heads, kv_heads, kv_heads)]
        result, integers = shapes[0], []
    else:
        rows, inner, groups, outer = job.shape
        shapes, integers = [(rows, inner), (groups, inner, outer)], [jax.ShapeDtypeStruct((groups,), jnp.int32)]
        result = rows, outer

    def both(*arrays):
        g, arrays, fixed = arrays[0], arrays[1 : 1 + len(shapes)], arrays[1 + len(shapes) :]
        y, pull = jax.vjp(lambda *floats: operation(*floats, *fixed), *arrays)
        return y, pull(g)

    floats = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ([result] * job.gradient + shapes)]
    return both if job.gradient else operation, floats + integers


def compile_for(device: Any, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """The program of a device that may be absent."""
    import jax

    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    return jax.jit(function).lower(*placed).compile()


def report(job: Job, compiled: Any) -> None:
    """Write down the program's text, temporaries in bytes, and the compiler's FLOPs where it counts them."""
    found = {
        "text": compiled.as_text(),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "flops": (compiled.cost_analysis() or {}).get("flops"),
    }
    Path(job.answer).write_text(json.dumps(found))


def tokamax_operation(job: Job) -> Callable[..., Any]:
    """The form of tokamax, with the tiles it chooses, or those of the job."""
    import tokamax  # pyright: ignore[reportMissingImports]
    from absl import flags

    flags.FLAGS([sys.argv[0]])
    implementation: Any = job.form.split()[1]
    if job.tiles is not None:
        implementation = (_attention_of(job.tiles) if job.attention else _product_of(job.tiles),)
    if job.attention:
        return functools.partial(
            tokamax.dot_product_attention,
            is_causal=True,
            logits_soft_cap=job.softcap,
            implementation=implementation,
        )
    return functools.partial(tokamax.ragged_dot, implementation=implementation)


def _product_of(tiles: Sequence[int]) -> Any:
    """Its grouped product for TPUs with the same tiles in all directions; it tunes them on a device only."""
    from tokamax._src.ops.ragged_dot import base, pallas_mosaic_tpu  # pyright: ignore[reportMissingImports]

    rows, inner, outer = tiles
    config = pallas_mosaic_tpu.Config(tile_m=rows, tile_k=inner, tile_n=outer)
    own = pallas_mosaic_tpu.PallasMosaicTpuRaggedDot(config=config)
    pull = functools.partial(base.vjp, dlhs_ragged_dot=own, drhs_ragged_dot=own)
    return pallas_mosaic_tpu.PallasMosaicTpuRaggedDot(config=config, vjp=pull)


def _attention_of(tiles: Sequence[int]) -> Any:
    """Its attention for TPUs with square blocks, computed 512 keys at a time."""
    from tokamax._src.ops.attention import api, pallas_mosaic_tpu_vjp  # pyright: ignore[reportMissingImports]

    (block,) = tiles
    step, form = min(512, block), api.IMPLEMENTATIONS["mosaic_tpu"]
    config = dataclasses.replace(
        form._get_heuristics_config(None), block_q=block, block_kv=block, block_kv_compute=step
    )
    backward = pallas_mosaic_tpu_vjp.Config(block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=step)
    return form.replace(config=config, vjp=form.vjp.replace(config=backward))


def cudnn_operation(job: Job) -> Callable[..., Any]:
    """The form of jax by cuDNN."""
    import jax

    if job.softcap is not None:
        raise ValueError("cuDNN has no soft cap")
    return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")


def main() -> None:
    """Compile the job of the command line."""
    job = Job(**json.loads(sys.argv[1]))
    signal.alarm(int(60 * job.minutes))  # it ends the process inside of a compiler, too
    logging.getLogger("absl").setLevel(logging.ERROR)  # tokamax warns of every shape that it has no tuned tiles for
    import jax
    import numpy as np
    from jax.experimental import topologies

    try:
        device = topologies.get_topology_desc(**job.target).devices[0]
        mesh = jax.sharding.Mesh(np.array([device]), ("device",)).abstract_mesh
        # tokamax asks the default device which kernels it can run; it is told of the one that is compiled for.
        with jax.sharding.use_abstract_mesh(mesh), jax.default_device(device):
            operation = (cudnn_operation if job.form == "cudnn" else tokamax_operation)(job)
            report(job, compile_for(device, *program(job, operation)))
    except Exception as error:
        Path(job.answer).write_text(json.dumps({"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}))


if __name__ == "__main__":
    main()
