"""What is read from XLA's list of launches and the assembler's report."""

from sparsezoo_jax.compilation.ptx import Kernel, summarise

LAUNCHES = """001: kCustomKernel [source | next=002] fill grid: [2, 1, 1] threads: [128, 1, 1]  shared_memory: 0 bytes
002: kCustomKernel [prev=001 (1) | sink] sums grid: [19, 4, 1] threads: [1024, 1, 1]  shared_memory: 12288 bytes
"""
ASSEMBLED = """ptxas info    : Compiling entry function 'sums' for 'sm_90a'
    0 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 54 registers, used 1 barriers
ptxas info    : Compiling entry function 'fill' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 0 barriers
"""


def test_launches_and_reports_are_joined_by_name():
    fill, sums = summarise(LAUNCHES, ASSEMBLED)
    assert fill == Kernel("fill", 2, 128, 12, 0, 0)
    assert sums == Kernel("sums", 76, 1024, 54, 12288, 24)


def test_occupancy():
    def of(threads, registers, shared):
        return Kernel("", 1, threads, registers, shared, 0).occupancy

    assert of(1024, 32, 0) == 1
    assert of(1024, 33, 0) == 0.5, "40 registers of 2,048 threads are more than 65,536"
    assert of(128, 32, 100_000) == 2 * 128 / 2048, "two blocks' shared memory"
    assert of(32, 16, 0) == 0.5, "32 blocks at most"
