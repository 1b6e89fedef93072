"""The sampling parameters of a checkpoint, read strictly from its `generation_config.json`, as transformers reads it.

A key sets a parameter, is known not to change what is generated, or is an error. null is "not given". No jax.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qwen_dist.engine.request import SamplingParams
from qwen_dist.errors import UsageError, printable
from qwen_dist.json_reader import keys_within, unusable_keys
from qwen_dist.storage.model_files import ModelFiles, ModelName

FILE_NAME = "generation_config.json"
# What transformers applies if `do_sample` is true and the file does not say.
_DEFAULTS = {"temperature": 1.0, "top_k": 50}
_MAX_SEQUENCES = 10_000

# Keys that do not change the tokens of a decoder that samples or is greedy.
_HARMLESS = frozenset(
    """_commit_hash _from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bos_token_id cache_config chat_format compile_config continuous_batching_config
    decoder_start_token_id disable_compile early_stopping eos_token_id is_assistant length_penalty low_memory
    max_cache_len max_matching_ngram_size max_window_size num_assistant_tokens num_assistant_tokens_schedule
    output_attentions output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits return_dict_in_generate speculation_type
    target_lookbehind transformers_version use_cache use_mtp""".split()
)
# Keys that would change the tokens unless they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window"),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
    "typical_p": (1,),
}


def read_generation_config(model: ModelName, ignored_keys: Iterable[str] = ()) -> SamplingParams:
    """Return the parameters of a model; see `read_sampling_params`."""
    return read_sampling_params(ModelFiles.open(model).read_object(FILE_NAME) or {}, ignored_keys)


def read_sampling_params(generation: Mapping[str, Any], ignored_keys: Iterable[str] = ()) -> SamplingParams:
    """Return the parameters of the parsed file. Without `do_sample` they are greedy, whatever the temperature.

    Args:
      generation: the parsed file.
      ignored_keys: keys that are not read.

    Raises:
      CheckpointError: listing every key that is unknown, unsupported or mistyped.
    """
    ignored = keys_within("generation_config", ignored_keys)
    left = {key: value for key, value in generation.items() if value is not None and key not in ignored}
    problems: list[str] = []
    values: dict[str, Any] = {}
    for key, (is_valid, kind) in _KINDS.items():
        if key in left:
            value = left.pop(key)
            if is_valid(value):
                values[key] = value
            else:
                problems.append(f"{key} is {_shown(value)}; it must be {kind}")
    problems += _refused(left)
    try:
        params = SamplingParams(**_params(values, generation))
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise unusable_keys(FILE_NAME, problems)
    return params


def _params(values: dict[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `SamplingParams`."""
    values = dict(values)
    if values.pop("do_sample", False):
        values = _DEFAULTS | values
    else:
        for key in ("temperature", "top_k", "top_p", "min_p"):
            values.pop(key, None)
    if "top_p" in values:
        values["top_p"] = min(values["top_p"], 1.0)
    stops = values.pop("stop_strings", ())
    values["stop"] = (stops,) if isinstance(stops, str) else tuple(stops)
    # A limit on the answer replaces one on prompt and answer together.
    if "min_new_tokens" in values:
        values.pop("min_length", None)
    if "max_new_tokens" in values:
        values.pop("max_length", None)
    elif "max_length" in values:
        values["max_new_tokens"] = values["max_length"]
    values["begin_suppress_tokens"] = tuple(values.pop("begin_suppress_tokens", ()))
    values["sequence_bias"] = tuple(_sequence_bias(values, generation.get("eos_token_id")))
    return values


def _sequence_bias(values: dict[str, Any], eos_token_id: Any) -> list[tuple[tuple[int, ...], float]]:
    """Remove the keys that bias or ban sequences; return them as (token ids, bias) pairs."""
    eos_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    biased = {tuple(ids): float(bias) for ids, bias in values.pop("sequence_bias", ())}
    # transformers leaves the end of text possible, whatever `bad_words_ids` says.
    banned = [tuple(ids) for ids in values.pop("bad_words_ids", ()) if ids not in [[id] for id in eos_ids]]
    banned += [(token,) for token in values.pop("suppress_tokens", ())]
    return [*biased.items(), *((ids, float("-inf")) for ids in dict.fromkeys(banned))]


def _refused(left: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the keys that set no parameter."""
    problems = []
    for key, value in left.items():
        if key in _HARMLESS or value is False or (value is not True and value in _NEUTRAL.get(key, ())):
            continue
        if key in _NEUTRAL:
            allowed = " or ".join(map(repr, _NEUTRAL[key]))
            problems.append(f"{key} is {_shown(value)}, which is not supported; supported is {allowed}")
        else:
            problems.append(f"{printable(key, 80)} = {_shown(value)} is not supported and may change what is generated")
    return problems


def _shown(value: Any) -> str:
    return printable(json.dumps(value), 80)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_top_k(value: Any) -> bool:
    return _is_count(value) or (value == -1 and isinstance(value, int))


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_SEQUENCES and all(_is_count(id) and id < 2**31 for id in value)


def _are_sequences(value: Any) -> bool:
    is_list = isinstance(value, list) and 0 < len(value) <= _MAX_SEQUENCES
    return is_list and all(_are_ids(ids) and 0 < len(ids) <= 64 for ids in value)


def _are_biased(value: Any) -> bool:
    is_list = isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return is_list and _are_sequences([ids for ids, _ in value]) and all(_is_number(bias) for _, bias in value)


def _are_stops(value: Any) -> bool:
    stops = value if isinstance(value, list) else [value]
    return all(isinstance(stop, str) and stop for stop in stops)


_Kind = tuple[Callable[[Any], bool], str]
_NUMBER: _Kind = (_is_number, "a number")
_COUNT: _Kind = (_is_count, "a whole number, 0 or more")
_IDS: _Kind = (_are_ids, f"a list of at most {_MAX_SEQUENCES} token ids")

# The keys that set a parameter, each with its check.
_KINDS: dict[str, _Kind] = {
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "temperature": _NUMBER,
    "top_k": (_is_top_k, "a whole number, 0 or more"),
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "repetition_penalty": _NUMBER,
    "no_repeat_ngram_size": _COUNT,
    "max_new_tokens": _COUNT,
    "max_length": _COUNT,
    "min_new_tokens": _COUNT,
    "min_length": _COUNT,
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "bad_words_ids": (_are_sequences, f"a list of 1 to {_MAX_SEQUENCES} lists of 1 to 64 token ids"),
    "sequence_bias": (_are_biased, "a list of [token ids, bias] pairs"),
    "stop_strings": (_are_stops, "a non-empty string or a list of them"),
}
