"""The steps that are compiled: a train step, one token with a cache, and the reading of a prompt into an empty one."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sparsezoo_jax.compilation.flops import KernelCall, kernel_calls, live, matmul_flops
from sparsezoo_jax.config import RunConfig
from sparsezoo_jax.errors import SparsezooWarning, UserError, require
from sparsezoo_jax.inference import Sampling, packed
from sparsezoo_jax.inference.generation import Step, next_token
from sparsezoo_jax.inference.placement import cache_shardings, state_shardings
from sparsezoo_jax.models import Decoder, DecoderConfig, build_model, dense_twin, flops_per_token
from sparsezoo_jax.sharding import RULES, check_batch, check_neurons, named_sharding, narrow_columns, use_mesh
from sparsezoo_jax.training.compilation import prepare_step

StepName = Literal["train", "decode", "prefill"]


@dataclass(frozen=True)
class LoweredStep:
    """A step traced for a mesh, ready to compile."""

    lowered: Any
    """`jax.stages.Lowered`."""
    arguments: dict[str, int]
    """Bytes on each device of parts of the arguments: parameters, optimizer, batch, cache, other."""
    tokens: int
    """Tokens that a step processes, on all devices."""
    sparse_flops: float
    """FLOPs of a step with the sparsity that the configuration aims at, without recomputation, on all devices."""
    dense_flops: float
    """The same of the decoder of equal parameters that computes everything; `sparse_flops` where there is none."""
    traced_flops: float
    """FLOPs of the matrix products in the traced step, on all devices."""
    kernels: dict[str, KernelCall]
    """What a call of each Pallas kernel in the traced step takes on one device, by name."""
    notes: list[str]
    """How devices share the work of layers, where there is a choice."""
    seconds: float
    """Time to trace and lower."""


def lower_step(config: RunConfig, mesh: Mesh, step: StepName, context: int) -> LoweredStep:
    """Trace a step of `config` on `mesh`, without allocating anything.

    A train step is the one that `train` runs, on batches of `data.batch_size` sequences of `data.seq_len` tokens. The
    other two are the call that `generate` makes, on `data.batch_size` sequences with a cache of `context` tokens:
    "decode" adds the last token, "prefill" reads all of them.

    Raises:
      ConfigError: sizes that the mesh does not divide, or a context beyond `model.max_seq_len`.
    """
    started = time.monotonic()
    if step == "train":
        batch_shape = (config.data.batch_size, config.data.seq_len)
        check_batch(batch_shape, mesh, accumulation=config.train.accumulation)
        prepared = prepare_step(
            config.train, lambda rngs: build_model(config.model, rngs), batch_shape, named_sharding(mesh)
        )
        check_neurons(prepared.template.parameters, mesh)
        narrow = narrow_columns(prepared.template.parameters, mesh)
        if narrow is not None and platform_of(mesh) == "tpu":
            warnings.warn(narrow, SparsezooWarning, stacklevel=2)
        function, arguments = prepared.train_step, (prepared.abstract, prepared.batch)
        parts = {
            "parameters": (prepared.abstract.params, prepared.abstract.frozen),
            "optimizer": prepared.abstract.opt_state,
            "batch": prepared.batch,
        }
        length, new, position, passes = config.data.seq_len, config.data.seq_len, "mean", 3
    else:
        require(0 < context <= config.model.max_seq_len, "--context", context, _limit(config))
        new = context if step == "prefill" else 1
        function, arguments, parts = _inference(config, mesh, new, context)
        length, position, passes = context, "last" if step == "decode" else "mean", 1
    with use_mesh(mesh):
        traced = function.trace(*arguments)
        jaxpr = live(traced.jaxpr.jaxpr)
        lowered = traced.lower()
        # Layers see the sequences of one micro-batch.
        rows = config.data.batch_size // (config.train.accumulation if step == "train" else 1)
        shape = (rows, new, config.model.d_model)
        shares = {spec.ffn.on_mesh(shape) for spec in config.model.layer_specs()}
    every_token = step != "prefill"
    tokens = config.data.batch_size * new
    last_logits = 0 if every_token else 2 * config.model.d_model * config.model.vocab_size * config.data.batch_size

    def needed(model: DecoderConfig) -> float:
        per_token = flops_per_token(model, length, position=position, logits=every_token)
        return passes * (per_token * tokens + last_logits)

    sizes = {name: bytes_per_device(part) for name, part in parts.items()}
    sizes["other"] = bytes_per_device(arguments) - sum(sizes.values())
    return LoweredStep(
        lowered=lowered,
        arguments=sizes,
        tokens=tokens,
        sparse_flops=needed(config.model),
        dense_flops=needed(dense_twin(config.model) or config.model),
        traced_flops=matmul_flops(jaxpr, platform_of(mesh)),
        kernels=kernel_calls(jaxpr, platform_of(mesh)),
        notes=sorted(note for note in shares if note is not None),
        seconds=time.monotonic() - started,
    )


def _limit(config: RunConfig) -> str:
    return f"must be from 1 to model.max_seq_len={config.model.max_seq_len}"


def _inference(config: RunConfig, mesh: Mesh, new: int, context: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    place, batch = named_sharding(mesh), config.data.batch_size
    rows = math.prod(mesh.shape[axis] for axis in RULES["batch"])
    require(batch % rows == 0, "data.batch_size", batch, f"must be a multiple of {rows}, the devices that split it")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: packed(Decoder(config.model, rngs=nnx.Rngs(0)))))

    def spec(shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place(axes, shape))

    def placed(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, shardings)

    state = placed(state, state_shardings(state, mesh))
    model = nnx.merge(graphdef, state)
    cache: Any = jax.eval_shape(lambda: model.init_cache(batch, context))
    shardings = cache_shardings(cache, mesh)
    cache = placed(cache, shardings)
    ints = spec((batch, new), jnp.int32, ("batch", None))
    key = jax.eval_shape(lambda: jax.random.key(0))
    scalar = spec((), jnp.int32, ())
    out: tuple[Any, Any, Any] = (place(("batch",), (batch,)), shardings, place((), ()))
    function = jax.jit(partial(next_token, Sampling(), graphdef), donate_argnums=1, out_shardings=Step(*out))
    arguments = (state, cache, ints, ints, scalar, jax.ShapeDtypeStruct((), key.dtype, sharding=place((), ())))
    return function, arguments, {"parameters": state, "cache": cache, "batch": ints}


def platform_of(mesh: Mesh) -> str:
    """The platform that functions on this mesh are lowered for, by the name that implementations are listed under."""
    platform = mesh.devices.flat[0].platform
    return "cuda" if platform == "gpu" else platform


def bytes_per_device(tree: Any) -> int:
    """Bytes that each device holds of abstract arrays with shardings (tiles of the memory's layout not counted)."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += 8
        else:
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


class OutOfMemoryError(Exception):
    """The compiler found that a step does not fit; the message is the compiler's."""


def compile_step(step: LoweredStep) -> tuple[Any, float]:
    """The compiled step and the seconds it took.

    Raises:
      OutOfMemoryError: it does not fit into the memory of a device.
      UserError: the compiler refuses it for another reason.
    """
    started = time.monotonic()
    try:
        return step.lowered.compile(), time.monotonic() - started
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" in text and ("HBM" in text or "hbm" in text):
            raise OutOfMemoryError(text) from None
        raise UserError(f"the compiler refuses this step: {text.splitlines()[0][:400]}") from None
