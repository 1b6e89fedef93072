"""The compiled steps of a model with recurrent states write into the states' memory, and never copy it."""

import jax
import pytest
from native_kernels import needs_kernels

from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.runner import Runner
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.ops import native, native_library
from qwen_dist.sharding import INFERENCE, ShardingContext

SLOTS, PAGES = 1024, 8


@pytest.fixture(scope="module")
def runner(tiny_checkpoint):
    path = tiny_checkpoint("qwen3_5", linear_key_head_dim=32, linear_value_head_dim=32)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return Runner(load_model(path, ShardingContext(mesh, INFERENCE), dtype="float32"), num_slots=SLOTS)


@pytest.mark.parametrize("phase", ["decode", "prefill", "mixed"])
@pytest.mark.parametrize("form", [pytest.param("kernel", marks=needs_kernels), "plain"])
def test_a_step_does_not_copy_the_states(phase, form, runner, monkeypatch):
    if form == "plain":
        monkeypatch.setattr(native_library, "is_available", lambda: False)
    runner = Runner(runner._model, num_slots=SLOTS)  # with no program compiled
    state, sampling = runner._abstract_state((PAGES,)), runner._abstract_sampling(2)
    prefill = runner._abstract_step(2, 32, 1, [PAGES], is_prefill=True)
    decode = runner._abstract_step(2, 1, 2, [PAGES], is_prefill=False)
    parameters = runner._model.parameters
    if phase == "decode":
        lowered = runner._decode.lower(parameters, state, decode, sampling, num_top=None)
    elif phase == "prefill":
        lowered = runner._prefill.lower(parameters, state, prefill, sampling, num_top=None)
    else:
        lowered = runner._mixed.lower(parameters, state, (prefill, decode), (sampling, sampling))
    assert (native.DELTA_RULE_IN_SLOTS in lowered.as_text()) == (form == "kernel")
    pool_bytes = max(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.states))
    assert pool_bytes > 16e6
    assert lowered.compile().memory_analysis().temp_size_in_bytes < pool_bytes / 4
