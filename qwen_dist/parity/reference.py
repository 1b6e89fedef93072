"""The reference: the `transformers` model itself, read through forward hooks. The only module that imports torch.

Names and layouts are this project's: `layers.0.self_attn.q_rope` [B, T, N, H], parameters without the checkpoint's prefix.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from qwen_dist.models.delta_net import state_ends
from qwen_dist.parity.inputs import Inputs

# Modules of a layer whose output is compared under the module's own name.
_HOOKED = (
    "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.q_norm self_attn.k_norm self_attn.o_proj "
    "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj mlp.shared_expert.gate_proj "
    "mlp.shared_expert.up_proj mlp.shared_expert.down_proj mlp.shared_expert_gate"
).split()
_PER_HEAD = ("q_proj", "k_proj", "v_proj")
# Of a gated delta net: modules whose output has the channels of each key head together.
_PER_KEY_HEAD = ("in_proj_qkvz", "in_proj_ba", "in_proj_z", "in_proj_b", "in_proj_a")
IGNORED_LABEL = -100


class UpcastToFloat64(TorchFunctionMode):
    """Turn every cast to float32 and every float32 constant in the block into float64.

    `transformers` casts norms, softmax, rope and the loss to float32 for every dtype of the model, so a "float64" run is
    exact to 1e-7 only. In this mode the same code computes entirely in float64.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        upcast_kwargs = {key: _upcast(value) for key, value in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*map(_upcast, args), **upcast_kwargs)

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)


def _upcast(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Reference:
    """A checkpoint in `transformers`, on the CPU, in one dtype.

    Args:
      checkpoint: its directory.
      dtype: "float64" (with `UpcastToFloat64`), "float32" or "bfloat16".
      attention: "eager", which returns attention weights and runs the experts one by one, or "sdpa", the default of
        transformers, which runs all experts in one call.
    """

    def __init__(self, checkpoint: str | pathlib.Path, dtype: str, attention: str = "eager"):
        self.is_upcast = dtype == "float64"
        with _without_progress_bars():
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint,
                dtype=getattr(torch, dtype),
                attn_implementation=_register_observed_attention(attention),
                experts_implementation="eager" if attention == "eager" else None,  # None is the default
                local_files_only=True,
            ).eval()
        if self.is_upcast:
            self._rebuild_rotary_tables()
        self._prefix = next(name for name, _ in self.model.named_modules() if name.endswith("embed_tokens"))
        self._prefix = self._prefix.removesuffix("embed_tokens")
        self._register_hooks()

    def _rebuild_rotary_tables(self) -> None:
        """Compute the inverse frequencies again in float64: the model computes them in float32 when it is built."""
        tables = [(name, module) for name, module in self.model.named_modules() if hasattr(module, "inv_freq")]
        assert tables, "no rotary embedding was found to upcast"
        for name, module in tables:
            with UpcastToFloat64():
                self.model.set_submodule(name, type(module)(config=module.config))

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        return UpcastToFloat64() if self.is_upcast else contextlib.nullcontext()

    def parameters(self) -> dict[str, np.ndarray]:
        """Return every parameter as loaded, in the checkpoint's shape. The arrays share the model's memory."""
        return {self._name(name): to_numpy(value) for name, value in self.model.named_parameters()}

    def _name(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def _register_hooks(self) -> None:
        """Add hooks to every module whose output is compared. They do nothing outside of a recording."""
        decoder = self.model.get_submodule(self._prefix.removesuffix("."))
        _hook_output(decoder.embed_tokens, "embed_tokens")
        for index, layer in enumerate(decoder.layers):
            modules = dict(layer.named_modules())
            for name in filter(modules.__contains__, _HOOKED):
                shape = _head_shape(layer.self_attn, name) if name.endswith(_PER_HEAD) else None
                _hook_output(modules[name], f"layers.{index}.{name}", shape)
            if "linear_attn" in modules:
                _hook_delta_net(layer.linear_attn, f"layers.{index}.linear_attn.")
            elif layer.self_attn.q_proj.out_features == 2 * layer.self_attn.o_proj.in_features:
                heads = (-1, layer.self_attn.head_dim)
                _hook_input(layer.self_attn.o_proj, f"layers.{index}.self_attn.gated", heads)
            if "mlp.experts" in modules:
                _hook_router(modules["mlp.gate"], f"layers.{index}.mlp.")
                _hook_experts(modules["mlp.experts"], f"layers.{index}.mlp.")
            _hook_input(layer.post_attention_layernorm, f"layers.{index}.residual")
            _hook_output(layer, f"layers.{index}.output")
        _hook_output(decoder.norm, "norm")

    def forward(self, inputs: Inputs, columns: np.ndarray) -> dict[str, np.ndarray]:
        """Return every intermediate at these columns of [B, T], and the logits, in the order of computation."""
        recording = Recording(torch.from_numpy(columns), len(inputs.tokens))
        token = _recording.set(recording)
        try:
            with torch.no_grad(), self._computing():
                output = self.model(**_arguments(inputs), use_cache=False, logits_to_keep=recording.columns)
        finally:
            _recording.reset(token)
        return {name: to_numpy(value) for name, value in (recording.values | {"logits": output.logits}).items()}

    def decode(
        self, inputs: Inputs, num_steps: int, forced_tokens: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decode with the cache, greedily or with the tokens `forced_tokens` [B, steps].

        Returns:
          The tokens, int32 [B, steps], and the logits before each, [B, steps, V].
        """
        tokens, logits = [], []
        with torch.no_grad(), self._computing():
            arguments = _arguments(inputs)
            for step in range(num_steps):
                output = self.model(**arguments, use_cache=True, logits_to_keep=1)
                logits.append(output.logits[:, -1])
                tokens.append(
                    logits[-1].argmax(-1) if forced_tokens is None else torch.from_numpy(forced_tokens[:, step]).long()
                )
                arguments = {
                    "input_ids": tokens[-1][:, None],
                    "attention_mask": torch.nn.functional.pad(arguments["attention_mask"], (0, 1), value=1),
                    "position_ids": arguments["position_ids"][:, -1:] + 1,
                    "past_key_values": output.past_key_values,
                }
        return np.stack([to_numpy(t) for t in tokens], 1).astype(np.int32), np.stack([to_numpy(x) for x in logits], 1)

    def gradient(self, inputs: Inputs) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the losses by name, and the gradient of "loss" by parameter.

        "loss" is the mean next-token cross-entropy; for a mixture of experts it includes the weighted "aux_loss".
        """
        arguments = _arguments(inputs)
        # A row's first token is preceded by padding only, so it is no target.
        labels = torch.where(torch.from_numpy(inputs.positions) > 0, arguments["input_ids"], IGNORED_LABEL)
        with self._computing():
            has_experts = any(name.endswith("mlp.experts") for name, _ in self.model.named_modules())
            options = {"output_router_logits": True} if has_experts else {}
            output = self.model(**arguments, labels=labels, use_cache=False, **options)
            output.loss.backward()
        gradients = {self._name(name): to_numpy(value.grad) for name, value in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return {name: output[name].item() for name in ("loss", "aux_loss") if name in output}, gradients


@dataclasses.dataclass
class Recording:
    """Intermediates by name, at these columns of the length dimension, for `num_rows` rows."""

    columns: torch.Tensor
    num_rows: int
    values: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


def _record(name: str, value: torch.Tensor, length_dim: int = 1) -> None:
    recording = _recording.get()
    if recording is not None:
        recording.values[name] = value.detach().index_select(length_dim, recording.columns)


def _record_whole(name: str, value: torch.Tensor) -> None:
    """Record a value that is not of tokens."""
    recording = _recording.get()
    if recording is not None:
        recording.values[name] = value.detach()


def _record_flat(name: str, value: torch.Tensor) -> None:
    """Record a value that has the tokens of all rows in one dimension."""
    recording = _recording.get()
    if recording is not None:
        _record(name, value.unflatten(0, (recording.num_rows, -1)))


def _head_shape(attention: Any, name: str) -> tuple[int, ...]:
    """Return the shape of a projection's channels: heads, with a gate after each head's query if there is one."""
    is_gated = attention.q_proj.out_features == 2 * attention.o_proj.in_features
    return (-1, 2, attention.head_dim) if is_gated and name.endswith("q_proj") else (-1, attention.head_dim)


def _hook_delta_net(module: Any, start: str) -> None:
    """Record the intermediates of a gated delta net, with the channels of each key head together, as here."""
    num_heads, values = module.num_k_heads, module.num_v_heads // module.num_k_heads
    sections = (module.head_k_dim, module.head_k_dim, values * module.head_v_dim)

    def by_key_head(x: torch.Tensor) -> torch.Tensor:
        parts = x.split([num_heads * rows for rows in sections], dim=-1)
        return torch.cat([part.unflatten(-1, (num_heads, -1)) for part in parts], dim=-1)

    for name in _PER_KEY_HEAD:
        if hasattr(module, name):
            _hook_output(getattr(module, name), start + name, (num_heads, -1))
    if hasattr(module, "in_proj_qkv"):
        module.in_proj_qkv.register_forward_hook(lambda _module, _inputs, x: _record(start + "in_proj_qkv", by_key_head(x)))
    heads = (num_heads, values, module.head_v_dim)

    def record_norm(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        recording = _recording.get()
        if recording is not None:
            _record(start + "norm", output.reshape(recording.num_rows, -1, *heads))

    module.norm.register_forward_hook(record_norm)
    _hook_output(module.out_proj, start + "out_proj")
    _observe_functions(sys.modules[type(module).__module__])

    def record_convolution(x: torch.Tensor) -> None:
        _record(start + "conv", by_key_head(x.transpose(1, 2)))

    def record_rule(g: torch.Tensor, beta: torch.Tensor, core: torch.Tensor, states: Mapping[int, torch.Tensor]) -> None:
        _record(start + "g", g.unflatten(-1, (num_heads, -1)))
        _record(start + "beta", beta.unflatten(-1, (num_heads, -1)))
        _record(start + "core", core.unflatten(2, (num_heads, -1)))
        for end, state in states.items():
            _record_whole(f"{start}state_{end}", state.unflatten(1, (num_heads, -1)))

    recorders = _DeltaNetRecorders(record_convolution, record_rule)
    module.register_forward_pre_hook(lambda _module, _inputs: _running_delta_net.set(recorders) and None)
    # The functions also serve models that are not observed.
    module.register_forward_hook(lambda _module, _inputs, _output: _running_delta_net.set(None) and None)


@dataclasses.dataclass(frozen=True)
class _DeltaNetRecorders:
    """What records the results of the functions that a gated delta net calls."""

    convolution: Callable[[torch.Tensor], None]
    rule: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[int, torch.Tensor]], None]


_running_delta_net: contextvars.ContextVar[_DeltaNetRecorders | None] = contextvars.ContextVar("delta_net", default=None)


def _observe_functions(modeling: Any) -> None:
    """Have a modeling file's convolution and delta rule, which are functions, report their results to the running layer."""
    if getattr(modeling, "is_observed_by_qwen_dist", False):
        return
    convolution, rule = modeling.causal_conv1d_fn, modeling.torch_chunk_gated_delta_rule

    def observed_convolution(*args: Any, **kwargs: Any) -> Any:
        output, recorders = convolution(*args, **kwargs), _running_delta_net.get()
        if recorders is not None and _recording.get() is not None:
            recorders.convolution(output)
        return output

    def observed_rule(*args: Any, g: torch.Tensor, beta: torch.Tensor, **kwargs: Any) -> Any:
        output, recorders = rule(*args, g=g, beta=beta, **kwargs), _running_delta_net.get()
        if recorders is not None and _recording.get() is not None:
            states, with_state = {}, kwargs | {"output_final_state": True}
            for end in state_ends(g.shape[1]):
                first = [x[:, :end] for x in (*args, g, beta)]
                states[end] = rule(*first[:-2], g=first[-2], beta=first[-1], **with_state)[1]
            recorders.rule(g, beta, output[0], states)
        return output

    modeling.causal_conv1d_fn, modeling.torch_chunk_gated_delta_rule = observed_convolution, observed_rule
    modeling.is_observed_by_qwen_dist = True


def _hook_output(module: torch.nn.Module, name: str, shape: tuple[int, ...] | None = None) -> None:
    """Record a module's output, its channels in this shape."""

    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output = output if shape is None else output.unflatten(-1, shape)
        (_record_flat if output.ndim == 2 else _record)(name, output)

    module.register_forward_hook(hook)


def _hook_router(module: torch.nn.Module, start: str) -> None:
    def hook(_module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        for name, value in zip(("gate", "scores", "chosen"), output, strict=True):
            _record_flat(start + name, value)

    module.register_forward_hook(hook)


def _hook_experts(module: torch.nn.Module, start: str) -> None:
    """Record the weighted sum of the experts, and the unweighted output of each token's first, second, … expert."""

    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if _recording.get() is None:
            return
        tokens, chosen, scores = inputs
        ones = torch.ones_like(scores[:, :1])
        each = [module.forward(tokens, expert, ones) for expert in chosen.split(1, dim=1)]
        _record_flat(start + "expert_outputs", torch.stack(each, dim=1))
        _record_flat(start + "experts", output)

    module.register_forward_hook(hook)


def _hook_input(module: torch.nn.Module, name: str, shape: tuple[int, ...] | None = None) -> None:
    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        _record(name, inputs[0] if shape is None else inputs[0].unflatten(-1, shape))

    module.register_forward_pre_hook(hook)


def _register_observed_attention(attention: str) -> str:
    """Register a recording wrapper of the attention function `attention`.

    Returns:
      The name of the wrapper.
    """

    def observed(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        eager = sys.modules[type(module).__module__].eager_attention_forward  # each modeling file has its own
        function: Callable[..., Any] = eager if attention == "eager" else ALL_ATTENTION_FUNCTIONS[attention]
        mixed, weights = function(module, query, key, value, *args, **options)
        start = f"layers.{module.layer_idx}.self_attn."
        _record(start + "q_rope", query.transpose(1, 2))
        _record(start + "k_rope", key.transpose(1, 2))
        if weights is not None:
            _record(start + "weights", weights, length_dim=2)
        _record(start + "mixed", mixed)
        return mixed, weights

    name = f"observed_{attention}"
    ALL_ATTENTION_FUNCTIONS.register(name, observed)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[attention])
    return name


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _arguments(inputs: Inputs) -> dict[str, Any]:
    return {
        "input_ids": torch.from_numpy(inputs.tokens).long(),
        "attention_mask": torch.from_numpy(inputs.is_real).long(),
        "position_ids": torch.from_numpy(np.maximum(inputs.positions, 0)).long(),
    }


def to_numpy(value: torch.Tensor) -> np.ndarray:
    """Return a NumPy view of the tensor's memory; bfloat16 is supported."""
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def versions() -> dict[str, str]:
    """Return the versions of the packages that the comparison uses."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
