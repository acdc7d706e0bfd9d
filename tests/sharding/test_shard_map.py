"""Functions that run on each device's own shard of an array."""

import jax.numpy as jnp
import pytest

from sparsezoo_jax.sharding import shard_map
from tests.kernels.few_rows import implementation

FORMS = ("xla", "pallas_tpu_interpret")


@pytest.fixture(scope="module")
def split_rows_by_form(on_eight_devices):
    return on_eight_devices("split_rows", *FORMS)


@pytest.fixture(params=FORMS)
def split_rows(split_rows_by_form, request):
    return split_rows_by_form[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "masked"])
def test_statistics_of_split_rows_are_those_of_whole_rows(split_rows, form):
    found = split_rows[f"{form}, whole statistics"]
    assert found["pieces"] == 8
    assert found["values"] < 2e-6
    assert found["gradients"] < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "masked"])
def test_statistics_of_pieces_would_be_noticed(split_rows, form):
    found = split_rows[f"{form}, local statistics"]
    assert found["values"] > 0.1
    assert found["gradients"] > 0.1


def test_without_a_mesh_the_function_gets_the_arrays_and_nothing_is_split():
    x = jnp.arange(6.0).reshape(2, 3)
    seen = []

    def function(x, split):
        seen.append(split)
        return x * 2

    assert jnp.array_equal(shard_map(function, (x,), (("batch", "ffn"),), ("batch", "ffn")), x * 2)
    assert seen == [{"batch": (), "ffn": ()}]


@pytest.mark.slow
def test_maps_of_active_blocks_and_unions_on_a_mesh(on_eight_devices):
    for name, differences in on_eight_devices("grouped_blocks").items():
        assert len(differences) == (5 if name == "unions" else 4)
        assert max(differences) < 2e-6, "value and gradients, sums of up to 32 numbers in another order"


@pytest.mark.slow
def test_operations_on_a_few_rows_on_eight_devices(on_eight_devices):
    implementation("native")
    found = on_eight_devices("few_rows")
    assert found.pop("devices") == 8
    assert len(found) == 8
    assert all(found.values()), found


@pytest.fixture(scope="module")
def decoding_rows(on_eight_devices):
    return on_eight_devices("decoding_rows")


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation",
    [
        "spark_ffn_rows",
        "active_rows",
        "spark_attention_rows",
        "block_ffn_rows",
        "block_ffn_union",
        "gradient of",
        "a step of",
    ],
)
def test_decoding_on_meshes(decoding_rows, operation):
    found = {name: case for name, case in decoding_rows.items() if name.startswith(operation)}
    count = {"active_rows": 5, "block_ffn_union": 4, "gradient of": 1, "a step of": 5}.get(operation, 7)
    assert len(found) == count
    for name, case in found.items():
        # The native operation rounds what meets int8, four factors of a device's neurons by their largest.
        rounds = name.startswith("block_ffn_rows, None, ")
        assert case["distance"] < (2e-4 if rounds else 1e-5), name
        assert case.get("counts", True), name


@pytest.mark.slow
def test_tokens_and_heads_of_decoding_stay_where_they_are(decoding_rows):
    """Devices that split a batch or heads have their part of the results; `tensor` has 8, the keys' heads are 4."""
    pieces = {name: case["pieces"] for name, case in decoding_rows.items() if "pallas_tpu_interpret" in name}
    for mesh, tokens, heads in (("data 2, tensor 4", 2, 8), ("expert 4, tensor 2", 4, 8), ("tensor 8", 1, 1)):
        for operation, count in (
            ("spark_ffn_rows", tokens),
            ("active_rows", tokens),
            ("block_ffn_rows", tokens),
            ("spark_attention_rows", heads),
        ):
            assert pieces[f"{operation}, pallas_tpu_interpret, {mesh}"] == count


@pytest.mark.slow
def test_spark_attention_on_meshes(on_eight_devices):
    report = on_eight_devices("split_attention")
    assert len(report) == 11
    for name, found in report.items():
        assert found["pieces"] == 8, name
        assert max(found["distances"]) < 1e-5, name


@pytest.mark.slow
def test_tensor_halves_the_work_of_every_kind_of_expert(on_eight_devices):
    for name, (whole, split) in on_eight_devices("split_widths").items():
        assert whole / split == pytest.approx(2, rel=0.1), f"{name}: a router and statistics are not split"


@pytest.mark.slow
def test_tokens_sent_to_their_experts(on_eight_devices):
    """The same as one device gives, by sending tokens and, where a device lacks room, by gathering weights."""
    report = on_eight_devices("exchanged_tokens")
    assert len(report) == 4
    for name, found in report.items():
        assert found["sends"], name
        assert (found["fullest"] > 1) == name.startswith("crowded"), name
        assert len(found["distances"]) == 8, name
        # Outputs near 100 are rounded by 1e-5 in float32, and so are their sines, of which the loss is made.
        assert max(found["distances"]) < 1e-4, name


@pytest.mark.slow
def test_experts_that_leave_out_channels(on_eight_devices):
    """Of a token's largest channels of a hidden vector, too, whose parts other devices would have."""
    report = on_eight_devices("masked_experts")
    assert len(report) == 6
    for name, distances in report.items():
        assert max(distances) < 1e-5, name
