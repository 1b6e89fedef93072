# %% [markdown]
# # A tour of the library
#
# This notebook loads a model, generates with it, scores texts, looks at what it computes inside, and compares it with
# PyTorch. It needs no accelerator and no network: the model is the small demonstration model of the package. Put a
# directory or a hub id such as `Qwen/Qwen3-0.6B` in its place to use another one.

# %%
import jax
import numpy as np

from qwen_dist import DEMO_MODEL, LLM, SamplingParams, Tokenizer, load_model
from qwen_dist.capture import capture

MODEL = DEMO_MODEL

# %% [markdown]
# ## Load and generate
#
# `LLM` holds the weights, the tokenizer and the engine. `chat` puts the messages into the checkpoint's chat template.
# It takes one conversation or a list of them, and answers many at a time. The settings of sampling come from the
# checkpoint, and arguments change them.

# %%
llm = LLM(MODEL, dtype="float32")
questions = ["What is the capital of France?", "What is the opposite of hot?", "Which is larger, 42 or 17?"]
for question, answer in zip(
    questions, llm.chat([[{"role": "user", "content": question}] for question in questions], temperature=0), strict=True
):
    print(f"{question} {answer.text}  ({answer.finish_reason}, {len(answer.token_ids)} tokens)")

# %% [markdown]
# `generate` continues a text as it is, without the template. Here the text is a rendered conversation with the
# beginning of an answer, so the model has to finish the sentence. A sampled answer depends on its prompt and its
# seed, and not on the other prompts of the call. `stream` yields the text of one answer while it is computed.

# %%
tokenizer = Tokenizer.open(MODEL)
prompt = tokenizer.render_chat([{"role": "user", "content": "What is the capital of France?"}])
sampled = SamplingParams(max_new_tokens=12, temperature=0.8, top_p=0.9, seed=3)
alone = llm.generate(prompt + "The capital", sampled)[0].text
together = llm.generate([prompt + "The capital", "One, two,"], sampled)[0].text
print("sampled:", repr(alone), "and the same beside another prompt:", alone == together)
print("stream: ", *llm.stream([{"role": "user", "content": "What is the capital of Japan?"}], temperature=0), sep="|")

# %% [markdown]
# ## Score
#
# `score` returns the log-probability of each token of a text, given the tokens before it. So it says which of two
# texts the model finds more probable. Here it compares four possible answers to one question, by the tokens of the
# answer alone.

# %%
answers = [f"The capital of France is {city}." for city in ("Paris", "Rome", "Berlin", "London")]
num_prompt_tokens = len(tokenizer.encode(prompt))
for answer, score in zip(answers, llm.score([prompt + answer for answer in answers]), strict=True):
    # The first log-probability is that of the second token.
    print(f"{sum(score.logprobs[num_prompt_tokens - 1 :]):8.2f}  {answer}")

# %% [markdown]
# ## The model as a function
#
# `load_model` returns the model without an engine: its parameters are a dict of arrays, under the checkpoint's names,
# and `logits` is a function of the parameters that `jax.jit` and `jax.grad` take. Letters name the dimensions: B
# rows, T tokens, N heads, D channels, V vocabulary.

# %%
lm = load_model(MODEL, mesh="data=1", dtype="float32")
for name in list(lm.parameters)[:4]:
    print(name, lm.parameters[name].shape)
text = prompt + "The capital of France is"
tokens_BT = np.array([tokenizer.encode(text)])
logits_BTV = lm(tokens_BT)
print("logits", logits_BTV.shape, "→ the next token is", repr(tokenizer.decode([int(logits_BTV[0, -1].argmax())])))

# %% [markdown]
# ## Look inside
#
# The model gives each of its intermediates a name. Inside `capture()` they are collected; outside, nothing changes. A
# captured value belongs to the traced function, so return it from there.


# %%
@jax.jit
def forward(parameters, tokens_BT, replacing):
    """Return the logits [B, T, V] and all intermediates by name; `replacing` are values to continue with instead."""
    with capture(replacing) as taps:
        logits_BTV = lm.logits(parameters, tokens_BT)
    return logits_BTV, taps


logits_BTV, taps = forward(lm.parameters, tokens_BT, {})
for name in [name for name in taps if name.startswith("layers.0.")]:
    print(f"{name:40} {taps[name].shape}")

# %% [markdown]
# **After which layer does the model know the answer?** The output of each layer has the size of the last one, so the
# final norm and the output matrix can be applied to it (the "logit lens"). The table shows the next token that each
# layer alone would give.

# %%
module = lm.module()
for layer in range(len(lm.config.layers)):
    x_BTD = taps[f"layers.{layer}.output"]
    probabilities = jax.nn.softmax(module.unembed(module.norm(x_BTD))[0, -1])
    best = int(probabilities.argmax())
    print(f"layer {layer}: {tokenizer.decode([best])!r:12} with probability {float(probabilities[best]):.3f}")

# %% [markdown]
# **Where does it look?** `queries_0.weights` are the attention weights [B, N, T, S] of the first block of queries:
# how much the query at T takes from the key at S. This prints the three tokens to which each head of the last layer
# gives most weight when the model predicts the next token.

# %%
weights_NS = np.asarray(taps[f"layers.{len(lm.config.layers) - 1}.self_attn.queries_0.weights"])[0, :, -1]
pieces = [tokenizer.decode([token], skip_special_tokens=False) for token in tokens_BT[0].tolist()]
for head, weights_S in enumerate(weights_NS):
    top = weights_S.argsort()[::-1][:3]
    print(f"head {head}:", ", ".join(f"{pieces[place]!r} {weights_S[place]:.2f}" for place in top))

# %% [markdown]
# **What changes the answer?** A capture can also replace an intermediate, and the model continues with the
# replacement. Here the same question is asked about Italy, and the output of one layer at the last token is taken
# from there into the run about France. The probability of each answer says how much of "which country" is at the last
# token after that layer.

# %%
other = text.replace("France", "Italy")
other_BT = np.array([tokenizer.encode(other)])
other_logits_BTV, other_taps = forward(lm.parameters, other_BT, {})
paris, rome = int(logits_BTV[0, -1].argmax()), int(other_logits_BTV[0, -1].argmax())
for layer in range(len(lm.config.layers)):
    name = f"layers.{layer}.output"
    mixed_BTD = taps[name].at[:, -1].set(other_taps[name][:, -1])
    patched_BTV, _ = forward(lm.parameters, tokens_BT, {name: mixed_BTD})
    found = jax.nn.softmax(patched_BTV[0, -1])
    shown = [f"{tokenizer.decode([token])!r} {float(found[token]):.3f}" for token in (paris, rome)]
    print(f"layer {layer} of Italy in the run of France:", ", ".join(shown))

# %% [markdown]
# ## Compare with PyTorch
#
# All of these intermediates are what PyTorch computes, to rounding. `run_parity` loads the checkpoint in
# `transformers` too and compares them one by one; `qwen-dist parity` is the same as a command. It needs the extra
# `parity` (torch and transformers).

# %%
from qwen_dist.parity.run import ParityOptions, run_parity  # noqa: E402

report = run_parity(ParityOptions(MODEL, dtype="float32", tokens=24))
for check in report.checks:
    if check.section == "whole model" and check.name.endswith((".output", "logits")):
        print(f"{check.name:20} ‖Δ‖/‖ref‖ {check.measured:.1e}, the bound is {check.limit:.0e}")
print(report.verdict())
