"""Memory of a step on one device: what the compiler allocates, its largest buffers, and which flags would shrink it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.sharding import RULES

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Buffer:
    """A large array on one device."""

    name: str
    bytes: int


def compiled_memory(compiled: Any) -> dict[str, int]:
    """Bytes on each device by kind, as the compiler assigned them.

    "total" is what has to be allocated: arguments, outputs that are not aliased to an argument, temporaries and code.
    "peak" is the most that is in use at one time, where the compiler tells.
    """
    found = compiled.memory_analysis()
    memory = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    memory["total"] = sum(memory.values()) - 2 * memory["aliased"]
    memory["peak"] = getattr(found, "peak_memory_in_bytes", 0)
    return {name: int(value) for name, value in memory.items()}


def needed_bytes(message: str) -> int | None:
    """Bytes of memory that a compiler's out-of-memory message says are needed; None if it says nothing."""
    number = r"([\d.]+)([KMGT]?)"
    for pattern in (rf"Used {number}i?B? of [\d.]+", rf"required[^(]*\({number}i?B?\)", rf"{number}i?B? exceeds"):
        found = re.search(pattern, message)
        if found:
            return int(float(found[1]) * _UNITS[found[2]])
    return None


def listed_buffers(message: str) -> list[Buffer]:
    """The largest allocations that a compiler's out-of-memory message lists; most messages list some."""
    buffers = []
    for part in re.split(r"\n\s*\d+\. Size: ", message)[1:]:
        size = re.match(r"([\d.]+)([KMGT]?)", part)
        shape = re.search(r"Shape: (\S+?\])", part)
        label = re.search(r'op_name="([^"]*)"', part)
        if size:
            name = " ".join(found[1] for found in (shape, label) if found) or "unnamed"
            buffers.append(Buffer(name, int(float(size[1]) * _UNITS[size[2]])))
    return buffers


def estimated_buffers(config: RunConfig, mesh: Mapping[str, int], step: str, context: int, new: int) -> list[Buffer]:
    """The large arrays that follow from the configuration, on one device, by their logical names; largest first.

    They say what a step is made of when the compiler gives up without a list. The compiler may need several of one at
    a time, or none.
    """
    model, train = config.model, step == "train"
    rows = math.prod(mesh[axis] for axis in RULES["batch"])
    batch = config.data.batch_size / rows / (config.train.accumulation if train else 1)
    length = config.data.seq_len if train else new
    keys = length if train else context
    queries, wide = length / mesh["context"], 2 if model.dtype == "bfloat16" else 4
    heads = model.attention.heads / (mesh["tensor"] if model.attention.score_heads % mesh["tensor"] == 0 else 1)
    chunk = config.train.loss_chunk if train else 1
    positions = queries if chunk is None else chunk / (mesh["context"] if train else 1)
    sizes = {
        "attention scores [B, heads, T, S] float32, one layer": 4 * batch * heads * queries * keys,
        "logits [B, T, V] float32": 4 * batch * positions * model.vocab_size / mesh["tensor"],
    }
    if train:
        ffn = wide * batch * queries * model.ffn.d_ff / mesh["tensor"]
        kept = wide * batch * queries * model.d_model * model.layers
        if model.remat in ("none", "dots"):
            sizes["FFN activations kept for the backward pass, all layers"] = 2 * ffn * model.layers
        if model.remat == "none":
            sizes["attention scores kept for the backward pass, all layers"] = (
                2 * 4 * batch * heads * queries * keys * model.layers
            )
        else:
            sizes["layer inputs kept for the backward pass [L, B, T, D]"] = kept
            sizes["FFN activations, one layer"] = ffn
    return sorted((Buffer(name, int(size)) for name, size in sizes.items()), key=lambda item: -item.bytes)


def suggestions(
    config: RunConfig, mesh: Mapping[str, int], step: str, state: int, buffers: list[Buffer], limit: int
) -> list[str]:
    """Flags that would shrink what is large, with the values to try; each says what it shrinks.

    Args:
      state: bytes of parameters, optimizer and cache on a device.
      buffers: the `estimated_buffers` of the same step.
      limit: bytes of memory of a device. What takes less than a tenth of it is left alone.
    """
    found: list[str] = []
    model, train = config.model, config.train
    large = {item.name.split(",")[0].split(" [")[0].split(" kept")[0] for item in buffers if item.bytes > limit / 10}
    rows = math.prod(mesh[axis] for axis in RULES["batch"])
    batch = config.data.batch_size // rows // (train.accumulation if step == "train" else 1)
    if state > limit / 4:
        if mesh["data"] > 1:
            found.append(f"--mesh.fsdp {mesh['fsdp'] * mesh['data']} --mesh.data 1: splits parameters and their state")
        else:
            found.append("a topology with more chips, all of them in --mesh.fsdp: splits parameters and their state")
    if large and batch > 1:
        if step == "train":
            found.append(f"--train.accumulation {train.accumulation * batch}: one sequence on a device at a time")
        else:
            found.append(f"--data.batch-size {rows}: one sequence on a device")
    if "attention scores" in large and batch <= 1:
        heads = math.gcd(model.attention.score_heads, mesh["fsdp"] * mesh["data"] * mesh["tensor"])
        if heads > mesh["tensor"]:
            fsdp = max(1, mesh["fsdp"] * mesh["tensor"] // heads)
            found.append(f"--mesh.tensor {heads} --mesh.fsdp {fsdp}: splits the heads of attention scores")
        elif mesh["context"] == 1:
            found.append("--mesh.context 2 or more: splits the queries of attention scores")
    if step == "train":
        if model.remat != "full" and any("kept" in item.name and item.bytes > limit / 10 for item in buffers):
            found.append("--model.remat full: keeps the inputs of layers only")
        length = config.data.seq_len
        if "logits" in large and (train.loss_chunk is None or train.loss_chunk > 256):
            found.append(f"--train.loss-chunk {math.gcd(length, 256)}: logits of a part of each sequence at a time")
        if large and batch <= 1 and length > 1024:
            found.append(f"--data.seq-len {length // 2}: shorter sequences")
    return found
