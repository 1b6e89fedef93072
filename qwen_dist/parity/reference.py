"""The reference side: the `transformers` model itself, observed through forward hooks. The only torch import here.

Names and layouts are this project's: `layers.0.self_attn.q_rope` [B, T, N, H], parameters without the checkpoint's prefix.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from qwen_dist.parity.inputs import Inputs

# Modules of a layer whose output is compared under the module's own name.
_HOOKED = (
    "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.q_norm self_attn.k_norm self_attn.o_proj "
    "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj mlp.shared_expert.gate_proj "
    "mlp.shared_expert.up_proj mlp.shared_expert.down_proj mlp.shared_expert_gate"
).split()
_PER_HEAD = ("q_proj", "k_proj", "v_proj")
IGNORED_LABEL = -100


class LiftedToFloat64(TorchFunctionMode):
    """Every cast to float32 and every float32 constant in the block is float64 instead.

    `transformers` casts norms, softmax, rope and the loss to float32 whatever the model's dtype is, so that a "float64"
    run is only good to 1e-7. Inside this mode the same lines of code compute in float64 throughout.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lifted = {key: _lift(value) for key, value in (kwargs or {}).items()}
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*map(_lift, args), **lifted)

    def __enter__(self) -> Any:
        self._default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._default)


def _lift(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class Reference:
    """A checkpoint in `transformers`, on the CPU, in one dtype.

    Args:
      checkpoint: its directory.
      dtype: "float64" (lifted, see above), "float32" or "bfloat16".
      attention: "eager", which has attention weights to show and runs one expert after the other, or "sdpa", the default of
        transformers, which multiplies by all experts in one call.
    """

    def __init__(self, checkpoint: str | pathlib.Path, dtype: str, attention: str = "eager"):
        self.is_lifted = dtype == "float64"
        with _without_progress_bars():
            self.model = transformers.AutoModelForCausalLM.from_pretrained(
                checkpoint,
                dtype=getattr(torch, dtype),
                attn_implementation=_observable(attention),
                experts_implementation="eager" if attention == "eager" else None,  # by default, where there are any
                local_files_only=True,
            ).eval()
        if self.is_lifted:
            self._rebuild_rotary_tables()
        self._prefix = next(name for name, _ in self.model.named_modules() if name.endswith("embed_tokens"))
        self._prefix = self._prefix.removesuffix("embed_tokens")
        self._observe_modules()

    def _rebuild_rotary_tables(self) -> None:
        """The inverse frequencies are computed once, in float32, when the model is built: build them again, lifted."""
        tables = [(name, module) for name, module in self.model.named_modules() if hasattr(module, "inv_freq")]
        assert tables, "no rotary embedding was found to lift"
        for name, module in tables:
            with LiftedToFloat64():
                self.model.set_submodule(name, type(module)(config=module.config))

    def _computing(self) -> contextlib.AbstractContextManager[Any]:
        return LiftedToFloat64() if self.is_lifted else contextlib.nullcontext()

    def parameters(self) -> dict[str, np.ndarray]:
        """Every parameter as loaded, in the checkpoint's shape; the arrays share the model's memory."""
        return {self._name(name): to_numpy(value) for name, value in self.model.named_parameters()}

    def _name(self, name: str) -> str:
        return name.removeprefix(self._prefix)

    def _observe_modules(self) -> None:
        """Hook every module whose output is compared; the hooks do nothing unless a recording is on."""
        decoder = self.model.get_submodule(self._prefix.removesuffix("."))
        _observe(decoder.embed_tokens, "embed_tokens")
        for index, layer in enumerate(decoder.layers):
            modules = dict(layer.named_modules())
            for name in filter(modules.__contains__, _HOOKED):
                head_dim = layer.self_attn.head_dim if name.endswith(_PER_HEAD) else None
                _observe(modules[name], f"layers.{index}.{name}", head_dim)
            if "mlp.experts" in modules:
                _observe_router(modules["mlp.gate"], f"layers.{index}.mlp.")
                _observe_experts(modules["mlp.experts"], f"layers.{index}.mlp.")
            _observe_input(layer.post_attention_layernorm, f"layers.{index}.residual")
            _observe(layer, f"layers.{index}.output")
        _observe(decoder.norm, "norm")

    def forward(self, inputs: Inputs, columns: np.ndarray) -> dict[str, np.ndarray]:
        """Every intermediate at these columns of [B, T], and the logits, in the order in which they are computed."""
        recording = Recording(torch.from_numpy(columns), len(inputs.tokens))
        token = _recording.set(recording)
        try:
            with torch.no_grad(), self._computing():
                output = self.model(**_arguments(inputs), use_cache=False, logits_to_keep=recording.columns)
        finally:
            _recording.reset(token)
        return {name: to_numpy(value) for name, value in (recording.values | {"logits": output.logits}).items()}

    def decode(self, inputs: Inputs, num_steps: int, chosen: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Decode with the cache, greedily or along the tokens `chosen` [B, steps].

        Returns the tokens taken, int32 [B, steps], and the logits before each, [B, steps, V].
        """
        tokens, logits = [], []
        with torch.no_grad(), self._computing():
            arguments = _arguments(inputs)
            for step in range(num_steps):
                output = self.model(**arguments, use_cache=True, logits_to_keep=1)
                logits.append(output.logits[:, -1])
                tokens.append(logits[-1].argmax(-1) if chosen is None else torch.from_numpy(chosen[:, step]).long())
                arguments = {
                    "input_ids": tokens[-1][:, None],
                    "attention_mask": torch.nn.functional.pad(arguments["attention_mask"], (0, 1), value=1),
                    "position_ids": arguments["position_ids"][:, -1:] + 1,
                    "past_key_values": output.past_key_values,
                }
        return np.stack([to_numpy(t) for t in tokens], 1).astype(np.int32), np.stack([to_numpy(x) for x in logits], 1)

    def gradient(self, inputs: Inputs) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """The losses by name, and the gradient of "loss" by every parameter.

        "loss" is the mean cross-entropy of each next token; of a mixture of experts with its share of "aux_loss".
        """
        arguments = _arguments(inputs)
        # A row's first token has nobody to predict it but padding.
        labels = torch.where(torch.from_numpy(inputs.positions) > 0, arguments["input_ids"], IGNORED_LABEL)
        with self._computing():
            asked = {"output_router_logits": True} if hasattr(self.model.config, "router_aux_loss_coef") else {}
            output = self.model(**arguments, labels=labels, use_cache=False, **asked)
            output.loss.backward()
        gradients = {self._name(name): to_numpy(value.grad) for name, value in self.model.named_parameters()}
        self.model.zero_grad(set_to_none=True)
        return {name: output[name].item() for name in ("loss", "aux_loss") if name in output}, gradients


@dataclasses.dataclass
class Recording:
    """Intermediates by name, at some columns of the length dimension, of so many rows."""

    columns: torch.Tensor
    num_rows: int
    values: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)


_recording: contextvars.ContextVar[Recording | None] = contextvars.ContextVar("recording", default=None)


def _record(name: str, value: torch.Tensor, length_dim: int = 1) -> None:
    recording = _recording.get()
    if recording is not None:
        recording.values[name] = value.detach().index_select(length_dim, recording.columns)


def _record_flat(name: str, value: torch.Tensor) -> None:
    """Of what has the tokens of all rows in one dimension."""
    recording = _recording.get()
    if recording is not None:
        _record(name, value.unflatten(0, (recording.num_rows, -1)))


def _observe(module: torch.nn.Module, name: str, head_dim: int | None = None) -> None:
    def hook(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output = output if head_dim is None else output.unflatten(-1, (-1, head_dim))
        (_record_flat if output.ndim == 2 else _record)(name, output)

    module.register_forward_hook(hook)


def _observe_router(module: torch.nn.Module, start: str) -> None:
    def hook(_module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        for name, value in zip(("gate", "scores", "chosen"), output, strict=True):
            _record_flat(start + name, value)

    module.register_forward_hook(hook)


def _observe_experts(module: torch.nn.Module, start: str) -> None:
    """Their sum, and the output of each: of the first expert of every token alone, of the second, and so on, in full."""

    def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if _recording.get() is None:
            return
        tokens, chosen, scores = inputs
        ones = torch.ones_like(scores[:, :1])
        each = [module.forward(tokens, expert, ones) for expert in chosen.split(1, dim=1)]
        _record_flat(start + "expert_outputs", torch.stack(each, dim=1))
        _record_flat(start + "experts", output)

    module.register_forward_hook(hook)


def _observe_input(module: torch.nn.Module, name: str) -> None:
    module.register_forward_pre_hook(lambda _module, inputs: _record(name, inputs[0]))


def _observable(attention: str) -> str:
    """Register `attention` under another name, with a look at its arguments and results; returns that name."""

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
    """The tensor's own memory as a numpy array, bfloat16 included."""
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()


def versions() -> dict[str, str]:
    """The versions of the packages that the comparison is with."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}
