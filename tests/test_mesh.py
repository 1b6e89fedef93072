"""The text of --mesh, and the jax mesh that it makes."""

import jax
import pytest

from qwen_dist.errors import UsageError
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import AXES, MeshConfig, default_mesh, make_mesh


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("", MeshConfig()),
        ("tensor=4", MeshConfig(tensor=4)),
        ("context=2,tensor=4", MeshConfig(context=2, tensor=4)),
        (" fsdp = 2 , tensor=4,", MeshConfig(fsdp=2, tensor=4)),
        ("data=2,fsdp=-1,tensor=2,expert=2,context=1", MeshConfig(data=2, fsdp=-1, expert=2, tensor=2)),
    ],
)
def test_parse(text, config):
    assert MeshConfig.parse(text) == config


def test_every_problem_of_a_mesh_is_listed():
    with pytest.raises(UsageError) as error:
        MeshConfig.parse("model=2,tensor=x,fsdp=2,fsdp=4,expert=2,data=0")
    assert str(error.value) == (
        "mesh 'model=2,tensor=x,fsdp=2,fsdp=4,expert=2,data=0': "
        "'model' is not an axis; axes are data, fsdp, expert, context, tensor; "
        "'tensor=x': a size is a positive number, or -1 for all remaining devices; "
        "fsdp is given twice; "
        "'data=0': a size is a positive number, or -1 for all remaining devices. Example: fsdp=2,tensor=4."
    )


@pytest.mark.parametrize(
    "text", ["tensor", "tensor=", "=2", "tensor==2", "tensor=--1", "tensor=-2", "tensor=1e1", "tensor=²"]
)
def test_malformed_sizes(text):
    with pytest.raises(UsageError, match=r"is not an axis|a size is a positive number"):
        MeshConfig.parse(text)


def test_one_axis_takes_the_remaining_devices():
    assert MeshConfig.parse("tensor=-1").sizes(8)["tensor"] == 8
    assert MeshConfig.parse("data=2,tensor=-1").sizes(8) == {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 4}
    with pytest.raises(UsageError, match="only one axis can be -1"):
        MeshConfig.parse("data=-1,tensor=-1")
    with pytest.raises(UsageError, match=r"mesh fsdp=3,tensor=-1: 3 does not divide the 8 available devices"):
        MeshConfig.parse("fsdp=3,tensor=-1").sizes(8)
    with pytest.raises(UsageError, match=r"16 does not divide the 8 available devices"):
        MeshConfig.parse("fsdp=16,tensor=-1").sizes(8)


def test_more_devices_than_are_available():
    message = r"mesh fsdp=4,tensor=4 needs 16 devices and there are 8.* --num-cpu-devices 16"
    with pytest.raises(UsageError, match=message):
        make_mesh(MeshConfig(fsdp=4, tensor=4))


@pytest.mark.parametrize("text", ["", "tensor=2", "data=2,fsdp=2,tensor=2"])
def test_meshes_have_every_axis_and_the_first_devices(text):
    mesh = make_mesh(MeshConfig.parse(text))
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == MeshConfig.parse(text).sizes(8)
    assert set(mesh.devices.flat) == set(jax.devices()[: mesh.size])
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


# --- DCN factors and the default ---


@pytest.mark.parametrize(
    ("text", "config", "shown"),
    [
        ("fsdp=dcn2*ici8", MeshConfig(fsdp=16, dcn=(("fsdp", 2),)), "fsdp=dcn2*ici8"),
        ("fsdp=dcn2*8", MeshConfig(fsdp=16, dcn=(("fsdp", 2),)), "fsdp=dcn2*ici8"),
        ("tensor=ici4,data=dcn2", MeshConfig(data=2, tensor=4, dcn=(("data", 2),)), "data=dcn2*ici1,tensor=4"),
        (
            "data=dcn2,fsdp=dcn2*ici-1",
            MeshConfig(data=2, fsdp=-1, dcn=(("data", 2), ("fsdp", 2))),
            "data=dcn2*ici1,fsdp=dcn2*ici-1",
        ),
    ],
)
def test_sizes_on_both_networks(text, config, shown):
    assert MeshConfig.parse(text) == config
    assert str(config) == shown and MeshConfig.parse(shown) == config


@pytest.mark.parametrize(
    "text", ["fsdp=dcn", "fsdp=dcn0", "fsdp=dcn2*", "fsdp=dcn2ici2", "fsdp=ici2*dcn2", "fsdp=*2", "fsdp=dcn-1"]
)
def test_malformed_sizes_on_both_networks(text):
    with pytest.raises(UsageError, match="a size is a positive number"):
        MeshConfig.parse(text)


def test_dcn_sizes_that_do_not_fit():
    with pytest.raises(UsageError, match=r"fsdp would span 3 devices, which its dcn size does not divide"):
        MeshConfig.parse("fsdp=dcn2*ici-1,tensor=2").sizes(6)
    with pytest.raises(UsageError, match=r"the product of the dcn sizes is 2, but the devices are in 1 processes"):
        make_mesh(MeshConfig.parse("data=dcn2,fsdp=4"))


def model(heads, kv_heads, channels, vocab, hidden):
    hf = {"model_type": "qwen3", "hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes = {"intermediate_size": channels, "vocab_size": vocab, "head_dim": 8, "num_hidden_layers": 1}
    other = {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 1e4}
    return parse_model_config(hf | sizes | other | {"hidden_act": "silu", "attention_bias": False})


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((16, 8, 128, 512, 64), MeshConfig(tensor=8)),
        ((14, 2, 128, 512, 64), MeshConfig(fsdp=4, tensor=2)),
        ((12, 3, 128, 512, 64), MeshConfig(fsdp=8)),  # four shards would split a group of query heads
        ((7, 7, 128, 512, 36), MeshConfig(data=2, fsdp=4)),
    ],
)
def test_the_default_fits_the_model(sizes, expected):
    assert default_mesh(model(*sizes), jax.devices()) == expected
    assert default_mesh(model(*sizes), jax.devices()[:1]) == MeshConfig()


def test_the_default_cuts_no_group_of_quantised_weights():
    """Of the MLP's 128 channels in groups of 32, and the hidden size in two groups."""
    sizes = model(16, 8, 128, 512, 64)
    units = {"mlp": 4, "q_heads": 16, "embed": 2}
    assert default_mesh(sizes, jax.devices(), units) == MeshConfig(fsdp=2, tensor=4)
    assert default_mesh(sizes, jax.devices(), {"mlp": 3, "embed": 2}) == MeshConfig(data=4, fsdp=2)
