"""The Python door to inference: prompts and chats to text, many at a time, on any mesh."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from qwen_dist.chat import Message, make_chat
from qwen_dist.checkpoint.load import ProgressCallback
from qwen_dist.config import KvCacheDtype, ModelOptions, Quantize, SamplingOptions, parse_bytes
from qwen_dist.engine.embeddings import embedding_request, unit_vector
from qwen_dist.engine.open import open_engine
from qwen_dist.engine.request import Request, RequestOutput, SamplingParams, TokenLogprob
from qwen_dist.errors import UsageError
from qwen_dist.runtime.backend import check_dtype

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
      text: without the token or text that ended it.
      token_ids: of the answer, with the token that ended it.
      finish_reason: "stop" after an end-of-text token or a stop string, "length" at `max_new_tokens` or the end of the
        context.
      prompt_token_ids: of the prompt, with the chat template applied.
      logprobs: of each token of the text, not of the one that ended it, if `SamplingParams.logprobs` asks for them.
      prompt_logprobs: of the prompt's tokens from the second on, if `SamplingParams.prompt_logprobs` asks for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-probabilities (nats) of a text's tokens from the second on, each given those before it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        return sum(self.logprobs)


class LLM:
    """A model with its tokenizer, ready to answer. Many prompts are answered at a time; one call runs at a time.

    Args:
      model: a directory in the Hugging Face format, a hub id such as `Qwen/Qwen3-0.6B`, or an address.
      mesh: devices per axis, such as `fsdp=2,tensor=4`; empty chooses for the model.
      dtype: of parameters and activations.
      adapter: a LoRA adapter in PEFT's format, merged into the weights if these are not quantised.
      quantize: keep the weights of linear layers and experts as the checkpoint has packed them ("stored"), dequantise them
        ("none"), or quantise them to "int8", "int4" or "fp8" while they load.
      quantize_group_size: in-features with one scale, 0 for all of a row; by default 32 for int4, 128 for int8, 0 for fp8.
      quantize_head: also the output weights, and so the embedding of a tied model, in int8.
      kv_cache_dtype: keys and values in the cache: as computed ("auto"), or "int8" or "fp8" with a scale for each head.
      load_format: "dummy" makes random weights and reads none.
      ignored_config_keys: unknown keys of the checkpoint's JSON files that do not change the computation.
      max_batch_size: the most prompts that are answered at the same time.
      kv_cache_memory: bound on what the layers keep between steps, on each device.
      policy: "throughput" starts the longest prompt first, "latency" the first.
      steps_per_dispatch: decode steps on the devices before the host reads the tokens.
      prefix_cache: compute the beginning that several prompts have only once, also from one call to the next.
      devices: of the mesh; default: all of jax.
      progress: called with bytes read and bytes in all while the weights load.

    Raises:
      UserError: the model cannot be loaded, or does not fit the mesh; the message says what to change.
    """

    def __init__(
        self,
        model: str,
        *,
        mesh: str = "",
        dtype: Literal["bfloat16", "float32", "float64"] = "bfloat16",
        adapter: str = "",
        quantize: Quantize = "stored",
        quantize_group_size: int | None = None,
        quantize_head: bool = False,
        kv_cache_dtype: KvCacheDtype = "auto",
        load_format: Literal["safetensors", "dummy"] = "safetensors",
        ignored_config_keys: Iterable[str] = (),
        max_batch_size: int = 32,
        kv_cache_memory: str = "4GB",
        policy: Literal["throughput", "latency"] = "throughput",
        steps_per_dispatch: int = 1,
        prefix_cache: bool = True,
        devices: Sequence[jax.Device] | None = None,
        progress: ProgressCallback | None = None,
    ):
        check_dtype(dtype)
        options = ModelOptions(
            str(model),
            dtype,
            ",".join(ignored_config_keys),
            load_format=load_format,
            adapter=str(adapter),
            quantize=quantize,
            quantize_group_size=quantize_group_size,
            quantize_head=quantize_head,
            kv_cache_dtype=kv_cache_dtype,
        )
        self._engine, self._tokenizer, self._defaults = open_engine(
            options,
            mesh,
            SamplingOptions(),
            max_batch_size=max_batch_size,
            cache_bytes=parse_bytes(kv_cache_memory),
            policy=policy,
            steps_per_dispatch=steps_per_dispatch,
            prefix_cache=prefix_cache,
            devices=devices,
            progress=progress,
        )

    @property
    def sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config.json says; used where a call gives no parameters."""
        return self._defaults

    @property
    def max_context(self) -> int:
        """The most tokens of prompt and answer together."""
        return self._engine.max_context

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._tokenizer.decode(token_ids)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """Continue prompts as they are, without the chat template.

        Args:
          prompts: a text or token ids, or a list of these.
          sampling_params: for all prompts, or one for each; default: those of the checkpoint.
          **changes: single fields of the parameters, such as `temperature=0`.

        Returns:
          A completion for each prompt, in order. An answer depends on its prompt alone, not on the others.

        Raises:
          UserError: a prompt is empty or too long, or a parameter is out of range.
        """
        ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        return self._answer(ids, self._params(sampling_params, changes, len(ids)))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """Answer conversations, in the checkpoint's chat template.

        Args:
          messages: `[{"role": "user", "content": …}, …]`, or a list of such conversations.
          sampling_params: as in `generate`.
          tools: JSON schemas of functions that the model may call.
          template_variables: variables of the template, such as `{"enable_thinking": False}`.
          **changes: as in `generate`.

        Returns:
          A completion for each conversation, in order.

        Raises:
          UserError: as in `generate`, or the messages do not fit the template.
        """
        chats = [messages] if messages and isinstance(messages[0], Mapping) else messages
        ids = [self._encode_chat(chat, tools, template_variables) for chat in chats]  # type: ignore[arg-type]
        return self._answer(ids, self._params(sampling_params, self._ending(changes), len(ids)))

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Iterator[str]:
        """Yield the answer to one prompt, or to one conversation, as its text becomes final. Arguments as above."""
        if isinstance(prompt, str) or not isinstance(prompt[0], Mapping):
            ids = self._encode(prompt)  # type: ignore[arg-type]
        else:
            ids, changes = self._encode_chat(prompt, None, template_variables), self._ending(changes)  # type: ignore[arg-type]
        params = self._params(sampling_params, changes, 1)
        return (output.text for output in self._run([ids], params) if output.text)

    def score(self, texts: Prompt | Sequence[Prompt]) -> list[Score]:
        """Return the log-probability of each token of texts (or token ids) from the second on."""
        ids = [self._encode(text) for text in _as_list(texts)]
        params = SamplingParams(max_new_tokens=0, prompt_logprobs=0)
        answers = self._answer(ids, [params] * len(ids))
        return [Score(one.prompt_token_ids, tuple(token.logprob for token in one.prompt_logprobs)) for one in answers]

    def embed(self, texts: Prompt | Sequence[Prompt], dimensions: int | None = None) -> np.ndarray:
        """Return an embedding of the length 1 for each text (or token ids), as Qwen3-Embedding models make them.

        Args:
          texts: as they are; a query of Qwen3-Embedding begins with its instruction.
          dimensions: of the embeddings; None for all that the model has.

        Returns:
          float32 [texts, dimensions].
        """
        ids = [self._encode(text) for text in _as_list(texts)]
        requests = [embedding_request(index, tokens, self._tokenizer, self.max_context) for index, tokens in enumerate(ids)]
        vectors = {output.request.key: unit_vector(output.embedding, dimensions) for output in self._checked(requests)}
        return np.stack([vectors[index] for index in range(len(ids))])

    def _encode(self, prompt: Prompt) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return tuple(map(int, prompt))
        self._tokenizer.check_length(prompt, self.max_context)
        return tuple(self._tokenizer.encode(prompt))

    def _encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        template_variables: Mapping[str, Any] | None,
    ) -> tuple[int, ...]:
        chat = make_chat(messages, tools, dict(template_variables or {}))
        return tuple(self._tokenizer.encode_prompt(chat, self.max_context))

    def _ending(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the changes with the tokens that end a turn of a chat."""
        return {"stop_token_ids": self._tokenizer.chat_stop_ids} | dict(changes)

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, changes: Mapping[str, Any], count: int
    ) -> list[SamplingParams]:
        if unknown := changes.keys() - {field.name for field in dataclasses.fields(SamplingParams)}:
            raise UsageError(f"{', '.join(sorted(unknown))} is not a sampling parameter; see SamplingParams")
        if given is None or isinstance(given, SamplingParams):
            given = [self._defaults if given is None else given] * count
        if len(given) != count:
            raise UsageError(f"there are {count} prompts and {len(given)} sampling parameters")
        return [params.override(changes) for params in given]

    def _answer(self, prompts: Sequence[tuple[int, ...]], params: Sequence[SamplingParams]) -> list[Completion]:
        outputs: list[list[RequestOutput]] = [[] for _ in prompts]
        for output in self._run(prompts, params):
            outputs[output.request.key].append(output)
        return [_completion(updates) for updates in outputs]

    def _run(self, prompts: Sequence[tuple[int, ...]], params: Sequence[SamplingParams]) -> Iterator[RequestOutput]:
        """Answer the prompts."""
        return self._checked(
            [Request(index, ids, one) for index, (ids, one) in enumerate(zip(prompts, params, strict=True))]
        )

    def _checked(self, requests: Sequence[Request]) -> Iterator[RequestOutput]:
        """Run requests; all are checked before the first is run."""
        if not self._engine.is_idle:
            raise UsageError("this LLM is answering another call: finish that one first, or close its stream")
        for request in requests:
            self._engine.check(request)
        return self._engine.run(requests)


def _as_list(prompts: Any) -> Sequence[Prompt]:
    """Return a list of prompts: a text is one, and so are token ids."""
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and not isinstance(prompts[0], str | Sequence))
    return [prompts] if is_one else prompts


def _completion(updates: Sequence[RequestOutput]) -> Completion:
    last = updates[-1]
    assert last.finish_reason is not None
    return Completion(
        "".join(update.text for update in updates),
        tuple(itertools.chain.from_iterable(update.tokens for update in updates)),
        last.finish_reason,
        last.request.prompt,
        tuple(itertools.chain.from_iterable(update.logprobs for update in updates)),
        last.prompt_logprobs,
    )
