"""Read PEFT's `adapter_config.json` strictly: each key is read, is known not to matter, or is an error that names it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_dist.errors import CheckpointError, printable, problem_list
from qwen_dist.json_reader import read_json_object
from qwen_dist.models.parameters import MAX_PROBLEMS

CONFIG_NAME = "adapter_config.json"
MAX_RANK = 2**16
MAX_TOKENS = 2**20
# Keys that say where an adapter comes from, how it was trained, or which layers it was put on, which the tensors show too.
# `fan_in_fan_out` is for Conv1D: PEFT turns it off for linear layers. Some `…_config` are read by an initialisation only.
_HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out "
    "inference_mode layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_core "
    "merge_weights peft_version qalora_group_size revision runtime_config target_modules task_type".split()
)
# Settings of other methods: what each would change. Anything but null, false or empty is refused.
_REFUSED = {
    "alora_invocation_tokens": "the adapter acts only after these tokens, so it is not a change of the weights",
    "arrow_config": "the adapter is chosen for each token, so it is not a change of the weights",
    "enable_lora": "only parts of a layer have an adapter",
    "kasa_config": "the base weights are truncated",
    "layer_replication": "layers of the base are repeated",
    "megatron_config": "the layers are those of Megatron",
    "monteclora_config": "the weights are drawn at random",
    "use_bdlora": "the matrices are block-diagonal",
    "use_qalora": "the input is pooled",
    "velora_config": "the activations are compressed",
}
# What PEFT does to the base weights when it loads an adapter that was initialised in this manner.
_INITIALISATIONS = {
    "gaussian": "",
    "eva": "",
    "orthogonal": "",
    "lora_ga": "",
    "mica": "",
    "pissa": "pissa",
    "olora": "olora",
}
_REFUSED_INITIALISATIONS = {
    "pissa_niter": "PEFT takes a random approximation of the base weights away",
    "corda": "PEFT needs the covariances of the training data",
    "loftq": "PEFT quantises the base weights",
}
# A pattern is matched against names of about 60 characters; these limits keep Python's `re` from taking hours.
_MAX_PATTERN, _MAX_REPEATS = 200, 3
_REPEATED_GROUP, _REPEAT = re.compile(r"\)[*+{?]"), re.compile(r"(?<!\\)[*+{]")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter that decide how it changes the weights.

    Attributes:
      rank, alpha: of layers that no pattern matches.
      rslora: the factor is alpha / sqrt(R) instead of alpha / R (arXiv:2312.03732).
      dora: each output of a layer is scaled to a trained magnitude (arXiv:2402.09353).
      lora_bias: the second matrix has a bias.
      base_change: what the base loses first: nothing (""), or the part that `pissa` or `olora` starts the adapter with.
      rank_pattern, alpha_pattern: other values by a regular expression for the end of a layer's name.
      modules_to_save: names of modules that were trained whole.
      target_parameters: names of parameters, such as stacked experts, that have an adapter.
      token_indices: the trained rows of embeddings, by the name of the module.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    lora_bias: bool = False
    base_change: str = ""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """Return the rank of a module, by its name in the base, such as `model.layers.0.mlp.up_proj`."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the factor of B A of a module: alpha / R, or alpha / sqrt(R) for rsLoRA."""
        return scale(self.rank_of(module), _by_pattern(self.alpha_pattern, module, self.alpha), self.rslora)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """Return the trained rows of an embedding."""
        return next((rows for name, rows in self.token_indices.items() if names_module(name, module)), ())


def scale(rank: int, alpha: float, rslora: bool) -> float:
    """Return the factor of B A: alpha / R, or alpha / sqrt(R) for rsLoRA (arXiv:2312.03732)."""
    return alpha / (rank**0.5 if rslora else rank)


def names_module(name: str, module: str) -> bool:
    """Return whether PEFT takes `name` for this module: the whole name or its end."""
    return module == name or module.endswith(f".{name}")


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    # PEFT: `get_pattern_key`; the first that matches counts.
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter_config(directory: Path, ignored_keys: Iterable[str] = ()) -> AdapterConfig:
    """Read the configuration of an adapter.

    Args:
      directory: of the adapter.
      ignored_keys: keys the user vouches for: they may be present and are not read.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it cannot be used; one message lists every problem.
    """
    content = read_json_object(directory / CONFIG_NAME)
    reader = _Reader({key: value for key, value in content.items() if key not in set(ignored_keys)})
    config = reader.config()
    if reader.problems:
        raise_problems(f"{printable(directory / CONFIG_NAME)} cannot be used", reader.problems)
    return config


def raise_problems(what: str, problems: list[str]) -> None:
    """Raise CheckpointError with one line for each problem, cut to `MAX_PROBLEMS`."""
    raise CheckpointError(f"{what}:\n{problem_list(problems, MAX_PROBLEMS)}")


class _Reader:
    """Takes values out of the file; collects problems instead of raising at the first."""

    def __init__(self, content: Mapping[str, Any]):
        self.rest = dict(content)
        self.problems: list[str] = []

    def config(self) -> AdapterConfig:
        if (kind := self.rest.pop("peft_type", "LORA")) != "LORA":
            self.problems.append(f"peft_type is {_show(kind)}, but only LORA adapters are read")
        config = AdapterConfig(
            rank=self._required("r", _rank),
            alpha=self._required("lora_alpha", _number),
            rslora=self._take("use_rslora", _bool, False),
            dora=self._take("use_dora", _bool, False),
            lora_bias=self._take("lora_bias", _bool, False),
            base_change=self._take("init_lora_weights", _initialisation, ""),
            rank_pattern=self._take("rank_pattern", _patterns(_rank), {}),
            alpha_pattern=self._take("alpha_pattern", _patterns(_number), {}),
            modules_to_save=self._take("modules_to_save", _names, ()),
            target_parameters=self._take("target_parameters", _names, ()),
            token_indices=self._take("trainable_token_indices", _token_indices, {}),
        )
        self._take("bias", _bias, "none")
        self._check_rest()
        if not self.problems and config.base_change and config.alpha <= 0:
            self.problems.append(f"lora_alpha is {config.alpha:g}, but {config.base_change} needs a positive one")
        return config

    def _required(self, key: str, parse: Any) -> Any:
        if self.rest.get(key) is None:
            self.rest.pop(key, None)
            self.problems.append(f"{key} is missing")
            return 1
        return self._take(key, parse, 1)

    def _take(self, key: str, parse: Any, default: Any) -> Any:
        value = self.rest.pop(key, None)
        if value is None:
            return default
        try:
            return parse(value)
        except ValueError as error:
            self.problems.append(f"{key} is {_show(value)}, but must be {error}")
            return default

    def _check_rest(self) -> None:
        for key, value in self.rest.items():
            shown = printable(key, 80)
            way_round = f"(if it does not change the weights: --config.model.ignored_config_keys={shown})"
            if key in _REFUSED and value not in (None, False, [], {}):
                self.problems.append(f"{shown} is {_show(value)}, which is not supported: {_REFUSED[key]} {way_round}")
            elif key not in _REFUSED and key not in _HARMLESS:
                self.problems.append(f"{shown} is not a known key {way_round}")


def _show(value: Any) -> str:
    return printable(repr(value), 60)


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _rank(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise ValueError(f"an integer from 1 to {MAX_RANK}")
    return value


def _number(value: Any) -> float:
    # Products of larger factors are not finite in float32.
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > 1e9:
        raise ValueError("a number from -1e9 to 1e9")
    return float(value)


def _bias(value: Any) -> str:
    if value not in ("none", "all", "lora_only"):
        raise ValueError("none, all or lora_only")
    return str(value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise ValueError("a list of names")
    return tuple(value)


def _initialisation(value: Any) -> str:
    """Return what the base weights lose; only the name of an initialisation says that PEFT changes them."""
    if isinstance(value, bool):
        return ""
    if isinstance(value, str):
        # PEFT writes "pissa" and the others in small letters, and compares some of them so.
        for name, reason in _REFUSED_INITIALISATIONS.items():
            if value.lower().startswith(name):
                way_round = "if the base is already the changed one: --config.model.ignored_config_keys=init_lora_weights"
                raise ValueError(f"another one: at loading {reason} ({way_round})")
        if value.lower() in _INITIALISATIONS:
            return _INITIALISATIONS[value.lower()]
    raise ValueError(f"true, false, {', '.join(_INITIALISATIONS)}")


def _patterns(parse: Any) -> Any:
    def parse_all(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("an object of patterns and values")
        for key in value:
            _check_pattern(key)
        return {key: parse(entry) for key, entry in value.items()}

    return parse_all


def _check_pattern(pattern: str) -> None:
    if len(pattern) > _MAX_PATTERN or _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > _MAX_REPEATS:
        raise ValueError(
            f"of patterns of at most {_MAX_PATTERN} characters, with at most {_MAX_REPEATS} repetitions and none of a group"
        )
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError):
        raise ValueError("of regular expressions") from None


def _token_indices(value: Any) -> dict[str, tuple[int, ...]]:
    by_module = value if isinstance(value, dict) else {"embed_tokens": value}
    for rows in by_module.values():
        is_list = isinstance(rows, list) and len(rows) <= MAX_TOKENS
        if not is_list or not all(type(row) is int and 0 <= row < 2**31 for row in rows) or len(set(rows)) < len(rows):
            raise ValueError("a list of different token ids, or an object of such lists")
    return {name: tuple(rows) for name, rows in by_module.items() if rows}
