"""Packs random weights as each tool does, and dequantises them element by element, apart from the code under test."""

import ml_dtypes
import numpy as np
import pytest

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word is this column


def mostly_slow(cases, default):
    """Return parameters of a test, of which the default tests run only some."""
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if case in default else pytest.mark.slow)
        for case in cases
    ]


def words(values, bits):
    """Pack unsigned values [..., N] into int32 words along the last dimension, low bits first, by integer arithmetic."""
    values = np.asarray(values, np.uint64)
    per_word = 32 // bits
    values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -values.shape[-1] % per_word)])
    grouped = values.reshape(*values.shape[:-1], -1, per_word)
    total = sum(grouped[..., place] << np.uint64(bits * place) for place in range(per_word))
    return np.ascontiguousarray(total.astype(np.uint32).view(np.int32))


def awq_words(values):
    """Pack unsigned 4-bit values [..., N] into words in AutoAWQ's order."""
    grouped = np.asarray(values, np.uint64).reshape(*values.shape[:-1], -1, 8)
    total = sum(grouped[..., column] << np.uint64(4 * place) for place, column in enumerate(AWQ_COLUMNS))
    return np.ascontiguousarray(total.astype(np.uint32).view(np.int32))


def dequantized(values, zero_points, scales, group_of):
    """Return (q - z) · s of [O, C] with z and s [O, G], element by element in the dtype of the scales, as float32."""
    result = np.empty(values.shape, np.float32)
    for row, column in np.ndindex(values.shape):
        group = group_of[column]
        difference = np.float32(int(values[row, column]) - int(zero_points[row, group]))
        result[row, column] = np.float32(scales.dtype.type(difference * np.float32(scales[row, group])))
    return result


class Packer:
    """Makes random packed weights. `values` are unsigned, of `bits` bits.

    `tensors(rng, rows, columns)` returns the tensors of a layer by leaf name, and its dequantised weight.
    """

    def __init__(self, method, bits, group, *, symmetric=True, scale_dtype="float16", act_order=False, **more):
        self.method, self.bits, self.group, self.symmetric = method, bits, group, symmetric
        self.scale_dtype, self.act_order, self.more = np.dtype(scale_dtype), act_order, more

    def config(self):
        """Return the quantization_config."""
        if self.method == "gptq":
            form = {"bits": self.bits, "group_size": self.group or -1, "sym": self.symmetric, "desc_act": self.act_order}
            return {"quant_method": "gptq"} | form | {"checkpoint_format": self.more.get("version", "gptq")}
        if self.method == "awq":
            form = {"bits": 4, "group_size": self.group, "version": "gemm", "zero_point": True}
            return {"quant_method": "awq"} | form
        weights = {"num_bits": self.bits, "type": "float" if "float" in self.method else "int"}
        weights |= {"symmetric": self.symmetric, "dynamic": False, "observer": "minmax"}
        weights |= {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        weights |= {"actorder": "group" if self.act_order else None}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
        return {"quant_method": "compressed-tensors", "config_groups": groups, "format": self.method, "ignore": ["lm_head"]}

    def tensors(self, rng, rows, columns):
        group = self.group or columns
        groups, half = columns // group, 2 ** (self.bits - 1)
        scales = rng.uniform(0.001, 0.02, (rows, groups)).astype(self.scale_dtype)
        order = rng.permutation(columns) if self.act_order else np.arange(columns)
        group_of = (order // group).astype(np.int32)
        if self.method == "float-quantized":
            values = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
            product = np.empty((rows, columns), np.float32)
            for row, column in np.ndindex(product.shape):
                exact = np.float32(values[row, column]) * np.float32(scales[row, group_of[column]])
                product[row, column] = np.float32(self.scale_dtype.type(exact))
            return {"weight": values, "weight_scale": scales}, product
        values = rng.integers(0, 2 * half, (rows, columns))
        zeros = np.full((rows, groups), half) if self.symmetric else rng.integers(1, 2 * half, (rows, groups))
        expected = dequantized(values, zeros, scales, group_of)
        return getattr(self, "_" + self.method.replace("-", "_"))(values, zeros, scales, group_of), expected

    def _gptq(self, values, zeros, scales, group_of):
        stored = zeros - (1 if self.more.get("version", "gptq") == "gptq" else 0)
        return {
            "qweight": words(values, self.bits).T.copy(),
            "qzeros": words(stored.T % 2**self.bits, self.bits),
            "scales": scales.T.copy(),
            "g_idx": group_of,
        }

    def _awq(self, values, zeros, scales, group_of):
        return {"qweight": awq_words(values.T), "qzeros": awq_words(zeros.T), "scales": scales.T.copy()}

    def _pack_quantized(self, values, zeros, scales, group_of):
        found = {"weight_packed": words(values, self.bits), "weight_scale": scales}
        found["weight_shape"] = np.array(values.shape, np.int64)
        if not self.symmetric:
            found["weight_zero_point"] = words(zeros.T, self.bits).T.copy()
        return found | ({"weight_g_idx": group_of} if self.act_order else {})

    def _int_quantized(self, values, zeros, scales, group_of):
        half = 2 ** (self.bits - 1)
        found = {"weight": (values - half).astype(np.int8), "weight_scale": scales}
        return found if self.symmetric else found | {"weight_zero_point": (zeros - half).astype(np.int8)}
