"""The comparison as a tool: load a checkpoint on both sides, ask both the same questions, judge the answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qwen_dist.checkpoint.model import load_model
from qwen_dist.errors import UsageError, UserError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.parity import inputs as asked
from qwen_dist.parity.compare import Bound, Distributions, ParityReport, Row, Section, missing, row
from qwen_dist.parity.inputs import Inputs
from qwen_dist.parity.subject import Subject
from qwen_dist.sharding import INFERENCE, Resolver, disk_shapes

if TYPE_CHECKING:  # torch and transformers are imported when a comparison runs, not before
    from qwen_dist.parity.reference import Reference

EXACT = Bound("max_abs", 0.0)
REPORTED = Bound("relative", None)
_IN_FLOAT64 = Bound("max_abs", 1e-10)
BOUNDS: dict[str, dict[Section, Bound]] = {
    "float64": dict.fromkeys(("same inputs", "whole model", "decode", "gradient"), _IN_FLOAT64),
    "float32": {
        "same inputs": Bound("relative", 1e-6),
        "whole model": Bound("relative", 1e-5),
        "decode": Bound("relative", 1e-5),
        # PyTorch's float32 log-softmax over 150,000 tokens is off by 5e-6, which makes 3e-4 of the gradient.
        "gradient": Bound("relative", 1e-3),
    },
}
# Scores of Qwen2.5 reach thousands, and exp turns an error relative to that into one relative to 1: PyTorch's own float32
# weights are 2e-5 from the exact ones. What the attention itself adds is judged where it is given the same inputs.
_ATTENTION_WEIGHTS_IN_FLOAT32 = Bound("relative", 1e-4)
MAX_MEAN_KL = 1e-3
DTYPES = ("float64", "float32", "bfloat16")
Values = Mapping[str, Any]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ParityOptions:
    """What to compare.

    model: directory of a checkpoint. dtype: of parameters and computation on both sides. prompts: texts to run; or
    tokens: how many random token ids a row has; neither: built-in texts, or 64 random ids for a checkpoint without a
    tokenizer. mesh: this side's mesh, such as `fsdp=2,tensor=4`. decode_steps: tokens decoded greedily after the prompt.
    max_columns: intermediates of longer inputs are compared at this many tokens, evenly spread, and the gradient is that of
    the last so many tokens.
    """

    model: str | pathlib.Path
    dtype: str = "float32"
    prompts: tuple[str, ...] = ()
    tokens: int | None = None
    mesh: str = ""
    decode_steps: int = 16
    max_columns: int = 256

    def __post_init__(self) -> None:
        problems = []
        if self.dtype not in DTYPES:
            problems.append(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.prompts and self.tokens is not None:
            problems.append("prompts and tokens are both given; give one of them")
        if self.tokens is not None and self.tokens < 2:
            problems.append(f"tokens is {self.tokens}; at least 2 are needed, so that one predicts the other")
        if problems:
            raise UsageError("parity: " + "; ".join(problems))


def run_parity(options: ParityOptions, progress: Progress = lambda stage: None) -> ParityReport:
    """Compare this project's model with the `transformers` one; `progress` is told each stage as it begins.

    Raises:
      UserError: torch and transformers are not installed.
      CheckpointError: the checkpoint cannot be used.
      UsageError: the model does not fit the mesh.
    """
    if missing_packages := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(f"parity compares with PyTorch: {' and '.join(missing_packages)} missing; pip install 'qwen-dist[parity]'")
    config = ModelConfig.from_directory(options.model)
    # On accelerators a float32 product is rounded to fewer bits unless one asks.
    with jax.enable_x64(options.dtype == "float64"), jax.default_matmul_precision("highest"):
        return _Comparison(options, config, progress).report()


def make_inputs(options: ParityOptions, config: ModelConfig) -> Inputs:
    """The rows of tokens that the options ask for."""
    num_rows = 8 if options.dtype == "bfloat16" else 2
    if options.prompts:
        return asked.from_text(options.model, options.prompts)
    if options.tokens is None and (pathlib.Path(options.model) / "tokenizer.json").exists():
        return asked.from_text(options.model, asked.PROMPTS[:num_rows])
    return asked.random_tokens(config.vocab_size, options.tokens or 64, num_rows)


def bound_of(dtype: str, section: Section, name: str) -> Bound:
    """What a component may differ by from PyTorch's in the same dtype."""
    if name == "embed_tokens":
        return EXACT
    if dtype == "bfloat16":
        # Rounded at the same places a norm is the same number, but where float32 sums in another order round differently.
        return Bound("differing", 0.01) if section == "same inputs" and name.endswith("norm") else REPORTED
    if dtype == "float32" and section == "whole model" and name.endswith(".weights"):
        return _ATTENTION_WEIGHTS_IN_FLOAT32
    return BOUNDS[dtype][section]


class _Comparison:
    """One run: the inputs, and the rows found so far."""

    def __init__(self, options: ParityOptions, config: ModelConfig, progress: Progress):
        self.options, self.config, self.progress = options, config, progress
        self.inputs = make_inputs(options, config)
        self.columns = spread(self.inputs.tokens.shape[1], options.max_columns)
        self.rows: list[Row] = []
        self.facts = self._facts()

    def report(self) -> ParityReport:
        from qwen_dist.parity.reference import Reference

        if self.options.dtype == "bfloat16":
            return self._report_bfloat16()
        self.progress("loading the checkpoint on both sides")
        reference, subject = Reference(self.options.model, self.options.dtype), self._load()
        self._compare_parameters(reference, subject)
        self.progress("intermediates and logits")
        expected = reference.forward(self.inputs, self.columns)
        if len(self.columns) == self.inputs.tokens.shape[1]:  # only then are the reference's inputs there to be given
            found = subject.forward(self.inputs, self.columns, replacing=_without_logits(expected))
            self._compare_intermediates("same inputs", found, expected)
        found = subject.forward(self.inputs, self.columns)
        self._compare_intermediates("whole model", found, expected)
        logits = self._tokens("logits", found["logits"]), self._tokens("logits", expected["logits"])
        del found, expected
        self.progress("greedy decoding")
        self._compare_decoding(reference, subject)
        self.progress("gradients")
        short = self.inputs.last(self.options.max_columns)
        expected_loss, expected_gradients = reference.gradient(short)
        del reference  # a large model's gradients need the room
        self._compare_gradients(subject.gradient(short), (expected_loss, expected_gradients))
        return self._finish(*logits)

    def _load(self) -> Subject:
        resolver = Resolver(make_mesh(MeshConfig.parse(self.options.mesh)), INFERENCE)
        return Subject(load_model(self.options.model, resolver, dtype=self.options.dtype))

    def _compare_parameters(self, reference: Reference, subject: Subject) -> None:
        """Equal names, equal shapes on disk, equal bits."""
        expected, found = reference.parameters(), subject.loaded.parameters
        shapes = disk_shapes(subject.loaded.module)
        for name in [*expected, *(name for name in found if name not in expected)]:
            if name not in found or name not in expected:
                whose = "only PyTorch has it" if name in expected else "PyTorch does not have it"
                self.rows.append(missing("parameters", name, EXACT, whose))
            elif shapes[name] != expected[name].shape:
                whose = f"shape {list(shapes[name])}, the reference has {list(expected[name].shape)}"
                self.rows.append(missing("parameters", name, EXACT, whose))
            else:
                ours = np.asarray(found[name]).reshape(shapes[name])
                self.rows.append(row("parameters", name, ours, expected[name], EXACT))

    def _compare_intermediates(self, section: Section, found: Values, expected: Values) -> None:
        tokens = self._token_names()
        for name in [*expected, *(name for name in found if name not in expected)]:
            bound = bound_of(self.options.dtype, section, name)
            if name not in found or name not in expected:
                whose = "only PyTorch has it" if name in expected else "PyTorch does not have it"
                self.rows.append(missing(section, name, bound, whose))
                continue
            ours, reference = (self._tokens(name, side[name]) for side in (found, expected))
            self.rows.append(row(section, name, ours, reference, bound, tokens))

    def _compare_decoding(self, reference: Reference, subject: Subject) -> None:
        num_steps = self.options.decode_steps
        chosen, expected = reference.decode(self.inputs, num_steps)
        cached, whole = subject.decode(self.inputs, chosen, prefill_chunk(self.inputs))
        bound = bound_of(self.options.dtype, "decode", "logits")
        rows = [f"row {index}" for index in range(len(chosen))]
        for step in range(num_steps):
            name = f"decode.step_{step}" if step else "decode.prefill"
            self.rows.append(row("decode", name, cached[:, step], expected[:, step], bound, rows))
        for step in range(num_steps):
            name = f"decode.step_{step}.against_full_forward"
            self.rows.append(row("decode", name, cached[:, step], whole[:, step], bound, rows))
        same = np.mean(cached.argmax(-1) == chosen)
        self.facts["greedy tokens that agree"] = f"{same:.1%} of {chosen.size}"

    def _compare_gradients(self, found: tuple[float, Values], expected: tuple[float, dict[str, np.ndarray]]) -> None:
        bound = bound_of(self.options.dtype, "gradient", "")
        self.rows.append(row("gradient", "loss", np.array([found[0]]), np.array([expected[0]]), bound))
        for name, gradient in expected[1].items():
            if name in found[1]:  # a parameter that only one side has is a fault of its own, reported there
                ours = np.asarray(found[1][name]).reshape(gradient.shape)
                self.rows.append(row("gradient", name, ours, gradient, bound))

    def _tokens(self, name: str, value: Any) -> np.ndarray:
        """The values at the real tokens that are compared, [tokens, ...]: padding may hold anything."""
        array = np.asarray(value)
        by_token = array.swapaxes(1, 2) if name.endswith(".weights") else array
        return by_token[self.inputs.is_real[:, self.columns]]

    def _token_names(self) -> list[str]:
        rows, columns = np.nonzero(self.inputs.is_real[:, self.columns])
        positions = self.inputs.positions[rows, self.columns[columns]]
        return [f"row {r}, position {p}" for r, p in zip(rows.tolist(), positions.tolist(), strict=True)]

    def _finish(self, ours: np.ndarray, reference: np.ndarray) -> ParityReport:
        is_compared = self.inputs.is_real[:, self.columns]
        distributions = Distributions.of(ours, reference, self.inputs.positions[:, self.columns][is_compared])
        self.facts["mean KL of the next token"] = f"{distributions.kl.mean():.3g} nats"
        self.facts["top-1 agreement"] = f"{distributions.same_top1.mean():.2%} of {len(distributions.kl)} tokens"
        self.facts["top-5 agreement"] = f"{distributions.same_top5.mean():.2%}"
        return ParityReport(self.facts, self.rows, distributions, _some_logits(ours, reference))

    def _facts(self) -> dict[str, str]:
        from qwen_dist.parity.reference import versions

        rows = self.inputs.lengths.tolist()
        compared = "" if len(self.columns) == max(rows) else f", compared at {len(self.columns)} columns"
        return {
            "checkpoint": pathlib.Path(self.options.model).name,
            "family": f"{self.config.family}, {len(self.config.layers)} layers",
            "dtype": self.options.dtype,
            "mesh": self.options.mesh or "one device",
            "rows": f"{len(rows)} of {min(rows)} to {max(rows)} tokens{compared}",
            "versions": ", ".join(f"{name} {version}" for name, version in ({"jax": jax.__version__} | versions()).items()),
        }


def spread(length: int, count: int) -> np.ndarray:
    """At most `count` of `length` columns, evenly spread, the last among them."""
    return np.unique(np.linspace(length - 1, 0, min(length, count)).round().astype(int))


def prefill_chunk(inputs: Inputs) -> int:
    """A chunk length that takes three steps for the longest row and divides it unevenly, where it is long enough."""
    return int(inputs.lengths.max()) * 2 // 5 + 1


def _without_logits(values: Values) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "logits"}


def _some_logits(ours: np.ndarray, reference: np.ndarray, count: int = 1500) -> np.ndarray:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, ours.size, count)
    return np.stack([reference.reshape(-1)[chosen], ours.reshape(-1)[chosen]], axis=1).astype(np.float64)
