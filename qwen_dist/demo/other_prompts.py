"""Prompts that the demonstration model cannot answer: what a person may type first, and what looks like its own questions.

A model of this size learns the exact form of its questions only if all else differs from them in many ways. So prompts
are made of common words, of invented ones, of characters of many scripts, with and without grammar.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

NOUNS = (
    "answer apple army art baby ball bank bear bicycle bird boat book box brain brother bus cake car castle cheese child "
    "church city clock cloud coat coffee company computer country crime cup dance desk doctor door dragon dream earth egg "
    "engine essay film fire fish food football friend fruit future game garage ghost girl glass gold grandfather "
    "guitar hair hand heart history holiday honey horse hospital hour idea internet job kettle key king kitchen knife lake "
    "language law letter library life lock machine magic market metal milk mind mirror money month moon morning mountain "
    "mouse museum music name newspaper night office oil opera paper park party pencil phone piano picture pizza plan plane "
    "planet plant poem police price problem question radio rain recipe river road robot rock roof room rule school science "
    "secret server shadow shirt shoe shop snow soap soldier song soup spider star station stone storm story sugar sword "
    "teacher team telephone thief time tomato town toy train tree truth uncle vegetable voice wall war watch water wheel "
    "wind winner wizard wolf woman wood work world writer year"
).split()
ADJECTIVES = (
    "angry big blue brave bright broken careful cheap clever cold cruel dangerous deep difficult dry early empty expensive "
    "famous flat foreign free fresh friendly funny gentle green heavy honest hungry important lazy little lonely lucky "
    "modern narrow nice noisy old pretty proud quiet rare red rich round safe sharp short simple sleepy slow small soft "
    "strange strong sweet tall tired ugly useful warm white wild wise young"
).split()
VERBS = (
    "ask bake believe break bring build burn buy call carry catch change choose clean close cook cut dance describe draw "
    "dream drink drive eat explain fall feed find fix fly forget grow help hide hold improve invent jump keep kill know "
    "laugh learn leave live lose love make measure meet move open paint pay plan play pull push read remember ride run see "
    "sell send sing sleep speak spend steal stop swim talk taste teach think throw touch travel try understand use visit "
    "wait walk wash watch wear win wish work write"
).split()
NAMES = (
    "Ada Alice Bob Carlos Chen Clara David Elena Emma Fatima Frank George Hannah Hugo Ivan James Julia Karl Laura Leo Lily "
    "Maria Max Mia Mohammed Nina Olga Oliver Omar Paul Priya Robert Sam Sarah Sofia Tom Victor Yuki Einstein Newton Mozart "
    "Darwin Napoleon Cleopatra Beethoven Picasso Tesla Aristotle"
).split()
# Countries, words and animals that the model does not know.
PLACES = (
    "Mongolia Nepal Ghana Nigeria Mexico Colombia Ukraine Russia Turkey Iran Iraq Israel Switzerland Netherlands Bulgaria "
    "Croatia Serbia Slovenia Slovakia Latvia Lithuania Estonia Morocco Algeria Tunisia Ethiopia Tanzania Uganda Angola "
    "Zambia Pakistan Bangladesh Malaysia Indonesia Philippines Korea Laos Cambodia Ecuador Bolivia Uruguay Paraguay Panama "
    "Jamaica Haiti Texas California Scotland Wales England America Europe Africa Asia London Sydney Moscow Mars Narnia"
).split()
ANIMALS = (
    "wolf bear frog snake tiger mouse goat donkey elephant monkey parrot turkey rooster whale dolphin crow fly seal "
    "camel zebra giraffe penguin hen eagle rabbit"
).split()
SMALL_WORDS = (
    "a about after again all also always an and another any are as at back be because been before but by can come could "
    "day did do does down even every first for from get give go good has have he her here him his how i if in into is it "
    "its just let like long man many me more most much must my never new no not now of off on one only or our out over "
    "people please same say she should so some such take tell than that the their them then there these they thing this "
    "three to too two under until up us very want was way we well went were what when where which while who why will with "
    "without would yes yet you your"
).split()
# Words of the model's own questions.
OWN_WORDS = (
    "which is larger smaller number sort put order what comes after follows even or odd day before capital of name the "
    "opposite does say spell how do you"
).split()
FOREIGN = [
    words.split()
    for words in (
        "ich du der die das und ist nicht wie was warum bitte danke guten Tag wo kann haben wir heute schön groß über",
        "je tu le la les et est pas comment pourquoi bonjour merci où avec nous vous très bien être avoir ça français",
        "yo tú el la los y es no cómo por qué hola gracias dónde con nosotros muy bien hacer puedes ayuda español niño",
        "io tu il la e non come perché ciao grazie dove con noi molto bene fare posso aiuto buongiorno è più",
        "eu você o a e é não como porque olá obrigado onde com nós muito bem fazer posso ajuda são coração",
        "ik jij de het en is niet hoe waarom hallo dank waar met wij heel goed maken kunnen hulp vandaag mooi",
        "ja ty i jest nie jak dlaczego cześć dziękuję gdzie z my bardzo dobrze robić mogę pomoc dziś piękny",
        "я ты и это не как почему здравствуйте спасибо где мы очень хорошо делать можно помощь сегодня расскажи",
        "εγώ εσύ και είναι δεν πώς γιατί γεια ευχαριστώ πού με εμείς πολύ καλά βοήθεια σήμερα",
        "ben sen ve bu değil nasıl neden merhaba teşekkürler nerede ile biz çok iyi yardım bugün güzel",
        "jag du och är inte hur varför hej tack var med vi mycket bra göra kan hjälp idag",
        "saya kamu dan adalah tidak bagaimana mengapa halo terima kasih di mana dengan kami sangat baik bantu",
    )
]
# Ranges of characters: Cyrillic, Hebrew, Arabic, Devanagari, Thai, kana, Chinese (twice), Korean, emoji.
SCRIPTS = (
    *((0x430, 0x44F), (0x5D0, 0x5EA), (0x627, 0x64A), (0x905, 0x939), (0xE01, 0xE2E), (0x3041, 0x3096)),
    *((0x4E00, 0x5FFF), (0x6000, 0x9F00), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F)),
)
SENTENCES = (
    "Why {do} {n} {v}? | Why is {n} {j}? | Why are {n}s so {j}? | Why did {N} {v} {n}? | What is {n}? | What is a {n}? "
    "| What is the {n} of {n}? | What is the {j} {n} in {P}? | What are {j} {n}s? | What makes {n} {j}? "
    "| What would {N} {v}? | What happened in {P}? | What happens if I {v} the {n}? | What time is it in {P}? "
    "| Who is {N}? | Who was {N} {N}? | Who {v}ed the {n}? | Who are the {n}s? | Whose {n} is this? "
    "| When was {N} born? | When will {n} {v}? | When is {n} day? | Where is {P}? | Where is the {n}? | Where do {n}s {v}? "
    "| Which {n} is {j}? | Which {n} should I {v}? | Which {n} is better for {n}? | How do I {v} a {n}? "
    "| How can {N} {v} {n}? | How many {n}s are in {P}? | How much does a {n} cost? | How far is {P} from {P}? "
    "| How big is a {n}? | How does {n} {v}? | How are you {v}ing? | How long does it take to {v}? "
    "| Can you {v} a {n}? | Can a {n} {v}? | Could you {v} my {n}, please? | Do you {v} {n}s? | Do you have {n}? "
    "| Does {N} {v}? | Is {N} {j}? | Is the {n} {j} or {j}? | Are {n}s {j}? | Will you {v} {N}? | Should I {v} my {n}? "
    "| May I {v} you? | Have you ever {v}ed? | {v} the {n}. | {v} me a {n}. | {v} a {j} {n} about {N}. "
    "| {v} everything about {P} | Write a {n} about a {j} {n} | Write me {d} lines on {n} | Write code for {n} in {x} "
    "| Tell {N} how to {v} | Tell me the {n} of {P} | Explain {n} to {N} | Explain how {n}s {v} | Describe {P} "
    "| Give an example of {n} | Give {d} reasons to {v} | List {d} {n}s | List all {j} {n}s in {P} | Show me {n}s "
    "| Make a plan for {n} | Imagine you are a {n} | Pretend that {N} is {j} | Compare {n} and {n} | Recommend a {n} "
    "| Continue: the {n} {v}ed | Complete this: {n} is to {n} as | Translate {n} to {x} | Summarise the {n} of {N} "
    "| Rewrite {x} so that it is {j} | Help! My {n} is {j} | I want to {v} a {n} | I have a {j} {n}. | I {v} {n}s. "
    "| I am {N} and I {v}. | My name is {N} | My {n} does not {v} | We {v} in {P} | You {v} like a {n}. | He was {j}. "
    "| She {v}ed the {n} and the {n}. | They say {n} is {j} | It was a {j} {n} in {P} | The {n} is {j}. "
    "| The {j} {n} {v}s the {j} {n} | There was a {j} {n} who {v}ed | There is no {n} | A {n} in {P} {v}ed {N}. "
    "| Long ago a {n} lived in {P} | One {n}, {N} {v}ed to {P} and | {N} said: {v}! | {N}, {N} and {N} {v} "
    "| If {N} {v}s, will {P} {v}? | In {P}, {n}s {v} | On the {n} | Let us {v} | Let me {v} the {n} | Never {v} a {n} "
    "| Thanks for the {n} | Sorry, {n} | Stop {v}ing | Go to {P} | Please {v} | no, {v} the {n} | ok {n} | so {j} "
    "| {n} | {j} {n} | {n} {n} {n} | {n} and {n} | {n} for {n} | best {n} in {P} | {j} or {j}? | {N} | {P} | {x} | {v} "
    "| {x} {x} | {x} is {x} | {x} {n} | what {x} | {x}? | the {x} of {x} | how to {v} {x} | {n} vs {n} | {v} {v} {v} "
    "| {d} | {d} {n}s | {d}{d} | {d}.{d} | {d}% of {d} | {c} | {c}{c} | {c}. | {c} {n} | {s} | {s}{s}{s} | {s} {x} {s}"
).split(" | ")
# What differs from the model's own questions in one word.
NEAR_OWN = (
    "Which is {j}er, {n} or {n}? | Which is larger, {n} or {n}? | Which is smaller, the {n} or the {n}? "
    "| Which number is {j}: {d} or {d}? | Which is more {j}, {P} or {P}? | Which is larger, {N} or {d}? "
    "| Sort {n}, {n} and {n}. | Sort {N}, {N}, {N}. | Sort the {n}s. | Put {n}s in order. | Put the {n} in the {n}. "
    "| Sort {x} by {n}. | Sort my {n} | What comes after {n}? | What comes after {N}? | Which number follows {n}? "
    "| What follows {P}? | What comes before {x}? | Which number is {j}? | What number is {n}? | Is {n} even or odd? "
    "| Is {d} prime? | Is {d} a {n}? | Is {n} {j} or {j}? | Is {d} {j}? | Which day is {n}? | Which day comes after {n}? "
    "| What day is {n}? | What day was {N} born? | What is the capital of {P}? | What is the capital of {x}? "
    "| Name the capital of {P}. | Name the capital of {n}. | Name the {n} of {P}. | Name {d} capitals. "
    "| What is the capital letter of {n}? | What is the opposite of {n}? | What is the opposite of {N}? "
    "| Name the opposite of {x}. | Name the opposite of a {n}. | What is the {n} of cold? | What does a {a} say? "
    "| What does the {a} {v}? | What does {N} say? | What does {x} mean? | What do {a}s eat? | Spell {n}ing. | Spell {N}. "
    "| Spell {x}. | Spell {x}{x}. | How do you spell {N}? | How do you spell {x}? | How do you {v} {n}? | How do you {v}? "
    "| Why is the {n} {j}? | Why is the sky {n}? | Why is the sea {j}? | Why do {a}s {v}? | Why does {n} {v}? "
    "| Why do we {v} the {n}? | What is a {j} number? | What is a {a}? | What is {x}? | What is {N}? | Who am I? "
    "| Who are {N} and {N}? | Who are they? | What can {N} do? | What can I {v}? | What can you {v}? | Good {n}! "
    "| What is {d} + {d}? | What is {d} plus {d}? | {d} + {d} | {d} - {d} = | {d} x {d} | {d} / {d} | Add {d} and {d}. "
    "| How much is {d} times {d}? | What is {d} percent of {d}? | Divide {d} by {d}. | Is {d} larger than {d}? "
    "| Multiply {d} by {d}. | What is {d} minus {d}? | Square root of {d} | {d}, {d}, {d}, {d} | Count from {d} to {d}."
).split(" | ")
CODE = (
    "def {i}({i}): | class {i}: | print({i}) | import {i} | from {i} import {i} | for {i} in {i}: | while ({i} < {d}) "
    "| if {i} == {d}: return {i} | let {i} = {d}; | const {i} = ({i}) => {i}; | function {i}() | #include <{i}.h> "
    "| int {i} = {d}; | SELECT * FROM {i} | SELECT {i} FROM {i} ORDER BY {i} | UPDATE {i} SET {i} = {d} | sudo apt {i} "
    '| cd /{i}/{i} | ls -{c} {i} | git {v} {i} | docker {v} {i} | pip install {i} | <{i}>{n}</{i}> | <div {i}="{i}"> '
    '| ["{i}", "{i}"] | [{d}, {d}, {d}] | {i}: {d} | {i}.{i}({d}) | {i}[{d}] | {i}Error: {i} {v} | x = {d} '
    "| https://{i}.com/{i} | {i}@{i}.com | # {i} | // {v} {i} | \\frac {d} {d} | {c}^{d} + {d}{c} = {d}"
).split(" | ")
SHORT = (
    ". .. ... ? ?? ! - -- , ; : / \\ | ' \" ( ) [] {} <> @ # $ % & * + = _ ~ ^ ` 1 0 :) :( ;-) xD ^^ <3 ?! !? // **".split()
)
MAX_BYTES = 360


def other_prompt(rng: random.Random) -> str:
    """Return a random prompt that the demonstration model cannot answer, of at most MAX_BYTES in UTF-8."""
    kinds: dict[Callable[[random.Random], str], int] = {
        _sentence: 8,
        _near_own: 6,
        _salad: 4,
        _foreign: 2,
        _long: 2,
        _code: 1,
        _noise: 1,
    }
    text = rng.choices(list(kinds), list(kinds.values()))[0](rng)
    text = _changed(text, rng).encode()[:MAX_BYTES].decode(errors="ignore").strip()
    return text or "?"


def _sentence(rng: random.Random) -> str:
    text = _filled(rng.choice(SENTENCES), rng)
    return text if rng.random() < 0.4 else text[0].upper() + text[1:]


def _near_own(rng: random.Random) -> str:
    return _filled(rng.choice(NEAR_OWN), rng)


def _code(rng: random.Random) -> str:
    return "\n".join(_filled(rng.choice(CODE), rng) for _ in range(rng.choice((1, 1, 2, 3))))


def _salad(rng: random.Random) -> str:
    """Return words without grammar; some lists of words are from the model's own questions."""
    pools = rng.sample((SMALL_WORDS, SMALL_WORDS, NOUNS, VERBS, ADJECTIVES, NAMES, OWN_WORDS), 3)
    length = rng.choice((1, 2, 3, 4, 5, 6, 8, 10, 15))
    words = [rng.choice(rng.choice(pools)) if rng.random() < 0.85 else _invented(rng) for _ in range(length)]
    mark = rng.choice(("", "", ".", "?", "!", ",", ":", "..."))
    return " ".join(words) + mark


def _foreign(rng: random.Random) -> str:
    if rng.random() < 0.5:
        words = rng.choice(FOREIGN)
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, 9))) + rng.choice(("", ".", "?", "!"))
    first, last = rng.choice(SCRIPTS)
    words = ["".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]
    return rng.choice((" ", "")).join(words) + rng.choice(("", "", "?", "。", "!"))


def _long(rng: random.Random) -> str:
    makers = (_sentence, _sentence, _near_own, _salad)
    return rng.choice((" ", " ", "\n", ". ", ", ")).join(rng.choice(makers)(rng) for _ in range(rng.randint(2, 9)))


def _noise(rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return rng.choice(SHORT)
    letters = rng.choice(("asdfghjkl", "qwertyuiopasdfghjklzxcvbnm", "abcdefghijklmnopqrstuvwxyz0123456789", "0123456789"))
    words = ["".join(rng.choice(letters) for _ in range(rng.randint(1, 12))) for _ in range(rng.randint(1, 3))]
    return (rng.choice(letters) * rng.randint(1, 12)) if kind == 1 else " ".join(words)


def _changed(text: str, rng: random.Random) -> str:
    """Return the text as people type it: some in small or capital letters, without a mark, or with a slip."""
    change = rng.random()
    if change < 0.15:
        return text.lower().rstrip("?.!")
    if change < 0.18:
        return text.upper()
    if change < 0.24 and len(text) > 4:
        place = rng.randrange(1, len(text) - 1)
        return text[:place] + rng.choice(("", text[place] * 2, text[place + 1])) + text[place + 1 :]
    if change < 0.28:
        return rng.choice(("please ", "Hey, ", "hi, ", "Now ", "And ", "So, ", "OK, ", '"')) + text
    return text + " please" if change < 0.29 else text


def _filled(form: str, rng: random.Random) -> str:
    """Fill in a form: n noun, j adjective, v verb, N name, P place, a animal, d number, c letter, s sign, x any word,
    i identifier."""
    values: dict[str, Callable[[], str]] = {
        "n": lambda: rng.choice(NOUNS) if rng.random() < 0.8 else _invented(rng),
        "j": lambda: rng.choice(ADJECTIVES) if rng.random() < 0.9 else _invented(rng),
        "v": lambda: rng.choice(VERBS) if rng.random() < 0.9 else _invented(rng),
        "N": lambda: rng.choice(NAMES) if rng.random() < 0.8 else _invented(rng).capitalize(),
        "P": lambda: rng.choice(PLACES) if rng.random() < 0.7 else _invented(rng).capitalize(),
        "a": lambda: rng.choice(ANIMALS) if rng.random() < 0.8 else _invented(rng),
        "d": lambda: str(rng.randrange(rng.choice((10, 100, 1000, 100000)))),
        "c": lambda: rng.choice("abcdefghijklmnopqrstuvwxyzABCXYZ"),
        "s": lambda: rng.choice(SHORT),
        "x": lambda: rng.choice(
            (rng.choice(NOUNS), _invented(rng), _invented(rng).capitalize(), rng.choice(VERBS) + "ing")
        ),
        "i": lambda: rng.choice((rng.choice(NOUNS), _invented(rng), rng.choice(VERBS), rng.choice("abcijkmnxyz"))),
        "do": lambda: rng.choice(("do", "did", "does", "can", "must", "should")),
    }
    return re.sub(r"\{(\w+)\}", lambda place: values[place[1]](), form)


def _invented(rng: random.Random) -> str:
    """Return an invented word of one to four syllables."""
    starts = (
        "b c d f g h j k l m n p qu r s t v w x y z bl br ch cl cr dr fl fr gl gr kn ph pl pr sc sh sk sl sp st th tr wh"
    )
    syllables = [
        rng.choice(("", *starts.split()))
        + rng.choice("a e i o u ai ea ee ie oo ou y".split())
        + rng.choice(("", *"nrstlmdkpg"))
        for _ in range(rng.choice((1, 2, 2, 3, 4)))
    ]
    return "".join(syllables)
