"""lm-eval's tasks on an `LLM`: the model type `qwen_dist` (extra `eval`).

    python -m qwen_dist.evaluation --model qwen_dist --model_args pretrained=DIR,dtype=float32 --tasks hellaswag

All arguments are those of lm-eval, in which importing this module registers the type. Scores are those of lm-eval's type
`hf` in the same dtype, up to rounding; long texts are scored in windows of the model's context less two tokens.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, maybe_truncate, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qwen_dist.engine.request import SamplingParams
from qwen_dist.errors import UsageError
from qwen_dist.llm import LLM
from qwen_dist.tokenizer import Tokenizer

_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")


@register_model("qwen_dist")
class EvaluatedLLM(TemplateLM):
    """What lm-eval asks of a model. It gets all requests of a task at once, and `LLM` batches them.

    Args:
      pretrained: the model, as `LLM` takes it.
      dtype, mesh, adapter, kv_cache_memory: of `LLM`.
      batch_size: the most requests at a time; "auto" is 32.
      max_gen_toks: the most tokens of an answer whose task does not say.
      max_batch_size, device: from lm-eval's command line, not used.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: Any = "bfloat16",
        mesh: str = "",
        adapter: str = "",
        kv_cache_memory: str = "4GB",
        batch_size: int | str = 32,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        number = 32 if str(batch_size).startswith("auto") else int(batch_size)
        sizes: dict[str, Any] = {"max_batch_size": number, "kv_cache_memory": kv_cache_memory}
        self._llm, self._name = LLM(pretrained, dtype=dtype, mesh=mesh, adapter=adapter, **sizes), str(pretrained)
        self._tokenizer = Tokenizer.open(self._name)
        self.max_length, self.max_gen_toks = self._llm.max_context - 1, int(max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self._tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self._tokenizer.render_chat(chat_history, add_generation_prompt)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows without overlap that fit the context."""
        windows: list[Any] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            of_text = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in of_text]
            owners += [owner] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        """Return of each (key, context, continuation) the continuation's log-probability, and whether it is greedy."""
        texts = [(context + continuation)[-self.max_length :] for _, context, continuation in requests]
        scored = self._llm.generate(texts, SamplingParams(max_new_tokens=0, prompt_logprobs=1))
        results = []
        for (key, _, continuation), answer in zip(requests, scored, strict=True):
            entries = answer.prompt_logprobs[max(0, len(answer.prompt_logprobs) - len(continuation)) :]
            result = sum(entry.logprob for entry in entries), all(entry.token == entry.top[0][0] for entry in entries)
            results.append(result)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the answer to each text, up to the first of its task's stops."""
        prompts, params, stops = [], [], []
        for text, given in (request.args for request in requests):
            settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            stops.append(handle_stop_sequences(settings.pop("until", None), eos=None))
            number, sampled = int(settings.pop("max_gen_toks")), settings.pop("do_sample", False)
            changes = {"temperature": settings.pop("temperature", 1.0) if sampled else 0.0, "max_new_tokens": number}
            changes |= {name: settings.pop(name) for name in _SAMPLING if name in settings} if sampled else {}
            unknown = settings.keys() - {*_SAMPLING, "temperature", "use_cache"}
            if unknown:
                raise UsageError(f"lm-eval asks for {', '.join(sorted(unknown))}, which is not supported")
            params.append(self._llm.sampling_params.override(changes | {"stop": [stop for stop in stops[-1] if stop]}))
            prompts.append(maybe_truncate(self.tok_encode(text), number, self.max_length, verbose=False)[0])
        answers = self._llm.generate(prompts, params) if prompts else []
        texts = [postprocess_generated_text(one.text, stop, None) for one, stop in zip(answers, stops, strict=True)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
