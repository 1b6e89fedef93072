"""Communication between devices, counted in the text of compiled programs."""

import pytest
from shapes import SMALL, SMALL_HYBRID, qwen3

from qwen_dist.config import LoraOptions
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig
from qwen_dist.planning.chips import Topology
from qwen_dist.planning.compile import count_collectives, lower, parse_collectives, topology_mesh
from qwen_dist.planning.workload import Workload
from qwen_dist.sharding import ShardingContext

ONE_LAYER = SMALL | {"num_hidden_layers": 1}
TEXT = """
  %all-reduce.5 = (f32[4]{0}, bf16[8,16]{1,0:T(8,128)(2,1)}) all-reduce(%a, %b), replica_groups={{0,1,2,3},{4,5,6,7}}
  %ag = (bf16[4,2]{1,0}, bf16[4,16]{1,0}) all-gather-start(%x), replica_groups=[2,8]<=[16], dimensions={1}
  %agd = bf16[4,16]{1,0} all-gather-done(%ag)
  %rs = f32[10]{0} reduce-scatter(%y), replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_2'}, to_apply=%add
  %q = f8e4m3fn[32]{0} all-gather(%c), replica_groups=mesh['a'=8] {'a':(1)2}, dimensions={0}
  %a2a = (f32[1,512]{1,0}, /*index=1*/f32[1,512]{1,0}) all-to-all(%c, %d), channel_id=1, replica_groups={{0,1}}
  %next = f32[512]{0} all-to-all(%e), channel_id=1, replica_groups={{0,1}}
  ROOT %cp = (f32[16,8]{0}, f32[16,8]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), pairs
  %ag1 = bf16[4,16]{1,0} all-gather(%a), channel_id=7, replica_groups={{0,1}}, dimensions={1}, attributes={chain_id="0"}
  %ag2 = bf16[4,16]{1,0} all-gather(%b), channel_id=7, replica_groups={{0,1}}, dimensions={1}, attributes={chain_id="0"}
  %ag3 = bf16[64]{0} all-gather(%e), replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={0}
  %name = f32[2]{0} fusion(%all-reduce.5), calls=%all-gather.clone
}

%all-reduce-scatter.2 (input.1: f32[4096,1024]) -> f32[4096,128] {
  %all-reduce.41 = f32[4096,1024]{1,0:T(8,128)} all-reduce(%input.1), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""


def test_collectives_in_the_text_of_a_compiled_program():
    found = {one.kind: (one.count, one.bytes) for one in count_collectives(TEXT)}
    assert found == {
        "all-gather": (4, 64 * 2 * 7 / 8 + 32 / 2 + 64 * 2 / 2 + 64 * 2 * 3 / 4),
        "all-reduce": (1, (4 * 4 + 128 * 2) * 2 * 3 / 4),
        "reduce-scatter": (2, 40 * 3 + 4096 * 1024 * 4 * 7 / 8),
        "all-to-all": (2, 1024 * 4 / 2 + 512 * 4 / 2),
        "collective-permute": (1, 128 * 4),
    }


def text(topology: str, mesh: str, hf, command: str, phase: str, lora: LoraOptions | None = None) -> str:
    workload = Workload(command, 8, 256, lora=lora)
    sharding_ctx = ShardingContext(topology_mesh(Topology.parse(topology), MeshConfig.parse(mesh)), workload.rules)
    return lower(parse_model_config(hf), sharding_ctx, workload, phase).compile().as_text()


def check_tensor_parallel(topology: str, mesh: str, hf, phase: str) -> None:
    """Each layer all-reduces its tokens twice, after the mixer and after the MLP. No all-gather is as large as a weight.

    The layers that are added are one more period of a hybrid's pattern.
    """
    depths = (2, 4) if "full_attention_interval" in hf else (1, 3)
    shallow, deep = (text(topology, mesh, hf | {"num_hidden_layers": depth}, "batch", phase) for depth in depths)
    tokens = hf["hidden_size"] * 8
    sums = [
        sum(elements >= tokens for op in parse_collectives(it) if op.kind == "all-reduce" for elements, _ in op.arrays)
        for it in (shallow, deep)
    ]
    assert sums[1] - sums[0] == 2 * 2
    smallest = hf["hidden_size"] * hf["num_key_value_heads"] * hf["head_dim"]
    gathered = [result for result in parse_collectives(deep) if result.kind == "all-gather"]
    assert all(elements < smallest for result in gathered for elements, _ in result.arrays), gathered


@pytest.mark.parametrize(
    ("mesh", "hf", "phase"),
    [
        ("tensor=8", SMALL, "decode"),
        pytest.param("data=2,tensor=4", SMALL, "prefill", marks=pytest.mark.slow),
        ("tensor=4", SMALL_HYBRID, "decode"),
        pytest.param("tensor=4", SMALL_HYBRID, "prefill", marks=pytest.mark.slow),
    ],
)
def test_tensor_parallel_layers_sum_twice_and_gather_no_weight(mesh, hf, phase):
    check_tensor_parallel("cpu:8", mesh, hf, phase)


def test_inference_over_fsdp_gathers_no_weights():
    smallest = SMALL["hidden_size"] * SMALL["num_key_value_heads"] * SMALL["head_dim"]
    for result in parse_collectives(text("cpu:8", "fsdp=8", ONE_LAYER, "batch", "decode")):
        if result.kind == "all-gather":
            assert all(elements < smallest for elements, _ in result.arrays), result


def test_training_over_fsdp_gathers_weights_and_nothing_larger():
    """Activations and the gradient of the logits, [batch, length, vocab], are not gathered."""
    largest = SMALL["vocab_size"] * SMALL["hidden_size"]
    compiled = text("cpu:8", "fsdp=8", ONE_LAYER, "finetune", "train")
    found = list(parse_collectives(compiled))
    gathered = [elements for result in found if result.kind == "all-gather" for elements, _ in result.arrays]
    assert max(gathered) == largest
    assert 8 * 256 * SMALL["vocab_size"] > largest
    # The head's gradient is summed over the devices once, not in each iteration of the loss's loop.
    in_loop = "\n".join(line for line in compiled.splitlines() if "/jvp()/while/body/" in line)
    assert in_loop
    assert all(elements < largest // 8 for result in parse_collectives(in_loop) for elements, _ in result.arrays)


@pytest.mark.parametrize("lora", [LoraOptions(), pytest.param(None, marks=pytest.mark.slow)])
def test_what_the_forward_pass_gathers_is_not_kept_for_the_backward_pass(lora):
    """Shardy gave the recomputation the gathered weight, cut into shards again, instead of the shard."""
    compiled = text("cpu:8", "fsdp=8", SMALL | {"num_hidden_layers": 2}, "finetune", "train", lora)
    assert "all-gather" in compiled
    operations = [line.partition(", metadata=") for line in compiled.splitlines() if "/remat2" in line]
    assert operations
    assert not [operation for operation, *_ in operations if "dynamic-slice" in operation]


def test_adapters_of_experts_over_fsdp_gather_weights_for_each_pass():
    """What is gathered for the forward pass is not kept for the backward pass: it would be as large as the model."""
    hf = qwen3(2, 256, 8, 512, model_type="qwen3_moe", vocab_size=512, head_dim=32)
    hf |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384, "norm_topk_prob": True}
    found = parse_collectives(text("cpu:8", "fsdp=2,expert=4", hf, "finetune", "train", LoraOptions()))
    gathered = [elements for one in found if one.kind == "all-gather" for elements, _ in one.arrays]
    gate_up, down = 2 * (2 * 384 * 256), 2 * (384 * 256)
    assert [gathered.count(size) for size in (gate_up, down)] == 2 * [2 * hf["num_hidden_layers"]]


@pytest.mark.slow
def test_training_over_fsdp_on_tpus_scatters_gradients():
    """No device holds a whole gradient: every matrix gradient is reduce-scattered, and only vectors are all-reduced.

    The longest vector is the gradient of the norm of queries, which the compiler may add up over heads afterwards.

    The weights of a block are gathered in the forward pass and again in the backward pass. Of the embedding, only the rows
    that tokens look up are exchanged, and the gradients of these rows.
    """
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    found = list(parse_collectives(text("v5e:2x4", "fsdp=8", ONE_LAYER, "finetune", "train")))

    def sizes(kind: str) -> list[int]:
        return sorted(elements for one in found if one.kind == kind for elements, _ in one.arrays)

    heads, embed = SMALL["num_attention_heads"] * SMALL["head_dim"], SMALL["hidden_size"]
    block = sorted(rows * embed for rows in 2 * [heads // 2, heads] + 3 * [SMALL["intermediate_size"]])
    head = SMALL["vocab_size"] * embed
    assert max(sizes("all-reduce")) <= heads
    assert sizes("reduce-scatter") == [*(size // 8 for size in block), head // 8]
    assert [size for size in sizes("all-gather") if size >= block[0]] == [*sorted(2 * block), head]
    assert sizes("all-to-all") == 2 * [8 * 256 * embed // 8]


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tensor_parallel_on_tpus(topology, phase):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    hf = qwen3(1, 2048, 16, 6144, vocab_size=8192)
    check_tensor_parallel(topology, "tensor=8", hf, phase)


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_hybrid_on_more_tpus_than_key_value_heads(phase):
    """Each key/value head is on two devices: the cache is not gathered either."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install 'jax[tpu]'")
    check_tensor_parallel("v5e:2x4", "tensor=8", SMALL_HYBRID, phase)
