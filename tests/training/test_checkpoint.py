import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.training.checkpoint import Checkpointer
from sparsezoo_jax.training.checkpoint_format import brief, describe
from sparsezoo_jax.training.objectives import AdaptiveFactor
from sparsezoo_jax.training.optimizers import Muon
from sparsezoo_jax.training.parameters import restore_params, saved_steps
from sparsezoo_jax.training.state import flatten

from .test_step import assert_equal, batch_number, setup

CHANGES = {"objectives": (AdaptiveFactor(loss="activation", weight=0.1, start=2, interval=1),)}


@pytest.fixture(scope="module")
def states():
    """Train states after 1, 2 and 3 steps."""
    _, state, step = setup(**CHANGES)
    found = []
    for n in range(3):
        state, _ = step(state, batch_number(n))
        found.append(state)
    return found


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(directory, keep_last=3)
    for number, state in enumerate(states, 1):
        checkpointer.save(state, {"n": number}, step=number)
    checkpointer.close()
    return directory


@pytest.fixture
def directory(saved, tmp_path):
    """A copy of three checkpoints, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def abstract(state):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


def restore(directory, state):
    checkpointer = Checkpointer(directory, keep_last=3)
    try:
        return checkpointer.restore(abstract(state)), checkpointer.steps()
    finally:
        checkpointer.close()


def test_restores_everything_exactly(directory, states):
    restored, _ = restore(directory, states[0])
    assert_equal(restored.state, states[2])
    assert jax.tree.structure(restored.state) == jax.tree.structure(states[2])
    assert restored.data_state == {"n": 3}


def test_an_empty_directory_restores_nothing(tmp_path, states):
    assert restore(tmp_path / "new", states[0]) == (None, [])


def test_keeps_the_last_and_the_best(tmp_path, states):
    checkpointer = Checkpointer(tmp_path, keep_last=2)
    losses = {1: 3.0, 2: 1.0, 3: None, 4: float("nan"), 5: 2.0, 6: 2.0}
    for step, loss in losses.items():
        checkpointer.save(states[0], {}, loss, step=step)
    checkpointer.close()
    assert saved_steps(tmp_path) == [2, 5, 6]


def test_can_keep_the_last_alone(tmp_path, states):
    checkpointer = Checkpointer(tmp_path, keep_last=1, keep_best=False)
    for step, loss in ((1, 0.5), (2, 1.0)):
        checkpointer.save(states[0], {}, loss, step=step)
    checkpointer.close()
    assert saved_steps(tmp_path) == [2]


def test_saving_is_safe_from_donation(tmp_path, states):
    # The step after a save overwrites the buffers that are being written.
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = jax.tree.map(jnp.copy, states[0])
    expected = jax.tree.map(np.array, state)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, {}, step=1)
    for _ in range(20):
        state = step(state)
    checkpointer.close()
    restored, _ = restore(tmp_path, states[0])
    assert_equal(restored.state, expected)


def files_of(directory, step, item):
    return [path for path in sorted((directory / str(step) / item).rglob("*")) if path.is_file()]


def truncate_data(directory, step):
    for path in files_of(directory, step, "model"):
        if "/d/" in str(path):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_training(directory, step):
    shutil.rmtree(directory / str(step) / "training")


def garble_meta(directory, step):
    for path in files_of(directory, step, "meta"):
        path.write_text("{")


def change_number(directory, step):
    """As a flipped bit that the file format does not notice."""
    (path,) = [path for path in files_of(directory, step, "meta") if '"arrays"' in path.read_text(errors="replace")]
    meta = json.loads(path.read_text())
    meta["arrays"]["model/params/up"][2] ^= 1
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize("damage", [truncate_data, drop_training, garble_meta, change_number])
def test_a_damaged_newest_step_is_reported_and_the_one_before_used(directory, states, damage, capsys):
    damage(directory, 3)
    restored, steps = restore(directory, states[0])
    assert_equal(restored.state, states[1])
    assert restored.data_state == {"n": 2}
    message = capsys.readouterr().err
    assert f"{directory}/3 is damaged" in message
    assert steps == [1, 2]
    # The step can be made and saved again.
    checkpointer = Checkpointer(directory, keep_last=3)
    checkpointer.save(states[2], {"n": 3}, step=3)
    checkpointer.close()
    assert saved_steps(directory) == [1, 2, 3]
    assert (directory / "3.damaged").is_dir()


def test_nothing_but_damaged_steps_is_an_error(directory, states):
    for step in (1, 2, 3):
        garble_meta(directory, step)
    with pytest.raises(StorageError, match=r"no checkpoint in .* can be read; step 3.*step 2.*step 1"):
        restore(directory, states[0])
    assert saved_steps(directory) == [1, 2, 3]


def test_another_optimizer_is_named_not_called_damage(directory):
    _, other, _ = setup(optimizer=Muon(), **CHANGES)
    with pytest.raises(UserError, match="of another configuration: training/opt_state"):
        restore(directory, other)


def test_another_shape_is_named(directory, states):
    changed = jax.tree.map(lambda x: x, states[0])
    changed.params["up"] = jnp.zeros((2, 8, 32))
    with pytest.raises(UserError, match=r"model/params/up is float32\[2, 8, 16\] there, float32\[2, 8, 32\] here"):
        restore(directory, changed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "uint32", "float16"])
def test_fingerprints_notice_any_flipped_bit_and_any_swap(dtype):
    values = jnp.asarray(np.arange(24).reshape(2, 3, 4) % 5, dtype)
    seen = {describe({"x": values})["x"][2]}
    flat = np.array(values).reshape(-1)
    raw = flat.view(np.uint8)
    bits = 1 if dtype == "bool" else 8
    for position in range(0, raw.size, 3):
        for bit in range(bits):
            changed = raw.copy()
            changed[position] ^= 1 << bit
            array = jnp.asarray(changed.view(flat.dtype).reshape(2, 3, 4))
            assert describe({"x": array})["x"][2] not in seen
    swapped = flat.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert describe({"x": jnp.asarray(swapped.reshape(2, 3, 4))})["x"][2] not in seen


def test_parameters_for_evaluation(directory, states):
    params, model_state = restore_params(directory)
    assert_equal(params, states[2].params)
    assert_equal(model_state, states[2].model_state)
    assert_equal(restore_params(directory, 1)[0], states[0].params)


def test_a_model_without_other_variables_can_be_saved(tmp_path, states):
    state = type(states[0])(**{**vars(states[0]), "model_state": {}, "objectives": ()})
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(state, {}, step=1)
    checkpointer.close()
    assert_equal(restore(tmp_path, state)[0].state, state)
    assert restore_params(tmp_path)[1] == {}


def test_a_step_that_is_not_there_lists_those_that_are(directory, tmp_path):
    with pytest.raises(UserError, match=r"no step 7 in .*; steps there are: 1, 2, 3"):
        restore_params(directory, 7)
    with pytest.raises(UserError, match=r"no checkpoint in .*; steps there are: none"):
        restore_params(tmp_path / "absent")


def test_reading_does_not_write(directory):
    garble_meta(directory, 3)
    before = sorted(directory.rglob("*"))
    with pytest.raises(StorageError, match="3 is damaged"):
        restore_params(directory)
    assert sorted(directory.rglob("*")) == before


def test_long_storage_errors_are_cut():
    error = ValueError("NOT_FOUND: Error opening\nSee full TensorStore details: <pages>")
    assert brief(error) == "NOT_FOUND: Error opening"


def test_restores_onto_another_mesh(saved):
    code = f"""
import jax, numpy as np
from sparsezoo_jax.training.parameters import restore_params
mesh = jax.make_mesh((4,), ("fsdp",))
def sharding_of(path, shape):
    divides = len(shape) > 1 and shape[-1] % 4 == 0
    spec = [None] * (len(shape) - 1) + ["fsdp"] if divides else []
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
one, _ = restore_params({str(saved)!r})
four, _ = restore_params({str(saved)!r}, sharding_of=sharding_of)
assert len(four["up"].sharding.device_set) == 4 and four["up"].addressable_shards[0].data.shape == (2, 8, 4)
jax.tree.map(np.testing.assert_array_equal, one, four)
print("same")
"""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "same", run.stderr


def test_flatten_and_describe_agree_on_paths(states):
    arrays = describe({"model": {"params": states[0].params}})
    assert set(arrays) == {f"model/params/{path}" for path in flatten(states[0].params)}
