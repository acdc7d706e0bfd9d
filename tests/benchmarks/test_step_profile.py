"""`benchmarks.step_profile`: which part of a step an operation belongs to."""

import dataclasses

import pytest

from benchmarks import step_profile
from sparsezoo_jax import preset
from sparsezoo_jax.training.config import TrainConfig

PROGRAM = """HloModule jit_step

FileNames
1 "/somewhere/sparsezoo_jax/models/moe.py"
2 "/somewhere/sparsezoo_jax/pallas_kernels/matmul/__init__.py"
3 "/somewhere/optax/_src/clipping.py"

FunctionNames
1 "MoE.__call__"
2 "matmul"
3 "clip"

FileLocations
1 {file_name_id=1 function_name_id=1 line=10 end_line=10 column=4 end_column=10}
2 {file_name_id=2 function_name_id=2 line=20 end_line=20 column=4 end_column=10}
3 {file_name_id=3 function_name_id=3 line=30 end_line=30 column=4 end_column=10}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=1}

ENTRY %main {
  %dot.7 = f32[4,8]{1,0} dot(%a, %b), metadata={op_name="jit(step)/dot_general" stack_frame_id=2}
  ROOT %multiply.1 = f32[4]{0} multiply(%c, %d), metadata={op_name="jit(step)/mul" stack_frame_id=3}
  %copy.2 = f32[4]{0} copy(%c)
}
"""


def test_an_operation_belongs_to_the_innermost_part_that_its_stack_names():
    stacks = step_profile.Stacks(PROGRAM)
    assert stacks.part("dot.7") == "experts' products"  # of the layer that called the product
    assert stacks.function("dot.7") == "pallas_kernels/matmul/__init__.py: matmul"
    assert stacks.part("multiply.1") == "optimizer and step"
    assert stacks.function("multiply.1") == step_profile.OTHER
    assert stacks.part("copy.2") == step_profile.OTHER
    assert "dot.7" in stacks
    assert "copy.2" not in stacks


def test_what_waits_for_others_is_not_counted_twice():
    names = [("while.3", "X", 9), ("dot.7", "X", 4), ("dot.7", "X", 2), ("dot.7", "M", 5), ("call", "X", 7)]
    trace = {"traceEvents": [{"name": name, "ph": phase, "dur": dur} for name, phase, dur in names]}
    assert step_profile.events(trace) == {"dot.7": 6}


def test_parts_of_a_real_step_are_found():
    changes = {
        "model.layers": 1,
        "model.layer_pattern": ["global"],
        "model.vocab_size": 300,
        "data.bpe_vocab_size": 300,
    }
    config = preset("dense", "tiny", changes)
    model = dataclasses.replace(config.model, scan_layers=False, remat="none")
    found = step_profile.profile(model, TrainConfig(), (2, 64), steps=2)
    parts = found["parts"]
    assert min(parts[name] for name in ("loss", "attention", "feed-forward", "norms", "optimizer and step")) > 0
    assert parts["experts' products"] == parts["routing"] == 0
    # Nearly all of it has a place.
    assert parts[step_profile.OTHER] < 0.1 * sum(parts.values())
    assert sum(parts.values()) == pytest.approx(sum(found["functions"].values()))
