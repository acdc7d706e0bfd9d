"""Evaluates and generates with stored runs on meshes of eight devices and on one; prints both as JSON."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
from flax import nnx

from sparsezoo_jax import data, evaluate, run_dir
from sparsezoo_jax.configs import preset
from sparsezoo_jax.inference import Sampling
from sparsezoo_jax.sharding import MeshConfig, build_mesh
from sparsezoo_jax.text_model import TextModel
from tests.models.conftest import CONFIGS
from tests.sparsification.conftest import store

#: Of eight devices these use four and two; each divides what its architecture has of its own.
MESHES = {"spark": MeshConfig(data=1, fsdp=2, tensor=2), "moe": MeshConfig(data=1, expert=2)}
SHAPE = {"vocab_size": 320, "max_seq_len": 32}
CORPUS = {"bpe_vocab_size": 320, "seq_len": 16, "batch_size": 4, "validation_fraction": 0.3}


def stored(folder: Path, arch: str) -> Path:
    """A run of random weights."""
    corpus = folder / "corpus.jsonl"
    texts = (f"the state of union number {i} is strong and at peace with all" for i in range(99))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tiny = preset(arch, "tiny")
    read = dataclasses.replace(tiny.data, dataset=str(corpus), **CORPUS)
    config = dataclasses.replace(tiny, model=dataclasses.replace(CONFIGS[arch], **SHAPE), data=read)
    return store(folder / arch, config, data.open_tokenizer(config.data))


def figures(directory: Path, arch: str, mesh: MeshConfig) -> dict:
    """Loss and statistics of `evaluate`, what `generate` draws, and bytes of a device."""
    # What costs a program of its own is tried with one of both.
    more = {"calibration": True, "weights": "bfloat16"} if arch == "moe" else {"meter_batches": 1}
    command = evaluate.Evaluate(directory=directory, mesh=mesh, batches=2, meters=arch == "spark", **more)
    found = evaluate.figures_of(command)
    on = build_mesh(mesh, only_needed=True)
    text = TextModel.load(directory, mesh=on)
    prompts = [text.encode(f"the state {word}") for word in ("of", "is", "and", "the")]
    generation = text.generate(prompts, max_new_tokens=6, sampling=Sampling(temperature=0.7), seed=1)
    for _ in generation:
        pass
    drafted = text.generate(prompts[:1], max_new_tokens=6, sampling=Sampling(temperature=0), drafts=2)
    for _ in drafted:
        pass
    loaded = jax.tree.leaves(nnx.state(run_dir.load(directory, mesh=on).model))
    laid_out = jax.tree.leaves(text.engine.state)
    return {
        "loss": found["loss"],
        "packed": found.get("packed", {}).get("loss"),
        "accuracy": found.get("calibration", {}).get("accuracy"),
        "active": [layer["ffn"]["density"] for layer in found.get("meters", {}).get("layers", ())],
        "density": found["ffn_density"],
        "rows": generation.rows,
        "drafted": drafted.rows,
        "loaded": on_first(loaded),
        "all": sum(x.nbytes for x in loaded),
        "laid_out": on_first(laid_out),
        "all_laid_out": sum(x.nbytes for x in laid_out),
    }


def on_first(arrays: list) -> int:
    """Bytes of arrays on the first device."""
    return sum(x.addressable_shards[0].data.nbytes for x in arrays)


def main() -> None:
    folder, report = Path(sys.argv[1]), {}
    for arch, mesh in MESHES.items():
        directory = stored(folder, arch)
        report[arch] = {"mesh": figures(directory, arch, mesh), "one": figures(directory, arch, MeshConfig(data=1))}
    print(json.dumps(report, default=float))


if __name__ == "__main__":
    main()
