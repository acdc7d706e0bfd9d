"""Weights that become 0: scores and comparisons restated in NumPy, layers in turn, and the runs that are made."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsezoo_jax import evaluate, huggingface, run_dir, sparsify
from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.evaluation_tables import print_pruned
from sparsezoo_jax.models import Decoder
from sparsezoo_jax.models.matrices import layer_matrices
from sparsezoo_jax.sparsification import pruning
from sparsezoo_jax.sparsification.config import PruningConfig
from sparsezoo_jax.training.state import ModelTemplate, flatten, nested

W = np.random.default_rng(0).standard_normal((12, 5)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 7, 12)) * np.linspace(0.1, 3, 12)
NORMS = np.sqrt(np.mean(np.sum(X**2, axis=1), axis=0))
GRADIENTS = np.abs(np.random.default_rng(2).standard_normal((12, 5))).astype(np.float32)


def test_scores():
    """`|W_ij| ||X_j||`, and `|W_ij| ||X_j|| + alpha |W_ij| G_ij`; without the one or the other what is left of it."""
    np.testing.assert_array_equal(pruning.weight_scores(W), np.abs(W))
    wanda = np.stack([[abs(W[i, j]) * NORMS[i] for j in range(5)] for i in range(12)])
    np.testing.assert_allclose(pruning.weight_scores(W, NORMS), wanda, rtol=1e-6)
    gblm = pruning.weight_scores(W, NORMS, GRADIENTS, 100.0)
    np.testing.assert_allclose(gblm, wanda + 100 * np.abs(W) * GRADIENTS, rtol=1e-6)
    np.testing.assert_allclose(pruning.weight_scores(W, NORMS, 0 * GRADIENTS, 100.0), wanda, rtol=1e-6)
    alone = pruning.weight_scores(W, 0 * NORMS, GRADIENTS, 2.0)
    np.testing.assert_allclose(alone, 2 * np.abs(W) * GRADIENTS, rtol=1e-6)


@pytest.mark.parametrize(("share", "gone"), [(0.0, 0), (0.25, 3), (0.5, 6), (0.35, 4), (0.99, 11)])
def test_every_output_loses_its_lowest(share, gone):
    kept = pruning.kept_weights(np.abs(W), share, "row")
    for output in range(5):
        lowest = np.argsort(np.abs(W[:, output]))[:gone]
        np.testing.assert_array_equal(np.flatnonzero(~kept[:, output]), np.sort(lowest))


def test_a_matrix_loses_its_lowest():
    kept = pruning.kept_weights(np.abs(W), 0.4, "matrix")
    assert np.sum(~kept) == 24
    assert np.abs(W)[~kept].max() < np.abs(W)[kept].min()


def test_of_equal_scores_the_first_go():
    kept = pruning.kept_weights(np.ones((4, 2)), 0.5, "row")
    np.testing.assert_array_equal(kept, [[False] * 2] * 2 + [[True] * 2] * 2)


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 6)])
def test_patterns_keep_n_of_each_m_inputs(kept, of):
    found = pruning.kept_weights(np.abs(W), 0.9, "row", pruning.Pattern(kept, of))
    for start in range(0, 12, of):
        for output in range(5):
            group = np.abs(W[start : start + of, output])
            expected = np.isin(np.arange(of), np.argsort(group)[of - kept :])
            np.testing.assert_array_equal(found[start : start + of, output], expected)


@pytest.mark.parametrize("compare", ["row", "matrix"])
def test_a_part_is_taken_of_negative_weights_that_moved_least(compare):
    """Restated for one output at a time, or for the matrix as one."""
    movement = np.random.default_rng(4).random(W.shape).astype(np.float32)
    kept = pruning.kept_while_activating(np.abs(W), W, movement, 0.5, 0.25, compare)
    columns = (
        [(W, movement, kept)] if compare == "matrix" else [(W[:, j], movement[:, j], kept[:, j]) for j in range(5)]
    )
    for w, moved, found in ((w.ravel(), m.ravel(), k.ravel()) for w, m, k in columns):
        count = w.size // 4
        lowest = np.argsort(np.abs(w))[:count]
        left = np.setdiff1d(np.arange(w.size), lowest)
        negative = left[w[left] < 0]
        taken = negative[np.argsort(moved[negative])[:count]]
        others = np.setdiff1d(left, taken)
        fill = others[np.argsort(np.abs(w)[others])[: count - len(taken)]]
        np.testing.assert_array_equal(np.flatnonzero(~found), np.sort([*lowest, *taken, *fill]))


def test_patterns_that_do_not_divide_the_inputs_are_refused():
    with pytest.raises(ConfigError, match=r"--pattern=2:5: must divide 12 inputs"):
        pruning.kept_weights(np.abs(W), 0.5, "row", pruning.Pattern(2, 5))


def called(model, **flags):
    """A jitted call on a batch of the pipeline's form."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def call(state, batch):
        fields = {name: batch[name] for name in ("segment_ids", "positions")}
        return nnx.merge(graphdef, state)(batch["tokens"], **fields, **flags)

    return lambda batch: call(state, batch)


def test_gradient_norms_are_over_sequences(dense, batches):
    """`sum_n |g_n|` and `sqrt(sum_n g_n^2)`, g_n the gradient of sequence n's mean loss, one by one."""
    paths = pruning.matrix_paths(dense, ("q", "down"))
    assert paths == ["segments/0/blocks/0/attention/projections/q_DNH", "segments/0/blocks/0/ffn/down_FD"]
    down = dense.segments[0].blocks[0].ffn.down_FD[...]
    template = ModelTemplate(lambda rngs: Decoder(dense.config, rngs=rngs))
    params, variables = template.split(dense)

    @jax.jit
    @jax.grad
    def gradient(down, row):
        model = template.merge(nested({**flatten(params), paths[1]: down}), variables)
        out = model(row["tokens"], segment_ids=row["segment_ids"], positions=row["positions"])
        logs = jax.nn.log_softmax(out.logits)
        picked = jnp.take_along_axis(logs, row["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(row["mask"], picked, 0)) / jnp.sum(row["mask"])

    found = [
        np.abs(gradient(down, {name: x[n : n + 1] for name, x in batch.items()})) for batch in batches for n in range(4)
    ]
    for norm, expected in (("l1", np.sum(found, axis=0)), ("l2", np.sqrt(np.sum(np.square(found), axis=0)))):
        own = pruning.gradient_norms(dense, batches, paths, norm)
        np.testing.assert_allclose(own[paths[1]], expected, rtol=2e-3, atol=1e-7)


def matrices(model):
    """By map [layers, I, O]."""
    inputs = {"o": 2}
    found = {}
    for matrix in layer_matrices(model):
        value = np.asarray(matrix.param[...])
        found[matrix.name] = value.reshape(value.shape[0], np.prod(value.shape[1 : 1 + inputs.get(matrix.name, 1)]), -1)
    return found


def test_layers_are_pruned_by_what_the_pruned_ones_below_make(dense, batches):
    """The inputs of attention depend on the layers below alone, so the pruned model shows what its scores were of."""
    score = lambda path, place, weight, norms: pruning.weight_scores(weight, norms)  # noqa: E731
    pruned = pruning.prune(dense, ("q", "down"), 0.5, score, "row", None, batches)
    before, after = matrices(dense), matrices(pruned.model)
    assert pruned.zeros == {"q": [0.5, 0.5], "down": [0.5, 0.5]}
    np.testing.assert_array_equal(after["up"], before["up"])
    for model, same in ((pruned.model, True), (dense, False)):
        call = called(model, record=("sublayer_input",))
        squares = 0
        for batch in batches:
            out = call(batch)
            real = (batch["segment_ids"] > 0)[..., None]
            squares = squares + np.sum(np.where(real, np.asarray(out.records["sublayer_input"][1][0]), 0) ** 2, (0, 1))
        score_IO = np.abs(before["q"][1]) * np.sqrt(squares)[:, None]
        kept = np.argsort(np.argsort(score_IO, axis=0), axis=0) >= 16
        # The first layer's masks moved a few of the second's choices, which the whole model does not show.
        assert np.mean((after["q"][1] != 0) == kept) == 1 if same else np.mean((after["q"][1] != 0) == kept) < 1
    np.testing.assert_array_equal(after["q"][after["q"] != 0], before["q"][after["q"] != 0])


@pytest.fixture(scope="module")
def pruned(made):
    """A run with 2:4 zeros by GBLM."""
    folder, command, _ = made
    config = PruningConfig(gradient_norm="l1")
    command = dataclasses.replace(command, out=folder / "gblm", method="gblm", pattern="2:4", pruning=config)
    return folder / "gblm", sparsify.sparsify(command)


def test_a_pruned_run_is_a_plain_one_with_zeros(made, pruned, capsys):
    run, figures = pruned
    loaded, before = run_dir.load(run), run_dir.load(made[0] / "dense")
    assert loaded.config.model == before.config.model
    assert json.loads((run / "sparsify.json").read_text()) == figures
    assert figures["zeros"] == dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), 0.5)
    for name, value in matrices(loaded.model).items():
        layers, inputs, outputs = value.shape
        assert np.all(np.sum(value.reshape(layers, inputs // 4, 4, outputs) != 0, axis=2) == 2), name
    assert figures["loss"] != figures["loss_dense"]
    evaluate.main([str(run), "--no-meters", "--json", "--batches", str(figures["batches"])])
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(figures["loss"], abs=1e-6)
    assert "sparsified" not in found
    assert found["pruned"]["zeros"] == figures["zeros"]
    assert found["pruned"]["nonzero"] * 2 == found["pruned"]["weights"]
    print_pruned(found["pruned"])
    shown = capsys.readouterr().out
    assert "Weights that are 0 (gblm at 0.5, 2:4)" in shown
    assert "save neither memory nor time" in shown


def test_zeros_stay_in_a_hugging_face_checkpoint(pruned, tmp_path):
    from safetensors.numpy import load_file

    huggingface.to_hf(pruned[0], tmp_path / "hf")
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    down = load_file(file)["model.layers.1.mlp.down_proj.weight"]
    assert np.all(np.sum(down.reshape(len(down), -1, 4) != 0, axis=2) == 2)


def test_magnitude_reads_no_text_and_compares_within_a_matrix(made, tmp_path):
    command = dataclasses.replace(made[1], out=tmp_path / "new", method="magnitude", sparsity=0.3, maps=("up", "down"))
    figures = sparsify.sparsify(command)
    assert (figures["calibration_tokens"], figures["compare"]) == (0, "matrix")
    before, after = matrices(run_dir.load(command.directory).model), matrices(run_dir.load(command.out).model)
    for layer in range(2):
        gone, kept = (np.abs(before["up"][layer][mask]) for mask in (after["up"][layer] == 0, after["up"][layer] != 0))
        assert gone.max() <= kept.min()
        assert gone.size == int(0.3 * 32 * 48)
    np.testing.assert_array_equal(after["q"], before["q"])


def test_survivors_go_back_to_an_earlier_step(dense, batches):
    """By the masks of the weights as they are, with the values of the earlier model everywhere."""
    template = ModelTemplate(lambda rngs: Decoder(dense.config, rngs=rngs))
    params, variables = template.split(dense)
    earlier = template.merge(jax.tree.map(lambda x: x + 0.01, params), variables)
    score = lambda path, place, weight, norms: pruning.weight_scores(weight)  # noqa: E731
    arguments = (dense, ("up",), 0.5, score, "row", None, None)
    rewound = pruning.prune(*arguments, pruning.Earlier(earlier, 0.0, True)).model
    plain = matrices(pruning.prune(*arguments).model)["up"]
    np.testing.assert_array_equal(matrices(rewound)["up"], np.where(plain != 0, matrices(earlier)["up"], 0))
    np.testing.assert_array_equal(matrices(rewound)["q"], matrices(earlier)["q"])
    np.testing.assert_array_equal(rewound.embedding_VD[...], earlier.embedding_VD[...])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activate": 0.1}, r"--pruning.activate=0.1: needs --pruning.since"),
        ({"rewind": True}, r"--pruning.rewind=True: needs --pruning.since"),
        ({"since": 3}, r"--pruning.since=3: is for --pruning.activate or rewind"),
        ({"activate": 1.0, "since": 3}, r"--pruning.activate=1.0: must be in \[0, 1\)"),
    ],
)
def test_pruning_flags_that_do_not_go_together(fields, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "4:2"}, r"--pattern=4:2: must be unstructured, or N:M such as 2:4"),
        ({"pattern": "half"}, r"--pattern=half: must be unstructured"),
        ({"pattern": "2:5"}, r"--pattern=2:5: must divide the 32 inputs of the map q"),
        ({"pattern": "2:4", "sparsity": 0.4}, r"--sparsity=0.4: must be 0.5 with --pattern 2:4"),
        ({"pattern": "2:4", "pruning": PruningConfig(compare="row")}, r"--pruning.compare=row: is for --pattern unst"),
        ({"pruning": PruningConfig(activate=0.6, since=1)}, r"--pruning.activate=0.6: must be at most --sparsity 0.5"),
        ({"pruning": PruningConfig(activate=0.1, since=1), "pattern": "2:4"}, r"--pruning.activate=0.1: is for unst"),
        ({"pruning": PruningConfig(activate=0.1, since=1)}, r"no step 1"),
        ({"maps": ("neurons",)}, r"--maps=neurons: must be one of q, q_up, k, v, o, gate, up, down"),
        ({"sparsity": 1.0}, r"--sparsity=1.0: must be in \[0, 1\)"),
        ({"gate": "top_k"}, r"--gate=top_k: is for --method cats, teal, wina"),
        ({"dense_tokens": 1}, r"--dense-tokens=1: is for --method cats, teal, wina"),
        ({"pruning": PruningConfig(gradient_weight=2)}, r"--pruning.gradient-weight=2: is for --method gblm"),
        ({"method": "teal", "pattern": "2:4"}, r"--pattern=2:4: is for --method magnitude, wanda, gblm"),
        ({"directory": "teal"}, r"teal: is sparsified already"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(made, tmp_path, changes, message):
    folder, command, _ = made
    changes = {name: folder / value if name == "directory" else value for name, value in changes.items()}
    command = dataclasses.replace(command, **{"out": tmp_path / "new", "method": "wanda", **changes})
    with pytest.raises(sparsify.UserError, match=message) as error:
        sparsify.sparsify(command)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()
