"""A small run that is made once, a sparsified one of it, and models of the same shape."""

import contextlib
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import data, run_dir, sparsify
from sparsezoo_jax.configs import preset
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.ffn import GatedFFNConfig
from sparsezoo_jax.training.parameters import save_params
from sparsezoo_jax.training.state import ModelTemplate, flatten

ATTENTION = {"heads": 2, "kv_heads": 1, "head_dim": 16}
MODEL = {"vocab_size": 320, "d_model": 32, "layers": 2, "max_seq_len": 64, "layer_pattern": ("global",)}
DATA = {"bpe_vocab_size": 320, "seq_len": 32, "batch_size": 4, "validation_fraction": 0.2}


def store(directory, config, tokenizer):
    """A run with random weights, as step 3."""
    build = lambda rngs: Decoder(config.model, rngs=rngs)  # noqa: E731
    params, variables = ModelTemplate(build).split(build(nnx.Rngs(0)))
    save_params(directory / "checkpoints", flatten(params), flatten(variables), step=3)
    tokenizer.save(directory)
    run_dir.write_config(directory, config)
    return directory


@pytest.fixture(scope="session")
def made(tmp_path_factory, small_corpus):
    """A dense run, a sparsified one of it, and the figures that the command printed."""
    folder = tmp_path_factory.mktemp("sparsified")
    tiny, corpus = preset("dense", "tiny"), {**DATA, "dataset": str(small_corpus)}
    attention = dataclasses.replace(tiny.model.attention, **ATTENTION)
    ffn = GatedFFNConfig(d_ff=48, activation="silu")
    model = dataclasses.replace(tiny.model, **MODEL, attention=attention, ffn=ffn, scan_layers=True)
    config = dataclasses.replace(tiny, model=model, data=dataclasses.replace(tiny.data, **corpus))
    tokenizer = data.open_tokenizer(config.data)
    run = store(folder / "dense", config, tokenizer)
    args = [run, folder / "teal", "--method", "teal", "--sparsity", 0.4, "--calibration.sequences", 6]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        sparsify.main([*map(str, args), "--batches", "100", "--json"])
    command = sparsify.Sparsify(directory=run, out=folder / "new", method="teal")
    return folder, command, json.loads(printed.getvalue())


@pytest.fixture(scope="session")
def dense(made):
    """The dense run's model."""
    return run_dir.load(made[0] / "dense").model


@pytest.fixture(scope="session")
def batches():
    """Two batches of random tokens, two documents in the first row and padding at the end of the second."""
    tokens = np.asarray(jax.random.randint(jax.random.key(2), (2, 4, 33), 0, 320))
    segments = np.ones((4, 32), np.int32)
    segments[0, 20:], segments[1, 25:] = 2, 0
    positions = np.tile(np.arange(32, dtype=np.int32), (4, 1))
    positions[0, 20:] -= 20
    mask = (segments > 0) & np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)))
    shared = {"segment_ids": segments, "positions": positions, "mask": mask}
    return [{"tokens": rows[:, :-1], "targets": rows[:, 1:], **shared} for rows in tokens]
