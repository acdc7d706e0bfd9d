"""Three train steps of small models on several meshes; prints the differences from one device as JSON.

Adam divides by the gradient's own size, so that an entry near zero would turn rounding into a step of full length: the
large epsilon keeps the comparison one of gradients.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.altup import AltUpConfig
from sparsezoo_jax.models.elimination import Elimination
from sparsezoo_jax.models.laurel import LaurelConfig
from sparsezoo_jax.models.per_layer import PerLayerConfig
from sparsezoo_jax.models.readme import ReadMEFFNConfig
from sparsezoo_jax.sharding import MeshConfig, build_mesh, device_put, named_sharding, num_replicas, use_mesh
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.lora import LoRAConfig, adapters_of
from sparsezoo_jax.training.objectives import FixedObjective
from sparsezoo_jax.training.optimizer import build_optimizer
from sparsezoo_jax.training.optimizers import AdamW
from sparsezoo_jax.training.schedules import Constant
from sparsezoo_jax.training.state import ModelTemplate, flatten, initial_state, map_with_path, state_shardings
from sparsezoo_jax.training.step import build_train_step

MESHES = {
    "data 8": {"data": 8},
    "fsdp 2, context 2, tensor 2": {"fsdp": 2, "context": 2, "tensor": 2},
    "data 2, expert 2, tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "expert 2, tensor 4": {"expert": 2, "tensor": 4},
}
#: Every axis meets dense, spark and blockffn; what routes, by blocks of the width or by experts, meets the axes that
#: treat it otherwise. Splits in four and in eight are on one or two architectures each.
COVERED = {
    "dense": ("data 8", "fsdp 2, context 2, tensor 2", "data 2, expert 2, tensor 2"),
    "spark": ("fsdp 2, context 2, tensor 2", "data 2, expert 2, tensor 2"),
    "blockffn": ("fsdp 2, context 2, tensor 2", "data 2, expert 2, tensor 2"),
    "deco": ("fsdp 2, context 2, tensor 2",),
    "mohd": ("fsdp 2, context 2, tensor 2",),
    "moex": ("expert 2, tensor 4",),
    "moe": ("data 2, expert 2, tensor 2",),
    "plm": ("fsdp 4, tensor 2",),
    "lazy": ("fsdp 2, context 2, tensor 2",),
    "ling": ("data 2, expert 2, tensor 2",),
    "prosparse": ("fsdp 4, tensor 2",),
    "sparselm": ("fsdp 2, context 2, tensor 2",),
    "delta": ("fsdp 2, context 2, tensor 2",),
    "adapters": ("data 2, expert 2, tensor 2",),
    "lemo": ("data 2, expert 2, tensor 2",),
    "readme": ("data 2, expert 2, tensor 2",),
    "altup": ("fsdp 2, context 2, tensor 2",),
}
#: What weighs the auxiliary losses; and micro-batches of a step on these meshes, one device having one.
OBJECTIVES = {
    "prosparse": (FixedObjective(loss="mean_l1", weight=0.1),),
    "sparselm": (FixedObjective(loss="l1", weight=0.01),),
    "delta": (FixedObjective(loss="delta_spikes", weight=0.001),),
}
ACCUMULATION = {("sparselm", "fsdp 2, context 2, tensor 2"): 4}
#: Where the initial state is made on the mesh as well: together on all axes.
INITIALISED = {("spark", "fsdp 2, context 2, tensor 2"), ("moe", "data 2, expert 2, tensor 2")}
WHOLE = LoRAConfig()
LORA = {"adapters": LoRAConfig(rank=8, whole=("scale$",)), "lemo": LoRAConfig(rank=8)}
#: Blocks of tokens that layers keep.
ELIMINATION = {"lemo": Elimination(block=8, kept={"attention": (2,), "ffn": (3,)})}
SHAPE = (8, 32)


def models():
    """The attention and FFN kinds, scanned and rematerialised as the large presets are, narrow."""
    for arch in ("dense", "spark"):
        model = preset(arch, "tiny").model
        narrow = {"r": 8, "top_k": 8} if arch == "spark" else {}
        # As in wider layers, where the statistics' shift is the mean of a sample from each device.
        spark = {"r": 32, "top_k": 20, "implementation": "one_pass"} if arch == "spark" else {}
        attention = dataclasses.replace(model.attention, window=16, heads=8, kv_heads=4, head_dim=16, **narrow)
        yield (
            arch,
            dataclasses.replace(
                model, vocab_size=512, d_model=64, attention=attention, scan_layers=True, remat="full",
                ffn=dataclasses.replace(model.ffn, d_ff=256, **spark),
            ),
        )  # fmt: skip

    model = preset("blockffn", "tiny").model
    attention = dataclasses.replace(model.attention, heads=8, q_lora_rank=32, kv_lora_rank=16)
    ffn = dataclasses.replace(model.ffn, experts=16, expert_width=16, chunk_length=16)
    yield (
        "blockffn",
        dataclasses.replace(
            model, vocab_size=512, d_model=64, attention=attention, ffn=ffn, scan_layers=True, remat="full"
        ),
    )

    model = preset("dense", "tiny").model
    gqa = dataclasses.replace(model.attention, window=16, heads=8, kv_heads=4, head_dim=16)
    ffn = dataclasses.replace(model.ffn, d_ff=64)
    yield (
        "lemo",
        dataclasses.replace(model, vocab_size=512, d_model=64, layers=2, attention=gqa, ffn=ffn, scan_layers=True),
    )

    model = preset("moe", "tiny").model
    ffn = dataclasses.replace(model.ffn, experts=9, expert_width=16, k=3, shared_experts=1, moved="tokens")
    model = dataclasses.replace(
        model, vocab_size=512, d_model=64, layers=2, attention=attention, ffn=ffn, scan_layers=True, remat="full"
    )
    yield "moe", model
    dense = preset("dense", "tiny").model.attention
    yield "adapters", dataclasses.replace(model, layers=1, attention=dense, remat="none")

    ffn = ReadMEFFNConfig(
        experts=4, expert_width=16, shared_width=16, router_width=32, router_heads=2, router_d_ff=32, moved="tokens"
    )
    yield "readme", dataclasses.replace(model, layers=1, attention=dense, ffn=ffn)

    model = preset("plm", "tiny").model
    attention = dataclasses.replace(model.attention, heads=8, kv_lora_rank=16)
    ffn = dataclasses.replace(model.ffn, d_ff=128)
    yield (
        "plm",
        dataclasses.replace(
            model, vocab_size=512, d_model=64, layers=2, attention=attention, ffn=ffn, scan_layers=True, remat="full"
        ),
    )

    model = preset("lazy", "tiny_topk").model
    attention = dataclasses.replace(model.attention, heads=8, kv_heads=8, head_dim=16)
    ffn = dataclasses.replace(model.ffn, d_ff=64, top_k=12)
    yield (
        "lazy",
        dataclasses.replace(
            model, vocab_size=512, d_model=64, layers=1, attention=attention, ffn=ffn, scan_layers=True, remat="dots"
        ),
    )

    model = preset("ling", "tiny").model
    ffn = dataclasses.replace(model.ffn, experts=9, expert_width=16, k=3, moved="tokens")
    # Without the dense first layer, as DECO has one; behind the layers follows that of a second prediction.
    model = dataclasses.replace(model, first_layers=0, first_ffn=None)
    yield (
        "ling",
        dataclasses.replace(model, vocab_size=512, d_model=64, layers=2, ffn=ffn, scan_layers=True, remat="full"),
    )

    model = preset("deco", "tiny").model
    ffn = dataclasses.replace(model.ffn, experts=16, expert_width=16)
    yield (
        "deco",
        dataclasses.replace(model, vocab_size=512, d_model=64, layers=2, ffn=ffn, scan_layers=True, remat="full"),
    )

    model = preset("mohd", "tiny").model
    attention = dataclasses.replace(model.attention, heads=8, kv_heads=4, head_dim=16)
    residual = dataclasses.replace(model.residual, blocks=8, active=4, shared=3)
    ffn = dataclasses.replace(model.ffn, d_ff=128)
    yield (
        "mohd",
        dataclasses.replace(
            model, vocab_size=512, d_model=128, layers=2, layer_pattern=("global",), attention=attention,
            residual=residual, ffn=ffn, remat="full",
        ),
    )  # fmt: skip

    model = preset("moex", "tiny").model
    attention = dataclasses.replace(model.attention, heads=8, kv_heads=8, head_dim=16)
    ffn = dataclasses.replace(model.ffn, expert_width=64)
    yield (
        "moex",
        dataclasses.replace(
            model, vocab_size=512, vocab_multiple=96, d_model=64, layers=2, attention=attention, ffn=ffn,
            scan_layers=True, remat="full",
        ),
    )  # fmt: skip

    model = preset("prosparse", "tiny").model
    attention = dataclasses.replace(model.attention, heads=8, kv_heads=8, head_dim=16)
    ffn = dataclasses.replace(model.ffn, d_ff=64)
    yield (
        "prosparse",
        dataclasses.replace(
            model, vocab_size=512, d_model=64, layers=1, attention=attention, ffn=ffn, scan_layers=True, remat="dots"
        ),
    )

    model = preset("delta", "tiny").model
    attention = dataclasses.replace(model.attention, heads=8, kv_heads=8, head_dim=16)
    # Units of a few long steps, so that rounding on another mesh turns few of them into the next one.
    ffn = dataclasses.replace(model.ffn, d_ff=64, gated=True, rounded="both", step_init=0.5)
    yield (
        "delta",
        dataclasses.replace(
            model, vocab_size=512, d_model=64, layers=1, attention=attention, ffn=ffn, scan_layers=True, remat="dots"
        ),
    )

    model = preset("sparselm", "tiny").model
    attention = dataclasses.replace(model.attention, heads=8, kv_heads=8, head_dim=16)
    # Where a hidden unit is close to 0, rounding turns it on or off in later steps, and with it its L1 gradient. Few
    # units, and full-sized weights for dead ones, keep all at a distance from 0.
    ffn = dataclasses.replace(model.ffn, d_ff=64, dead_after=1, revival=1.0, stored_neurons=38)
    yield (
        "sparselm",
        dataclasses.replace(
            model, vocab_size=512, d_model=64, layers=2, attention=attention, ffn=ffn, scan_layers=True, remat="dots"
        ),
    )

    model = preset("dense", "tiny").model
    attention = dataclasses.replace(
        model.attention, window=16, heads=8, kv_heads=4, head_dim=16, softcap=None, qk_norm=True, value_norm=True
    )
    yield (
        "altup",
        dataclasses.replace(
            model, vocab_size=512, d_model=64, attention=attention, ffn=dataclasses.replace(model.ffn, d_ff=64),
            residual=LaurelConfig(rank=8), altup=AltUpConfig(streams=2), per_layer=PerLayerConfig(width=16),
            kv_shared_layers=2, scan_layers=True, remat="full",
        ),
    )  # fmt: skip


def batches():
    """Three batches of packed documents."""
    rng = np.random.default_rng(0)
    for _ in range(3):
        tokens = rng.integers(0, 512, (SHAPE[0], SHAPE[1] + 1)).astype(np.int32)
        segments = np.where(np.arange(SHAPE[1]) < rng.integers(5, 25, (SHAPE[0], 1)), 1, 2).astype(np.int32)
        first = np.argmax(segments == 2, axis=1, keepdims=True)
        index = np.broadcast_to(np.arange(SHAPE[1], dtype=np.int32), SHAPE)
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segment_ids": segments,
            "positions": np.where(segments == 2, index - first, index).astype(np.int32),
            "mask": rng.random(SHAPE) < 0.9,
        }


class Run:
    """Training of a model: what does not depend on the mesh is made once."""

    def __init__(self, config, objectives=(), lora=WHOLE, elimination=None):
        self.settings = TrainConfig(
            steps=3,
            schedule=Constant(learning_rate=1e-2),
            optimizer=AdamW(eps=1e-2),
            loss_chunk=16,
            objectives=objectives,
            lora=lora,
        )

        def build(rngs):
            return Decoder(config, rngs=rngs)

        self.template, self.elimination = ModelTemplate(build), elimination
        self.adapters = adapters_of(lora, self.template.parameters)
        self.trained = self.template.parameters if self.adapters is None else self.adapters.parameters
        self.optimizer = build_optimizer(self.settings, self.trained)
        self.key = jax.random.key(0)

        def initialise(key):
            state = initial_state(self.template, build, self.optimizer, objectives, key, self.adapters)
            return with_dead_neurons(state)

        self.initialise = initialise
        self.abstract = jax.eval_shape(initialise, self.key)
        self.initial = jax.device_get(jax.jit(initialise)(self.key))

    def shardings(self, mesh):
        """The sharding of each array of the state."""
        return state_shardings(self.template, self.abstract, named_sharding(mesh), self.adapters)

    def initial_distance(self, mesh):
        """How far the state is that is made on a mesh from the one made on one device."""
        with use_mesh(mesh):
            made = jax.device_get(jax.jit(self.initialise, out_shardings=self.shardings(mesh))(self.key))
        return distance(flatten(made), flatten(self.initial))

    def train(self, mesh, accumulation=1):
        """Metrics, the first gradients, the final parameters, and on how many devices of a model copy each of them is.

        From the same state on every mesh, which compiling its initialisation for each would make no other.
        """
        place, shardings = named_sharding(mesh), self.shardings(mesh)
        settings = dataclasses.replace(self.settings, accumulation=accumulation)
        with use_mesh(mesh):
            state = jax.device_put(self.initial, shardings)
            step = jax.jit(
                build_train_step(settings, self.template, self.optimizer, elimination=self.elimination),
                out_shardings=(shardings, place((), ())),
                donate_argnums=0,
            )
            rows = []
            for batch in batches():
                state, metrics = step(state, device_put(batch, place(("batch", "length"), SHAPE), SHAPE))
                rows.append({name: float(metrics[name]) for name in ("loss", "grad_norm")})
                if len(rows) == 1:  # Adam's first moment is then the gradient, but for a factor
                    moments = flatten(jax.device_get(state.opt_state))
                    gradients = {path: x for path, x in moments.items() if "mu/" in path}
        held = {name: num_replicas(v.full_axes, v.shape, mesh) for name, v in self.trained.items()}
        found = {
            name: round(x.size / max(shard.data.size for shard in x.addressable_shards))
            for name, x in flatten(state.params).items()
        }
        model_devices = mesh.size // mesh.shape["data"]
        assert all(model_devices // found[name] == held[name] for name in held), (found, held)
        return rows, gradients, flatten(jax.device_get(state.params)), held


def with_dead_neurons(state):
    """Where silent neurons are counted, a quarter of them: so that layers that revive them do."""
    if not any(path.endswith("silent_F") for path in flatten(state.model_state)):
        return state

    def cleared(path, array):
        return array.at[..., ::4].set(0) if path.endswith("ffn/gate_DF") else array

    return dataclasses.replace(state, params=map_with_path(cleared, state.params))


def distance(a, b):
    """Largest relative distance, in the 2-norm, among arrays of one name; absolute from one that is 0."""
    sizes = {name: np.linalg.norm(array) or 1 for name, array in b.items()}
    return max(float(np.linalg.norm(a[name] - b[name]) / sizes[name]) for name in b)


def main():
    report = {}
    wanted = sys.argv[1:]
    for arch, config in models():
        if wanted and arch not in wanted:
            continue
        run = Run(config, OBJECTIVES.get(arch, ()), LORA.get(arch, WHOLE), ELIMINATION.get(arch))
        rows, gradients, parameters, _ = run.train(build_mesh(MeshConfig(), jax.devices()[:1]))
        report[arch] = {}
        for name in COVERED[arch]:
            mesh = build_mesh(MeshConfig(**MESHES[name]))
            sharded_rows, sharded_gradients, sharded, held = run.train(mesh, ACCUMULATION.get((arch, name), 1))
            report[arch][name] = {
                "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, sharded_rows, strict=True)),
                "grad_norm": max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(rows, sharded_rows, strict=True)),
                "gradients": distance(sharded_gradients, gradients),
                "parameters": distance(sharded, parameters),
                "held": {path: count for path, count in held.items() if count > 1},
            }
            if (arch, name) in INITIALISED:
                report[arch][name]["initial"] = run.initial_distance(mesh)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
