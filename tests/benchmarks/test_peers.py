"""The comparison with PyTorch: what runs of it without PyTorch, and what is said then."""

import argparse
import sys
from functools import partial

import pytest

from benchmarks import peers, workers


def test_without_pytorch_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "argv", ["peers"])
    assert peers.main() == 2
    found = capsys.readouterr()
    assert found.err == "PyTorch is not installed, and there is nothing to compare with: pip install torch\n"
    assert found.out == ""


def test_a_peer_in_a_process_of_its_own(tmp_path, capsys):
    """Its processor time counts, and one that ends is an error."""
    script = tmp_path / "peer.py"
    script.write_text(
        "import sys\nassert sys.stdin.readline() == '32 1\\n'\n"
        "for line in sys.stdin:\n    if line == 'stop\\n': break\n    print(2.5 * int(line.split()[1]), flush=True)\n"
    )
    with workers.Worker(sys.executable, str(script), "32 1") as worker:
        sides = {"ours": lambda: None, peers.LLAMA_CPP: partial(worker, "decode 2")}
        peers.report("a token", sides, rounds=3, threads=2, baseline=peers.LLAMA_CPP, worker=worker, times=5)
        row = capsys.readouterr().out.splitlines()[1].split(" | ")
        assert row[:2] == ["| a token", "llama.cpp"]
        assert float(row[2]) == pytest.approx(1e3 * 5.0 / 2 / 5, rel=0.01)
        with pytest.raises(RuntimeError, match="ended with 0"):
            worker("stop")


def test_our_side_trains(capsys):
    shape = peers.Shape(d_model=32, layers=1, d_ff=48, heads=2, kv_heads=1, head_dim=16, vocab=40)
    peers.report("2 x 70", {"ours": peers.our_step(shape, 2, 70)}, rounds=2, threads=1, baseline="ours")
    assert capsys.readouterr().out.startswith("| 2 x 70 | ours | ")


def test_our_side_reads_prompts_decodes_batches_and_generates(capsys):
    shape = peers.Shape(d_model=32, layers=1, d_ff=48, heads=2, kv_heads=1, head_dim=16, vocab=40)
    case = peers.ours(shape, "float32")
    case(peers.generation("20:3"))()
    sides = {"ours": case(peers.Case(1, 20, 1)), peers.PYTORCH: case(peers.Case(3, 0, 2))}
    peers.report("both", sides, rounds=2, threads=1)
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [["| both", "ours"], ["| both", "PyTorch"]]
    assert float(rows[1].split(" | ")[3]) == 1.0, "PyTorch's time by itself"


def test_generations_are_named_by_two_numbers():
    assert peers.generation("64:32") == peers.Case(rows=1, prompt=64, new=32)
    for text in ("64", "64:0", "a:b", "64:32:1"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be PROMPT:NEW, two numbers of tokens above 0"):
            peers.generation(text)
