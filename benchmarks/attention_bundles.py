"""Instruction bundles that the TPU compiler schedules for a tile of attention: python -m benchmarks.attention_bundles

For each generation and heads, of the loops over tiles in which every query sees every key (most of them): bundles for
512 x 512 scores of one head on one core, forward and backward, beside the cycles that the products take at the matrix
unit's peak; the sum of the larger ones, for bundles leave out waits; and temporaries of both passes over a whole
sequence. With --splash the same of the splash attention that comes with jax, of whole kernels, start and end of a tile
included; with --spark of Spark attention, whose forward pass takes two kernels. With --tokamax PYTHON, another
environment's, of that library's kernels, again in blocks that every query sees. Nothing is measured on a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.compiled_worker import Job
from benchmarks.shapes import TPUS

#: Heads of queries and of keys, their width, soft cap: Gemma-2 2B's, Llama 3 8B's, and heads with keys of their own.
HEADS = {
    "8/4 x 256, cap 50": (8, 4, 256, 50.0),
    "32/8 x 128": (32, 8, 128, None),
    "16/16 x 128": (16, 16, 128, None),
}
#: Multiply-adds a cycle of the matrix units of one core.
MATRIX_UNITS = {"v5e": 4 * 128**2, "v5p": 4 * 128**2, "v6e": 4 * 256**2, "tpu7x": 4 * 256**2}
#: In the names of the kernels of a pass.
KERNELS = ("all_keys", "moments", "mix", "backward")
#: Spark 2B's predictor and target number of keys.
SPARK: dict[str, Any] = {"r": 128, "top_k": 256}
#: Side of a block, and whether one kernel makes all gradients (with sums of the queries' for every block of keys).
SPLASH = {"two backward kernels": (512, False), "fused backward": (1024, True)}
#: Sides of tokamax's blocks: its choice without a device to tune on, and the least of its search at this length.
TOKAMAX = (128, 1024)


class Loop(NamedTuple):
    """The innermost loop of a kernel."""

    kernel: str
    bundles: int
    whole: bool
    """All queries of a tile take one trip, for which the compiler makes no loop."""


def loops(folder: Path) -> list[Loop]:
    """The long innermost loops of the dumped kernels; of two in one kernel the first is that of full tiles.

    In a kernel without a loop these are the two longest parts, without a mask and with one.
    """
    found = []
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule" in path.name or "attention" not in path.name:
            continue
        lines = [line for line in path.read_text().splitlines() if re.match(r"\s*0x[0-9a-f]+", line)]
        inner = [line.split("{")[0].count(">") >= 2 for line in lines]
        sizes, start = [], None
        for i, inside in enumerate([*inner, False]):
            if inside and start is None:
                start = i
            elif not inside and start is not None:
                if i - start > 200:
                    sizes.append(i - start)
                start = None
        kernel = next(x for x in KERNELS if x in path.name)
        found += [Loop(kernel, size, whole=not sizes) for size in sizes or bodies(path)]
    return found


def bodies(path: Path) -> list[int]:
    """Bundles of the two longest parts of a schedule, in its order."""
    sizes = regions(path)
    return [sizes[i] for i in sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:2])]


def compile_one(generation: str, heads: str, length: int, form: str | None) -> None:
    """Compile both passes and print the bytes of their temporaries; run with the dump switched on."""
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from sparsezoo_jax.compilation.memory import compiled_memory
    from sparsezoo_jax.compilation.topologies import lowering_for, open_topology
    from sparsezoo_jax.pallas_kernels import flash_attention, spark_attention
    from sparsezoo_jax.pallas_kernels.spark_attention import Visibility

    queries, keys, width, softcap = HEADS[heads]
    device = open_topology(TPUS[generation]).devices[0]

    def ours(q, k, v, segments):
        visible = Visibility.of_tokens(segments)
        return flash_attention(q, k, v, visible, softcap=softcap, implementation="pallas_tpu")

    def spark(q, k, v, segments):
        visible = Visibility.of_tokens(segments)
        return spark_attention(q, k, v, visible, softcap=softcap, **SPARK, implementation="pallas_tpu")[0]

    attend: Callable[..., jax.Array] = ours
    if form is not None:
        attend = spark if form == "spark" else _splash(form, length, queries // keys, softcap)

    def both(q, k, v, segments, g):
        y, pull = jax.vjp(lambda *x: attend(*x, segments), q, k, v)
        return y, pull(g)

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    q, k = array(1, length, queries, width), array(1, length, keys, width)
    options: Any = None if form not in SPLASH else {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    with lowering_for(device):
        lowered = jax.jit(both).lower(q, k, k, array(1, length, dtype=jnp.int32), q)
        compiled = lowered.compile(compiler_options=options)
    print(compiled_memory(compiled)["temporaries"])


def _splash(form: str, length: int, group: int, softcap: float | None) -> Callable[..., jax.Array]:
    """Splash attention of one sequence, whose queries' heads are grouped by their keys' here."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block, fused = SPLASH[form]
    own = None if fused else block
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=512,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=512,
        block_q_dq=own,
        block_kv_dq=own,
        use_fused_bwd_kernel=fused,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * group)
    kernel = kernels.make_splash_mqa(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=softcap
    )

    def attend(q, k, v, segments):
        q_KGTH = q[0].reshape(length, -1, group, q.shape[-1]).transpose(1, 2, 0, 3)
        ids = kernels.SegmentIds(segments[0], segments[0])
        y_KGTH: Any = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q_KGTH, *(x[0].swapaxes(0, 1) for x in (k, v)), ids)
        return y_KGTH.transpose(2, 0, 1, 3).reshape(q.shape)

    return attend


def dumped(generation: str, heads: str, length: int, form: str | None, folder: str) -> float:
    """Compile in a process of its own, with the schedules dumped into `folder`; megabytes of temporaries."""
    command = [sys.executable, "-m", "benchmarks.attention_bundles", "--compile-only", generation, heads, form or ""]
    return int(_dumping([*command, "--length", str(length)], folder).split()[-1]) / 1e6


def _dumping(command: list[str], folder: str) -> str:
    """What a command prints that compiles with the schedules dumped into `folder`."""
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=.*final.*"
    environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def row(generation: str, heads: str, length: int, form: str | None = None) -> str:
    """A line of the table: of flash attention, or of "spark"."""
    from sparsezoo_jax.pallas_kernels.tuning import TABLE, Key

    queries, keys, width, _ = HEADS[heads]
    kernel = "flash_attention_tpu" if form is None else "spark_attention_tpu"
    target = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}[generation]
    lines = (TABLE.get(Key(kernel, target=target, columns=columns)) for columns in (width, None))
    tile_queries, tile_keys, rows = next((line for line in lines if line is not None), TABLE[Key(kernel)]).tiles
    tile_keys = min(tile_keys, max(512, length // 4))
    with tempfile.TemporaryDirectory() as folder:
        temporaries, found = dumped(generation, heads, length, form, folder), loops(Path(folder))
    # Of the loops of a kernel the first one is that of full tiles; a trip has `rows` queries of all heads on the keys.
    first = {loop.kernel: loop.bundles / (tile_queries if loop.whole else rows) for loop in reversed(found)}
    each = {name: n * 512 * 512 / tile_keys / (queries // keys) for name, n in first.items()}
    backward = each.pop("backward")
    forward, product = sum(each.values()), 512 * 512 * width / MATRIX_UNITS[generation]
    # Both forms multiply whole heads with keys and with values; Spark's makes the predictor's scores twice.
    products = 2 * product if form is None else (2 + SPARK["r"] / width) * product
    least = max(forward, products) + max(backward, 5 * product)
    return (
        f"| {generation} | {heads}{'' if form is None else f', {form}'} | 512 x {tile_keys} | "
        f"{forward:,.0f} ({products:,.0f}) | {backward:,.0f} ({5 * product:,.0f}) | {least:,.0f} | {temporaries:,.0f} |"
    )


def splash_row(generation: str, heads: str, length: int, form: str) -> str:
    """The line of a form of splash attention."""
    (block, _), bundles = SPLASH[form], {"fwd": 0.0, "dkv": 0.0, "dq": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        temporaries = dumped(generation, heads, length, form, folder)
        for path in Path(folder).glob("*splash*schedule-analysis*"):
            count = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
            name = next(name for name in bundles if f"_{name}_" in path.name)
            bundles[name] += int(count[1]) * (512 / block) ** 2 if count else 0
    backward = bundles["dkv"] + bundles["dq"]
    return (
        f"| {generation} | {heads}, splash, {form} | {block} x {block} | {bundles['fwd']:,.0f} | {backward:,.0f} | "
        f"{bundles['fwd'] + backward:,.0f} | {temporaries:,.0f} |"
    )


def regions(path: Path) -> list[int]:
    """Bundles between the places of a schedule that a skipped part (`pl.when`) goes on at."""
    found = [0]
    for line in path.read_text().splitlines():
        if label := re.match(r"\s*0x[0-9a-f]+\s+(\w*)\s*:", line):
            if label[1] == "PF":
                found.append(0)
            found[-1] += 1
    return found


def tokamax_row(python: str, generation: str, heads: str, length: int, block: int) -> str:
    """The line of tokamax's kernels, which have a body for blocks without a mask and, after it, one with."""
    from sparsezoo_jax.compilation.topologies import prepare_environment

    prepare_environment()
    queries, keys, width, softcap = HEADS[heads]
    target = {"platform": "tpu", "topology_name": TPUS[generation], "chips_per_host_bounds": (1, 1, 1)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        shape = (length, queries, keys, width)
        job = Job("tokamax mosaic", shape, softcap, True, target, str(answer), attention=True, tiles=(block,))
        worker = str(Path(__file__).parent / "compiled_worker.py")
        _dumping([python, worker, json.dumps(dataclasses.asdict(job))], folder)
        found = json.loads(answer.read_text())
        if "failed" in found:
            return f"| {generation} | {heads}, tokamax | {block} x {block} | {found['failed']} |"
        passes = []
        for name in ("fwd", "dkv"):
            (path,) = Path(folder).glob(f"*splash*_{name}_*-final_bundles.txt")
            passes.append(bodies(path)[0] * (512 / block) ** 2)
    forward, backward = passes
    product = 512 * 512 * width / MATRIX_UNITS[generation]
    least = max(forward, 2 * product) + max(backward, 5 * product)
    return (
        f"| {generation} | {heads}, tokamax | {block} x {block} | {forward:,.0f} | {backward:,.0f} | {least:,.0f} | "
        f"{found['temporaries'] / 1e6:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192, help="tokens of the sequence")
    parser.add_argument("--tpu", nargs="*", default=list(TPUS), choices=list(TPUS))
    parser.add_argument("--splash", action="store_true", help="splash attention's kernels, too")
    parser.add_argument("--spark", action="store_true", help="Spark attention's kernels, too")
    parser.add_argument("--tokamax", metavar="PYTHON", help="a Python with tokamax: its kernels, too")
    parser.add_argument("--compile-only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile_only:
        generation, heads, form = options.compile_only
        compile_one(generation, heads, options.length, form or None)
        return
    print("| | heads x width | tile | forward (products) | backward (products) | at least | temporaries MB |")
    print("|---|---|---|---|---|---|---|")
    for generation in options.tpu:
        for heads in HEADS:
            print(row(generation, heads, options.length), flush=True)
            if options.spark and HEADS[heads][2] > SPARK["r"]:
                print(row(generation, heads, options.length, "spark"), flush=True)
            for form in SPLASH if options.splash else ():
                print(splash_row(generation, heads, options.length, form), flush=True)
            for block in TOKAMAX if options.tokamax else ():
                print(tokamax_row(options.tokamax, generation, heads, options.length, block), flush=True)


if __name__ == "__main__":
    main()
