"""Models of images: one compiled classifier, mixer and masked autoencoder for many assertions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax.configs import preset
from sparsezoo_jax.data.images.batches import Patching, patches_of
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation.cross_entropy import model_loss
from sparsezoo_jax.models import Encoder, build_model, count_parameters, train_flops_per_token
from sparsezoo_jax.models.encoder import image_context, largest_of_maps, pixel_targets, read_as, sines
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.models.images import ImagesConfig, MAEConfig
from sparsezoo_jax.models.mixer import MixerConfig
from sparsezoo_jax.overrides import with_values

BATCH, PATCHES, PIXELS = 3, 16, 4
NARROW = {"d_model": 16, "ffn": PlainFFNConfig(d_ff=24, activation="relu")}
SMALL = {
    "vit": dataclasses.replace(preset("vit", "digits").model, layers=2, **NARROW),
    "mae": dataclasses.replace(preset("vit_mae", "digits").model, layers=1, **NARROW),
}
SMALL["mixer"] = dataclasses.replace(
    SMALL["vit"], layers=1, attention=MixerConfig(tokens=PATCHES, d_tokens=8, activation="relu")
)


def call(config):
    model = build_model(config, nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    @jax.jit
    def run(tokens, segments, positions):
        return nnx.merge(graphdef, state)(tokens, segment_ids=segments, positions=positions)

    return model, run


@pytest.fixture(scope="module")
def patches():
    tokens = np.random.default_rng(0).integers(0, 256, (BATCH, PATCHES, PIXELS), np.uint8)
    positions = np.broadcast_to(np.arange(PATCHES, dtype=np.int32), (BATCH, PATCHES))
    return tokens, np.ones((BATCH, PATCHES), np.int32), positions


def test_a_classifier_sees_all_patches_of_an_image_and_no_other_image(patches):
    model, run = call(SMALL["vit"])
    assert isinstance(model, Encoder)
    tokens, segments, positions = patches
    out = run(*patches)
    assert out.logits.shape == (BATCH, PATCHES, 10)
    assert out.logits.dtype == jnp.float32
    np.testing.assert_array_equal(out.logits[:, 0], out.logits[:, -1])
    np.testing.assert_allclose(out.stats["attended_keys"], [PATCHES, PATCHES])
    assert ((out.stats["ffn_density"] > 0.2) & (out.stats["ffn_density"] < 0.8)).all()

    other = tokens.copy()
    other[1, -1] = 255 - other[1, -1]
    changed = run(other, segments, positions)
    moved = np.abs(changed.hidden - out.hidden).max(-1)
    assert (moved[1] > 1e-4).all()  # the last patch is seen by the first
    np.testing.assert_array_equal(moved[[0, 2]], 0)

    # Patches in another order at their own positions are the same image; at others they are not.
    order = np.random.default_rng(1).permutation(PATCHES)
    same = run(tokens[:, order], segments, positions[:, order])
    np.testing.assert_allclose(same.logits, out.logits, atol=1e-5)
    assert np.abs(run(tokens[:, order], segments, positions).logits - out.logits).max() > 1e-4

    # What is not seen changes nothing, and is in no average.
    hidden = np.array(segments)
    hidden[:, 5:] = 0
    seen = run(tokens, hidden, positions)
    other = tokens.copy()
    other[:, 5:] = 0
    np.testing.assert_allclose(run(other, hidden, positions).logits, seen.logits, atol=1e-6)
    np.testing.assert_allclose(seen.stats["attended_keys"], [5, 5])


def test_a_masked_autoencoder_is_trained_on_hidden_pixels_alone(patches):
    config = SMALL["mae"]
    assert (config.images.visible, config.images.patches) == (4, PATCHES)
    model, run = call(config)
    tokens, _, positions = patches
    hidden = np.random.default_rng(2).random((BATCH, PATCHES)).argsort(1).argsort(1) >= 4
    segments = (~hidden).astype(np.int32)
    out = run(tokens, segments, positions)
    assert out.logits.shape == (BATCH, PATCHES, PIXELS)
    np.testing.assert_allclose(out.stats["attended_keys"], [4])  # the encoder works on what is seen
    assert out.hidden.shape == (BATCH, 4, 16)
    other = np.where(hidden[..., None], 255 - tokens, tokens)
    np.testing.assert_array_equal(run(other, segments, positions).logits, out.logits)

    batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "mask": hidden,
             "targets": np.zeros_like(segments)}  # fmt: skip
    sums = model_loss(model, {name: jnp.asarray(x) for name, x in batch.items()})[1]
    mean = tokens.astype(float).mean(-1, keepdims=True)
    target = (tokens - mean) / tokens.astype(float).std(-1, keepdims=True, ddof=1)
    errors = ((np.asarray(out.logits) - target) ** 2).mean(-1)
    assert float(sums.count) == 12 * BATCH
    # A variance of bytes is far above what is added to it.
    assert float(sums.cross_entropy_sum) == pytest.approx(errors[hidden].sum(), rel=1e-3)


def test_a_mixer_mixes_the_patches_of_each_channel(patches):
    config = SMALL["mixer"]
    model, run = call(config)
    out = run(*patches)
    assert 0.2 < float(out.stats["mixing_density"][0]) < 0.8
    mixer = model.segments[0].blocks[0].attention
    x = np.random.default_rng(3).standard_normal((1, PATCHES, 16)).astype(np.float32)
    up, down = (np.asarray(weight[...])[0] for weight in (mixer.up_TM, mixer.down_MT))
    expected = np.stack([np.maximum(x[0, :, d] @ up, 0) @ down for d in range(16)], -1)
    graphdef, state = nnx.split(mixer)
    single = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], state))
    ctx = image_context(jnp.ones((1, PATCHES), jnp.int32), jnp.arange(PATCHES)[None])
    np.testing.assert_allclose(single(jnp.asarray(x), ctx)[0][0], expected, atol=1e-5)


def test_maps_keep_their_largest_patches():
    x = jnp.asarray([[[3.0, 1.0], [-4.0, 2.0], [1.0, -3.0], [0.5, 9.0]]])
    valid = jnp.asarray([[True, True, True, False]])
    kept = largest_of_maps(x, 0.5, valid)
    np.testing.assert_array_equal(kept, [[[3, 0], [-4, 2], [0, -3], [0, 0]]])
    np.testing.assert_array_equal(largest_of_maps(x, 0.01, valid), [[[0, 0], [-4, 0], [0, -3], [0, 0]]])
    gradient = jax.grad(lambda x: jnp.sum(2 * largest_of_maps(x, 0.5, valid)))(x)
    np.testing.assert_array_equal(gradient != 0, kept != 0)


@pytest.mark.parametrize("when", ["always", "evaluation"])
def test_top_k_of_maps_is_in_training_only_where_asked(patches, when):
    images = dataclasses.replace(SMALL["vit"].images, map_top_k=0.25, map_top_k_in=when)
    sparse = build_model(dataclasses.replace(SMALL["vit"], layers=1, images=images), nnx.Rngs(0))
    plain = build_model(dataclasses.replace(SMALL["vit"], layers=1), nnx.Rngs(0))
    tokens, segments, positions = patches
    seen = []
    out = sparse(tokens, segment_ids=segments, positions=positions,
                 edit=lambda name, layer, x: seen.append((name, x)) or x)  # fmt: skip
    maps = np.asarray(dict(seen)["ffn_output"])
    assert ((maps != 0).sum(1) == 4).all()
    full = plain(tokens, segment_ids=segments, positions=positions).logits
    assert np.abs(out.logits - full).max() > 1e-4
    sparse.train()
    same = np.allclose(sparse(tokens, segment_ids=segments, positions=positions).logits, full, atol=1e-6)
    assert same == (when == "evaluation")


def test_an_autoencoder_that_sees_all_patches_is_the_classifier_of_its_parameters(patches):
    tokens, segments, positions = patches
    model = build_model(SMALL["mae"], nnx.Rngs(0))
    images = dataclasses.replace(model.config.images, mae=MAEConfig())
    # Both draw the encoder's parameters first.
    classifier = build_model(dataclasses.replace(SMALL["mae"], images=images), nnx.Rngs(0))
    whole = read_as(model, images)
    hidden = whole(tokens, logits=False).hidden
    assert hidden.shape == (BATCH, PATCHES, 16)
    np.testing.assert_allclose(hidden, classifier(tokens, logits=False).hidden, atol=1e-6)
    # With another top-k of maps, and not in the model that was given.
    sparse = read_as(whole, dataclasses.replace(images, map_top_k=0.25, map_top_k_of="residual"))
    stream = sparse(tokens, logits=False, record={"residual"}).records["residual"][0]
    np.testing.assert_array_equal((np.asarray(stream) != 0).sum(1), 4)
    np.testing.assert_array_equal(whole(tokens, logits=False).hidden, hidden)
    assert model(tokens, segment_ids=segments * (positions < 4), positions=positions).logits.shape[-1] == PIXELS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 4}, "model.images.patch=4: must be 2, as the model was trained"),
        ({"positions": "learned"}, "model.images.positions=learned: must be sine"),
        ({"mae": MAEConfig(hidden_share=0.5, width=48)}, "hidden_share=0.5: must be none or 0.75"),
    ],
)
def test_a_model_is_read_as_what_its_parameters_are(changes, message):
    model = build_model(SMALL["mae"], nnx.Rngs(0))
    with pytest.raises(ConfigError, match=message):
        read_as(model, dataclasses.replace(model.config.images, **changes))


def test_sines_are_those_of_rows_and_columns():
    table = sines(16, 8)
    row, column = 2, 3
    angles = np.array([1, 1 / 100])  # 10,000^(0 / 2) and ^(1 / 2)
    expected = [*np.sin(row * angles), *np.cos(row * angles), *np.sin(column * angles), *np.cos(column * angles)]
    np.testing.assert_allclose(table[4 * row + column], expected, atol=1e-6)


def test_pixels_are_scaled_or_normalised_by_patch():
    tokens = jnp.asarray([[[0, 255, 51, 102]]], jnp.uint8)
    np.testing.assert_allclose(pixel_targets(tokens, normalised=False), [[[-1, 1, -0.6, -0.2]]], atol=1e-6)
    normalised = np.asarray(pixel_targets(tokens, normalised=True))
    assert normalised.mean() == pytest.approx(0, abs=1e-6)
    assert normalised.std(ddof=1) == pytest.approx(1, rel=1e-4)


def test_patches_are_squares_in_the_order_of_rows():
    image = np.arange(4 * 4 * 2).reshape(1, 4, 4, 2)
    patches = patches_of(image, 2)
    np.testing.assert_array_equal(patches[0, 1].reshape(2, 2, 2), image[0, :2, 2:])
    assert Patching(4, 2, 2, 4, 10).patches == 4


def test_published_sizes():
    """ViT-B/16 as published: 86,567,656 parameters, of which the class token and its position are not here."""
    assert count_parameters(preset("vit", "b16").model).total == 86_567_656 - 2 * 768
    # Steiner et al. and others give 17.6 GFLOPs (multiply-adds 17.5) for a forward pass at 224 pixels.
    assert train_flops_per_token(preset("vit", "b16").model, 196).dense / 3 / 2 == pytest.approx(17.5e9, rel=0.01)
    # Mixer-B/16: 59 million (table 1), here with positions.
    assert count_parameters(preset("mixer", "b16").model).total == pytest.approx(59.9e6 + 196 * 768, rel=0.01)


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("vit", {"model.images.patch": 3}, "model.images.patch=3: must divide model.images.size=32"),
        ("vit", {"model.max_seq_len": 80}, "model.max_seq_len=80: must be 64, the patches"),
        ("vit", {"model.layer_pattern": ("local",)}, "model.layer_pattern"),
        ("vit", {"model.mtp_layers": 1}, "model.mtp_layers=1: must be 0 in a model of images"),
        ("vit", {"data.mode": "streaming"}, "data.mode=streaming: must be prepared"),
        ("vit", {"mesh.context": 2}, "mesh.context=2: must be 1 for a model of images"),
        ("vit_mae", {"model.images.mae.hidden_share": 1.0}, "hidden_share=1.0: must be above 0 and below 1"),
        ("vit_mae", {"model.images.mae.hidden_share": 0.999}, "must leave a patch to see"),
        ("vit", {"model.images.map_top_k": 0.0}, "map_top_k=0.0: must be above 0"),
        ("mixer", {"model.attention.tokens": 60}, "model.attention.tokens=60: must be 64"),
        ("mixer", {"model.images.mae.hidden_share": 0.5}, "model.attention"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_says_why(arch, change, message):
    with pytest.raises(ConfigError, match=message):
        with_values(preset(arch), change)


def test_a_mixer_is_for_images():
    with pytest.raises(ConfigError, match=r"model.attention.kind=mixer: mixes a fixed number of patches"):
        dataclasses.replace(preset("lazy").model, attention=MixerConfig(tokens=4, d_tokens=4))


def test_images_of_words_need_a_patch():
    with pytest.raises(ConfigError, match=r"hidden_share=0.5: needs a patch"):
        ImagesConfig(mae=MAEConfig(hidden_share=0.5))
