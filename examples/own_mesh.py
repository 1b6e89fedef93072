"""Load a model onto your own mesh with your own rule set, and look at where its weights are.

python examples/own_mesh.py [MODEL]
"""

import sys

import jax
import numpy as np
from jax.sharding import AxisType

from qwen_dist import DEMO_MODEL, RuleSet, load_model

# The mesh axes of each logical axis; one without a rule is not sharded.
RULES = RuleSet(
    phase="inference",
    parameters={"mlp": ("model",), "vocab": ("model",)},
    activations={"batch": ("rows",), "mlp": ("model",), "vocab": ("model",)},
)


def main(model: str = DEMO_MODEL) -> None:
    mesh = jax.make_mesh((2, 2), ("rows", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    lm = load_model(model, mesh=mesh, rules=RULES, dtype="float32")
    for name in ("embed_tokens.weight", "layers.0.mlp.down_proj.weight", "layers.0.self_attn.q_proj.weight"):
        weight = lm.parameters[name]
        print(f"{name} {weight.shape}: {weight.sharding.spec}, {weight.addressable_shards[0].data.shape} on each device")
    tokens = np.arange(20, 36).reshape(2, 8)
    on_mesh = lm(tokens)
    on_one_device = load_model(model, mesh="data=1", dtype="float32")(tokens)
    print(f"logits {on_mesh.shape} differ from one device's by {abs(np.asarray(on_mesh) - on_one_device).max():.1e}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)  # on a machine without accelerators
    main(*sys.argv[1:])
