import pytest
from pydantic import TypeAdapter, ValidationError

from sparsezoo_jax.errors import ConfigError
from sparsezoo_jax.training.config import ParameterGroup, TrainConfig
from sparsezoo_jax.training.lora import LoRAConfig
from sparsezoo_jax.training.objectives import FixedObjective, SineProgressive
from sparsezoo_jax.training.optimizers import Adafactor, AdamW, Muon
from sparsezoo_jax.training.schedules import WSD, WSDC, Constant, Cosine, steps_of


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 0},
        {"log_every": 0},
        {"accumulation": 0},
        {"keep_last": 0},
        {"merge_last": 0},
        {"max_skipped_steps": 0},
        {"profile_steps": 0},
        {"profile_start": 0},
        {"stop_at": 0},
        {"grad_clip": 0.0},
        {"eval_every": -1},
        {"checkpoint_every": -1},
        {"seed": -1},
        {"z_loss": -1e-4},
    ],
)
def test_a_number_out_of_range_names_its_field(changes):
    (name,) = changes
    with pytest.raises(ConfigError, match=rf"train\.{name}={changes[name]}"):
        TrainConfig(**changes)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: Cosine(learning_rate=0), "train.schedule.learning_rate"),
        (lambda: Cosine(min_ratio=1.5), "train.schedule.min_ratio"),
        (lambda: Constant(warmup_steps=-1), "train.schedule.warmup_steps"),
        (lambda: Constant(warmup_steps=10.5), "train.schedule.warmup_steps"),
        (lambda: WSD(decay_steps=-0.1), "train.schedule.decay_steps"),
        (lambda: WSD(decay="exponential"), "train.schedule.min_ratio"),
        (lambda: WSDC(stable_steps=-1), "train.schedule.stable_steps"),
        (lambda: AdamW(b2=1.0), "train.optimizer.b2"),
        (lambda: AdamW(eps=0), "train.optimizer.eps"),
        (lambda: AdamW(weight_decay=-1), "train.optimizer.weight_decay"),
        (lambda: Muon(momentum=1.0), "train.optimizer.momentum"),
        (lambda: Muon(newton_schulz_steps=0), "train.optimizer.newton_schulz_steps"),
        (lambda: Adafactor(clip_threshold=0), "train.optimizer.clip_threshold"),
        (lambda: ParameterGroup(pattern="("), "train.groups.pattern"),
        (lambda: ParameterGroup(pattern="a", clip=0), "train.groups.clip"),
        (lambda: ParameterGroup(pattern="a", lr_multiplier=-1), "train.groups.lr_multiplier"),
        (lambda: ParameterGroup(pattern="a", weight_decay=-1), "train.groups.weight_decay"),
        (lambda: FixedObjective(loss="a", weight=-1), "train.objectives.weight"),
        (lambda: SineProgressive(loss="a", peaks=(), steps=()), "train.objectives.peaks"),
        (lambda: SineProgressive(loss="a", peaks=(1, 2), steps=(5,)), "train.objectives.steps"),
        (lambda: SineProgressive(loss="a", peaks=(1, 2), steps=(5, 5)), "train.objectives.steps"),
    ],
)
def test_a_part_out_of_range_names_its_field(build, field):
    with pytest.raises(ConfigError) as caught:
        build()
    assert caught.value.field == field


def test_phases_longer_than_the_run_are_refused():
    with pytest.raises(ConfigError, match=r"train\.steps=100: the schedule's phases take 150 steps"):
        TrainConfig(steps=100, schedule=WSD(warmup_steps=100, decay_steps=50))


def test_two_objectives_for_one_loss_are_refused():
    objective = FixedObjective(loss="balance", weight=1)
    with pytest.raises(ConfigError, match="balance"):
        TrainConfig(objectives=(objective, objective))


def test_unknown_fields_are_refused():
    with pytest.raises(ValidationError):
        TrainConfig(step=3)  # pyright: ignore[reportCallIssue]


def test_lengths_below_one_are_fractions():
    assert [steps_of(x, 500) for x in (0, 0.02, 0.999, 1, 30)] == [0, 10, 500, 1, 30]


def test_json_round_trip_keeps_every_kind():
    config = TrainConfig(
        optimizer=Muon(momentum=0.9),
        schedule=WSDC(decay="cosine"),
        groups=(ParameterGroup(pattern="ffn/router", clip=0.5),),
        objectives=(SineProgressive(loss="l1", peaks=(0.0, 1.0), steps=(1, 9)), FixedObjective(loss="z", weight=1)),
    )
    adapter = TypeAdapter(TrainConfig)
    assert adapter.validate_json(adapter.dump_json(config)) == config


def test_merging_needs_checkpoints_of_whole_models():
    with pytest.raises(ConfigError, match=r"train\.checkpoint_every=0: must be above 0 with train\.merge_last"):
        TrainConfig(merge_last=2, checkpoint_every=0)
    with pytest.raises(ConfigError, match=r"train\.merge_last=2: must be 1 with train\.lora\.rank"):
        TrainConfig(merge_last=2, lora=LoRAConfig(rank=2))
    found = [TrainConfig(steps=7, checkpoint_every=2, merge_last=n).merged_steps() for n in (1, 2, 3, 9)]
    assert found == [(), (6, 7), (4, 6, 7), (2, 4, 6, 7)]
    assert TrainConfig(steps=6, checkpoint_every=2, merge_last=2).merged_steps() == (4, 6)
    assert TrainConfig(steps=6, checkpoint_every=6, merge_last=2).merged_steps() == ()
