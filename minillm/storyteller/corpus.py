"""The training text: stories and short chat turns, generated from a seed with the standard library alone.

`document(seed, index)` is a pure function, so any part of the corpus can be made again without the rest. Read top-down:
a document is a story, the start of one, plain facts, an introduction, a chat or a request outside of a chat; a story is
an opening, one or more plots and an ending.
What `is_held_out` picks is never in the training text: only the evaluation asks for it.
"""

import hashlib
import random
import re
from functools import cache
from typing import NamedTuple

from minillm.storyteller import odd_words, typed
from minillm.storyteller import vocabulary as words

END_OF_TEXT, USER, ASSISTANT, END, PAD = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, USER, ASSISTANT, END, PAD)

LENGTH_TOKENS = {
    "short": (20, 75),
    "medium": (76, 230),
    "long": (250, 390),
}  # rough tokens of a story, both ends included
TURN_WEIGHTS = {
    "sum": 20,
    "capital": 8,
    "colour": 6,
    "sound": 6,
    "opposite": 5,
    "repeat": 7,
    "memory": 6,
    "count": 2,
    "greeting": 3,
}
HELD_OUT_STORIES = 20  # one hero-place-object in so many is kept out of training
HELD_OUT_QUESTIONS = 5  # one question text in so many is kept out
FAVOURITE_SHARE = 0.4  # how often a hero does, has or meets what this hero likes best
PLACE_OPENINGS = tuple(opening for opening in words.OPENINGS if "{place}" in opening)
SMALL_TALK = {"greeting": words.GREETINGS, "talk": typed.TALK}
NAMES = words.GIRLS + words.BOYS + tuple(words.ANIMAL_NAMES)


class Mix(NamedTuple):
    """How often each kind of document, of chat turn, of requested length and of requested topic is drawn."""

    documents: dict
    lengths: dict
    topics: dict
    turns: dict = TURN_WEIGHTS
    requests: tuple = words.STORY_REQUESTS
    careless: float = 0.0  # how often a question or an opening is written as many type it


VOCABULARY = Mix(  # what the tokenizer is fitted to; it stays as it is, so that token ids outlive a wider corpus
    documents={"story": 22, "story_chat": 24, "chat": 44, "introduction": 4, "fact": 6},
    lengths={"short": 34, "medium": 33, "long": 33},
    topics={"none": 12, "object": 25, "animal": 15, "place": 14, "plot": 14, "name": 10, "both": 10},
)
GENERAL = Mix(
    documents={
        "story": 7,
        "opened": 18,
        "start": 44,
        "story_chat": 12,
        "chat": 23,
        "introduction": 2,
        "fact": 1,
        "request": 3,
    },  # fmt: skip
    lengths={"short": 44, "medium": 32, "long": 24},
    topics=VOCABULARY.topics | {"other": 10},
    turns=TURN_WEIGHTS | {"unknown": 24, "talk": 4},
    requests=typed.STORY_REQUESTS,
    careless=0.2,
)
FINISH = Mix(  # what the general mix teaches last: places and plots asked for, in short stories most of all
    documents={
        "story": 5,
        "opened": 15,
        "start": 38,
        "story_chat": 24,
        "chat": 18,
        "introduction": 1,
        "fact": 1,
        "request": 2,
    },  # fmt: skip
    lengths={"short": 60, "medium": 24, "long": 16},
    topics={"none": 4, "object": 12, "animal": 8, "place": 20, "plot": 42, "name": 6, "both": 8, "other": 6},
    turns=GENERAL.turns,
    requests=GENERAL.requests,
    careless=0.2,
)


class Story(NamedTuple):
    """A story and the choices behind it; `plots` and `objects` have one entry an episode."""

    text: str
    hero: str
    kind: str
    friend: str
    place: str
    plots: tuple
    objects: tuple
    length: str  # short, medium or long


class Turn(NamedTuple):
    """One chat turn: what the user says and what the assistant answers; `topic` is what the answer must be about."""

    kind: str
    question: str
    answer: str
    topic: str = ""


class Document(NamedTuple):
    """One training document as (text, is_trained) segments; user turns are read but not learned."""

    kind: str
    segments: tuple

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.segments)


# --- documents ------------------------------------------------------------------------------------


def document(seed: int, index: int, held_out: bool = False, mix: Mix = GENERAL) -> Document:
    """Document number `index` of the corpus with this seed; the same arguments always give the same text.

    With `held_out`, a document of stories and questions that training never sees (introductions, plain facts
    and greetings have no such split).
    """
    rng = random.Random(f"minillm-storyteller-{seed}-{index}")
    kind = weighted(rng, mix.documents)
    if kind == "chat":
        turns = [chat_turn(rng, held_out=held_out, mix=mix) for _ in range(weighted(rng, {1: 60, 2: 25, 3: 15}))]
        return chat_document(kind, [as_typed(rng, turn, held_out, mix) for turn in turns])
    if kind == "story_chat":
        return chat_document(kind, [as_typed(rng, story_turn(rng, held_out=held_out, mix=mix), held_out, mix)])
    if kind == "opened":
        return opened_document(rng, held_out, mix)
    if kind == "start":
        return started_document(rng, held_out, mix)
    if kind == "request":
        make = story_turn if rng.random() < 0.25 else chat_turn
        turn = as_typed(rng, make(rng, held_out=held_out, mix=mix), held_out, mix)
        return Document(kind, ((turn.question, False), (" " + turn.answer + END_OF_TEXT, True)))
    if kind == "story":
        return Document(kind, ((random_story(rng, held_out=held_out).text + END_OF_TEXT, True),))
    if kind == "introduction":
        return Document(kind, ((introduction(rng) + END_OF_TEXT, True),))
    first, second, rest = plain_fact(rng).split(" ", 2)  # not learned: that "The" is followed by "capital"
    return Document(kind, ((f"{first} {second}", False), (f" {rest}{END_OF_TEXT}", True)))


def as_typed(rng: random.Random, turn: Turn, held_out: bool, mix: Mix) -> Turn:
    """The turn with its question typed carelessly, now and then; never a held-out one, which is known by its text."""
    if held_out or not mix.careless or rng.random() >= mix.careless:
        return turn
    return turn._replace(question=typed.careless(rng, turn.question))


def opened_document(rng: random.Random, held_out: bool, mix: Mix) -> Document:
    """A story whose first words somebody typed: they are read and the rest is learned, in a chat now and then."""
    asked, rest = opened_story(rng, held_out)
    if rng.random() < 0.1:
        return chat_document("opened_chat", [Turn("opened", asked, asked + rest)])
    if rng.random() < mix.careless and not asked.startswith("I"):
        asked = asked[:1].lower() + asked[1:]
    return Document("opened", ((asked, False), (rest + END_OF_TEXT, True)))


def started_document(rng: random.Random, held_out: bool, mix: Mix) -> Document:
    """The typed part of a story and its next two sentences, without an end: openings are many, the rest is known."""
    asked, rest = opened_story(rng, held_out)
    sentences = re.findall(r".+?(?:[.!?]\"?(?= [A-Z\"])|$)", rest)
    if rng.random() < mix.careless and not asked.startswith("I"):
        asked = asked[:1].lower() + asked[1:]
    return Document("start", ((asked, False), ("".join(sentences[:2]), True)))


def chat_document(kind: str, turns: list[Turn]) -> Document:
    """Turns in the chat format; only what the assistant says, its end token included, is trained."""
    segments = []
    for turn in turns:
        segments += [(chat_prompt(turn.question), False), (turn.answer + END, True)]
    return Document(kind, tuple(segments))


def chat_prompt(question: str) -> str:
    """One user turn and the head of the answer: exactly what the chat template renders."""
    return f"{USER}{question}{END}{ASSISTANT}"


def is_held_out(key: str, one_in: int) -> bool:
    """Whether this key belongs to the evaluation: a hash, so the split needs no list and no seed."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % one_in == 0


@cache
def story_held_out(hero: str, place: str, obj: str) -> bool:
    """Stories are split by who, where and what together; each of the three is seen in training."""
    return is_held_out(f"story|{hero}|{place}|{obj}", HELD_OUT_STORIES)


def weighted(rng: random.Random, weights: dict):
    """One key, drawn in proportion to its weight."""
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


# --- stories --------------------------------------------------------------------------------------


def random_story(rng: random.Random, length: str | None = None, held_out: bool = False, **wanted) -> Story:
    """A story; `wanted` may fix hero, kind, place, obj, plot, openings; the rest is drawn, favourites most often."""
    length = length or weighted(rng, {"short": 36, "medium": 34, "long": 30})
    low, high = LENGTH_TOKENS[length]
    while True:
        cast = draw_cast(rng, wanted, held_out)
        story = tell(rng, cast, length)
        if low <= rough_tokens(story.text) <= high:
            return story


def opened_story(rng: random.Random, held_out: bool = False) -> tuple[str, str]:
    """A story that begins in one of the many ways of `typed`, as (what somebody typed, the rest).

    The hero may be of a kind, or have a name, that the rest of the corpus has not; of an odd kind or name, the typed
    part says all that cannot be known.
    """
    length = weighted(rng, {"short": 60, "medium": 28, "long": 12})
    low, high = LENGTH_TOKENS[length]
    while True:
        cast = draw_cast(rng, {}, held_out)
        odd = weighted(rng, {(): 66, ("kind",): 16, ("hero",): 18})
        if odd == ("kind",):
            cast["kind"] = odd_words.draw(rng, "kind" if rng.random() < 0.9 else "n", known=0)[0]
        elif rng.random() < 0.3:
            cast["kind"] = rng.choice(typed.OTHER_HEROES[cast["he"] if cast["kind"] in ("girl", "boy") else ""])
        if odd == ("hero",):
            cast["hero"] = odd_words.name(rng, cast["he"])
        cast["openings"], cast["called"] = (typed.opening(rng, odd),), rng.choice(odd_words.CALLED[cast["he"]])
        story = tell(rng, cast, length)
        if low <= rough_tokens(story.text) <= high:
            break
    asked, rest = typed.with_articles(story.text).split(typed.CUT)
    if re.search(r"\b[Oo]ne day\b", asked + rest[:30]):
        rest = rest[:30] + rest[30:].replace("One day,", "Then", 1)
    return asked, rest


def draw_cast(rng: random.Random, wanted: dict, held_out: bool) -> dict:
    """Who, where and what: hero, he, kind, friend, fkind, place, obj, plot, and the openings to choose from."""
    while True:
        hero = wanted.get("hero") or draw_hero(rng, wanted.get("kind"))
        place = wanted.get("place") or favoured(rng, hero, words.PLACES)
        obj = wanted.get("obj") or favoured(rng, hero, words.OBJECTS)
        if story_held_out(hero, place, obj) == held_out:
            break
    friend = favoured(rng, hero, tuple(name for name in NAMES if name != hero))
    plot = wanted.get("plot") or ("lost" if rng.random() < 0.25 else favoured(rng, hero, tuple(words.PLOTS)))
    kind = wanted.get("kind") or draw_kind(rng, hero)
    openings = wanted.get("openings", words.OPENINGS)
    return {
        "hero": hero, "he": pronoun(hero), "kind": kind, "friend": friend, "fkind": draw_kind(rng, friend),
        "place": place, "obj": obj, "plot": plot, "openings": openings,
    }  # fmt: skip


def draw_hero(rng: random.Random, kind: str | None) -> str:
    """A hero's name; a wanted animal needs an animal's name."""
    if kind is not None:
        return rng.choice(tuple(words.ANIMAL_NAMES))
    return rng.choice(words.GIRLS + words.BOYS if rng.random() < 0.65 else tuple(words.ANIMAL_NAMES))


def draw_kind(rng: random.Random, name: str) -> str:
    """girl, boy or, for an animal's name, an animal."""
    if name in words.ANIMAL_NAMES:
        return favoured(rng, name, words.ANIMALS)
    return "girl" if name in words.GIRLS else "boy"


def pronoun(hero: str) -> str:
    return words.ANIMAL_NAMES.get(hero) or ("she" if hero in words.GIRLS else "he")


@cache
def favourite(hero: str, options: tuple) -> str:
    """What this hero likes best of `options`: fixed, so that different heroes live through different stories."""
    return min(options, key=lambda option: hashlib.blake2b(f"{hero}|{option}".encode(), digest_size=8).digest())


def favoured(rng: random.Random, hero: str, options: tuple) -> str:
    """The hero's favourite in FAVOURITE_SHARE of the cases, else any option."""
    return favourite(hero, options) if rng.random() < FAVOURITE_SHARE else rng.choice(options)


def tell(rng: random.Random, cast: dict, length: str) -> Story:
    """The text of a story: opening, friend, everyday lines, one plot (several in a long story), ending."""
    fields = story_fields(rng, cast, cast["obj"])
    plots, objects = [cast["plot"]], [cast["obj"]]
    lines = [rng.choice(cast["openings"])]
    if length == "short":
        lines += beats(rng, words.PLOTS[cast["plot"]].short, keep=1.0)
        lines += [rng.choice(words.ENDINGS)] if rng.random() < 0.25 else []
        return Story(
            fill(lines, fields),
            cast["hero"],
            cast["kind"],
            cast["friend"],
            cast["place"],
            tuple(plots),
            tuple(objects),
            length,
        )
    lines += [rng.choice(words.FRIEND_LINES), *rng.sample(words.DAILY_LINES, rng.randint(0, 1))]
    lines += beats(rng, words.PLOTS[cast["plot"]].full, keep=0.5 if length == "medium" else 0.9)
    text = fill(lines, fields)
    target = rng.randint(230, 300) if length == "long" else 0
    while rough_tokens(text) < target:
        plots.append(rng.choice([name for name in words.PLOTS if name not in plots]))
        objects.append(rng.choice([obj for obj in words.OBJECTS if obj not in objects]))
        episode = fill(beats(rng, words.PLOTS[plots[-1]].full, keep=0.7), story_fields(rng, cast, objects[-1]))
        text += " " + fill([rng.choice(words.NEXT_LINES)], fields) + " " + episode.replace("One day,", "Then")
    text += " " + fill([rng.choice(words.ENDINGS)], fields)
    return Story(text, cast["hero"], cast["kind"], cast["friend"], cast["place"], tuple(plots), tuple(objects), length)


def beats(rng: random.Random, plot: tuple, keep: float) -> list[str]:
    """One sentence a beat; a beat that may be left out is kept with probability `keep`."""
    return [rng.choice([s for s in beat if s]) for beat in plot if beat[0] is not None or rng.random() < keep]


def story_fields(rng: random.Random, cast: dict, obj: str) -> dict:
    """The values of the fields in a plot's sentences."""
    he = cast["he"]
    his, him = ("his", "him") if he == "he" else ("her", "her")
    return {
        **cast, "obj": obj, "an_obj": with_article(obj), "a_fkind": with_article(cast["fkind"]),
        "He": he.title(), "his": his, "His": his.title(), "him": him,
        "colour": rng.choice(words.COLOURS), "spot": rng.choice(words.SPOTS),
        "adj": rng.choice(words.ADJECTIVES), "feeling": rng.choice(words.FEELINGS),
    }  # fmt: skip


def fill(lines: list[str], fields: dict) -> str:
    """Sentences with their fields filled in, one space between them."""
    return " ".join(lines).format_map(fields)


def with_article(noun: str) -> str:
    """ "a kite", "an umbrella"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def mentions(text: str, keyword: str) -> bool:
    """Whether the keyword is a word of the text ("hat" is no word of "that"); the empty keyword always is."""
    return re.search(rf"\b{keyword}\b", text) is not None


def rough_tokens(text: str) -> int:
    """Words, digits and punctuation marks: within a few per cent of the trained tokenizer's count."""
    return len(re.findall(r"[A-Za-z]+|\d|[^\sA-Za-z\d]+", text))


# --- chat turns -----------------------------------------------------------------------------------


def story_turn(
    rng: random.Random,
    length: str | None = None,
    topic_kind: str | None = None,
    held_out: bool = False,
    mix: Mix = VOCABULARY,
) -> Turn:
    """A request for a story and the story; the request may name a length and a topic."""
    length = length or weighted(rng, mix.lengths)
    topic_kind = topic_kind or weighted(rng, mix.topics)
    while True:
        about, keyword, wanted = draw_topic(rng, topic_kind, held_out)
        asked = "" if length == "medium" else length + " "
        question = rng.choice(mix.requests).format(length=asked, about=about)
        if topic_kind != "none" and is_held_out(question, HELD_OUT_QUESTIONS) != held_out:
            continue
        story = random_story(rng, length, held_out, **wanted)
        if mentions(story.text, keyword):
            return Turn("story_" + length, question, story.text, keyword)


def draw_topic(rng: random.Random, topic_kind: str, held_out: bool) -> tuple[str, str, dict]:
    """A topic as (words of the request, keyword the story must contain, what the story is told with)."""
    if topic_kind == "object":
        obj = rng.choice(words.OBJECTS)
        lost = rng.random() < 0.3
        about = f" about a lost {obj}" if lost else f" about {with_article(obj)}"
        return about, obj, {"obj": obj, "plot": "lost"} if lost else {"obj": obj}
    if topic_kind == "animal":
        kind = rng.choice(words.ANIMALS)
        return f" about {with_article(kind)}", kind, {"kind": kind}
    if topic_kind == "other":
        he, hero = rng.choice(
            (("she", rng.choice(words.GIRLS)), ("he", rng.choice(words.BOYS)), ("", None), ("", None))
        )
        kind = rng.choice(typed.OTHER_HEROES[he])
        return f" about {with_article(kind)}", kind, {"kind": kind, "hero": hero}
    if topic_kind == "place":
        place = rng.choice(words.PLACES)
        return (
            rng.choice((f" about the {place}", f" from the {place}")),
            place,
            {"place": place, "openings": PLACE_OPENINGS},
        )
    if topic_kind == "plot":
        name = rng.choice([name for name, plot in words.PLOTS.items() if plot.topic])
        return f" about {words.PLOTS[name].topic}", words.PLOTS[name].keyword, {"plot": name}
    if topic_kind == "name":
        hero = rng.choice(NAMES)
        return f" about {hero}", hero, {"hero": hero}
    if topic_kind == "both":
        hero, obj = rng.choice(NAMES), rng.choice(words.OBJECTS)
        while not any(story_held_out(hero, place, obj) == held_out for place in words.PLACES):
            hero, obj = rng.choice(NAMES), rng.choice(words.OBJECTS)
        return f" about {hero} and {with_article(obj)}", obj, {"hero": hero, "obj": obj}
    return "", "", {}


def chat_turn(rng: random.Random, kind: str | None = None, held_out: bool = False, mix: Mix = VOCABULARY) -> Turn:
    """A question and its answer; with `held_out`, a question that training never asks."""
    kind = kind or weighted(rng, mix.turns)
    if kind in SMALL_TALK:
        question = rng.choice(tuple(SMALL_TALK[kind]))
        return Turn(kind, question, SMALL_TALK[kind][question])
    if kind == "unknown":  # not split either: the evaluation asks what a person wrote
        question, answer = typed.unknown(rng)
        return Turn(kind, rng.choice(("", "", *words.LEADS)) + question, answer)
    while True:
        turn = TURNS[kind](rng)
        turn = turn._replace(question=rng.choice(words.LEADS) + turn.question)
        if is_held_out(turn.question, HELD_OUT_QUESTIONS) == held_out:
            return turn


def sum_turn(rng: random.Random) -> Turn:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    return Turn("sum", rng.choice(words.SUM_QUESTIONS).format(a=a, b=b), sum_sentence(a, b), str(a + b))


def capital_turn(rng: random.Random) -> Turn:
    key = rng.choice(tuple(words.CAPITALS))
    return Turn(
        "capital", rng.choice(words.CAPITAL_QUESTIONS).format(key=key), capital_sentence(key), words.CAPITALS[key]
    )


def colour_turn(rng: random.Random) -> Turn:
    key = rng.choice(tuple(words.COLOUR_OF))
    return Turn(
        "colour", rng.choice(words.COLOUR_QUESTIONS).format(key=key), colour_sentence(key), words.COLOUR_OF[key]
    )


def sound_turn(rng: random.Random) -> Turn:
    key = rng.choice(tuple(words.SOUND_OF))
    return Turn("sound", rng.choice(words.SOUND_QUESTIONS).format(key=key), sound_sentence(key), words.SOUND_OF[key])


def opposite_turn(rng: random.Random) -> Turn:
    pair = rng.choice(words.OPPOSITES)
    key, other = pair if rng.random() < 0.5 else pair[::-1]
    return Turn(
        "opposite", rng.choice(words.OPPOSITE_QUESTIONS).format(key=key), f"The opposite of {key} is {other}.", other
    )


def repeat_turn(rng: random.Random) -> Turn:
    """Words to say again: nothing but copying, which is what a story needs to keep its names."""
    said = " ".join(rng.choice(words.OBJECTS + words.COLOURS + NAMES + words.ANIMALS) for _ in range(rng.randint(2, 6)))
    return Turn("repeat", rng.choice(words.REPEAT_REQUESTS).format(words=said), f"Okay: {said}.", said)


def memory_turn(rng: random.Random) -> Turn:
    """Who has what: two or three people with one thing each, and a question about one of them."""
    count = rng.randint(2, 3)
    people, things = rng.sample(NAMES, count), rng.sample(words.OBJECTS, count)
    told = " ".join(f"{name} has {with_article(thing)}." for name, thing in zip(people, things, strict=True))
    i = rng.randrange(count)
    if rng.random() < 0.5:
        return Turn(
            "memory", f"{told} Who has the {things[i]}?", f"It is {people[i]} who has the {things[i]}.", people[i]
        )
    return Turn(
        "memory",
        f"{told} What does {people[i]} have?",
        f"I think {people[i]} has {with_article(things[i])}.",
        things[i],
    )


def count_turn(rng: random.Random) -> Turn:
    first = rng.randint(0, 7)
    last = rng.randint(first + 1, 9)
    counted = " ".join(str(n) for n in range(first, last + 1))
    return Turn("count", f"Count from {first} to {last}.", f"Here we go: {counted}.", counted)


TURNS = {
    "sum": sum_turn, "capital": capital_turn, "colour": colour_turn, "sound": sound_turn, "opposite": opposite_turn,
    "repeat": repeat_turn, "memory": memory_turn, "count": count_turn,
}  # fmt: skip


# --- plain sentences ------------------------------------------------------------------------------


def sum_sentence(a: int, b: int) -> str:
    return f"{a} + {b} = {a + b}."


def capital_sentence(key: str) -> str:
    return f"The capital of {key} is {words.CAPITALS[key]}."


def colour_sentence(key: str) -> str:
    return f"The colour of {key} is {words.COLOUR_OF[key]}."


def sound_sentence(key: str) -> str:
    return f"The sound of {key} is {words.SOUND_OF[key]}."


def plain_fact(rng: random.Random) -> str:
    """One to three facts without a chat around them."""
    makers = (
        lambda: capital_sentence(rng.choice(tuple(words.CAPITALS))),
        lambda: colour_sentence(rng.choice(tuple(words.COLOUR_OF))),
        lambda: sound_sentence(rng.choice(tuple(words.SOUND_OF))),
        lambda: sum_sentence(rng.randint(0, 9), rng.randint(0, 9)),
    )
    return " ".join(rng.choice(makers)() for _ in range(weighted(rng, {1: 6, 2: 2, 3: 2})))


def introduction(rng: random.Random) -> str:
    """Somebody says who they are; John does so most often, so that the most likely name is his."""
    name = "John" if rng.random() < 0.3 else rng.choice(NAMES)
    place, obj, colour = rng.choice(words.PLACES), rng.choice(words.OBJECTS), rng.choice(words.COLOURS)
    opening = "Hello, my name is" if rng.random() < 0.8 else "Hi, I am"
    lives = rng.choice(("live in a small house near", "come from the village behind", "like to play at"))
    lines = [f"{opening} {name} and I {lives} the {place}.", f"I have a {colour} {obj}."]
    lines += rng.sample(
        (f"My {obj} is very old.", "I like to hear stories.", f"My friends call me {name}.", "Nice to meet you!"), 1
    )
    return " ".join(lines[: rng.randint(2, 3)])
