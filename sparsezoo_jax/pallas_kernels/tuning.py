"""Tiles, warps and pipeline stages of every kernel, by what it runs on: one table, to which measured lines are added.

A line holds for a kernel, and where it says so for one target (an NVIDIA compute capability such as "9.0", or a TPU's
device kind), for elements of so many bytes, or for heads or rows of so many columns. The line that says most wins;
of each kernel there is one without a target. `python -m benchmarks.device --tune` prints lines for the device there is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax


class Launch(NamedTuple):
    """How a kernel runs."""

    tiles: tuple[int, ...]
    """Sizes, which the comment above the kernel's lines explains."""
    warps: int = 4
    stages: int = 1
    """Tiles that a loop loads ahead."""


class Key(NamedTuple):
    """What a line holds for; None: for all of them."""

    kernel: str
    bytes: int | None = None
    """Of an element."""
    target: str | None = None
    """Compute capability or device kind."""
    columns: int | None = None
    """Of a head."""


#: Chosen by what the assembler says of registers and shared memory (docs/kernels.md): nothing was timed on a device.
TABLE: dict[Key, Launch] = {
    # Queries and keys of a tile of scores.
    Key("spark_attention_moments"): Launch((32, 32), 8, 2),
    Key("spark_attention_moments", 2): Launch((128, 64), 8, 2),
    Key("spark_attention_mix"): Launch((32, 32), 8, 1),
    Key("spark_attention_mix", 2): Launch((128, 32), 8, 3),
    Key("spark_attention_mix", 2, "8.0"): Launch((64, 32), 8, 2),
    Key("spark_attention_queries"): Launch((32, 32), 8, 1),
    Key("spark_attention_queries", 2): Launch((128, 16), 8, 3),
    Key("spark_attention_queries", 2, "8.0"): Launch((64, 32), 8, 2),
    Key("spark_attention_keys"): Launch((32, 32), 8, 1),
    Key("spark_attention_keys", 2): Launch((64, 32), 8, 2),
    # Likewise. An H100's asynchronous products have 64 rows at least, which the program's own tile makes. Older cards
    # hold more of the operands in registers.
    Key("flash_attention_all_keys"): Launch((32, 32), 8, 1),
    Key("flash_attention_all_keys", 2): Launch((128, 64), 8, 2),
    Key("flash_attention_all_keys", 2, columns=128): Launch((128, 128), 8, 2),
    Key("flash_attention_all_keys", 2, "8.0"): Launch((64, 32), 8, 3),
    Key("flash_attention_all_keys", 2, "8.0", 128): Launch((128, 64), 8, 2),
    **{Key("flash_attention_all_keys", 2, card): Launch((64, 32), 8, 2) for card in ("8.6", "8.9")},
    **{Key("flash_attention_all_keys", 2, card, 128): Launch((128, 32), 8, 2) for card in ("8.6", "8.9")},
    Key("flash_attention_queries"): Launch((32, 32), 8, 1),
    Key("flash_attention_queries", 2): Launch((128, 32), 8, 2),
    Key("flash_attention_queries", 2, columns=128): Launch((128, 64), 8, 2),
    Key("flash_attention_queries", 2, "8.0"): Launch((64, 32), 8, 2),
    Key("flash_attention_queries", 2, "8.0", 128): Launch((128, 32), 8, 2),
    **{Key("flash_attention_queries", 2, card): Launch((32, 32), 4, 1) for card in ("8.6", "8.9")},
    **{Key("flash_attention_queries", 2, card, 128): Launch((64, 32), 8, 2) for card in ("8.6", "8.9")},
    Key("flash_attention_keys"): Launch((32, 32), 8, 1),
    Key("flash_attention_keys", 2): Launch((32, 64), 8, 2),
    Key("flash_attention_keys", 2, columns=128): Launch((64, 64), 8, 2),
    # On TPUs: queries and keys at most, and queries worked on at a time, multiples of 128. With 128 of these the matrix
    # unit waits more often for the keys that it takes in (docs/kernels.md has the compiler's bundles).
    Key("spark_attention_tpu"): Launch((512, 512, 256)),
    Key("spark_attention_tpu", target="TPU v6 lite"): Launch((512, 1024, 256)),
    # In wider tiles the sums of all keys are scaled down less often; a v5p waits for its matrix unit all the same, and
    # then they only waste more above the diagonal.
    Key("flash_attention_tpu"): Launch((512, 1024, 256)),
    Key("flash_attention_tpu", target="TPU v5", columns=256): Launch((512, 512, 256)),
    # Keys of a turn, terms of one matrix product, and keys of a program: a sequence has few heads, and a GPU 132
    # processors.
    Key("spark_attention_rows"): Launch((32, 64, 512), 4, 2),
    # Columns of a thread, where there are threads for so few.
    Key("statistical_topk"): Launch((16,)),
    # Neurons of a program, terms of one matrix product.
    Key("spark_ffn_rows_hidden"): Launch((16, 128), 4, 3),
    Key("block_ffn_rows_hidden"): Launch((16, 128), 4, 3),
    # Neurons of a turn, columns of a program, and parts of the neurons, of which each is a program's, for columns alone
    # would leave processors idle.
    Key("spark_ffn_rows_sum"): Launch((32, 64, 16), 4, 3),
    Key("block_ffn_rows_sum"): Launch((32, 64, 16), 4, 3),
    # Rows of one group, columns of the result, terms of one matrix product; for the weights' gradient inputs, outputs,
    # rows of a turn.
    Key("ragged_rows"): Launch((64, 64, 32), 4, 2),
    Key("ragged_rows", 2): Launch((128, 128, 64), 8, 3),
    Key("ragged_weights"): Launch((64, 64, 32), 4, 2),
    Key("ragged_weights", 2): Launch((128, 128, 64), 8, 3),
    # Tokens of a block, neurons of a program or columns of the result, terms of one matrix product; for the weights'
    # gradients neurons of a block, columns, tokens of a turn. The first line's block is that of the two others.
    Key("relu_ffn_hidden"): Launch((64, 32, 32), 4, 1),
    Key("relu_ffn_hidden", 2): Launch((128, 64, 64), 8, 3),
    Key("relu_ffn_sum"): Launch((64, 64, 32), 4, 1),
    Key("relu_ffn_sum", 2): Launch((128, 128, 32), 8, 3),
    Key("relu_ffn_gradients"): Launch((64, 32, 32), 4, 1),
    Key("relu_ffn_gradients", 2): Launch((128, 64, 64), 8, 3),
    Key("relu_ffn_weights"): Launch((64, 64, 32), 4, 1),
    Key("relu_ffn_weights", 2): Launch((64, 128, 32), 8, 3),
    # Neurons (columns of the result) of a program: few, for a union has few experts; terms of one matrix product.
    Key("block_ffn_union_hidden"): Launch((32, 64), 4, 3),
    Key("block_ffn_union_sum"): Launch((32, 64), 4, 3),
}


class Target(NamedTuple):
    """What kernels are compiled for."""

    name: str | None
    """Compute capability or device kind; None: no accelerator is known of."""
    shared: int
    """Shared memory that a block of threads may have, bytes."""


#: Rows of the smallest tile that a matrix product takes.
SMALLEST = 16
#: Of an H100: what kernels are held to where the device isn't known, for then the compiler is asked for that one.
_SHARED = 232_448
#: Parts of the keys of jax's caches: functions are traced again when they change.
_TARGET: Any = jax.make_user_context(default_value=None)
_TRIED: Any = jax.make_user_context(default_value=())


def target_of(device: Any) -> Target:
    """The target that a jax device is, whether it exists or is one to compile for."""
    capability = getattr(device, "compute_capability", None)
    if capability is None:
        return Target(device.device_kind if device.platform == "tpu" else None, _SHARED)
    return Target(str(capability), getattr(device, "shared_memory_per_block_optin", None) or _SHARED)


def target() -> Target:
    """What programs that are traced now are for: as `compiling_for` says, or the device of this process."""
    return _TARGET.value or target_of(jax.local_devices()[0])


@contextlib.contextmanager
def compiling_for(device: Any) -> Iterator[None]:
    """Choose for `device` in what is traced within."""
    with _TARGET(target_of(device)):
        yield


@contextlib.contextmanager
def trying(**launches: Launch) -> Iterator[None]:
    """Launch kernels, by name, as given instead of as the table says, in what is traced within."""
    with _TRIED(tuple(launches.items())):
        yield


def launch_of(kernel: str, *, itemsize: int, columns: int | None = None) -> Launch:
    """The line of the table for a kernel on the target, for elements of `itemsize` bytes."""
    if (tried := dict(_TRIED.value).get(kernel)) is not None:
        return tried
    known = Key(kernel, itemsize, target().name, columns)

    def holds(key: Key) -> bool:
        return all(wanted is None or wanted == found for wanted, found in zip(key, known, strict=True))

    def says(key: Key) -> tuple[bool, ...]:
        return key.target is not None, key.columns is not None, key.bytes is not None

    return TABLE[max(filter(holds, TABLE), key=says)]


def shared_bytes(launch: Launch, queries: int, keys: int, own: int = 0) -> int:
    """Shared memory of a kernel with a tile of its own and a loop over others, which it holds as many of as stages.

    The assembler's figures (docs/kernels.md) are up to 2 kB above the tiles themselves, or well below.

    Args:
      launch: of tiles of queries and keys.
      queries, keys: bytes of a row of each.
      own: which of the two tiles is the program's.
    """
    copies = [launch.stages, launch.stages]
    copies[own] = 1
    sizes = zip(launch.tiles, (queries, keys), copies, strict=True)
    return 4096 + sum(tile * row * count for tile, row, count in sizes)


def fitting(launch: Launch, queries: int, keys: int, own: int = 0) -> Launch | None:
    """`launch` with fewer stages and then smaller tiles, until the target's shared memory holds it; None if none do.

    Arguments as of `shared_bytes`.
    """
    limit = target().shared
    while shared_bytes(launch, queries, keys, own) > limit:
        if launch.stages > 1:
            launch = launch._replace(stages=launch.stages - 1)
        elif (largest := max(launch.tiles)) > SMALLEST:
            tiles = list(launch.tiles)
            tiles[tiles.index(largest)] //= 2
            launch = launch._replace(tiles=tuple(tiles))
        else:
            return None
    return launch
