"""Mixtures with masks laid out for decoding compute what the trained ones do, from the rows that masks leave."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.inference.layouts import Formats, laid_out
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.common import BuildContext, InitConfig
from sparsezoo_jax.models.deco import DECOConfig
from sparsezoo_jax.models.masks import DENSITY
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.models.moex import MoEXFFNConfig
from sparsezoo_jax.models.records import EXPERT_SCORES
from sparsezoo_jax.models.sparsified import SparsifiedFFNConfig
from sparsezoo_jax.sparsification import METHODS
from tests.kernels.few_rows import implementation
from tests.sparsification.test_formulas import call, silu

D, W = 24, 8
MOE = MoEFFNConfig(experts=6, expert_width=W, k=3, router="deepseek", shared_experts=2, gated=True, router_std=1.0)
KINDS = {
    "moe": MOE,
    "plain moe": dataclasses.replace(MOE, router="topk", shared_experts=None, gated=False, activation="relu2"),
    "remoe": dataclasses.replace(MOE, router="remoe"),
    "blockffn": BlockFFNConfig(experts=5, expert_width=W, gated=True, init_std=None),
    "moex": MoEXFFNConfig(experts=4, expert_width=W, k=2),
    "deco": DECOConfig(experts=5, expert_width=W, shared_width=10, scale_init=1.0),
}
CUTS = {"gate": 0.5, "up": 0.6, "neurons": 0.1, "down": 0.05}
METHOD = {
    **{(kind, "teal"): {} for kind in KINDS},
    **{(kind, "wina"): {} for kind in KINDS},
    **{(kind, "cats"): {} for kind in ("moe", "remoe", "blockffn", "deco")},
    ("moe", "first tokens dense"): {"dense_tokens": 2},
    ("blockffn", "first tokens dense"): {"dense_tokens": 2},
    ("deco", "first tokens dense"): {"dense_tokens": 2},
    ("moe", "largest neurons"): {"maps": ("gate", "neurons", "shared_neurons"), "gate": "top_k"},
    ("moe", "some maps"): {"maps": ("down", "shared_up")},
    ("moex", "some maps"): {"maps": ("down",)},
}


def masked(kind, method, dtype="float32"):
    """A layer that leaves out about a half, with norms and statistics that were prepared."""
    of, changes = KINDS[kind], dict(METHOD[kind, method])
    base = METHODS[method if method in METHODS else "teal"]
    maps = tuple(name for name in changes.pop("maps", base.maps) if name in of.linear_maps(D))
    gate = changes.pop("gate", base.gate)
    base = base._replace(maps=maps, weighted=maps if base.weighted else (), gate=gate)
    ctx = BuildContext(D, 1, InitConfig(), param_dtype=jnp.dtype("float32"), dtype=jnp.dtype(dtype))
    layer = SparsifiedFFNConfig(of=of, sparsity=base.sparsity(0.5, **changes)).build(ctx, nnx.Rngs(0))
    cuts = [0.5 if gate == "top_k" else CUTS[name.removeprefix("shared_")] for name in layer.masks.names]
    layer.masks.cut_P[...] = jnp.asarray(cuts, jnp.float32)
    layer.prepare()
    return layer


@cache
def pair(kind, method, dtype="float32"):
    """The layer, and the same laid out."""
    layer = masked(kind, method, dtype)
    return layer, laid_out(layer, Formats(), None)


def tokens(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).standard_normal((*shape, D)), dtype)


#: In bfloat16 one kind of each form of the product.
CASES = [
    *((*which, "float32") for which in METHOD),
    *((kind, method, "bfloat16") for kind, method in METHOD if kind in ("moe", "deco") and method in METHODS),
]


@pytest.mark.parametrize(("kind", "method", "dtype"), CASES)
def test_is_the_trained_one(kind, method, dtype):
    """A prompt, tokens of a batch, a chunk and a single token."""
    implementation("native")
    layer, packed = pair(kind, method, dtype)
    run, decode = jax.jit(partial(call, layer)), jax.jit(partial(call, packed))
    x = tokens(3, 8, dtype=dtype)
    expected, aux = run(x)
    assert {name for name in aux.stats if name.startswith(DENSITY)} == {DENSITY + name for name in layer.masks.names}
    size = float(jnp.abs(expected).max())
    # In bfloat16 a channel whose score is near its threshold is left out in one form, and read in the other.
    largest, mean = (2e-6, 1e-6) if dtype == "float32" else (0.2, 0.01)
    for length in (8, 3):
        found, measured = decode(x[:, :length])
        difference = np.abs(found.astype(jnp.float32) - expected[:, :length].astype(jnp.float32)) / size
        assert (difference.max() < largest, difference.mean() < mean) == (True, True), (
            difference.max(),
            difference.mean(),
        )
        wanted = run(x[:, :length])[1].stats
        assert {name: float(value) for name, value in measured.stats.items()} == pytest.approx(
            {name: float(value) for name, value in wanted.items()}, abs=1e-6 if dtype == "float32" else 0.05
        )
    alone = decode(x[:1, :1])[0]
    np.testing.assert_allclose(alone.astype(jnp.float32), decode(x[:, :3])[0][:1, :1].astype(jnp.float32), atol=1e-6)


def lost(rows, keep):
    """Laid-out rows [E, N, K] without those of which `keep` [E, N] is false."""
    rows.rows[...] = jnp.where(jnp.asarray(keep)[..., None], rows.rows[...], jnp.nan)


@pytest.mark.parametrize("method", ["teal", "cats"])
def test_a_token_reads_the_rows_that_its_masks_leave(method):
    """Of the experts that it takes, by the masks in NumPy; all other rows are lost."""
    implementation("native")
    layer, (x,) = masked("moe", method), tokens(1, 1)[0]
    expected, aux = call(layer, x[None, None], record=frozenset({EXPERT_SCORES}))
    taken = np.asarray(aux.records[EXPERT_SCORES])[0, 0, MOE.shared :] != 0
    assert taken.sum() == MOE.k - MOE.shared
    inner, x = layer.inner, np.asarray(x, np.float64)
    packed = laid_out(layer, Formats(), None)
    for maps, prefix in ((packed.inner.routed, ""), (packed.inner.fused, "shared_")):
        gate, up, _ = (
            np.asarray(getattr(inner, f"{prefix}{name}")[...], np.float64)
            for name in (("gate_EDW", "up_EDW", "down_EWD") if not prefix else ("gate_DF", "up_DF", "down_FD"))
        )
        gate, up = (w if w.ndim == 3 else w[None] for w in (gate, up))
        used = taken if not prefix else np.ones(1, bool)
        to_gate, to_up = (x * (np.abs(x) > CUTS[name]) if method == "teal" else x for name in ("gate", "up"))
        gates = silu(np.einsum("d,edw->ew", to_gate, gate))
        if method == "cats":
            kept = used[:, None] & (np.abs(gates) > CUTS["neurons"])
            lost(maps.gate, used[:, None] & np.ones(D, bool))
            lost(maps.up, kept)
        else:
            kept = used[:, None] & (np.abs(gates * np.einsum("d,edw->ew", to_up, up)) > CUTS["down"])
            lost(maps.gate, used[:, None] & (to_gate != 0))
            lost(maps.up, used[:, None] & (to_up != 0))
        assert 0 < kept.sum() < used.sum() * kept.shape[1]
        lost(maps.down, kept)
    found = jax.jit(partial(call, packed))(jnp.asarray(x, jnp.float32)[None, None])[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bytes_are_those_of_the_channels_that_were_read():
    """By the statistics of the token; without them by the share that was asked for."""
    _, packed = pair("moe", "teal")
    stats = {"ffn_density": 0.5, **{f"density_{name}": 0.25 for name in packed.masks.names}, "density_up": 0.75}
    router, expert, number = 4 * D * MOE.routed, 4 * D * W, MOE.k - MOE.shared
    assert packed.bytes_of(stats) == router + number * expert * (0.25 + 0.75 + 0.25) + MOE.shared * expert * 3 * 0.25
    assert packed.bytes_of({"ffn_density": 0.5}) == router + MOE.k * expert * 3 * 0.5 == packed.bytes_read(0.5)
    _, packed = pair("moex", "teal")
    of = KINDS["moex"]
    gate = 4 * 2 * D * of.experts
    # A unit that is 0 needs no row, whatever the mask leaves: here 5 of the 16 neurons of both experts.
    assert packed.bytes_read(5 / (of.experts * W)) == gate + expert * (2 * 0.5 + 5 / W)
