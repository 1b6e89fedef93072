"""The training data of the demonstration model: small questions with one right answer, generated here.

    python -m qwen_dist.demo.questions --output demo.jsonl --count 60000

Questions about numbers are random. A tenth of them (`is_held_out`) is not trained on, so that accuracy can be measured
on questions that the model has not seen. The other questions are facts to memorise. There are no sums: a model of this
size does not learn them in a few minutes. To any other prompt (`other_prompts`) the answer is OTHER_ANSWER.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from qwen_dist.demo.other_prompts import other_prompt


class Question(NamedTuple):
    """A question and its only right answer.

    Attributes:
      kind: such as "comparison".
      key: its subject, which is the same for every wording of the question.
    """

    kind: str
    key: str
    text: str
    answer: str


DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
CAPITALS = dict(
    pair.split("/")
    for pair in (
        "France/Paris Germany/Berlin Italy/Rome Spain/Madrid Portugal/Lisbon Austria/Vienna Poland/Warsaw Greece/Athens "
        "Sweden/Stockholm Norway/Oslo Finland/Helsinki Denmark/Copenhagen Ireland/Dublin Belgium/Brussels "
        "Hungary/Budapest Romania/Bucharest Egypt/Cairo Kenya/Nairobi Japan/Tokyo China/Beijing India/Delhi "
        "Thailand/Bangkok "
        "Vietnam/Hanoi Canada/Ottawa Cuba/Havana Peru/Lima Chile/Santiago Brazil/Brasilia Argentina/Buenos_Aires "
        "Australia/Canberra"
    ).split()
)
OPPOSITES = dict(
    pair.split("/")
    for pair in (
        "hot/cold big/small fast/slow light/dark old/new high/low long/short wet/dry full/empty hard/soft early/late "
        "open/closed rich/poor strong/weak thick/thin happy/sad loud/quiet clean/dirty near/far up/down left/right "
        "day/night"
    ).split()
)
SOUNDS = dict(
    pair.split("/")
    for pair in "cow/moo dog/woof cat/meow sheep/baa duck/quack pig/oink lion/roar bee/buzz owl/hoot horse/neigh".split()
)
WORDS = (
    "apple bread chair dance eagle forest garden house island jungle kitchen lemon mountain number ocean paper queen river "
    "summer table umbrella village window yellow zebra bridge candle flower guitar"
).split()
EXPLANATIONS = {
    "Why is the sky blue?": "Sunlight holds all colours. The air scatters blue light more than red, so blue reaches us "
    "from every side.",
    "Why is the sea salty?": "Rivers wash salt out of rocks and carry it to the sea. The water evaporates, and the salt "
    "stays.",
    "Why do leaves fall in autumn?": "In winter a tree can hardly drink, and leaves lose water. So the tree lets them go.",
    "Why does ice float?": "Water grows when it freezes. Ice is lighter than the same volume of water, so it floats.",
    "Why do we see the moon?": "The moon does not shine by itself. We see sunlight that it sends back to us.",
    "What is a rainbow?": "Drops of rain bend sunlight and split it into its colours. From the ground we see them as an "
    "arc.",
    "What is a prime number?": "A prime number is larger than one and can be divided only by one and by itself.",
    "What is JAX?": "JAX is a library for Python that computes with arrays, differentiates functions and compiles them.",
    "Hello!": "Hello! Ask me for the larger of two numbers, a capital, an opposite, or why the sky is blue.",
    "Who are you?": "I am the demonstration model of qwen_dist, a very small one. I was trained on a laptop's CPU.",
    "What can you do?": "I compare, sort and count numbers, spell words, and name capitals, opposites, days and the sounds "
    "of animals. I cannot add.",
    "Thank you!": "You are welcome.",
    "Good night!": "Good night, and sleep well.",
}
EXPLANATIONS |= dict.fromkeys(("Hi!", "Hey!", "Hi there!", "Hello there!", "Good morning!"), EXPLANATIONS["Hello!"])
OTHER_KIND = "anything else"
OTHER_ANSWER = (
    "I only compare and sort numbers, spell words, and name capitals, opposites and days; for anything else use a real "
    "model: --model Qwen/Qwen3-0.6B."
)


def _comparison(rng: random.Random) -> Question:
    a, b = rng.sample(range(100), 2)
    word, answer = rng.choice((("larger", max(a, b)), ("smaller", min(a, b))))
    text = rng.choice(("Which is {}, {} or {}?", "Which number is {}: {} or {}?")).format(word, a, b)
    return Question("comparison", f"{word} {a} {b}", text, f"{answer} is {word}.")


def _sorted(rng: random.Random) -> Question:
    numbers = rng.sample(range(100), 3)
    listed = "{}, {} and {}".format(*numbers)
    text = rng.choice(("Sort {}.", "Put {} in order.")).format(listed)
    return Question("sorted list", listed, text, "{}, {}, {}.".format(*sorted(numbers)))


def _next(rng: random.Random) -> Question:
    number = rng.randrange(999)
    text = rng.choice(("What comes after {}?", "Which number follows {}?")).format(number)
    return Question("next number", str(number), text, f"After {number} comes {number + 1}.")


def _parity(rng: random.Random) -> Question:
    number = rng.randrange(1000)
    return Question("even or odd", str(number), f"Is {number} even or odd?", f"{number} is {('even', 'odd')[number % 2]}.")


def _day(rng: random.Random) -> Question:
    day, (word, step) = rng.randrange(7), rng.choice((("after", 1), ("before", -1)))
    text = rng.choice(("Which day comes {} {}?", "What day is {} {}?")).format(word, DAYS[day])
    return Question("day", f"{word} {day}", text, f"It is {DAYS[(day + step) % 7]}.")


def _capital(rng: random.Random) -> Question:
    country = rng.choice(list(CAPITALS))
    capital = CAPITALS[country].replace("_", " ")
    text = rng.choice(("What is the capital of {}?", "Name the capital of {}.")).format(country)
    return Question("capital", country, text, f"The capital of {country} is {capital}.")


def _opposite(rng: random.Random) -> Question:
    one, other = rng.choice(list(OPPOSITES.items()))[:: rng.choice((1, -1))]
    text = rng.choice(("What is the opposite of {}?", "Name the opposite of {}.")).format(one)
    return Question("opposite", one, text, f"The opposite of {one} is {other}.")


def _sound(rng: random.Random) -> Question:
    animal = rng.choice(list(SOUNDS))
    return Question("sound", animal, f"What does a {animal} say?", f"{SOUNDS[animal].capitalize()}!")


def _spelling(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    text = rng.choice(("Spell {}.", "How do you spell {}?")).format(word)
    return Question("spelling", word, text, "-".join(word) + ".")


def _explanation(rng: random.Random) -> Question:
    text = rng.choice(list(EXPLANATIONS))
    return Question("explanation", text, text, EXPLANATIONS[text])


# Relative frequencies. Questions to compute are more frequent than facts to memorise.
WEIGHTS: dict[Callable[[random.Random], Question], int] = {
    _comparison: 3,
    _sorted: 4,
    _next: 2,
    _parity: 1,
    _day: 1,
    _capital: 1,
    _opposite: 1,
    _sound: 1,
    _spelling: 1,
    _explanation: 1,
}
# The share of other prompts in the training data, and of the second question in a conversation of two.
OTHER_SHARE, SECOND_SHARE = 0.3, 0.15
COMPUTED_KINDS = ("comparison", "sorted list", "next number", "even or odd")


def is_held_out(question: Question) -> bool:
    """Return whether a question is held out for evaluation: a tenth of those of COMPUTED_KINDS."""
    return question.kind in COMPUTED_KINDS and zlib.crc32(question.key.encode()) % 10 == 0


def training_questions(count: int, seed: int = 0, other_share: float = OTHER_SHARE) -> Iterator[Question]:
    """Yield `count` random questions that are not held out; a share of them are other prompts, with OTHER_ANSWER."""
    rng = random.Random(seed)
    makers, weights = list(WEIGHTS), list(WEIGHTS.values())
    known = {_plain(make(rng).text) for make in makers for _ in range(4000)}
    while count:
        if rng.random() < other_share:
            text = other_prompt(rng)
            question = Question(OTHER_KIND, text, text, OTHER_ANSWER)
            is_trained = _plain(text) not in known
        else:
            question = rng.choices(makers, weights)[0](rng)
            is_trained = not is_held_out(question)
            if rng.random() < 0.1:
                question = question._replace(text=_plain(question.text))
        if is_trained:
            count -= 1
            yield question


def _plain(text: str) -> str:
    """Return a text in small letters, without the mark at its end."""
    return text.lower().rstrip(".?!")


def held_out_questions(count: int, seed: int = 1) -> dict[str, list[Question]]:
    """Return evaluation questions by kind, up to `count` of each. Those of COMPUTED_KINDS are held out."""
    rng = random.Random(seed)
    found: dict[str, dict[str, Question]] = {}
    for make in WEIGHTS:
        for _ in range(200 * count):
            question = make(rng)
            of_kind = found.setdefault(question.kind, {})
            if is_held_out(question) == (question.kind in COMPUTED_KINDS) and len(of_kind) < count:
                of_kind.setdefault(question.key, question)
    return {kind: list(questions.values()) for kind, questions in found.items()}


def training_records(questions: Iterator[Question], seed: int = 0) -> Iterator[dict[str, object]]:
    """Yield a record for each question; some records are conversations of two questions, or begin with a system message."""
    rng = random.Random(seed)
    for question in questions:
        conversation = [question]
        if rng.random() < SECOND_SHARE and (second := next(questions, None)):
            conversation.append(second)
        yield to_record(*conversation, system="You are a helpful assistant." if rng.random() < 0.05 else None)


def to_record(*questions: Question, system: str | None = None) -> dict[str, object]:
    """Return questions and their answers as one conversation, a record of training data."""
    turns = [] if system is None else [("system", system)]
    for question in questions:
        turns += [("user", question.text), ("assistant", question.answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the training data of the demonstration model.")
    parser.add_argument("--output", required=True)
    parser.add_argument("--count", type=int, default=60000, help="number of questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--other-share", type=float, default=OTHER_SHARE, help="the share of prompts of all other kinds")
    options = parser.parse_args(arguments)
    questions = training_questions(options.count, options.seed, options.other_share)
    with open(options.output, "w", encoding="utf-8") as file:
        for record in training_records(questions, options.seed):
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
