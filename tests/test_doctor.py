"""What `qwen-dist doctor` says is what a run would use; the settings of accelerators, and that the user's own ones stay."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from accelerators import H100

from qwen_dist.cli import doctor, main
from qwen_dist.ops import gpu
from qwen_dist.ops.dispatch import Backend
from qwen_dist.ops.table import dispatch_table
from qwen_dist.runtime import settings
from qwen_dist.runtime.settings import compiler_options, compiler_settings, expected_platform, set_environment


class Device:
    platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    @staticmethod
    def memory_stats():
        return {"bytes_limit": 72 * 10**9}


def test_a_cpu_has_the_kernels_of_the_dispatch_table(capsys, monkeypatch):
    monkeypatch.setattr(settings, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(settings, "has_tpu", lambda: False)
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    backends = {phase: Backend.of_platform("cpu", 8, phase) for phase in ("inference", "train")}
    assert report["platform"] == "cpu" and len(report["devices"]) == 8 and report["settings"] == []
    assert report["backends"] == {phase: backend.value for phase, backend in backends.items()}
    assert report["kernels"]["attention"] == {
        phase: list(dispatch_table()["attention"][backend]) for phase, backend in backends.items()
    }
    assert report["versions"]["jax"] == jax.__version__


def test_a_gpu_without_cudnn_is_missing_it(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "find_devices", lambda: [Device, Device])
    monkeypatch.setattr(doctor, "start_jax", lambda *_: None)
    monkeypatch.setattr(gpu, "gpu_features", lambda: H100)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    assert "devices: 2 × NVIDIA H100 80GB HBM3 (gpu), 72.0 GB for programs on each" in shown
    assert "cudnn → triton → plain" in shown and "nothing is missing" in shown
    assert re.search(r"XLA_PYTHON_CLIENT_MEM_FRACTION\s*│ 0.5 \s*│ you ", shown)
    assert "xla_gpu_enable_latency_hiding_scheduler (train)" in shown

    monkeypatch.setattr(gpu, "gpu_features", lambda: gpu.GPUFeatures(gpu.HOPPER, 0, has_triton=True))
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == ["there is no cuDNN; attention needs 90500 or newer: pip install -U 'qwen-dist[cuda]'"]
    assert report["kernels"]["attention"]["train"] == ["triton", "plain"]


def test_an_accelerator_that_jax_does_not_use_is_missing(capsys, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(settings, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(doctor, "start_jax", lambda *_: None)
    assert main(["doctor"]) == 1
    assert "an NVIDIA GPU is here and jax does not use it: pip install 'qwen-dist[cuda]'" in capsys.readouterr().out


def test_what_the_user_has_set_stays():
    chosen = settings.settings("gpu", "float32")
    for given in ({}, {"XLA_CLIENT_MEM_FRACTION": "0.3"}, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}):
        environ = dict(given)
        set_environment(environ, chosen)
        assert environ == (given or {"XLA_CLIENT_MEM_FRACTION": "0.9"})
    (precision,) = [one for one in chosen if one.name == "jax_default_matmul_precision"]
    assert settings.is_overridden(precision, {"JAX_DEFAULT_MATMUL_PRECISION": "default"})
    assert not settings.is_overridden(precision, {})


@pytest.mark.parametrize(
    ("environ", "has_gpu", "plugins", "platform"),
    [
        ({}, True, ("jax_cuda13_plugin",), "gpu"),
        ({}, True, (), "cpu"),
        ({}, False, ("jax_cuda13_plugin",), "cpu"),
        ({"JAX_PLATFORMS": "cpu"}, True, ("jax_cuda13_plugin",), "cpu"),
        ({"JAX_PLATFORMS": "cuda,cpu"}, False, (), "gpu"),
    ],
)
def test_the_platform_is_known_before_jax_starts(environ, has_gpu, plugins, platform, monkeypatch):
    monkeypatch.setattr(settings, "has_nvidia_gpu", lambda: has_gpu)
    monkeypatch.setattr(settings, "has_tpu", lambda: False)
    monkeypatch.setattr(settings, "cuda_plugins", lambda: plugins)
    assert expected_platform(environ) == platform


def test_every_setting_exists_in_this_jax():
    """A name that jax or the compiler does not know would stop every run."""
    for one in settings.settings("gpu", "float32"):
        assert one.kind == "environment" or one.name in jax.config.values
    options = compiler_options("gpu", 8, "train")
    assert options and compiler_options("cpu", 8, "train") is None
    assert jax.jit(lambda x: x + 1, compiler_options=options)(jnp.int32(1)) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        jax.jit(lambda x: x + 1, compiler_options={"xla_gpu_no_such_option": "true"})(jnp.int32(1))
    chosen = *settings.settings("gpu", "float32"), *compiler_settings("gpu", 8, "train")
    assert all(one.reason and one.source.startswith("https://") for one in chosen)
