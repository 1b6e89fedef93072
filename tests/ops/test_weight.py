"""A weight that is not one array: declared, sharded, loaded, multiplied and saved like any other parameter."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_dist.checkpoint.load import load
from qwen_dist.checkpoint.save import save
from qwen_dist.checkpoint.source import open_checkpoint
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models import layers
from qwen_dist.models.parameters import abstract_parameters, declare_param, disk_shapes, with_parameters
from qwen_dist.ops.grouped_matmul import grouped_matmul
from qwen_dist.ops.matmul import matmul
from qwen_dist.ops.weight import QuantizedWeight, TensorSpec, WeightFormat, to_array
from qwen_dist.sharding import INFERENCE, ShardingContext, use_sharding


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ScaledWeight:
    """A toy: `values` of 16 bits, and a scale of 32 bits for each element of the first dimension."""

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def dtype(self) -> Any:
        return jnp.dtype("float32")

    def dequantize(self) -> jax.Array:
        return self.values.astype(jnp.float32) * self.scale.reshape(-1, *(1,) * (self.ndim - 1))

    def reshape(self, *shape: int) -> "ScaledWeight":
        return ScaledWeight(self.values.reshape(*shape), self.scale)


SCALED = WeightFormat(
    "scaled",
    lambda shape, dtype, axes: {
        "": TensorSpec(shape, "bfloat16", axes),
        "_scale": TensorSpec(shape[:1], "float32", axes[:1]),
    },
    lambda tensors: ScaledWeight(tensors[""], tensors["_scale"]),
)
OUT, IN = 24, 16


def weight() -> ScaledWeight:
    values, scale = jax.random.normal(jax.random.key(0), (OUT, IN)), jax.random.uniform(jax.random.key(1), (OUT,))
    return ScaledWeight(values.astype("bfloat16"), scale)


def test_products_take_it():
    x = jax.random.normal(jax.random.key(2), (5, IN))
    assert isinstance(weight(), QuantizedWeight)
    np.testing.assert_array_equal(matmul(x, weight()), matmul(x, to_array(weight())))
    experts, sizes = jax.tree.map(lambda leaf: leaf.reshape(3, 8, *leaf.shape[1:]), weight()), jnp.array([2, 0, 3])
    experts = ScaledWeight(experts.values, jnp.ones(3))
    found, expected = (grouped_matmul(x, w, sizes, "float32") for w in (experts, to_array(experts)))
    np.testing.assert_array_equal(found, expected)


@pytest.fixture
def linear(monkeypatch):
    monkeypatch.setattr(layers, "declare_param", functools.partial(declare_param, weight_format=SCALED))
    return layers.Linear({"mlp": OUT}, {"embed": IN}, bias=False, dtype="float32", std=0.02)


@pytest.mark.parametrize("mesh", ["data=1", "fsdp=2,tensor=4"])
def test_a_layer_declares_loads_and_saves_it(linear, mesh, tmp_path):
    config = MeshConfig.parse(mesh)
    sharding_ctx = ShardingContext(make_mesh(config, jax.devices()[: config.num_devices]), INFERENCE)
    target = abstract_parameters(linear, sharding_ctx)
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in target.items()} == {
        "weight": ((OUT, IN), "bfloat16"),
        "weight_scale": ((OUT,), "float32"),
    }
    assert tuple(target["weight_scale"].sharding.spec) == tuple(target["weight"].sharding.spec)[:1]
    original = {"weight": weight().values, "weight_scale": weight().scale}
    save(original, tmp_path / "saved", config={"model_type": "qwen3"}, disk_shapes=disk_shapes(linear))
    assert json.loads((tmp_path / "saved/config.json").read_text())["model_type"] == "qwen3"
    loaded = load(open_checkpoint(tmp_path / "saved"), target, disk_shapes=disk_shapes(linear), tied=False)
    for name, array in original.items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), np.asarray(array))
        assert loaded[name].sharding == target[name].sharding

    @jax.jit
    def run(parameters, x):
        with use_sharding(sharding_ctx):
            return with_parameters(linear, parameters)(x)

    x = jax.random.normal(jax.random.key(3), (4, IN))
    np.testing.assert_allclose(run(loaded, x), x @ to_array(weight()).T, rtol=1e-5, atol=1e-5)
