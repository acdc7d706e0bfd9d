"""Calibrates small models on meshes of eight devices and on one; prints how far both are from each other as JSON."""

import contextlib
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax import nnx

from sparsezoo_jax import sparsify
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.blockffn import BlockFFNConfig
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.models.matrices import layer_matrices
from sparsezoo_jax.models.moe import MoEFFNConfig
from sparsezoo_jax.sharding import MeshConfig, build_mesh, use_mesh
from sparsezoo_jax.sparsification import making, pruning
from sparsezoo_jax.sparsification.config import AllocationConfig, CalibrationConfig, NeuronConfig, RSparseConfig
from sparsezoo_jax.sparsification.layers import layers_of
from sparsezoo_jax.sparsification.placement import placed
from sparsezoo_jax.sparsification.progress import Progress, Stage
from tests.models.conftest import CONFIGS

MESH = MeshConfig(data=2, fsdp=2, tensor=2)
EXPERTS = MeshConfig(data=2, fsdp=2, expert=2)
MIXTURES = {
    "moe": MoEFFNConfig(experts=6, expert_width=8, k=4, router="deepseek", gated=True, router_std=1.0),
    "blockffn": BlockFFNConfig(experts=4, expert_width=8),
}
FIELDS = {
    "teal": {"allocation": AllocationConfig(kind="greedy", step=0.5, sequences=3), "rotate": True},
    "rsparse": {"rsparse": RSparseConfig(population=4, generations=0, sequences=3)},
    "gblm": {},
    "flap": {"neurons": NeuronConfig(widths="by-layer", multiple=8)},
}


class Sequences(making.Text):
    """Text of drawn tokens, as `making.Text` gives it."""

    def __init__(self, rows: int):
        super().__init__(None, 8, CalibrationConfig(sequences=7), rows)

    def __iter__(self):
        tokens = np.random.default_rng(0).integers(1, 61, (8, 17)).astype(np.int32)
        real = np.broadcast_to(np.arange(8)[:, None] < 7, (8, 16))
        positions = np.broadcast_to(np.arange(16, dtype=np.int32), (8, 16))
        fields = {"segment_ids": real.astype(np.int32), "positions": positions, "mask": real}
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], **fields}


def matrices(model: Decoder) -> dict[str, np.ndarray]:
    return {matrix.name: np.asarray(matrix.param[...], np.float32) for matrix in layer_matrices(model)}


def made(config, mesh, method: Any, progress: Progress | None = None, fields: Any = None):
    """What a method makes, and its statistics; with `fields` of the command, or those of `FIELDS`."""
    fields = FIELDS[method] if fields is None else fields
    plan = sparsify.planned(sparsify.Sparsify(directory=Path("run"), out=Path("out"), method=method, **fields))
    rows = 1 if mesh is None else 4
    with use_mesh(mesh):
        model = placed(Decoder(config, rngs=nnx.Rngs(0)))
        return plan.make(model, Sequences(rows), Progress() if progress is None else progress)


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the largest value."""
    return float(np.max(np.abs(found - expected)) / max(float(np.max(np.abs(expected))), 1e-30))


def compared(ours: Any, one: Any) -> dict:
    """Statistics and cuts of two devices' makings."""
    maps = [(ours.calibration.maps[name], one.calibration.maps[name]) for name in one.calibration.maps]
    cuts = one.record["cuts"]
    return {
        "tokens": [ours.calibration.tokens, one.calibration.tokens],
        "counted": [int(map.counts.sum()) for pair in maps for map in pair],
        "moved": max(np.abs(a.counts - b.counts).sum() / b.counts.sum() for a, b in maps),
        "squares": max(apart(a.squares, b.squares) for a, b in maps),
        "cuts": max(apart(np.array(x), np.array(cuts[name])) for name, x in ours.record["cuts"].items()),
    }


def of_experts(config, mesh) -> dict:
    """The same of mixtures whose experts lie on two devices, and which of their weights go."""
    report = {}
    for kind, ffn in MIXTURES.items():
        mixture = dataclasses.replace(config, ffn=ffn)
        pair = [made(mixture, where, "teal", fields={}) for where in (mesh, None)]
        report[kind] = compared(*pair) | {"maps": sorted(pair[0].calibration.maps)}
        ours, one = (matrices(made(mixture, where, "wanda", fields={}).model) for where in (mesh, None))
        report[kind]["others"] = float(np.mean([np.mean((ours[name] == 0) != (one[name] == 0)) for name in one]))
        report[kind]["zeros"] = float(np.mean(ours["down"] == 0))
    report["resumed"] = resumed(dataclasses.replace(config, ffn=MIXTURES["moe"]), mesh, "wanda", {})
    return report


def figures(config, mesh) -> dict:
    report = {}
    pair = {method: (made(config, mesh, method), made(config, None, method)) for method in FIELDS}
    for method in ("teal", "rsparse"):
        report[method] = compared(*pair[method])
    report["teal"]["shares"] = [x.record["shares"] for x in pair["teal"]]
    report["rsparse"]["alphas"] = [x.record["alphas"] for x in pair["rsparse"]]
    ours, one = (matrices(x.model) for x in pair["gblm"])
    report["gblm"] = {"others": float(np.mean([np.mean((ours[name] == 0) != (one[name] == 0)) for name in one]))}
    with use_mesh(mesh):
        model = placed(Decoder(config, rngs=nnx.Rngs(0)))
        paths = pruning.matrix_paths(model, ("q", "down"))
        norms = pruning.gradient_norms(model, Sequences(4), paths, "l2")
        block = next(layers_of(model))[1]
        leaves = jax.tree.leaves(nnx.state(block))
        report["gblm"]["first_device"] = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        report["gblm"]["all"] = sum(x.nbytes for x in leaves)
    expected = pruning.gradient_norms(Decoder(config, rngs=nnx.Rngs(0)), Sequences(1), paths, "l2")
    report["gblm"]["gradients"] = max(apart(norms[path], expected[path]) for path in paths)
    ours, one = pair["flap"]
    report["flap"] = {
        "widths": [ours.record["widths"], one.record["widths"]],
        "matrices": max(apart(x, matrices(one.model)[name]) for name, x in matrices(ours.model).items()),
    }
    report["resumed"] = resumed(config, mesh)
    return report


def resumed(config, mesh, method: Any = "gblm", fields: Any = None) -> bool:
    """Whether what is cut off on a mesh and goes on there makes the same, bit for bit."""
    keep, calls = Stage.keep, []

    def dying(*arguments):
        keep(*arguments)
        calls.append(arguments)
        if len(calls) == 1:
            raise InterruptedError

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Stage, "keep", dying):
        with contextlib.suppress(InterruptedError):
            made(config, mesh, method, Progress(Path(folder)), fields)
        found = matrices(made(config, mesh, method, Progress(Path(folder)), fields).model)
    expected = matrices(made(config, mesh, method, None, fields).model)
    return len(calls) == config.layers and all(x.tobytes() == expected[name].tobytes() for name, x in found.items())


def main() -> None:
    ffn = GatedFFNConfig(d_ff=64, activation="silu")
    config = dataclasses.replace(CONFIGS["llama"], ffn=ffn, scan_layers=True)
    report = figures(config, build_mesh(MESH, only_needed=True))
    report["experts"] = of_experts(config, build_mesh(EXPERTS, only_needed=True))
    print(json.dumps(report, default=float))


if __name__ == "__main__":
    main()
