"""The bytes that a compiled program moves in main memory, counted in its text."""

import pathlib
import re
import runpy

import pytest

TPU = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "benchmarks" / "tpu.py"))
# 1 kB arrays: a weight that is prefetched, a product, a pool that is written in place, and a loop that reads pages of it.
TEXT = """
%writes (p: u16[512], n: u16[8], i: s32[1]) -> u16[512] {
  %p = u16[512]{0} parameter(0)
  ROOT %s = u16[512]{0} scatter(%p, %i, %n), to_apply=%last
}

%reads (p: u16[512], i: s32[1]) -> u16[64] {
  ROOT %g = u16[64]{0} gather(%p, %i), slice_sizes={64}
}

%body (t: (s32[], u16[512])) -> (s32[], u16[512]) {
  %t = (s32[]{:T(128)}, u16[512]{0}) parameter(0)
  %pool.2 = u16[512]{0} get-tuple-element(%t), index=1
  %number = s32[1]{0:T(128)S(1)} get-tuple-element(%t), index=0
  %page = u16[64]{0:T(64)S(1)} fusion(%pool.2, %number), calls=%reads, metadata={op_name="layers.3/self_attn/gather"}
}

ENTRY %main (w: bf16[512], pool: u16[512], x: bf16[8]) -> u16[512] {
  %w = bf16[512]{0} parameter(0)
  %pool = u16[512]{0} parameter(1)
  %x = bf16[8]{0:T(8)S(1)} parameter(2)
  %i = s32[1]{0:T(128)S(1)} parameter(3)
  %fetch = (bf16[512]{0:T(512)S(1)}, bf16[512]{0}, u32[]{:S(2)}) copy-start(%w)
  %fetched = bf16[512]{0:T(512)S(1)} copy-done(%fetch)
  %y = bf16[8]{0} fusion(%fetched, %x), kind=kOutput, calls=%product, metadata={op_name="jit(f)/layers.0/mlp/dot_general"}
  %written = u16[512]{0} fusion(%pool, %y, %i), kind=kCustom, calls=%writes, metadata={op_name="jit(f)/scatter"}
  %loop = (s32[]{:T(128)}, u16[512]{0}) while(%start), condition=%more, body=%body
}
"""


@pytest.mark.slow
def test_a_decode_step_on_a_tpu_moves_little_more_than_weights_and_live_cache(capsys):
    """In particular it copies no pool of pages to write one token of each sequence."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    TPU["print_bytes"]("v5e:2x2", [3], 32, 2048)
    printed = capsys.readouterr().out
    assert float(re.search(r"3 layers: .*ratio ([\d.]+)", printed)[1]) < 1.3, printed


@pytest.mark.parametrize("iterations", [1, 5])
def test_bytes_by_operation(iterations):
    """The prefetched weight moves once; of the pool what is written and what is read, and that in each iteration."""
    assert TPU["moved_bytes"](TEXT, iterations) == {
        "prefetch or copy of the compiler (copy-start)": 1024,
        "layer/mlp/dot_general (fusion)": 16,
        "scatter (fusion)": 2 * 16,
        "layer/self_attn/gather (fusion)": 128 * iterations,
    }
