"""The libraries that write packed weights unpack them to the same values, and load what `qwen-dist quantize` writes.

These packages are in no extra: `pip install --no-deps compressed-tensors loguru autoawq` before these tests run.
"""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
from packed_files import Packer, mostly_slow
from test_formats import context, logits

from qwen_dist.checkpoint.compressed import quantize_checkpoint
from qwen_dist.checkpoint.model import load_model
from qwen_dist.quantization.options import QuantizeOptions

ROWS, COLUMNS = 48, 64


@pytest.mark.parity
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_compressed_tensors_unpacks_the_same(packed_checkpoint, bits, symmetric, group, dtype):
    """Their own compressor packs it, and their own decompressor says what it is."""
    pytest.importorskip("compressed_tensors")
    import torch
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, symmetric=symmetric, **strategy)
    )
    generator = torch.Generator().manual_seed(0)

    class FromThem(Packer):
        def tensors(self, rng, rows, columns):
            groups, half = columns // (group or columns), 2 ** (bits - 1)
            scale = (torch.rand((rows, groups), generator=generator) * 0.02 + 0.001).to(getattr(torch, dtype))
            state = {
                "weight": (torch.randn((rows, columns), generator=generator) * 0.1).to(scale.dtype),
                "weight_scale": scale,
            }
            if not symmetric:
                zero = torch.randint(-half, half, (rows, groups), generator=generator)
                state["weight_zero_point"] = zero.to(torch.int8)
            packed = PackedQuantizationCompressor.compress(state, scheme)
            value = PackedQuantizationCompressor.decompress(dict(packed), scheme)["weight"]
            assert value.dtype == scale.dtype
            arrays = {name: _numpy(tensor) for name, tensor in packed.items()}
            return arrays, value.float().numpy()

    packer = FromThem("pack-quantized", bits, group, symmetric=symmetric)
    directory, plain = packed_checkpoint("qwen3", packer)
    expected = load_model(plain, context(), dtype="float32").parameters
    found = load_model(directory, context(), dtype="float32", quantize="none").parameters
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name)


def _numpy(tensor):
    import ml_dtypes
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _file_of(package, path):
    """Return one file of an installed package as a module; the package itself may need others to be imported."""
    if (found := importlib.util.find_spec(package)) is None:
        pytest.skip(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location("reference", pathlib.Path(found.origin).parent / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parity
def test_autoawq_unpacks_the_same():
    import torch

    dequantize_gemm = _file_of("awq", "utils/packing_utils.py").dequantize_gemm
    packer = Packer("awq", 4, 32, symmetric=False)
    leaves, expected = packer.tensors(np.random.default_rng(0), ROWS, COLUMNS)
    given = (torch.from_numpy(leaves[name]) for name in ("qweight", "qzeros", "scales"))
    theirs = dequantize_gemm(*given, 4, 32)
    np.testing.assert_array_equal(theirs.float().numpy().T, expected)


FORMS = {"int4": ("int4", 32), "int8": ("int8", 32), "int8 row": ("int8", 0), "fp8": ("float8_e4m3fn", 0)}


FAMILIES = [(family, form) for family in ("qwen3", "qwen3_moe", "qwen3_5") for form in FORMS]
DEFAULT = [("qwen3", "int4"), ("qwen3_moe", "int8"), ("qwen3_5", "fp8")]


@pytest.mark.parametrize(("family", "form"), mostly_slow(FAMILIES, DEFAULT))
def test_what_is_written_is_read_again(small, family, form, tmp_path):
    """Values, scales and everything else are equal; on the way in on two devices."""
    options, output = QuantizeOptions(*FORMS[form]), tmp_path / "quantised"
    quantize_checkpoint(small(family), context("fsdp=2"), str(output), options, dtype="float32")
    expected = load_model(small(family), context(), dtype="float32", quantize=options).parameters
    found = load_model(output, context(), dtype="float32", quantize="stored").parameters
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(value), err_msg=name, strict=True)
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "lm_head" in config["ignore"]


@pytest.mark.parity
@pytest.mark.parametrize("form", FORMS)
def test_transformers_loads_what_is_written(small, form, tmp_path):
    """With equal logits."""
    pytest.importorskip("compressed_tensors")
    import torch
    import transformers

    options, output = QuantizeOptions(*FORMS[form]), tmp_path / "quantised"
    quantize_checkpoint(small("qwen3"), context(), str(output), options, dtype="float32")
    loaded = load_model(output, context(), dtype="float32", quantize="stored")
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    model = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits(loaded), theirs, rtol=1e-5, atol=1e-5)
