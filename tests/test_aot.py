"""The aot command as a user runs it, on shrunken models; every test compiles for hardware that is not there."""

import importlib.util
import json
import sys

import pytest

from sparsezoo_jax import aot, cli
from sparsezoo_jax.compilation import memory, profile, topologies
from tests.test_commands import SMALL

pytest.importorskip("libtpu")
pytestmark = pytest.mark.usefixtures("optimised")

MODEL = {name: value for name, value in SMALL.items() if name.startswith("model.")} | {
    "data.seq-len": 64,
    "data.batch-size": 8,
    "data.bpe-vocab-size": 320,
}


def call(monkeypatch, capsys, *args, **changes):
    """Exit status, stdout and stderr of the command."""
    values = MODEL | {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["aot", "--arch", "spark", *flags, *map(str, args)])
    try:
        cli.run(aot.main)
        status = 0
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_train_step(monkeypatch, capsys):
    """Parameters and Adam's two moments are split over fsdp and tensor, and the report says what they take."""
    status, out, _ = call(
        monkeypatch, capsys, "--topology", "v5e:2x2", "--mesh.fsdp", 2, "--mesh.tensor", 2, "--json",
        "--matmul-efficiency", 0.5,
        "--model.scan-layers", model__layer_pattern="global", model__ffn__d_ff=96,
    )  # fmt: skip
    assert status == 0
    report = json.loads(out)
    assert report["fits"]
    assert (report["chips"], report["tokens"]) == (4, 8 * 64)
    assert report["mesh"] == {"data": 1, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    sizes = report["arguments"]
    assert sizes["optimizer"] == pytest.approx(2 * sizes["parameters"], rel=0.01)
    assert report["memory"]["arguments"] >= sizes["parameters"] + sizes["optimizer"] + sizes["batch"]
    assert report["flops"]["traced"] > report["flops"]["dense"] > report["flops"]["sparse"] > 0
    parts, seconds = report["parts"], report["seconds"]
    assert parts["compute"] == pytest.approx(report["bounds"]["compute"] / 0.5)
    assert parts["hbm"] == pytest.approx(report["traffic"] / 0.819e12)
    named = {"embedding", "attention", "ffn", "attention, backward", "ffn, backward", "loss", "optimizer"}
    assert named <= set(report["traffic_by_part"])
    assert seconds["none"] == pytest.approx(sum(parts.values()))
    assert seconds["none"] > seconds["half"] > seconds["full"]
    assert report["mfu"]["dense"]["none"] > report["mfu"]["sparse"]["none"] > 0
    assert {axis for item in report["collectives"] for axis in item["axes"].split("+")} >= {"fsdp", "tensor"}
    assert report["unknown_loops"] == []


def test_decode_and_tables(monkeypatch, capsys):
    args = ("--topology", "v6e:2x4", "--mesh.data", 8, "--step", "decode", "--context", 64)
    status, out, err = call(monkeypatch, capsys, *args)
    assert status == 0
    title = "decode step on v6e:2x4 (8 chips; data=8)"
    for text in (title, "cache", "of the device", "tokens/s/chip", "step, half overlap", "fits"):
        assert text in out
    assert err == ""


@pytest.mark.slow
def test_micro_batches(monkeypatch, capsys):
    """With split tables, whose gradients are summed over devices in each of them: a compiler refused that once."""
    flags = "--arch dense --size 0_1b --topology v6e:2x2 --mesh.fsdp 4 --train.accumulation 2 --data.batch-size 8"
    small = "--data.seq-len 128 --model.layers 1 --model.vocab-size 8192 --model.ffn.d-ff 512"
    command = f"aot {flags} {small} --model.attention.implementation xla"
    monkeypatch.setattr(sys, "argv", command.split())
    cli.run(aot.main)
    assert "fits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_step_that_does_not_fit(monkeypatch, capsys):
    """Scores of 512 sequences of 8,192 tokens on one chip: the compiler gives up, and the report says why."""
    status, out, err = call(
        monkeypatch, capsys, "--topology", "v5e:1x1", "--json",
        model__max_seq_len=8192, data__seq_len=8192, data__batch_size=512,
    )  # fmt: skip
    assert status == 1
    report = json.loads(out)
    assert not report["fits"]
    assert report["needed"] > report["hbm"] == 16 * 2**30
    # 512 sequences x 2 heads x 8192^2 scores of 4 bytes.
    assert report["buffers"][0]["bytes"] >= 512 * 2 * 8192**2 * 4
    assert any("attention scores" in item["name"] or "[" in item["name"] for item in report["buffers"])
    advice = " ".join(report["suggestions"])
    assert "--train.accumulation 512" in advice
    assert "--model.remat full" in advice
    assert "--mesh.fsdp" not in advice  # parameters take next to nothing
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--topology", "v9:2x2"), "v5p:4x4x4"),
        (("--topology", "v5e"), "h100:1x1x8"),
        (("--topology", "v5p:3x3x3"), "not divisible"),
        (("--topology", "v6e:64x64"), "must have from 1 to 1024 chips"),
        (("--topology", "v5e:2x2", "--mesh.fsdp", "3"), "don't divide 4 devices"),
        (("--topology", "v5e:2x2", "--mesh.fsdp", "4", "--data.batch-size", "6"), "multiple of mesh.fsdp=4"),
        (("--topology", "v5e:2x2", "--step", "decode", "--context", "65"), "model.max_seq_len=64"),
        (("--topology", "v5e:2x2", "--step", "sleep"), "decode"),
        (("--topology", "h100:2x1x4"), "1xHOSTSxGPUS"),
        (("--topology", "l40s:2x1x4"), "1xHOSTSxGPUS"),
        (("--matmul-efficiency", "1.5"), "must be above 0 and at most 1"),
    ],
)
def test_bad_input(args, message, monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys, *args)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("topology", "module"), [("v5e:2x2", "libtpu"), ("h100:1x1x8", "jax_cuda12_plugin")])
def test_missing_package(topology, module, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    status, _, err = call(monkeypatch, capsys, "--topology", topology)
    assert status == 2
    assert len(err.strip().splitlines()) == 1
    assert "pip install 'sparsezoo-jax[aot]'" in err


@pytest.mark.parametrize(
    ("name", "slices", "sizes"),
    [
        ("v4:2x2x2", 1, {}),
        ("v5p:4x4x4", 1, {"fsdp": 32, "tensor": 2}),
        ("v5p:8x8x8", 1, {"fsdp": 128, "tensor": 4}),
        ("v6e:16x16", 2, {"data": 2, "fsdp": 256}),
        ("tpu7x:2x2x1", 1, {"fsdp": 8}),
    ],
)
def test_meshes_of_topologies(name, slices, sizes):
    """Every mesh finds a layout, also where its axes are no product of the topology's sides."""
    from sparsezoo_jax.sharding import MeshConfig, build_mesh

    topology = topologies.open_topology(name, slices)
    mesh = build_mesh(MeshConfig(slices=slices, **sizes), topology.devices)
    assert mesh.size == len(topology.devices) == topology.chips * topology.chip.devices
    assert all(mesh.shape[axis] == size for axis, size in sizes.items())


def test_messages_of_the_compiler():
    """Own text in the form of the two messages: with a list of buffers and without."""
    long = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.\n"
        "Largest program allocations in hbm:\n\n"
        '  1. Size: 8.00G\n     Operator: op_name="jit(step)/mul" source_file="x"\n     Shape: f32[8,4]{1,0}\n'
        "     Unpadded size: 8.00G\n  2. Size: 512.0M\n     Shape: bf16[2]{0}\n"
    )
    assert memory.needed_bytes(long) == 20.5 * 2**30
    assert memory.listed_buffers(long) == [
        memory.Buffer("f32[8,4] jit(step)/mul", 8 * 2**30),
        memory.Buffer("bf16[2]", 512 * 2**20),
    ]
    short = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (1.50T) exceeds available HBM (15.75G)."
    assert memory.needed_bytes(short) == 1.5 * 2**40
    assert memory.listed_buffers(short) == []


def test_profile_summary():
    """Operations that are alike are listed once and count each time."""
    texts = [
        'hlo_op_estimate {\n  hlo_op_name: "fusion.1"\n  estimated_cycles: 100\n  num_equivalent_hlos: 3\n}\n',
        'hlo_op_estimate {\n  hlo_op_name: "copy.2"\n  estimated_cycles: 50\n}\n',
    ]
    found = profile.summarise(texts, top=1)
    assert found["cycles"] == 350
    assert found["ops"] == [{"op": "fusion.1", "cycles": 300, "share": 300 / 350}]
