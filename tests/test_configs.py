"""Presets: every one is built abstractly and has the parameters it should have."""

import dataclasses

import numpy as np
import pytest

from sparsezoo_jax.config import differences, flatten, from_json, to_json
from sparsezoo_jax.configs import PRESETS, preset
from sparsezoo_jax.errors import ConfigError, UserError
from sparsezoo_jax.models import count_parameters, dense_twin
from sparsezoo_jax.models.ffn import PlainFFNConfig
from sparsezoo_jax.overrides import union_kinds, with_kind, with_list
from sparsezoo_jax.training.schedules import build_schedule

ALL = [(arch, size) for arch, sizes in PRESETS.items() for size in sizes]

# (non-embedding, total), from the BlockFFN, DECO, Spark, SparseLM and Gemma 2 papers, GPT-2's release, or by hand.
PARAMETERS = {
    ("blockffn", "tiny"): (1_021_664, 1_545_952),
    ("blockffn", "small"): (119_383_552, 307_932_160),
    ("blockffn", "medium"): (494_721_848, 808_969_528),
    ("blockffn", "large"): (817_236_992, 1_194_334_208),
    ("blockffn", "xlarge"): (1_187_830_952, 1_627_777_704),
    ("blockffn", "2_8b"): (2_802_997_760, 2_953_419_264),
    ("deco", "tiny"): (1_026_844, 1_551_132),
    ("deco", "0_1b"): (109_038_390, 221_854_518),
    ("deco", "0_2b"): (242_325_755, 392_747_259),
    ("deco", "0_5b"): (533_273_426, 721_300_306),
    ("deco", "1_2b"): (1_187_533_082, 1_450_770_714),
    ("dense", "tiny"): (985_216, 1_509_504),
    ("dense", "gemma2_2b"): (2_024_517_888, 2_614_636_800),
    ("dense", "0_1b"): (75_516_672, 124_668_672),
    ("dense", "gpt2"): (85_056_000, 124_439_808),
    ("lazy", "tiny"): (1_049_728, 1_574_016),
    ("lazy", "tiny_topk"): (1_049_728, 1_574_016),
    ("lazy", "t5_small"): (18_881_024, 35_330_560),
    ("lazy", "t5_base"): (84_953_856, 109_628_160),
    ("lazy", "t5_base_topk"): (84_953_856, 109_628_160),
    ("lazy", "t5_large"): (302_040_064, 334_939_136),
    ("ling", "tiny"): (1_549_696, 2_073_984),
    ("ling", "mini"): (15_611_812_864, 16_255_638_528),
    ("ling", "flash"): (101_602_045_952, 102_889_697_280),
    ("ling", "1t"): (997_130_006_528, 999_705_309_184),
    ("moe", "tiny"): (1_021_568, 1_545_856),
    ("moe", "tiny_remoe"): (1_021_568, 1_545_856),
    ("moe", "small"): (119_382_784, 307_931_392),
    ("moe", "small_remoe"): (119_382_784, 307_931_392),
    ("moe", "medium"): (494_720_768, 808_968_448),
    ("moe", "medium_remoe"): (494_720_768, 808_968_448),
    ("moe", "large"): (817_235_456, 1_194_332_672),
    ("moe", "large_remoe"): (817_235_456, 1_194_332_672),
    ("moe", "xlarge"): (1_187_828_992, 1_627_775_744),
    ("moe", "xlarge_remoe"): (1_187_828_992, 1_627_775_744),
    ("moex", "tiny"): (4_457_600, 5_112_960),
    ("moex", "chess"): (142_615_040, 143_155_200),
    ("moex", "small"): (481_315_584, 520_699_392),
    ("moex", "medium"): (1_711_326_208, 1_763_837_952),
    ("mohd", "tiny"): (2_068_736, 3_117_312),
    ("mohd", "tiny_c50"): (1_026_176, 1_550_464),
    ("mohd", "tiny_x4"): (4_203_008, 6_300_160),
    ("mohd", "355m_c50"): (294_175_744, 326_943_744),
    ("mohd", "355m_c75"): (294_175_744, 326_943_744),
    ("mohd", "355m_x2"): (589_924_352, 655_460_352),
    ("mohd", "355m_x3"): (888_425_472, 986_729_472),
    ("mohd", "355m_x4"): (1_186_140_160, 1_317_212_160),
    ("mohd", "495m_c50"): (401_911_296, 451_063_296),
    ("mohd", "495m_c75"): (401_911_296, 451_063_296),
    ("mohd", "495m_x2"): (803_822_592, 902_126_592),
    ("mohd", "495m_x3"): (1_209_862_656, 1_357_318_656),
    ("mohd", "495m_x4"): (1_615_902_720, 1_812_510_720),
    ("mohd", "1_13b_c50"): (1_017_743_360, 1_083_279_360),
    ("mohd", "1_13b_c75"): (1_017_743_360, 1_083_279_360),
    ("mohd", "1_13b_x2"): (2_041_778_176, 2_172_850_176),
    ("mohd", "1_13b_x3"): (3_074_463_744, 3_271_071_744),
    ("mohd", "1_13b_x4"): (4_108_722_176, 4_370_866_176),
    ("delta", "tiny"): (1_052_800, 1_577_088),
    ("plm", "tiny"): (1_009_024, 1_533_312),
    ("plm", "1_8b"): (1_514_293_248, 1_825_458_176),
    ("prosparse", "tiny"): (1_049_728, 1_574_016),
    ("prosparse", "1b"): (1_247_442_432, 1_360_246_272),
    ("prosparse", "7b"): (6_476_271_616, 6_738_415_616),
    ("prosparse", "13b"): (12_688_184_320, 13_015_864_320),
    ("spark", "tiny"): (985_216, 1_509_504),
    ("spark", "small"): (75_535_104, 100_111_104),
    ("spark", "2b"): (2_024_517_888, 2_614_636_800),
    ("spark", "9b"): (8_324_201_984, 9_242_164_736),
    ("sparselm", "tiny"): (1_049_728, 1_574_016),
    ("sparselm", "0_5b"): (411_076_608, 511_739_904),
    ("sparselm", "1b"): (924_919_808, 1_025_583_104),
    ("sparselm", "1_5b"): (1_438_763_008, 1_539_426_304),
    ("sparselm", "1_5b_plain"): (1_409_402_880, 1_510_066_176),
    ("sparselm", "2b"): (1_952_606_208, 2_053_269_504),
    ("mixer", "tiny"): (331_942, 343_270),
    ("mixer", "b16"): (58_522_648, 60_031_000),
    ("vit", "tiny"): (447_654, 458_982),
    ("vit", "tiny_topk"): (447_654, 458_982),
    ("vit", "digits"): (447_658, 450_538),
    ("vit", "b16"): (85_057_768, 86_566_120),
    ("vit", "b16_topk"): (85_057_768, 86_566_120),
    ("vit_mae", "tiny"): (482_832, 487_440),
    ("vit_mae", "digits"): (480_676, 481_060),
    ("vit_mae", "b16"): (111_048_192, 111_638_016),
}


def test_every_preset_is_counted():
    assert set(PARAMETERS) == set(ALL)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "size"), ALL)
def test_parameter_count(arch, size):
    config = preset(arch, size)
    assert (config.arch, config.size) == (arch, size)
    count = count_parameters(config.model)
    assert (count.non_embedding, count.total) == PARAMETERS[arch, size]


@pytest.mark.parametrize(("arch", "size"), ALL)
def test_json_round_trip(arch, size):
    config = preset(arch, size)
    assert from_json(to_json(config)) == config


def test_spark_2b_is_the_papers():
    model = preset("spark", "2b").model
    assert (model.ffn.d_ff, model.ffn.r, model.ffn.top_k) == (13_824, 1024, 1106)
    assert (model.attention.r, model.attention.top_k, model.attention.head_dim) == (128, 256, 256)


@pytest.mark.parametrize(
    ("size", "non_embedding"),
    [("small", 119_382_784), ("medium", 496_103_168), ("large", 819_594_752), ("xlarge", 1_191_341_312)],
)
def test_blockffn_dense_twins_are_the_papers(size, non_embedding):
    twin = dense_twin(preset("blockffn", size).model)
    assert count_parameters(twin).non_embedding == non_embedding


@pytest.mark.parametrize(("size", "active"), [("chess", 42_491_904), ("small", 180_960_768), ("medium", 555_878_400)])
def test_moex_parameters_of_a_token_are_the_papers(size, active):
    """Equal to those of a dense MLP of two experts' width, the paper's rule for matching."""
    model = preset("moex", size).model
    ffn = model.ffn
    assert count_parameters(model).active == active

    def dense(experts):
        width = experts * ffn.expert_width
        return count_parameters(dataclasses.replace(model, ffn=PlainFFNConfig(d_ff=width, activation="relu"))).total

    assert dense(2) == active
    assert size not in ALPHA_4 or dense(1) == ALPHA_4[size]


@pytest.mark.parametrize(("size", "total", "active"), [("mini", 16.256, 1.433), ("flash", 103, 6.1), ("1t", 1000, 51)])
def test_ling_is_the_reports(size, total, active):
    """To the digits of the report (of the release for mini): billions in all, and of a token."""
    count = count_parameters(preset("ling", size).model)
    assert (count.total / 1e9, count.active / 1e9) == (pytest.approx(total, rel=2e-3), pytest.approx(active, rel=1e-2))
    # 789 M without embeddings, the release's figure; norms are 89,088 of ours.
    assert size != "mini" or count.active - count.embedding == 789_053_440 + 89_088


ALPHA_4 = {"chess": 25_714_688, "small": 124_337_664}


def test_moex_learning_rates_are_the_papers():
    """Peak 3e-4 after 2,000 steps of warm-up; both final learning rates of the paper."""
    train = preset("moex", "chess").train
    table, text = (build_schedule(dataclasses.replace(train.schedule, min_ratio=r), train.steps) for r in (0.1, 1 / 3))
    assert train.schedule.min_ratio == 0.1
    for schedule, floor in ((table, 3e-5), (text, 1e-4)):
        assert schedule(0) == 0
        np.testing.assert_allclose(schedule(1000), 1.5e-4, rtol=1e-6)
        np.testing.assert_allclose(schedule(2000), 3e-4, rtol=1e-6)
        np.testing.assert_allclose(schedule(train.steps), floor, rtol=1e-5)
    assert [objective.weight for objective in train.objectives] == [pytest.approx(0.008)]


def test_blockffn_scalings():
    for size, divisor, residual in (("small", 3, 0.35), ("medium", 5, 0.269430), ("xlarge", 7, 0.236643)):
        model = preset("blockffn", size).model
        assert (model.embedding_scale, model.logit_divisor) == (12, divisor)
        assert model.residual.scale == pytest.approx(residual, abs=1e-6)


def test_unknown_presets():
    with pytest.raises(
        ConfigError,
        match=r"--arch=sparc: must be one of blockffn, deco, delta, dense, .*, vit_mae \(did you mean spark\?\)",
    ):
        preset("sparc")
    with pytest.raises(ConfigError, match=r"--size=3b: for --arch spark it must be one of tiny, small, 2b, 9b"):
        preset("spark", "3b")


def test_exchanging_kinds():
    config = preset("spark")
    muon = with_kind(config, "train.optimizer", "muon")
    assert muon.train.optimizer.kind == "muon"
    assert muon.train.optimizer.b2 == config.train.optimizer.b2
    dense = with_kind(config, "model.attention", "gqa")
    assert dense.model.attention.kind == "gqa"
    assert dense.model.attention.window == config.model.attention.window
    assert "model.ffn" in union_kinds(config)
    with pytest.raises(ConfigError, match=r"train.optimizer.kind=moon: must be one of .* \(did you mean muon\?\)"):
        with_kind(config, "train.optimizer", "moon")
    with pytest.raises(ConfigError, match=r"model.kind=x: is no exchangeable part; those are model.attention"):
        with_kind(config, "model", "x")
    with pytest.raises(ConfigError, match=r"model.ffn.kind=spark: the preset gives no r, top_k"):
        with_kind(preset("dense"), "model.ffn", "spark")


def test_parts_that_may_be_lacking_have_flags_where_they_are_there():
    from sparsezoo_jax import cli
    from sparsezoo_jax.config import RunConfig

    def parsed(arch, *flags):
        return cli.parse_with_preset(RunConfig, ["--arch", arch, *flags], prog="train", description="").model

    deco = parsed("deco", "--model.first-ffn.d-ff", "310", "--model.first-ffn.activation", "relu")
    assert (deco.first_ffn.kind, deco.first_ffn.d_ff, deco.first_ffn.activation) == ("gated", 310, "relu")
    assert deco.ffn == preset("deco").model.ffn
    assert parsed("deco", "--model.first-ffn.kind", "sparselm").first_ffn.kind == "sparselm"
    assert "model.first_ffn" not in union_kinds(preset("spark"))
    with pytest.raises(UserError, match=r"--model.first-ffn.d-ff"):
        parsed("spark", "--model.first-ffn.d-ff", "310")


def test_lists_of_objects():
    config = with_list(preset("spark"), "train.groups", '[{"pattern": "embedding", "lr_multiplier": 0.5}]')
    assert (config.train.groups[0].pattern, config.train.groups[0].lr_multiplier) == ("embedding", 0.5)
    config = with_list(config, "train.objectives", '[{"kind": "fixed", "loss": "balance", "weight": 0.01}]')
    assert config.train.objectives[0].kind == "fixed"
    assert from_json(to_json(config)) == config
    with pytest.raises(ConfigError, match=r"train.groups=\[\{: must be a JSON list"):
        with_list(config, "train.groups", "[{")
    with pytest.raises(ConfigError, match=r"patern"):
        with_list(config, "train.groups", '[{"patern": "x"}]')


def test_differences_that_matter():
    config = preset("spark")
    assert differences(config, config) == {}
    muon = with_kind(config, "train.optimizer", "muon")
    assert differences(config, muon)["train.optimizer.kind"] == ("adamw", "muon")
    assert flatten(config)["model.ffn.top_k"] == 61


def test_damaged_json():
    good = to_json(preset("spark"))
    with pytest.raises(UserError, match="not a configuration"):
        from_json(good[:-20])
    with pytest.raises(UserError, match=r"model\.spark.*|ffn.*widht"):
        from_json(good.replace('"d_ff"', '"widht"'))


def test_a_kind_that_is_a_plain_field_is_a_flag_as_any_other():
    from sparsezoo_jax import cli
    from sparsezoo_jax.config import RunConfig

    args = ["--arch", "moex", "--model.init.kind", "fixed", "--model.init.scale", "0.02"]
    config = cli.parse_with_preset(RunConfig, args, prog="train", description="")
    assert (config.model.init.kind, config.model.init.scale) == ("fixed", 0.02)
    assert cli.parse_with_preset(RunConfig, args[:2], prog="train", description="").model.init.kind == "fan_in"
