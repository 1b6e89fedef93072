"""What a user writes behind --mesh, and the jax mesh it becomes."""

import jax
import pytest

from qwen_dist.errors import UsageError
from qwen_dist.mesh import AXES, MeshConfig, make_mesh


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("", MeshConfig()),
        ("tensor=4", MeshConfig(tensor=4)),
        (" fsdp = 2 , tensor=4,", MeshConfig(fsdp=2, tensor=4)),
        ("data=2,fsdp=-1,tensor=2,expert=1,context=1", MeshConfig(data=2, fsdp=-1, tensor=2)),
    ],
)
def test_parse(text, config):
    assert MeshConfig.parse(text) == config


def test_every_problem_of_a_mesh_is_listed():
    with pytest.raises(UsageError) as error:
        MeshConfig.parse("model=2,tensor=x,fsdp=2,fsdp=4,expert=2,data=0,context=-1")
    assert str(error.value) == (
        "mesh 'model=2,tensor=x,fsdp=2,fsdp=4,expert=2,data=0,context=-1': "
        "'model' is not an axis; axes are data, fsdp, expert, context, tensor; "
        "'tensor=x': a size is a positive number, or -1 for all devices that are left; "
        "fsdp is given twice; "
        "expert can only be 1 for the models supported so far; "
        "'data=0': a size is a positive number, or -1 for all devices that are left; "
        "context can only be 1 for the models supported so far. Example: fsdp=2,tensor=4."
    )


@pytest.mark.parametrize(
    "text", ["tensor", "tensor=", "=2", "tensor==2", "tensor=--1", "tensor=-2", "tensor=1e1", "tensor=²"]
)
def test_malformed_parts(text):
    with pytest.raises(UsageError, match=r"is not an axis|a size is a positive number"):
        MeshConfig.parse(text)


def test_one_axis_takes_the_devices_that_are_left():
    assert MeshConfig.parse("tensor=-1").sizes(8)["tensor"] == 8
    assert MeshConfig.parse("data=2,tensor=-1").sizes(8) == {"data": 2, "fsdp": 1, "expert": 1, "context": 1, "tensor": 4}
    with pytest.raises(UsageError, match="only one axis can be -1"):
        MeshConfig.parse("data=-1,tensor=-1")
    with pytest.raises(UsageError, match=r"mesh fsdp=3,tensor=-1: 3 does not divide the 8 devices there are"):
        MeshConfig.parse("fsdp=3,tensor=-1").sizes(8)
    with pytest.raises(UsageError, match=r"16 does not divide the 8 devices"):
        MeshConfig.parse("fsdp=16,tensor=-1").sizes(8)


def test_more_devices_than_there_are():
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
