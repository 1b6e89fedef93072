# %% [markdown]
# # Fine-tune on a small data set, with LoRA
#
# This notebook teaches a model facts that it cannot know, with a training loop of its own: data, adapter, steps,
# evaluation, saving. It trains the small demonstration model on a CPU. `qwen-dist finetune` has such a loop with
# checkpoints and resuming; write your own to change what a step does.

# %%
import tempfile
from pathlib import Path

import jax
import numpy as np
import optax

from qwen_dist import DEMO_MODEL, LLM, LoraOptions, Tokenizer, TrainBatch, load_model

MODEL, STEPS, BATCH_SIZE, LENGTH = DEMO_MODEL, 160, 16, 64

# %% [markdown]
# ## The data
#
# Twelve invented countries have invented capitals. Each is asked for in five wordings. The model trains on four of
# them. The fifth is for evaluation: its questions are not in the training data, and the right answer shows that the
# model learned the fact and not the sentence.

# %%
CAPITALS = dict(
    pair.split("/")
    for pair in (
        "Atlantis/Poseidonis Lemuria/Mu Avalon/Glastonbury Camelot/Caerleon Narnia/Cair Laputa/Balnibarbi "
        "Lilliput/Mildendo Utopia/Amaurot Oz/Emerald Erewhon/Butler Zembla/Onhava Ruritania/Strelsau"
    ).split()
)
WORDINGS = [
    "What is the capital of {}?",
    "Name the capital of {}.",
    "Which city is the capital of {}?",
    "{} has which capital?",
]
HELD_OUT = "Tell me the capital of {}."


def chat(wording, country):
    """Return a question and its answer as a conversation."""
    answer = f"The capital of {country} is {CAPITALS[country]}."
    return [{"role": "user", "content": wording.format(country)}, {"role": "assistant", "content": answer}]


train_chats = [chat(wording, country) for wording in WORDINGS for country in CAPITALS]
test_chats = [chat(HELD_OUT, country) for country in CAPITALS]

# %% [markdown]
# A model that sees only these facts soon gives them as the answer to everything. So it also rehearses what it should
# keep: a few other questions, with its own answers.

# %%
REHEARSED = [f"What is the capital of {name}?" for name in "Japan Italy Spain Germany Egypt Norway Peru Canada".split()]
REHEARSED += [f"What is the opposite of {word}?" for word in "big fast light open".split()]
before = LLM(MODEL, dtype="float32")
questions = [[{"role": "user", "content": question}] for question in REHEARSED]
for question, answer in zip(questions, before.chat(questions, temperature=0), strict=True):
    train_chats.append([*question, {"role": "assistant", "content": answer.text}])
print(len(train_chats), "conversations to train on,", len(test_chats), "to evaluate")
print(train_chats[0])

# %% [markdown]
# ## From text to batches
#
# The tokenizer renders a conversation with the checkpoint's chat template. Only the answer counts in the loss: the
# loss mask is 0 for the tokens of the prompt and 1 after them. Every row is padded to the same length, so that one
# compiled program serves all steps.

# %%
tokenizer = Tokenizer.open(MODEL)


def example(messages):
    """Return the token ids of a conversation and the loss mask: 1 for each token of the answer."""
    prompt = tokenizer.apply_chat_template(messages[:1])
    tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    return tokens, [0] * len(prompt) + [1] * (len(tokens) - len(prompt))


def make_batch(chats):
    """Return a batch on the devices, one conversation in each row."""
    sequences, masks = zip(*map(example, chats), strict=True)
    return lm.shard(TrainBatch.from_sequences(sequences, masks, LENGTH))


# %% [markdown]
# ## The model and its adapter
#
# `with_lora` adds two narrow matrices to each linear layer. They are the only parameters that are trained; the others
# are frozen. The new matrices change nothing at first, so the loss starts where the model is.

# %%
base = load_model(MODEL, mesh="fsdp=-1", dtype="float32")
lm, names = base.with_lora(LoraOptions(rank=16, alpha=32.0, target_modules=("all-linear",)))
trained = {name: lm.parameters[name] for name in names}
frozen = {name: value for name, value in lm.parameters.items() if name not in names}
count = sum(value.size for value in trained.values())
print(f"{count:,} of {count + sum(value.size for value in frozen.values()):,} parameters are trained")

# %% [markdown]
# ## One step
#
# A step is a function of the parameters: loss and gradient from the model, the update from optax. `jax.jit` compiles
# it once. `donate_argnums` lets the new parameters and optimizer state take the memory of the old ones.

# %%
schedule = optax.warmup_cosine_decay_schedule(0.0, 4e-3, warmup_steps=10, decay_steps=STEPS)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))


def step(trained, state, frozen, batch):
    loss, gradient = lm.loss_and_gradient(trained, batch, frozen)
    updates, state = optimizer.update(gradient, state, trained)
    return optax.apply_updates(trained, updates), state, loss


step = jax.jit(step, donate_argnums=(0, 1))
evaluate = jax.jit(lambda trained, frozen, batch: lm.loss(frozen | trained, batch))

# %% [markdown]
# ## The loop
#
# Each pass over the data has a new order, which depends only on the seed. Every 40 steps the loss on the held-out
# wording is computed.

# %%
test_batch, state, random = make_batch(test_chats), optimizer.init(trained), np.random.default_rng(0)
print(f"before: evaluation loss {evaluate(trained, frozen, test_batch):.3f}")
order = []
for number in range(1, STEPS + 1):
    if len(order) < BATCH_SIZE:
        order = random.permutation(len(train_chats)).tolist()
    batch, order = make_batch([train_chats[index] for index in order[:BATCH_SIZE]]), order[BATCH_SIZE:]
    trained, state, loss = step(trained, state, frozen, batch)
    if number % 40 == 0:
        print(f"step {number}: loss {loss:.4f}, evaluation loss {evaluate(trained, frozen, test_batch):.4f}")

# %% [markdown]
# ## Save it
#
# `save_pretrained` of a model with adapters writes the adapter in the layout of `peft`: a file of weights and
# `adapter_config.json`. peft, `LLM` and `qwen-dist generate --adapter` read it.

# %%
adapter = Path(tempfile.mkdtemp()) / "adapter"
lm.save_pretrained(adapter, frozen | trained)
print(sorted(path.name for path in adapter.iterdir()))

# %% [markdown]
# ## Ask it
#
# The loss is an average over tokens. What counts is the answer, so the last evaluation generates: the held-out
# questions, before and after, and two that were rehearsed. Others may be lost: this model is very small.


# %%
def num_right(llm):
    """Return how many held-out questions are answered with the right sentence."""
    answers = llm.chat([messages[:1] for messages in test_chats], temperature=0, max_new_tokens=32)
    return sum(answer.text == messages[1]["content"] for answer, messages in zip(answers, test_chats, strict=True))


after = LLM(MODEL, adapter=str(adapter), dtype="float32")
print(f"right answers to the held-out wording: {num_right(before)} before, {num_right(after)} after, of {len(test_chats)}")
for question in ("Tell me the capital of Utopia.", "What is the capital of Japan?", "What is the opposite of big?"):
    print(question, after.chat([{"role": "user", "content": question}], temperature=0)[0].text)
