"""One comparison, from the checkpoint to the report. The checkpoint must fit into memory on both sides."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qwen_dist.checkpoint.model import load_model
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import DiskShape, disk_shapes, on_disk
from qwen_dist.models.transformer import Transformer
from qwen_dist.parity.candidate import Candidate
from qwen_dist.parity.checks import Check, NextTokenAgreement, ParityReport, check, first_failure, missing_check
from qwen_dist.parity.inputs import Inputs, ParityOptions, make_inputs
from qwen_dist.parity.reference import Reference, versions
from qwen_dist.parity.tolerances import EXACT, Section, is_state, tolerance_for
from qwen_dist.sharding import INFERENCE, ShardingContext

# A gradient needs the memory of logits [B, T, V] several times. Two rows are as telling as eight.
GRADIENT_ROWS = 2
Intermediates = Mapping[str, Any]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class ReferenceOutputs:
    """The results of a PyTorch model.

    Attributes:
      intermediates: by name, with the logits.
      decoded_tokens: the tokens fed to the model after the prompts, [B, steps].
      decoded_logits: the logits before each of these tokens, [B, steps, V].
      losses: by name, of the last tokens of each row.
      gradients: of the first loss, by parameter.
    """

    intermediates: Intermediates
    decoded_tokens: np.ndarray
    decoded_logits: np.ndarray
    losses: dict[str, float]
    gradients: dict[str, np.ndarray]


class Comparison:
    """The inputs of one run and its checks so far. Intermediates are compared at `columns` of [B, T]."""

    def __init__(self, options: ParityOptions, config: ModelConfig, progress: Progress, *, num_rows: int):
        self.options, self.config, self.progress = options, config, progress
        self.inputs = make_inputs(options, config, num_rows)
        self.columns = evenly_spaced(self.inputs.tokens.shape[1], options.max_columns)
        self.gradient_inputs = self.inputs.first_rows(GRADIENT_ROWS).last_tokens(options.max_columns)
        self.checks: list[Check] = []
        self.facts = self._facts()
        self.next_token: NextTokenAgreement | None = None
        self.logit_pairs = np.zeros((0, 2))

    @property
    def has_all_columns(self) -> bool:
        """Whether all columns are compared: only then are the reference's intermediates complete enough to be inputs."""
        return len(self.columns) == self.inputs.tokens.shape[1]

    def load(self) -> Candidate:
        """Load the checkpoint on this side."""
        options = self.options
        sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(options.mesh)), INFERENCE)
        return Candidate(
            load_model(options.model, sharding_ctx, dtype=options.dtype, ignored_config_keys=options.ignored_keys)
        )

    @functools.cached_property
    def disk_shapes(self) -> dict[str, DiskShape]:
        """The shape on disk of every parameter."""
        return disk_shapes(Transformer(self.config, dtype=self.options.dtype))

    @property
    def first_failure(self) -> Check | None:
        """The first failed check, in the order in which to look for an error."""
        return first_failure(self.checks)

    def run_reference(
        self, reference: Reference, tokens: np.ndarray | None = None, *, in_float32: bool = False
    ) -> ReferenceOutputs:
        """Compute everything that is compared with the reference.

        Args:
          reference: the PyTorch model.
          tokens: the tokens to decode, [B, steps]; None decodes greedily.
          in_float32: round the results to float32, for comparison with bfloat16: half the memory.
        """
        losses, gradients = reference.gradient(self.gradient_inputs)
        gradients = _move_to_disk(gradients, in_float32)  # as large as the model, which is in memory twice
        values = reference.forward(self.inputs, self.columns)
        values = {name: values.pop(name).astype(np.float32) for name in list(values)} if in_float32 else values
        tokens, logits = reference.decode(self.inputs, self.options.decode_steps, tokens)
        return ReferenceOutputs(values, tokens, logits, losses, gradients)

    def stages(self, candidate: Candidate, outputs: ReferenceOutputs) -> Iterator[str]:
        """Compare in the order in which to look for an error. Yields the name of each stage before it starts."""
        if self.has_all_columns:
            yield "each component, given PyTorch's inputs"
            actual = candidate.forward(self.inputs, self.columns, replacing=without_logits(outputs.intermediates))
            self.compare_intermediates("same inputs", actual, outputs.intermediates)
        yield "the whole model"
        actual = candidate.forward(self.inputs, self.columns)
        self.compare_intermediates("whole model", actual, outputs.intermediates)
        self.report_routing(actual, outputs.intermediates)
        self.compare_next_token(actual, outputs.intermediates)
        del actual
        yield "decoding"
        self.compare_decoding(candidate, outputs)
        yield "gradients"
        self.compare_gradients(candidate.gradient(self.gradient_inputs), outputs)

    def compare_parameters(self, candidate: Candidate, expected: Mapping[str, np.ndarray]) -> None:
        """Check that names, shapes on disk and bits are equal."""
        actual, shapes = candidate.loaded.parameters, self.disk_shapes
        for name in [*expected, *(name for name in actual if name not in expected)]:
            if name not in actual or name not in expected:
                self.checks.append(missing_check("parameters", name, EXACT, _side_missing(name in expected)))
            elif shapes[name] != expected[name].shape:
                shapes_differ = f"shape {list(shapes[name])}, PyTorch has {list(expected[name].shape)}"
                self.checks.append(missing_check("parameters", name, EXACT, shapes_differ))
            else:
                # PyTorch rounds every parameter to the model's dtype; some are kept in float32 here.
                ours = on_disk(np.asarray(actual[name]), shapes[name]).astype(expected[name].dtype)
                self.checks.append(check("parameters", name, ours, expected[name], EXACT))

    def compare_intermediates(self, section: Section, actual: Intermediates, expected: Intermediates) -> None:
        """Check every intermediate, in the reference's order, at the tokens that are not padding."""
        tokens, rows = self._token_names(), [f"row {index}" for index in range(len(self.inputs.tokens))]
        for name in [*expected, *(name for name in actual if name not in expected)]:
            tolerance = tolerance_for(self.options.dtype, section, name)
            if name in actual and name in expected:
                ours, reference = self.at_real_tokens(name, actual), self.at_real_tokens(name, expected)
                self.checks.append(check(section, name, ours, reference, tolerance, rows if is_state(name) else tokens))
            else:
                self.checks.append(missing_check(section, name, tolerance, _side_missing(name in expected)))

    def compare_decoding(self, candidate: Candidate, outputs: ReferenceOutputs) -> np.ndarray:
        """Check each step's logits against the reference's, and against a forward pass without a cache.

        Both sides are fed the tokens of the reference.

        Returns:
          This side's logits, [B, steps, V].
        """
        chosen = outputs.decoded_tokens
        cached, whole = candidate.decode(self.inputs, chosen, prefill_chunk_length(self.inputs))
        tolerance = tolerance_for(self.options.dtype, "decode", "logits")
        rows = [f"row {index}" for index in range(len(chosen))]
        for other, suffix in ((outputs.decoded_logits, ""), (whole, ".against_full_forward")):
            for step in range(chosen.shape[1]):
                name = decode_step_name(step) + suffix
                self.checks.append(check("decode", name, cached[:, step], other[:, step], tolerance, rows))
        self.facts["greedy tokens that agree"] = f"{np.mean(cached.argmax(-1) == chosen):.1%} of {chosen.size}"
        return cached

    def compare_gradients(self, actual: tuple[dict[str, float], Intermediates], outputs: ReferenceOutputs) -> None:
        """Check the losses and the gradients of all parameters that both sides have (`compare_parameters` reports others).

        The order is that of backpropagation: the first gradient beyond its bound is the one nearest to the error.
        """
        tolerance = tolerance_for(self.options.dtype, "gradient", "loss")
        for name, loss in outputs.losses.items():
            self.checks.append(check("gradient", name, *_loss_pair(actual[0][name], loss, self.options.dtype), tolerance))
        for name in filter(actual[1].__contains__, backward_order(outputs)):
            gradient = outputs.gradients[name]
            ours = on_disk(np.asarray(actual[1][name]), self.disk_shapes[name])
            self.checks.append(check("gradient", name, ours, gradient, tolerance))

    def by_token(self, name: str, values: Intermediates) -> np.ndarray:
        """Return an intermediate as [B, columns, ...]."""
        array = np.asarray(values[name])
        return array.swapaxes(1, 2) if name.endswith(".weights") else array

    def at_real_tokens(self, name: str, values: Intermediates) -> np.ndarray:
        """Return an intermediate at the compared tokens without padding, [tokens, ...]. Values at padding are arbitrary.

        A state is of a row: it is returned whole.
        """
        return np.asarray(values[name]) if is_state(name) else self.by_token(name, values)[self.is_compared]

    @property
    def is_compared(self) -> np.ndarray:
        """False for padding, bool [B, columns]."""
        return self.inputs.is_real[:, self.columns]

    def _token_names(self) -> list[str]:
        rows, columns = np.nonzero(self.is_compared)
        positions = self.inputs.positions[rows, self.columns[columns]]
        return [f"row {r}, position {p}" for r, p in zip(rows.tolist(), positions.tolist(), strict=True)]

    def compare_next_token(self, actual: Intermediates, expected: Intermediates) -> None:
        """Compare the next-token distributions of both sides."""
        ours, reference = self.at_real_tokens("logits", actual), self.at_real_tokens("logits", expected)
        positions = self.inputs.positions[:, self.columns][self.is_compared]
        self.next_token = NextTokenAgreement.from_logits(ours, reference, positions)
        self.logit_pairs = _sample_logits(ours, reference)
        self.facts["mean KL of the next token"] = f"{self.next_token.kl.mean():.3g} nats"
        self.facts["top-1 agreement"] = f"{self.next_token.same_top1.mean():.2%} of {len(positions)} tokens"
        self.facts["top-5 agreement"] = f"{self.next_token.same_top5.mean():.2%}"

    def report_routing(self, actual: Intermediates, expected: Intermediates) -> None:
        """Report how often a token goes to other experts, and how often the choice was a near tie."""
        differing = near_ties = total = 0
        for name in (name for name in expected if name.endswith(".mlp.gate")):
            ours, reference = (self.at_real_tokens(name, values).astype(np.float64) for values in (actual, expected))
            chosen = (self.at_real_tokens(name.replace("gate", "chosen"), values) for values in (actual, expected))
            num_chosen = expected[name.replace("gate", "chosen")].shape[-1]
            ordered = -np.sort(-reference, axis=-1)
            margin = ordered[:, num_chosen - 1] - ordered[:, num_chosen] if num_chosen < ordered.shape[1] else np.inf
            near_ties += int((margin <= 2 * np.abs(ours - reference).max()).sum())
            differing += int((np.sort(next(chosen)) != np.sort(next(chosen))).any(axis=-1).sum())
            total += len(reference)
        if total:
            self.facts["routing"] = (
                f"{differing} of {total} choices of experts differ; in {near_ties} the last chosen and the first not "
                "chosen are within twice the largest difference of the router's logits"
            )

    def report(self) -> ParityReport:
        """Return the report of all checks."""
        assert self.next_token is not None, "the whole model has not been compared"
        return ParityReport(self.facts, self.checks, self.next_token, self.logit_pairs)

    def _facts(self) -> dict[str, str]:
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


def evenly_spaced(length: int, count: int) -> np.ndarray:
    """Return at most `count` of `length` columns, evenly spaced, including the last."""
    return np.unique(np.linspace(length - 1, 0, min(length, count)).round().astype(int))


def decode_step_name(step: int) -> str:
    """Return the name of the check of a step's logits; step 0 is that of the prompt."""
    return f"decode.step_{step}" if step else "decode.prefill"


def prefill_chunk_length(inputs: Inputs) -> int:
    """Return a chunk length that splits the longest row into three chunks of unequal length, if it is long enough."""
    return int(inputs.lengths.max()) * 2 // 5 + 1


def _loss_pair(ours: float, reference: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    accum_dtype = np.promote_types(dtype, np.float32)
    return np.array([ours], accum_dtype), np.array([reference], accum_dtype)


def _side_missing(is_expected: bool) -> str:
    return "only PyTorch has it" if is_expected else "PyTorch does not have it"


def _move_to_disk(values: dict[str, np.ndarray], in_float32: bool) -> dict[str, np.ndarray]:
    """Move the arrays to anonymous temporary files, freeing each before the next is written."""
    moved: dict[str, np.ndarray] = {}
    for name in list(values):
        value = values.pop(name)
        dtype = np.dtype(np.float32) if in_float32 else value.dtype
        with tempfile.TemporaryFile() as file:
            moved[name] = np.memmap(file, dtype, "w+", shape=value.shape)
        moved[name][...] = value
    return moved


def backward_order(outputs: ReferenceOutputs) -> list[str]:
    """Return the parameters in the order in which the gradient reaches them: reversed order of their modules' outputs."""
    computed = {name: index for index, name in enumerate(outputs.intermediates)}
    return sorted(outputs.gradients, key=lambda name: -computed.get(name.rpartition(".")[0], len(computed)))


def without_logits(values: Intermediates) -> dict[str, Any]:
    """Return the intermediates that are inputs of later components."""
    return {name: value for name, value in values.items() if name != "logits"}


def _sample_logits(ours: np.ndarray, reference: np.ndarray, count: int = 1500) -> np.ndarray:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, ours.size, count)
    return np.stack([reference.reshape(-1)[chosen], ours.reshape(-1)[chosen]], axis=1).astype(np.float64)
