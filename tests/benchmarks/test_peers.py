"""The comparison with PyTorch: what runs of it without PyTorch, and what is said then."""

import sys

from benchmarks import peers


def test_without_pytorch_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["peers"])
    assert peers.main() == 2
    found = capsys.readouterr()
    assert found.err == "PyTorch is not installed, and there is nothing to compare with: pip install torch\n"
    assert found.out == ""


def test_our_side_reads_prompts_and_decodes_batches(capsys):
    shape = peers.Shape(d_model=32, layers=1, d_ff=48, heads=2, kv_heads=1, head_dim=16, vocab=40)
    case = peers.ours(shape, "float32")
    sides = {"ours": case(1, 20), peers.PYTORCH: case(3, 1)}
    peers.report("both", sides, rounds=2, threads=1)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [["| both", "ours"], ["| both", "PyTorch"]]
    assert float(rows[1].split(" | ")[3]) == 1.0, "PyTorch's time by itself"
