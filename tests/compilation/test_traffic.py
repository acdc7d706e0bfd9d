"""Bytes to and from HBM in the text of compiled programs."""

from sparsezoo_jax.compilation.hlo import parse
from sparsezoo_jax.compilation.traffic import hbm_bytes, step_traffic

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


# Three trips, each of which reads one of three rows of 4 kB and writes one of 8 kB into an array of three.
LOOP = """HloModule jit_f, is_scheduled=true

%row (p0: f32[3,1000], p1: s32[]) -> f32[1,2000] {
  %p0 = f32[3,1000]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %d = f32[1,1000]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1000}
  ROOT %twice = f32[1,2000]{1,0} concatenate(%d, %d), dimensions={1}
}

%put (q0: f32[3,2000], q1: f32[1,2000], q2: s32[]) -> f32[3,2000] {
  %q0 = f32[3,2000]{1,0} parameter(0)
  %q1 = f32[1,2000]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %u = f32[3,2000]{1,0} dynamic-update-slice(%q0, %q1, %q2, %zero)
}

%body (p: (s32[], f32[3,1000], f32[3,2000])) -> (s32[], f32[3,1000], f32[3,2000]) {
  %p = (s32[], f32[3,1000]{1,0}, f32[3,2000]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[3,1000]{1,0} get-tuple-element(%p), index=1
  %y = f32[3,2000]{1,0} get-tuple-element(%p), index=2
  %r = f32[1,2000]{1,0:S(1)} fusion(%x, %i), kind=kLoop, calls=%row
  %w = f32[3,2000]{1,0} fusion(%y, %r, %i), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[3,1000]{1,0}, f32[3,2000]{1,0}) tuple(%i, %x, %w)
}

%cond (p.1: (s32[], f32[3,1000], f32[3,2000])) -> pred[] {
  %p.1 = (s32[], f32[3,1000]{1,0}, f32[3,2000]{1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

ENTRY %main (a: f32[3,1000], b: f32[3,2000]) -> f32[3,2000] {
  %a = f32[3,1000]{1,0} parameter(0)
  %b = f32[3,2000]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], f32[3,1000]{1,0}, f32[3,2000]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[], f32[3,1000]{1,0}, f32[3,2000]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %g = f32[3,2000]{1,0} get-tuple-element(%loop), index=2
  ROOT %n = f32[3,2000]{1,0} negate(%g)
}
"""  # noqa: E501


def test_a_loop_moves_what_its_trips_slice_and_update():
    row_in, row_out, index, all_rows = 4000, 8000, 4, 24_000
    moved = 3 * (row_in + index) + 3 * (row_out + index) + 2 * all_rows
    assert step_traffic(parse(LOOP)) == {"rest": moved}
    in_hbm = LOOP.replace(":S(1)", "")
    assert step_traffic(parse(in_hbm))["rest"] - moved == 3 * 2 * row_out, "written, and read again"


def test_traffic_is_told_by_the_names_of_operations():
    def named(text, line, name):
        return text.replace(line, f'{line}, metadata={{op_name="jit(step)/{name}/mul"}}')

    text = named(LOOP, "calls=%row", "transpose(jvp(layers))/while/body/ffn")
    # The update has no name, and is a part of what the loop around it is.
    text = named(text, "body=%body", "jvp(layers)/while")
    found = step_traffic(parse(named(text, "negate(%g)", "optimizer")))
    assert found == {"optimizer": 2 * 24_000, "layers": 3 * (8000 + 4), "ffn, backward": 3 * (4000 + 4)}


def test_prefetches_and_kernels_count_as_in_the_entry():
    assert step_traffic(parse(SLICES)) == {"rest": hbm_bytes(SLICES)}
    # Of the copy in VMEM nothing is read again, and fusions read a tenth of what they slice.
    assert step_traffic(parse(TEXT)) == {"rest": hbm_bytes(TEXT)}
