import asyncio
import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sparsezoo_jax.errors import StorageError, UserError
from sparsezoo_jax.training import checkpoint_format, parameters
from sparsezoo_jax.training.checkpoint import Checkpointer
from sparsezoo_jax.training.checkpoint_format import brief, describe, write_meta
from sparsezoo_jax.training.objectives import AdaptiveFactor
from sparsezoo_jax.training.optimizers import Muon
from sparsezoo_jax.training.parameters import restore_params, saved_steps
from sparsezoo_jax.training.state import flatten
from tests.devices import with_devices

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
        checkpointer.save(state, {"next_batch": number}, step=number)
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
    assert restored.data_state == {"next_batch": 3}


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


def change_meta(change):
    """As damage that the file format does not notice."""

    def damage(directory, step):
        (path,) = [path for path in files_of(directory, step, "meta") if '"arrays"' in path.read_text(errors="replace")]
        meta = json.loads(path.read_text())
        change(meta)
        path.write_text(json.dumps(meta))

    return damage


def flip_fingerprint(path):
    def change(meta):
        meta["arrays"][path][2] ^= 1

    return change


def rewritten(change):
    """Metadata with a right checksum and a wrong content: a mistake of a program, not of a disk."""

    def changed(meta):
        del meta["checksum"], meta["format"]
        change(meta)
        meta.update(write_meta({**meta}))

    return changed


DAMAGES = {
    "cut": truncate_data,
    "no training": drop_training,
    "no JSON": garble_meta,
    "fingerprint of a parameter": change_meta(rewritten(flip_fingerprint("model/params/up"))),
    "fingerprint of the optimizer": change_meta(rewritten(flip_fingerprint("training/opt_state/0/mu/up"))),
    "fingerprint of a counter": change_meta(rewritten(flip_fingerprint("training/skipped"))),
    "next batch": change_meta(lambda meta: meta["data"].update(next_batch=4)),
    "next batch of another step": change_meta(rewritten(lambda meta: meta["data"].update(next_batch=4))),
    "NaN as next batch": change_meta(rewritten(lambda meta: meta["data"].update(next_batch=float("nan")))),
    "step": change_meta(rewritten(lambda meta: meta.update(step=2))),
    "record": change_meta(lambda meta: meta["record"].update(lost_steps=1)),
    "no data": change_meta(lambda meta: meta.pop("data")),
    "no checksum": change_meta(lambda meta: meta.pop("checksum")),
    "no format": change_meta(lambda meta: meta.pop("format")),
    "another name for the format": change_meta(lambda meta: meta.update(formad=meta.pop("format"))),
    "description of orbax": lambda directory, step: describe_step(directory, step, "[]"),
    "description's handlers": lambda directory, step: describe_step(directory, step, '{"item_handlers": 3}'),
    "description's metrics": lambda directory, step: describe_step(directory, step, '{"metrics": 5}'),
    "nested description": lambda directory, step: describe_step(directory, step, "[" * 100_000),
    "folder as a description": lambda directory, step: fold(directory / str(step) / "_CHECKPOINT_METADATA"),
    "pipe as a description": lambda directory, step: describe_step(directory, step, None),
    "long description": lambda directory, step: lengthen(directory / str(step) / "_CHECKPOINT_METADATA"),
    "long list of arrays": lambda directory, step: lengthen(directory / str(step) / "model" / "_METADATA"),
    "a list": lambda directory, step: replace_meta(directory, step, "[]"),
    "null": lambda directory, step: replace_meta(directory, step, "null"),
    "nested": lambda directory, step: replace_meta(directory, step, "[" * 100_000),
    "arrays as a list": change_meta(rewritten(lambda meta: meta.update(arrays=[]))),
    "array as a number": change_meta(rewritten(lambda meta: meta["arrays"].update({"model/params/up": 7}))),
    "shape of words": change_meta(rewritten(lambda meta: meta["arrays"]["model/params/up"].__setitem__(0, ["a"]))),
}


def describe_step(directory, step, text):
    path = directory / str(step) / "_CHECKPOINT_METADATA"
    path.unlink()
    os.mkfifo(path) if text is None else path.write_text(text)


def fold(path):
    path.unlink()
    path.mkdir()


def lengthen(path):
    """To a size that would fill the memory if it were read; the disk holds nothing of it."""
    with open(path, "r+b") as file:
        file.truncate(1 << 40)


def replace_meta(directory, step, text):
    for path in files_of(directory, step, "meta"):
        if '"arrays"' in path.read_text(errors="replace"):
            path.write_text(text)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_step_is_reported_and_the_one_before_used(directory, states, damage, capsys):
    damage(directory, 3)
    restored, steps = restore(directory, states[0])
    assert_equal(restored.state, states[1])
    assert restored.data_state == {"next_batch": 2}
    message = capsys.readouterr().err
    assert f"{directory}/3 is damaged" in message
    assert message.count("\n") == 1
    assert steps == [1, 2]
    assert (directory / "3.damaged").is_dir()


def test_a_step_that_was_damaged_can_be_saved_again(directory, states):
    garble_meta(directory, 3)
    restore(directory, states[0])
    checkpointer = Checkpointer(directory, keep_last=3)
    checkpointer.save(states[2], {"next_batch": 3}, step=3)
    checkpointer.close()
    assert saved_steps(directory) == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [lambda content: b"", lambda content: content[: len(content) // 2], lambda content: bytes(len(content)), None],
    ids=["empty", "half", "zeros", "gone"],
)
def test_damage_of_any_small_file_is_noticed_or_harmless(directory, states, change):
    """Files of the libraries beneath, too: their own indices, and the losses by which the best step is kept."""
    names = [path.relative_to(directory / "3") for path in (directory / "3").rglob("*") if path.is_file()]
    small = [name for name in names if "/d/" not in str(name)]
    assert len(small) >= 8
    for name in small:
        copy = directory.with_name(f"copy {str(name).replace('/', ' ')}")
        shutil.copytree(directory, copy)
        content = (copy / "3" / name).read_bytes()
        (copy / "3" / name).unlink() if change is None else (copy / "3" / name).write_bytes(change(content))
        restored, _ = restore(copy, states[0])
        assert_equal(restored.state, states[restored.data_state["next_batch"] - 1])
        assert restored.data_state["next_batch"] >= 2, name


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        TimeoutError(),
        ValueError("UNAVAILABLE: the server went away"),
        ValueError("Error reading local file [os_error_code='13']"),
        ExceptionGroup("several", [ValueError("x"), OSError(errno.EIO, "Input/output error")]),
    ],
    ids=str,
)
@pytest.mark.parametrize("item", ["meta", "model"])
def test_what_cannot_be_read_now_is_not_called_damage(directory, states, error, item, monkeypatch, capsys):
    real = ocp.CheckpointManager.restore

    def failing(manager, step, args):
        if step == 3 and item in args:
            raise error
        return real(manager, step, args=args)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", failing)
    before = sorted(directory.rglob("*"))
    with pytest.raises(StorageError, match=f"checkpoint {directory}/3 can't be read: "):
        restore(directory, states[0])
    assert sorted(directory.rglob("*")) == before
    assert "damaged" not in capsys.readouterr().err


def test_a_step_of_the_first_format_is_read_with_a_warning(directory, states, capsys):
    change_meta(lambda meta: [meta.pop(name) for name in ("format", "checksum", "record", "passed_over")])(directory, 3)
    restored, _ = restore(directory, states[0])
    assert restored.data_state == {"next_batch": 3}
    assert "3 is of a version whose metadata has no checksum" in capsys.readouterr().err


def test_a_step_of_a_later_format_is_refused_not_set_aside(directory, states):
    def later(meta):
        del meta["checksum"]
        meta["format"] = 3
        meta["checksum"] = checkpoint_format._checksum(meta)

    change_meta(later)(directory, 3)
    with pytest.raises(StorageError, match="has format 3, of another version of this package; this one reads format 2"):
        restore(directory, states[0])


def test_another_type_is_refused(directory, states):
    changed = jax.tree.map(lambda x: x, states[0])
    changed.params["up"] = changed.params["up"].astype(jnp.bfloat16)
    with pytest.raises(UserError, match=r"model/params/up is float32\[2, 8, 16\] there, bfloat16\[2, 8, 16\] here"):
        restore(directory, changed)


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


def test_steps_without_a_readable_description_are_not_none(directory, states):
    for step in (1, 2, 3):
        describe_step(directory, step, "[]")
    with pytest.raises(StorageError, match=r"no checkpoint in .* can be read; step 1: _CHECKPOINT_METADATA can't be"):
        restore(directory, states[0])
    assert sorted(path.name for path in directory.iterdir()) == ["1", "2", "3"]


def test_what_the_machine_lacks_is_no_damage(directory, states, monkeypatch):
    """Descriptions are looked at in a temporary folder, by orbax: neither's failing says anything of the steps."""
    before = sorted(directory.rglob("*"))

    def too_many(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    for target in ("tempfile.TemporaryDirectory", "orbax.checkpoint.CheckpointManager"):
        with monkeypatch.context() as patch:
            patch.setattr(target, too_many)
            with pytest.raises(StorageError, match=r"in .*checkpoints can't be read: Too many open files"):
                Checkpointer(directory)
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("text", ["[]", None])
def test_a_reader_names_the_step_without_a_readable_description(directory, text):
    describe_step(directory, 3, text)
    with pytest.raises(StorageError, match=r"checkpoints/3 is damaged: _CHECKPOINT_METADATA .* rename it to 3.damaged"):
        restore_params(directory, 2)
    (directory / "3").rename(directory / "3.damaged")
    restore_params(directory, 2)


def test_reading_does_not_write(directory):
    garble_meta(directory, 3)
    before = sorted(directory.rglob("*"))
    with pytest.raises(StorageError, match=r"3 is damaged: .*; step 2 can be read: --step 2"):
        restore_params(directory)
    garble_meta(directory, 2)
    with pytest.raises(StorageError, match="step 1 can be read: --step 1"):
        restore_params(directory)
    assert sorted(directory.rglob("*")) == before


def test_no_mark_of_a_first_save_that_failed_unseen(tmp_path, states, monkeypatch):
    """The second save finds that out; with the mark, the next start would take the checkpoints for lost."""
    mark = tmp_path / "mark"
    checkpointer = Checkpointer(tmp_path / "checkpoints", mark=mark)
    outcomes = iter([None, OSError(errno.ENOSPC, "No space left on device")])

    def save(*_, **__):
        if error := next(outcomes):
            raise error

    monkeypatch.setattr(checkpointer._manager, "save", save)
    checkpointer.save(states[0], {}, step=1)
    with pytest.raises(StorageError, match="No space left"):
        checkpointer.save(states[1], {}, step=2)
    checkpointer.close()
    assert not mark.exists()


def test_a_run_that_removes_old_steps_can_be_read(directory, monkeypatch):
    """Orbax finds a step in the list that is gone when it looks at it."""
    manager, lists = ocp.CheckpointManager, []

    def look(*args, **kwargs):
        lists.append(sorted(path.name for path in directory.iterdir()))
        if len(lists) == 1:
            shutil.rmtree(directory / "1")
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(directory / "1"))
        return manager(*args, **kwargs)

    monkeypatch.setattr(ocp, "CheckpointManager", look)
    assert saved_steps(directory) == [2, 3]
    assert lists == [["1", "2", "3"], ["2", "3"]]


def test_a_step_that_is_removed_while_it_is_read_is_not_damaged(directory, monkeypatch):
    monkeypatch.setattr(parameters, "read_meta", lambda manager, step: remove_then_read(directory, manager, step))
    with pytest.raises(StorageError, match=r"checkpoint .*/3 can't be read: it was removed meanwhile, as a run"):
        restore_params(directory)


def remove_then_read(directory, manager, step):
    shutil.rmtree(directory / str(step))
    return checkpoint_format.read_meta(manager, step)


def test_long_storage_errors_are_cut():
    error = ValueError("NOT_FOUND: Error opening\nSee full TensorStore details: <pages>")
    assert brief(error) == "NOT_FOUND: Error opening"


@pytest.mark.parametrize(
    ("name", "text", "is_told"),
    [
        ("orbax/checkpoint/serialization.py", "File too large", False),
        ("user.py", "File too large", True),
        ("user.py", "Failed writing: 'run/checkpoints/4.orbax-checkpoint-tmp/model'", False),
    ],
)
def test_asyncio_tells_nothing_of_the_rest_of_a_failed_save(name, text, is_told, caplog):
    try:
        exec(compile(f"raise ValueError({text!r})", name, "exec"))
    except ValueError as error:
        context = {"message": "_GatheringFuture exception was never retrieved", "exception": error}
        loop = asyncio.new_event_loop()
        loop.default_exception_handler(context)
        loop.close()
    assert bool(caplog.records) is is_told


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
    environment = {**os.environ, "XLA_FLAGS": with_devices(4), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "same", run.stderr


def test_flatten_and_describe_agree_on_paths(states):
    arrays = describe({"model": {"params": states[0].params}})
    assert set(arrays) == {f"model/params/{path}" for path in flatten(states[0].params)}
