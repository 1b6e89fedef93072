"""The dispatch table: every operation with what runs on each backend."""

from __future__ import annotations

from qwen_dist.ops.argmax import ALLOWED_ARGMAX, ARGMAX
from qwen_dist.ops.attention import ATTENTION
from qwen_dist.ops.delta_rule import DELTA_RULE, DELTA_RULE_IN_SLOTS
from qwen_dist.ops.dispatch import Backend, Op
from qwen_dist.ops.experts import EXPERTS
from qwen_dist.ops.grouped_matmul import GROUPED_MATMUL, ROWS_BY_ROWS, ROWS_BY_WEIGHTS
from qwen_dist.ops.matmul import BATCHED_MATMUL, DEQUANTIZED_GRADIENT, DEQUANTIZED_MATMUL, MATMUL
from qwen_dist.ops.paged_attention import PAGED_ATTENTION
from qwen_dist.ops.paged_cache import WRITE
from qwen_dist.ops.rotary import ROTATE
from qwen_dist.ops.short_convolution import SHORT_CONVOLUTION
from qwen_dist.ops.swiglu import SWIGLU

OPS: tuple[Op, ...] = (
    MATMUL,
    BATCHED_MATMUL,
    DEQUANTIZED_MATMUL,
    DEQUANTIZED_GRADIENT,
    GROUPED_MATMUL,
    ROWS_BY_WEIGHTS,
    ROWS_BY_ROWS,
    ATTENTION,
    WRITE,
    PAGED_ATTENTION,
    ROTATE,
    SWIGLU,
    EXPERTS,
    SHORT_CONVOLUTION,
    DELTA_RULE,
    DELTA_RULE_IN_SLOTS,
    ARGMAX,
    ALLOWED_ARGMAX,
)


def dispatch_table() -> dict[str, dict[Backend, tuple[str, ...]]]:
    """Return for each op and backend the names of the implementations, in the order in which they are tried."""
    return {op.name: {backend: tuple(one.name for one in op.implementations(backend)) for backend in Backend} for op in OPS}
