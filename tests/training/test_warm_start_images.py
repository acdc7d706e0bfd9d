"""Classifiers of images that start from the encoder of a masked autoencoder."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import run_dir
from sparsezoo_jax.configs import preset
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.models import build_model
from sparsezoo_jax.models.encoder import sines
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.mixer import MixerConfig
from sparsezoo_jax.overrides import with_values
from sparsezoo_jax.training.compilation import prepare_step
from sparsezoo_jax.training.config import TrainConfig
from sparsezoo_jax.training.lora import LoRAConfig
from sparsezoo_jax.training.parameters import save_params
from sparsezoo_jax.training.state import ModelTemplate, first_device, flatten
from sparsezoo_jax.training.warm_start import NEW_HEAD, open_warm_start

SMALL = {"model.layers": 1, "model.d_model": 16, "model.ffn": PlainFFNConfig(d_ff=24, activation="relu")}
MAE, VIT = (with_values(preset(arch, "digits"), SMALL) for arch in ("vit_mae", "vit"))
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
LEARNED = {"images": dataclasses.replace(MAE.model.images, positions="learned")}


def cut(patches, **images):
    return {"images": dataclasses.replace(VIT.model.images, **images), "max_seq_len": patches}


def parameters(config, seed):
    build = lambda rngs: build_model(config, rngs)  # noqa: E731
    return ModelTemplate(build).split(build(nnx.Rngs(seed)))[0]


@pytest.fixture(scope="module")
def mae(tmp_path_factory):
    """The directory of a masked autoencoder that has made no step, and its parameters."""
    directory = tmp_path_factory.mktemp("mae") / "run"
    run_dir.write_config(directory, MAE)
    params = flatten(parameters(MAE.model, 0))
    save_params(directory / run_dir.CHECKPOINTS, params, step=4)
    return directory, params


@pytest.mark.parametrize("positions", ["sine", "learned"])
def test_a_classifier_takes_the_encoder_and_has_a_head_of_its_own(mae, positions):
    images = dataclasses.replace(VIT.model.images, positions=positions)
    # What the autoencoder calls its classes means nothing.
    config = dataclasses.replace(VIT.model, images=images, vocab_size=7)
    own = parameters(config, 1)
    start = open_warm_start(mae[0] / run_dir.CHECKPOINTS, MAE.model, config)
    found = flatten(start((own, {}), (jax.tree.map(lambda _: DEVICE, own), {}), lambda axes, shape: DEVICE)[0])
    assert found.keys() == flatten(own).keys()
    head = {path for path in found if path.startswith("classes/")}
    assert len(head) == 2
    for path, array in found.items():
        if path == "positions_TD":
            expected = sines(16, 16)
        else:
            expected = flatten(own)[path] if path in head else mae[1][path]
        np.testing.assert_array_equal(array, expected, err_msg=path)
    # The parameters that adapters are beside: all of these but the head.
    assert flatten(start.read()[0]).keys() == found.keys() - head


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (cut(64, patch=1), r"model.images.patch: is 2 there and 1"),
        (cut(64, size=16), r"model.images.size: is 8 there and 16"),
        # As many patches, and numbers in one, but others.
        (cut(16, size=4, patch=1, channels=4), r"model.images.size: is 8 there and 4 here"),
        ({"layers": 2}, r"segments/0/blocks/0/.*: is \(1, .* there and \(2, "),
        ({"d_model": 24}, r"is \(16,\) there and \(24,\) here"),
        ({"ffn": PlainFFNConfig(d_ff=32, activation="relu")}, r"ffn/down_FD: is \(1, 24, 16\) there and \(1, 32, 16\)"),
        ({"attention": MixerConfig(tokens=16, d_tokens=8)}, r"attention/.*absent"),
    ],
)  # fmt: skip
def test_an_encoder_that_does_not_fit_is_one_error(mae, target, message):
    with pytest.raises(ConfigError, match=f"train.init_from=.*{message}"):
        open_warm_start(mae[0] / run_dir.CHECKPOINTS, MAE.model, dataclasses.replace(VIT.model, **target))


def test_an_autoencoder_does_not_start_from_a_classifier_nor_with_other_positions(mae, tmp_path):
    save_params(tmp_path, flatten(parameters(VIT.model, 0)))
    with pytest.raises(ConfigError, match=r"classes/output_DV: is \(16, 10\) there and absent here"):
        open_warm_start(tmp_path, VIT.model, MAE.model)
    source = dataclasses.replace(MAE.model, **LEARNED)
    sine = dataclasses.replace(VIT.model.images, positions="sine")
    with pytest.raises(ConfigError, match=r"positions_TD: is \(16, 16\) there and absent here"):
        open_warm_start(mae[0] / run_dir.CHECKPOINTS, source, dataclasses.replace(VIT.model, images=sine))


def test_adapters_leave_the_head_to_train_whole(mae, tmp_path):
    asked = with_values(VIT, {"train.init_from": str(mae[0]), "train.lora": LoRAConfig(rank=2)})
    found = run_dir.with_choices_of_base(asked, tmp_path / "new")
    assert found.train.lora.whole == (NEW_HEAD,)
    assert run_dir.with_choices_of_base(found, tmp_path / "new") == found
    # A run that began so goes on so, wherever the autoencoder is by then.
    run_dir.write_config(tmp_path / "begun", found)
    gone = with_values(asked, {"train.init_from": str(tmp_path / "gone")})
    assert run_dir.with_choices_of_base(gone, tmp_path / "begun").train.lora == found.train.lora
    # Adapters of a classifier leave its head as it is, and without adapters everything trains.
    run_dir.write_config(tmp_path / "classifier", VIT)
    of_classifier = with_values(asked, {"train.init_from": str(tmp_path / "classifier")})
    assert run_dir.with_choices_of_base(of_classifier, tmp_path / "new").train.lora.whole == ()
    whole = with_values(VIT, {"train.init_from": str(mae[0])})
    assert run_dir.with_choices_of_base(whole, tmp_path / "new") == whole

    start = run_dir.open_source(found)
    assert start is not None
    train = TrainConfig(steps=4, lora=found.train.lora)
    prepared = prepare_step(train, lambda rngs: build_model(VIT.model, rngs), (4, 16), first_device)
    state = prepared.with_base(prepared.first_state(jax.random.key(3)), *start.read())
    assert {path for path in flatten(state.params) if "/lora_" not in path} == {
        "classes/output_DV",
        "classes/output_bias",
    }
    assert np.std(flatten(state.params)["classes/output_DV"]) > 0
    assert flatten(state.frozen).keys() == mae[1].keys() - {p for p in mae[1] if p.startswith("reconstruction/")} | {
        "positions_TD"
    }
    merged = flatten(prepared.merge(state.params, state.frozen))
    np.testing.assert_array_equal(merged["patches_PD"], mae[1]["patches_PD"])


def test_nothing_is_warned_of_that_the_start_is_about(mae, recwarn):
    run_dir.open_source(with_values(VIT, {"train.init_from": str(mae[0])}))
    assert not [warning for warning in recwarn if "train.init_from" in str(warning.message)]
    images = dataclasses.replace(VIT.model.images, map_top_k=0.5)
    with pytest.warns(match=r"model.images.map_top_k was None, is 0.5"):
        run_dir.open_source(with_values(VIT, {"train.init_from": str(mae[0]), "model.images": images}))
