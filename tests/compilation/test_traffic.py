"""Bytes to and from HBM in the text of compiled programs."""

from sparsezoo_jax.compilation.traffic import hbm_bytes

# A prefetched to VMEM (40 kB read), used from there twice: 4 kB written to HBM, then B (4 kB) read and C (4 kB)
# written.
# The kernel declares 50 kB, 40 of them of the copy in VMEM.
TEXT = """HloModule jit_f, is_scheduled=true

%inner (p: f32[10000]) -> f32[1000] {
  %p = f32[10000]{0:T(1024)} parameter(0)
  ROOT %s = f32[1000]{0:T(1024)} slice(%p), slice={[0:1000]}
}

ENTRY %main (a: f32[10000]) -> f32[1000] {
  %a = f32[10000]{0:T(1024)} parameter(0)
  %start = (f32[10000]{0:T(1024)S(1)}, f32[10000]{0:T(1024)}, u32[]{:S(2)}) copy-start(%a)
  %done = f32[10000]{0:T(1024)S(1)} copy-done(%start)
  %b = f32[1000]{0:T(1024)} fusion(%done), kind=kLoop, calls=%inner
  %k = f32[1000]{0:T(1024)S(1)} custom-call(%done, %b), backend_config={"cost_estimate":{"bytes_accessed":"50000"}}
  ROOT %c = f32[1000]{0:T(1024)} fusion(%k, %b), kind=kLoop, calls=%inner
}
"""


def test_what_stays_in_vmem_is_not_counted():
    prefetch, fusion, kernel, last = 40_000, 4000, 50_000 - 40_000 - 4000, 4000 + 4000
    assert hbm_bytes(TEXT) == prefetch + fusion + kernel + last


SLICES = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: f32[10000]) -> f32[10000] {
  %a = f32[10000]{0:T(1024)} parameter(0)
  %s1 = ((f32[10000]{0:T(1024)}), f32[4000]{0:T(1024)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4000]}
  %s2 = ((f32[10000]{0:T(1024)}), f32[6000]{0:T(1024)}, s32[]{:S(2)}) slice-start(%a), slice={[4000:10000]}
  %d1 = f32[4000]{0:T(1024)S(1)} slice-done(%s1)
  %d2 = f32[6000]{0:T(1024)} slice-done(%s2)
  ROOT %c = f32[10000]{0:T(1024)S(1)} custom-call(%d1, %d2), custom_call_target="ConcatBitcast"
}
"""


def test_a_prefetch_in_pieces_reads_each_once():
    assert hbm_bytes(SLICES) == 16_000 + 2 * 24_000 + 24_000, "one to VMEM, one within HBM, whose result is read"
