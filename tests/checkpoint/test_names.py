"""Names: prefixes, experts, skipped tensors, and one message for everything that does not fit."""

import math

import pytest

from qwen_dist.checkpoint.names import PREFIXES, Layout, group_names, map_names, name_tensors, summarize_names
from qwen_dist.checkpoint.safetensors import DTYPES, TensorInfo
from qwen_dist.errors import CheckpointError

SHAPES = {
    "embed_tokens.weight": (10, 4),
    "layers.0.self_attn.q_proj.weight": (8, 4),
    "layers.1.self_attn.q_proj.weight": (8, 4),
    "norm.weight": (4,),
}


def stored(shapes):
    """Return tensor descriptions for {name: shape}, as if all were in one file."""
    return {
        name: TensorInfo(name, "f", DTYPES["BF16"], tuple(shape), 0, 2 * math.prod(shape)) for name, shape in shapes.items()
    }


def test_long_numbers_are_part_of_a_name():
    long = f"layers.{'9' * 5000}.weight"
    assert group_names([long, "layers.1.weight", "layers.2.weight"]) == {
        long: [long],
        "layers.{1-2}.weight": ["layers.1.weight", "layers.2.weight"],
    }


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(prefix):
    shapes = SHAPES | {"lm_head.weight": (10, 4)}
    tensors = {prefix[name == "lm_head.weight"] + name: shape for name, shape in shapes.items()}
    names = map_names(shapes, stored(tensors))
    assert [segment.tensor for segments in names.segments.values() for segment in segments] == list(tensors)


def test_everything_wrong_is_in_one_message():
    tensors = {"model." + name: shape for name, shape in SHAPES.items()}
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    tensors["model.embed_tokens.weight"] = (12, 4)
    tensors |= {f"model.layers.{i}.self_attn.q_proj.bias": (8,) for i in range(3)}
    with pytest.raises(CheckpointError) as error:
        map_names(SHAPES, stored(tensors))
    text = str(error.value)
    assert "missing: model.layers.1.self_attn.q_proj.weight\n" in text
    assert "unexpected: model.layers.{0-2}.self_attn.q_proj.bias (3 tensors)" in text
    assert "wrong shape: model.embed_tokens.weight: the model expects [10, 4], the checkpoint has [12, 4]" in text


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update({"model.norm.bias": (4,)}), "unexpected: model.norm.bias"),
        (lambda t: t.update({"model.layers.1.self_attn.q_proj.weight": (4, 8)}), r"expects \[8, 4\], .* has \[4, 8\]"),
        (lambda t: t.update({"model.layers.2.self_attn.q_proj.weight": (8, 4)}), "unexpected: model.layers.2"),
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"), "missing: model.layers.0"),
        (lambda t: t.update({"model.other.weight_scale_inv": (1, 1)}), "unexpected: model.other.weight_scale_inv"),
        (lambda t: t.update({"lm_head.weight": (10, 4)}), "unexpected: lm_head.weight"),
    ],
    ids=["missing", "unexpected", "transposed", "too many layers", "gap in the layers", "unused scale", "untied head"],
)  # fmt: skip
def test_each_misfit(change, message):
    tensors = {"model." + name: shape for name, shape in SHAPES.items()}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        map_names(SHAPES, stored(tensors))


def test_skipped_on_purpose():
    extra = [
        "model.visual.blocks.0.attn.weight",
        "visual.x",
        "mtp.layers.0.w",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ]
    tensors = {"model." + name: shape for name, shape in SHAPES.items()} | dict.fromkeys(extra, (1,))
    assert map_names(SHAPES, stored(tensors)).skipped == tuple(sorted(extra))


def test_stored_head_is_a_tied_head_only_if_tied():
    tensors = stored({"model." + name: shape for name, shape in SHAPES.items()} | {"lm_head.weight": (10, 4)})
    assert map_names(SHAPES, tensors, tied=True).tied_head == ("lm_head.weight", "model.embed_tokens.weight")
    untied = map_names(SHAPES | {"lm_head.weight": (10, 4)}, tensors)
    assert untied.tied_head is None and untied.segments["lm_head.weight"][0].tensor == "lm_head.weight"


EXPERTS = {"gate_proj": (3, 6, 4), "up_proj": (3, 6, 4), "down_proj": (3, 4, 6), "gate_up_proj": (3, 12, 4)}


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_one_by_one(kind, suffix):
    name = f"layers.0.mlp.experts.{kind}{suffix}"
    segments = name_tensors({name: EXPERTS[kind]}).segments[name]
    kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
    assert [segment.tensor for segment in segments] == [
        f"model.layers.0.mlp.experts.{expert}.{one}.weight" for expert in range(3) for one in kinds
    ]
    assert {segment.shape for segment in segments} == {(4, 6) if kind == "down_proj" else (6, 4)}


@pytest.mark.parametrize("kind", EXPERTS)
def test_fused_experts(kind):
    name = f"layers.0.mlp.experts.{kind}"
    layout = Layout(fused_experts=frozenset({"layers.0.mlp.experts."}))
    segments = name_tensors({name: EXPERTS[kind]}, layout=layout).segments[name]
    tensor = "down_proj" if kind == "down_proj" else "gate_up_proj"
    assert {segment.tensor for segment in segments} == {f"model.layers.0.mlp.experts.{tensor}"}
    expected = {"gate_up_proj": [(0, 48), (48, 48), (96, 48)], "down_proj": [(0, 24), (24, 24), (48, 24)],
                "gate_proj": [(0, 24), (48, 24), (96, 24)], "up_proj": [(24, 24), (72, 24), (120, 24)]}  # fmt: skip
    assert [(segment.start, segment.size) for segment in segments] == expected[kind]


def test_grouping():
    names = [f"layers.{i}.experts.{j}.w" for i in (0, 1, 3) for j in range(2)] + ["norm"]
    assert summarize_names(names) == ["layers.{0-1,3}.experts.{0-1}.w (6 tensors)", "norm"]
    assert len(group_names(names)["layers.{0-1,3}.experts.{0-1}.w"]) == 6


@pytest.mark.fault
@pytest.mark.parametrize(
    ("stored_experts", "message"),
    [
        ([0, 1], r"missing: model\.layers\.0\.mlp\.experts\.2\.up_proj\.weight"),
        ([0, 1, 2, 3], r"unexpected: model\.layers\.0\.mlp\.experts\.3\.up_proj\.weight"),
        ([0, 2], r"missing: model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight"),
    ],
    ids=["fewer", "more", "gap"],
)
def test_another_number_of_experts(stored_experts, message):
    tensors = {f"model.layers.0.mlp.experts.{expert}.up_proj.weight": (6, 4) for expert in stored_experts}
    with pytest.raises(CheckpointError, match=message):
        map_names({"layers.0.mlp.experts.up_proj": (3, 6, 4)}, stored(tensors))
