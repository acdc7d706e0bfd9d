"""What is read from the dumps of other libraries' compilers."""

from benchmarks.attention_bundles import regions
from benchmarks.compiled_peers import launches_of_mosaic
from sparsezoo_jax.compilation.ptx import Kernel

LAUNCH = """module @kernel {
  gpu.launch async [%0] blocks(%arg2, %arg3, %arg4) in (%arg8 = %c64, %arg9 = %c8_1, %arg10 = %c1) threads(%arg5, %arg6, %arg7) in (%arg11 = %c384, %arg12 = %c1_0, %arg13 = %c1_1) dynamic_shared_memory_size %c198736_i32 {
"""  # noqa: E501
SAID = """ptxas warning : Registers are spilled to local memory in 'f', 3540 bytes spill stores, 3180 bytes spill loads
ptxas info    : Compiling entry function 'f' for 'sm_90a'
    2328 bytes stack frame, 3540 bytes spill stores, 3180 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 2328 bytes cumulative stack size, 1 bytes smem
"""


def test_kernels_of_mosaic_are_in_the_order_of_compilation(tmp_path):
    for name in ("b_10", "a_9"):
        (tmp_path / f"{name}.ptxas").write_text(SAID)
        (tmp_path / f"{name}.mlir-passes.log").write_text(LAUNCH)
    first, second = launches_of_mosaic(tmp_path)
    assert first == Kernel("a", 512, 384, 168, 198_736, 6720)
    assert second.name == "b"


def test_regions_of_a_schedule(tmp_path):
    dump = tmp_path / "final_bundles.txt"
    dump.write_text(
        "  0x0   :  { a }\n  0x1 LB: > { b }\n 0x2 PF: > { c }\nPF: predicated\n  0x3   : > { d }\n 0x4 PF: > { e }\n"
    )
    assert regions(dump) == [2, 2, 1]
