"""One comparison from beginning to end, for a checkpoint that fits into memory on both sides."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from qwen_dist.checkpoint.model import load_model
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.parameters import disk_shapes
from qwen_dist.parity.bounds import EXACT, Section, bound_of
from qwen_dist.parity.compare import Distributions, ParityReport, Row, first_fault, missing, row
from qwen_dist.parity.inputs import Inputs, ParityOptions, make_inputs
from qwen_dist.parity.reference import Reference, versions
from qwen_dist.parity.subject import Subject
from qwen_dist.sharding import INFERENCE, ShardingContext

# A gradient needs room for logits [B, T, V] several times over; two rows show whatever eight do.
GRADIENT_ROWS = 2
Values = Mapping[str, Any]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Answers:
    """What a PyTorch model said.

    values: intermediates and logits by name. chosen: the tokens [B, steps] it was fed after the prompts, and decoded: the
    logits [B, steps, V] before each. losses and the first one's gradients: of the last tokens of each row.
    """

    values: Values
    chosen: np.ndarray
    decoded: np.ndarray
    losses: dict[str, float]
    gradients: dict[str, np.ndarray]


def compare_in_one_dtype(comparison: Comparison) -> ParityReport:
    """Float64 and float32: both sides compute in it, and every intermediate must be the same but for rounding."""
    comparison.progress("PyTorch")
    reference = Reference(comparison.options.model, comparison.options.dtype)
    answers = comparison.ask(reference)
    comparison.progress("loading the checkpoint here, and its parameters")
    subject = comparison.load()
    comparison.compare_parameters(subject, reference.parameters())
    del reference  # a large model's gradients need the room
    for stage in comparison.stages(subject, answers):
        comparison.progress(stage)
    return comparison.report()


class Comparison:
    """One run: what is asked, and the rows found so far. Intermediates are compared at `columns` of [B, T]."""

    def __init__(self, options: ParityOptions, config: ModelConfig, progress: Progress):
        self.options, self.config, self.progress = options, config, progress
        self.inputs = make_inputs(options, config)
        self.columns = spread(self.inputs.tokens.shape[1], options.max_columns)
        self.gradient_inputs = self.inputs.first_rows(GRADIENT_ROWS).last(options.max_columns)
        self.rows: list[Row] = []
        self.facts = self._facts()
        self.distributions: Distributions | None = None
        self.scatter = np.zeros((0, 2))

    @property
    def has_all_columns(self) -> bool:
        """Only then are the reference's inputs there to be given to this side."""
        return len(self.columns) == self.inputs.tokens.shape[1]

    def load(self) -> Subject:
        """The checkpoint on this side."""
        sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(self.options.mesh)), INFERENCE)
        return Subject(load_model(self.options.model, sharding_ctx, dtype=self.options.dtype))

    @property
    def first_fault(self) -> Row | None:
        """The first row beyond its bound, in the order in which to look for a fault."""
        return first_fault(self.rows)

    def ask(self, reference: Reference, chosen: np.ndarray | None = None, *, in_float32: bool = False) -> Answers:
        """Everything the reference is asked; it decodes greedily where it is not told which tokens to take.

        With `in_float32` the answers are rounded to it: half the memory, for who compares with something much coarser.
        """
        losses, gradients = reference.gradient(self.gradient_inputs)
        gradients = _on_disk(gradients, in_float32)  # as large as the model: there may be no room for both, twice
        values = reference.forward(self.inputs, self.columns)
        values = {name: values.pop(name).astype(np.float32) for name in list(values)} if in_float32 else values
        chosen, decoded = reference.decode(self.inputs, self.options.decode_steps, chosen)
        return Answers(values, chosen, decoded, losses, gradients)

    def stages(self, subject: Subject, answers: Answers) -> Iterator[str]:
        """Compare in the order in which a fault should be looked for; yields what comes next."""
        if self.has_all_columns:
            yield "each component, given PyTorch's inputs"
            found = subject.forward(self.inputs, self.columns, replacing=without_logits(answers.values))
            self.compare_intermediates("same inputs", found, answers.values)
        yield "the whole model"
        found = subject.forward(self.inputs, self.columns)
        self.compare_intermediates("whole model", found, answers.values)
        self.report_routing(found, answers.values)
        self.compare_next_token(found, answers.values)
        del found
        yield "decoding"
        self.compare_decoding(subject, answers)
        yield "gradients"
        self.compare_gradients(subject.gradient(self.gradient_inputs), answers)

    def compare_parameters(self, subject: Subject, expected: Mapping[str, np.ndarray]) -> None:
        """Equal names, equal shapes on disk, equal bits."""
        found, shapes = subject.loaded.parameters, disk_shapes(subject.loaded.module)
        for name in [*expected, *(name for name in found if name not in expected)]:
            if name not in found or name not in expected:
                self.rows.append(missing("parameters", name, EXACT, _whose(name in expected)))
            elif shapes[name] != expected[name].shape:
                whose = f"shape {list(shapes[name])}, PyTorch has {list(expected[name].shape)}"
                self.rows.append(missing("parameters", name, EXACT, whose))
            else:
                ours = np.asarray(found[name]).reshape(shapes[name])
                self.rows.append(row("parameters", name, ours, expected[name], EXACT))

    def compare_intermediates(self, section: Section, found: Values, expected: Values) -> None:
        """A row for every intermediate, in the reference's order, at the tokens that are not padding."""
        tokens = self._token_names()
        for name in [*expected, *(name for name in found if name not in expected)]:
            bound = bound_of(self.options.dtype, section, name)
            if name in found and name in expected:
                ours, reference = self.tokens_of(name, found), self.tokens_of(name, expected)
                self.rows.append(row(section, name, ours, reference, bound, tokens))
            else:
                self.rows.append(missing(section, name, bound, _whose(name in expected)))

    def compare_decoding(self, subject: Subject, answers: Answers) -> np.ndarray:
        """Each step's logits [B, steps, V] against the reference's, and against a forward without a cache.

        Both sides are fed the tokens that the reference chose. Returns this side's logits.
        """
        chosen = answers.chosen
        cached, whole = subject.decode(self.inputs, chosen, prefill_chunk(self.inputs))
        bound = bound_of(self.options.dtype, "decode", "logits")
        rows = [f"row {index}" for index in range(len(chosen))]
        for other, suffix in ((answers.decoded, ""), (whole, ".against_full_forward")):
            for step in range(chosen.shape[1]):
                name = (f"decode.step_{step}" if step else "decode.prefill") + suffix
                self.rows.append(row("decode", name, cached[:, step], other[:, step], bound, rows))
        self.facts["greedy tokens that agree"] = f"{np.mean(cached.argmax(-1) == chosen):.1%} of {chosen.size}"
        return cached

    def compare_gradients(self, found: tuple[dict[str, float], Values], answers: Answers) -> None:
        """The losses, and the gradient by every parameter that both sides have: one that only one has is reported there.

        From the loss backwards, as gradients flow: the first that is off is the nearest to the fault.
        """
        bound = bound_of(self.options.dtype, "gradient", "loss")
        for name, loss in answers.losses.items():
            self.rows.append(row("gradient", name, *_loss_pair(found[0][name], loss, self.options.dtype), bound))
        for name in filter(found[1].__contains__, backwards(answers)):
            gradient = answers.gradients[name]
            ours = np.asarray(found[1][name]).reshape(gradient.shape)
            self.rows.append(row("gradient", name, ours, gradient, bound))

    def by_token(self, name: str, values: Values) -> np.ndarray:
        """An intermediate as [B, columns, ...]."""
        array = np.asarray(values[name])
        return array.swapaxes(1, 2) if name.endswith(".weights") else array

    def tokens_of(self, name: str, values: Values) -> np.ndarray:
        """An intermediate at the tokens that are compared, [tokens, ...], without padding, which may hold anything."""
        return self.by_token(name, values)[self.is_compared]

    @property
    def is_compared(self) -> np.ndarray:
        """Which of the compared columns hold a token, bool [B, columns]."""
        return self.inputs.is_real[:, self.columns]

    def _token_names(self) -> list[str]:
        rows, columns = np.nonzero(self.is_compared)
        positions = self.inputs.positions[rows, self.columns[columns]]
        return [f"row {r}, position {p}" for r, p in zip(rows.tolist(), positions.tolist(), strict=True)]

    def compare_next_token(self, found: Values, expected: Values) -> None:
        """What the two sides' logits say of the next token."""
        ours, reference = self.tokens_of("logits", found), self.tokens_of("logits", expected)
        positions = self.inputs.positions[:, self.columns][self.is_compared]
        self.distributions = Distributions.of(ours, reference, positions)
        self.scatter = _some_logits(ours, reference)
        self.facts["mean KL of the next token"] = f"{self.distributions.kl.mean():.3g} nats"
        self.facts["top-1 agreement"] = f"{self.distributions.same_top1.mean():.2%} of {len(positions)} tokens"
        self.facts["top-5 agreement"] = f"{self.distributions.same_top5.mean():.2%}"

    def report_routing(self, found: Values, expected: Values) -> None:
        """How often a token goes to other experts, and how often that hangs on less than the logits differ by."""
        differing = near_ties = total = 0
        for name in (name for name in expected if name.endswith(".mlp.gate")):
            ours, reference = (self.tokens_of(name, values).astype(np.float64) for values in (found, expected))
            chosen = (self.tokens_of(name.replace("gate", "chosen"), values) for values in (found, expected))
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
        """All that was found."""
        assert self.distributions is not None, "the whole model has not been compared"
        return ParityReport(self.facts, self.rows, self.distributions, self.scatter)

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


def spread(length: int, count: int) -> np.ndarray:
    """At most `count` of `length` columns, evenly spread, the last among them."""
    return np.unique(np.linspace(length - 1, 0, min(length, count)).round().astype(int))


def prefill_chunk(inputs: Inputs) -> int:
    """A chunk length that takes three steps for the longest row and divides it unevenly, where it is long enough."""
    return int(inputs.lengths.max()) * 2 // 5 + 1


def _loss_pair(ours: float, reference: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    wide = np.promote_types(dtype, np.float32)
    return np.array([ours], wide), np.array([reference], wide)


def _whose(is_expected: bool) -> str:
    return "only PyTorch has it" if is_expected else "PyTorch does not have it"


def _on_disk(values: dict[str, np.ndarray], in_float32: bool) -> dict[str, np.ndarray]:
    """The same arrays in temporary files without a name, each freed before the next is written."""
    moved: dict[str, np.ndarray] = {}
    for name in list(values):
        value = values.pop(name)
        dtype = np.dtype(np.float32) if in_float32 else value.dtype
        with tempfile.TemporaryFile() as file:
            moved[name] = np.memmap(file, dtype, "w+", shape=value.shape)
        moved[name][...] = value
    return moved


def backwards(answers: Answers) -> list[str]:
    """The parameters in the order in which a gradient reaches them: that of their modules' outputs, reversed."""
    computed = {name: index for index, name in enumerate(answers.values)}
    return sorted(answers.gradients, key=lambda name: -computed.get(name.rpartition(".")[0], len(computed)))


def without_logits(values: Values) -> dict[str, Any]:
    """The intermediates that the model goes on computing with."""
    return {name: value for name, value in values.items() if name != "logits"}


def _some_logits(ours: np.ndarray, reference: np.ndarray, count: int = 1500) -> np.ndarray:
    rng = np.random.default_rng(0)
    chosen = rng.integers(0, ours.size, count)
    return np.stack([reference.reshape(-1)[chosen], ours.reshape(-1)[chosen]], axis=1).astype(np.float64)
