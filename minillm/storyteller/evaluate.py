"""Measure the storyteller against what it must reach, on stories and questions that its training never saw.

    python -m minillm.storyteller.evaluate --json eval.json

Answers are greedy unless a line says "sampled". The table has one line a figure: measured, target, number of cases.
"""

import argparse
import json
import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import transformers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.errors import CheckpointError, ConfigError, check_options, check_whole, read_text
from minillm.storyteller import CHECKPOINT_DIR, corpus, hand_written, train, typed
from minillm.storyteller import vocabulary as words

BATCH = 100  # prompts generated together
MOST_NEW_TOKENS = 512  # a story that is still going then did not end by itself
TEMPERATURE = 0.8
PLAIN_PROMPTS = (
    "Once upon a time",
    "Once upon a time, there was a",
    "The capital of France is",
    "Hello, my name is",
)
CHAT_PROMPTS = (
    "Hello",
    "How are you?",
    "What is 3 + 4?",
    "Tell me a short story about a kite.",
)
NAMES = frozenset(corpus.NAMES)
STORY_KINDS = ("story", "story_chat", "opened", "opened_chat", "start")
NAMING = re.compile(  # the first place where somebody gets a name, with the kind if it stands there
    r"(?:(\w+),? (?:named|called|(?:was|is) called|whose name was)|name was|called (?:him|her)) "
    rf"(?:{'|'.join(corpus.NAMES)})\b"
)
VERBS = typed.VERBS | {"said", "asked", "is", "are", "had", "belonged", "there"}  # a first sentence has one of them
CARD_MARKS = ("<!-- figures: written by minillm storyteller eval --card -->", "<!-- end of figures -->")


class Figure(NamedTuple):
    """One measured figure; `target` is None for a figure that is only reported."""

    name: str
    measured: float
    target: float | None
    cases: int
    at_most: bool = False  # whether the target is an upper limit

    @property
    def reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.measured <= self.target if self.at_most else self.measured >= self.target


class Answer(NamedTuple):
    """What the model said to a prompt."""

    text: str  # without the end token
    tokens: int  # new tokens, the end token included
    ended: bool  # by an end token, not by the limit


class Storyteller(NamedTuple):
    """A loaded checkpoint."""

    model: torch.nn.Module
    tokenizer: object

    @classmethod
    def load(cls, folder: Path) -> "Storyteller":
        """Raises CheckpointError for a folder that transformers cannot load."""
        try:
            return cls(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))
        except Exception as error:  # transformers raises what it likes
            raise CheckpointError(f"transformers cannot load the checkpoint in {folder}: {error}") from error


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    check_options(args, at_least_one=("cases",), files=("json", "card"))
    check_whole("--threads", args.threads, 1, 1024)
    if args.card:
        split_card(Path(args.card))
    recipe = recipe_of(Path(args.checkpoint))
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    storyteller = Storyteller.load(Path(args.checkpoint))
    figures = []
    for figure in measure_all(storyteller, args.cases, recipe):
        figures.append(figure)
        print(table_line(figure), flush=True)
    seconds = time.perf_counter() - started
    print(f"{sum(f.reached is not False for f in figures)} of {len(figures)} figures without a miss, {seconds:.0f} s")
    recorded = record(storyteller, figures, args, seconds)
    if args.json:
        Path(args.json).write_text(json.dumps(recorded, indent=2, ensure_ascii=False) + "\n")
    if args.card:
        update_card(Path(args.card), recorded)
    return 0 if all(figure.reached is not False for figure in figures) else 1


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minillm storyteller eval", description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", default=str(CHECKPOINT_DIR), help="folder of the checkpoint")
    parser.add_argument("--json", help="write the figures and examples to this file")
    parser.add_argument("--cases", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--machine", default="a CPU", help="what the record says about the machine")
    parser.add_argument("--card", help="also write the figures into this model card, between its two marks")
    return parser.parse_args(argv)


def recipe_of(folder: Path) -> train.Recipe:
    """The recipe that a checkpoint was trained with. Raises CheckpointError if it does not say."""
    text = read_text(folder / "training.json", "the recipe of a storyteller,", error=CheckpointError)
    try:
        return train.Recipe(**json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'training.json'} is no recipe of a storyteller: {error}") from error


def measure_all(storyteller: Storyteller, cases: int, recipe: train.Recipe) -> Iterator[Figure]:
    """Every figure; sampled stories are compared with all that the recipe trains on."""
    yield held_out_loss(storyteller, cases)
    yield from repeated_names(storyteller, cases)
    yield from facts(storyteller, cases)
    yield question_figure(storyteller, "sums of two digits", "sum", cases, 0.90)
    yield question_figure(storyteller, "opposites", "opposite", cases, None)
    yield question_figure(storyteller, "repeat after me", "repeat", cases, None)
    yield question_figure(storyteller, "who has what", "memory", cases, None)
    yield lost_is_found(storyteller, cases)
    yield from requested_stories(storyteller, cases)
    known = Known.of(train.training_documents(recipe))
    yield from sampled_stories(storyteller, cases, known)
    yield different_openings(storyteller)
    yield from hand_written_openings(storyteller, known)
    yield honest_answers(storyteller)


# --- figures without generation -------------------------------------------------------------------


def held_out_loss(storyteller: Storyteller, cases: int) -> Figure:
    """Mean loss a trained token on held-out documents (nats)."""
    total, count = 0.0, 0
    for i in range(cases):
        ids, labels = train.encode(storyteller.tokenizer, corpus.document(1, i, held_out=True))
        with torch.no_grad():
            logits = storyteller.model(torch.tensor([ids])).logits[0, :-1]  # [T-1, V]
        total += F.cross_entropy(
            logits, torch.tensor(labels[1:]), ignore_index=train.NOT_TRAINED, reduction="sum"
        ).item()
        count += sum(label != train.NOT_TRAINED for label in labels[1:])
    return Figure("held-out loss, nats per token", total / count, None, cases)


def repeated_names(storyteller: Storyteller, cases: int) -> list[Figure]:
    """Where a held-out story repeats a name: is the likeliest *name* the right one, and is the likeliest *token*?

    The second figure also counts as wrong every place where a pronoun or another sentence would have done as well.
    """
    rng = random.Random("repeated names")
    name_ids = torch.tensor(sorted(single_token(storyteller.tokenizer, " " + name) for name in corpus.NAMES))
    among_names, among_all = [], []
    for _ in range(cases):
        ids = storyteller.tokenizer(
            corpus.random_story(rng, held_out=True).text, return_tensors="pt"
        ).input_ids  # [1, T]
        places = repeated_places(ids[0].tolist(), set(name_ids.tolist()))
        with torch.no_grad():
            logits = storyteller.model(ids).logits[0]  # [T, V]
        for place in places:
            before = logits[place - 1]
            among_names.append(bool(name_ids[before[name_ids].argmax()] == ids[0, place]))
            among_all.append(bool(before.argmax() == ids[0, place]))
    return [
        Figure("repeated names, among names", statistics.mean(among_names), 0.95, len(among_names)),
        Figure("repeated names, among all tokens", statistics.mean(among_all), None, len(among_all)),
    ]


def repeated_places(ids: list[int], name_ids: set[int]) -> list[int]:
    """Positions of names that stood in the text before."""
    return [i for i, token in enumerate(ids) if token in name_ids and token in ids[:i]]


def single_token(tokenizer, text: str) -> int:
    """The id of a text that must be one token."""
    ids = tokenizer(text).input_ids
    if len(ids) != 1:
        raise ValueError(f"{text!r} is {len(ids)} tokens, not 1: retrain the tokenizer with a larger vocabulary")
    return ids[0]


# --- questions ------------------------------------------------------------------------------------


def facts(storyteller: Storyteller, cases: int) -> list[Figure]:
    """Capitals, colours and sounds: the target is on all together, since each has fewer held-out questions."""
    kinds = {"capitals": "capital", "colours": "colour", "animal sounds": "sound"}
    figures = [question_figure(storyteller, name, kind, cases, None) for name, kind in kinds.items()]
    asked = sum(figure.cases for figure in figures)
    right = sum(figure.measured * figure.cases for figure in figures)
    return [Figure("capitals, colours, sounds", right / asked, 0.95, asked), *figures]


def question_figure(storyteller: Storyteller, name: str, kind: str, cases: int, target: float | None) -> Figure:
    """Share of held-out questions of one kind that are answered word for word."""
    turns = distinct_turns(lambda rng: corpus.chat_turn(rng, kind, held_out=True), cases)
    answers = generate(storyteller, [corpus.chat_prompt(turn.question) for turn in turns], most_new_tokens=40)
    right = [answer.text == turn.answer for turn, answer in zip(turns, answers, strict=True)]
    return Figure(name, statistics.mean(right), target, len(turns))


def distinct_turns(make: Callable[[random.Random], corpus.Turn], cases: int) -> list[corpus.Turn]:
    """Up to `cases` turns with different questions, fewer if the corpus has no more."""
    rng, turns = random.Random("held-out questions"), {}
    for _ in range(100 * cases):
        turn = make(rng)
        turns.setdefault(turn.question, turn)
        if len(turns) == cases:
            break
    return list(turns.values())


# --- stories --------------------------------------------------------------------------------------


def lost_is_found(storyteller: Storyteller, cases: int) -> Figure:
    """Stories cut after the sentence in which something is lost, half of them short: what is found then?"""
    rng = random.Random("lost and found")
    stories = [corpus.random_story(rng, ("short", "medium")[i % 2], held_out=True, plot="lost") for i in range(cases)]
    answers = generate(storyteller, [cut_after_loss(story.text) for story in stories], most_new_tokens=256)
    right = [found_object(answer.text) == story.objects[0] for story, answer in zip(stories, answers, strict=True)]
    return Figure("the lost object is the one found", statistics.mean(right), 0.80, cases)


def cut_after_loss(text: str) -> str:
    """The story up to and with the first sentence that says "lost"."""
    return text[: text.index(".", re.search(r"\blost\b", text).start()) + 1]


def found_object(text: str) -> str | None:
    """The object of the first "found the …"."""
    found = re.search(r"\bfound the (\w+)", text)
    return found and found.group(1)


def requested_stories(storyteller: Storyteller, cases: int) -> list[Figure]:
    """Held-out requests for short and for long stories about something: is it about that, and how long is it?"""
    about, lengths, consistent = [], {}, []
    for length in ("short", "long"):
        turns = distinct_turns(lambda rng, length=length: topic_turn(rng, length), cases)
        answers = generate(storyteller, [corpus.chat_prompt(turn.question) for turn in turns])
        about += [corpus.mentions(answer.text, turn.topic) for turn, answer in zip(turns, answers, strict=True)]
        consistent += [cast_is_consistent(answer.text) for answer in answers]
        lengths[length] = statistics.median(answer.tokens for answer in answers)
    return [
        Figure("the story is about the topic asked for", statistics.mean(about), 0.90, len(about)),
        Figure("median long story / median short one", lengths["long"] / lengths["short"], 3.0, len(about)),
        Figure("median short story, tokens", lengths["short"], None, len(about) // 2),
        Figure("median long story, tokens", lengths["long"], None, len(about) // 2),
        Figure("requested stories with one hero and one friend", statistics.mean(consistent), None, len(consistent)),
    ]


def topic_turn(rng: random.Random, length: str) -> corpus.Turn:
    """A held-out request with a topic of any kind."""
    kind = rng.choice(("object", "animal", "place", "plot", "name", "both"))
    return corpus.story_turn(rng, length, kind, held_out=True)


def cast_is_consistent(text: str) -> bool:
    """No more than two names in the whole story: nobody changed the name on the way."""
    return len({name for name in corpus.NAMES if corpus.mentions(text, name)}) <= 2


def sampled_stories(storyteller: Storyteller, cases: int, known: "Known") -> list[Figure]:
    """Stories sampled from "Once upon a time": do they end, how different are their lengths, are they new?"""
    torch.manual_seed(0)
    opening = "Once upon a time"
    answers = generate(storyteller, [opening] * cases, temperature=TEMPERATURE)
    tenth, ninetieth = (statistics.quantiles([answer.tokens for answer in answers], n=10)[i] for i in (0, 8))
    ended = statistics.mean(answer.ended for answer in answers)
    copied = statistics.mean(hash(opening + answer.text) in known.stories for answer in answers)
    consistent = statistics.mean(cast_is_consistent(opening + answer.text) for answer in answers)
    return [
        Figure("sampled stories that end by themselves", ended, 0.95, cases),
        Figure("sampled lengths, 90th / 10th percentile", ninetieth / tenth, 5.0, cases),
        Figure("sampled stories verbatim in the corpus", copied, 0.05, cases, at_most=True),
        Figure("sampled stories with one hero and one friend", consistent, None, cases),
    ]


class Known(NamedTuple):
    """What the stories of the training text hold, as far as they were learned."""

    stories: set[int]  # hashes, with or without a request before them
    words: set[str]  # in small letters; a name is NAME
    pairs: set[tuple[str, str]]  # neighbours among those words and marks

    @classmethod
    def of(cls, documents: Iterable[corpus.Document]) -> "Known":
        stories, pairs = set(), set()
        for document in documents:
            if document.kind in STORY_KINDS:
                text = document.segments[-1][0].removesuffix(corpus.END).removesuffix(corpus.END_OF_TEXT)
                stories.add(hash(text))
                if document.kind == "opened_chat":  # the answer repeats what was typed, odd words and all
                    text = text.removeprefix(document.segments[0][0].removeprefix(corpus.USER).split(corpus.END)[0])
                pairs.update(pairwise(words_and_marks(text)))
        return cls(stories, {word for pair in pairs for word in pair}, pairs)


def words_and_marks(text: str, hero: str = "") -> list[str]:
    """Words, digits and marks in small letters; every name, of the corpus or the hero's, is the word NAME."""
    found = re.findall(r"[^\W\d_]+|\d|[^\s\w]+", text)
    return ["NAME" if word in NAMES or (word == hero and hero[0].isupper()) else word.lower() for word in found]


def different_openings(storyteller: Storyteller) -> Figure:
    """Greedy stories that begin with every child's name: how many are different once the names are taken out?"""
    heroes = [(name, "girl") for name in words.GIRLS] + [(name, "boy") for name in words.BOYS]
    openings = [f"Once upon a time, there was a little {kind} named {name}." for name, kind in heroes]
    answers = generate(storyteller, openings)
    any_name = re.compile(r"\b(" + "|".join(corpus.NAMES) + r")\b")
    told = {any_name.sub("X", answer.text) for answer in answers}
    return Figure("different greedy stories by opening", len(told) / len(openings), None, len(openings))


# --- openings and requests written by hand --------------------------------------------------------


def hand_written_openings(storyteller: Storyteller, known: Known) -> list[Figure]:
    """Openings that no grammar made: does the story go on as the training text would, with its hero, and end?"""
    good, ended = judged(storyteller, hand_written.OPENINGS, known)
    good_others, _ = judged(storyteller, hand_written.OTHER_OPENINGS, known)
    return [
        Figure("hand-written openings that go on grammatically", statistics.mean(good), 0.90, len(good)),
        Figure("hand-written openings whose story ends by itself", statistics.mean(ended), 0.95, len(ended)),
        Figure(
            "openings by another hand that go on grammatically", statistics.mean(good_others), None, len(good_others)
        ),
    ]


def judged(storyteller: Storyteller, openings: tuple, known: Known) -> tuple[list[bool], list[bool]]:
    """For each opening: whether it goes on without a fault, and whether the story ends by itself."""
    answers = generate(storyteller, [opening.text for opening in openings])
    good = [not faults(opening, answer.text, known) for opening, answer in zip(openings, answers, strict=True)]
    return good, [answer.ended for answer in answers]


def faults(opening: hand_written.Opening, continuation: str, known: Known) -> list[str]:
    """What is wrong with a continuation, [] if nothing is.

    Two neighbours that the training text never had, a word three times running, a first sentence without a verb, or
    another hero than the opening's: a third name, a second pronoun, a name or a kind that is not the opening's.
    """
    before, after = (words_and_marks(text, opening.hero) for text in (opening.text, continuation))
    found = [f"{one} {two} is in no text" for one, two in pairwise(after) if (one, two) not in known.pairs]
    if after and before[-1] in known.words and (before[-1], after[0]) not in known.pairs:
        found.append(f"{before[-1]} {after[0]} is in no text")
    found += [
        f"{one} three times"
        for one, two, three in zip(after, after[1:], after[2:], strict=False)
        if one == two == three
    ]
    sentence = words_and_marks(re.split(r"(?<=[.!?])", continuation, maxsplit=1)[0])
    if not opening.verb and not VERBS & set(sentence):
        found.append("the first sentence has no verb")
    return found + hero_faults(opening, continuation)


def hero_faults(opening: hand_written.Opening, continuation: str) -> list[str]:
    text, hero = opening.text + continuation, opening.hero
    found = []
    if not cast_is_consistent(text):
        found.append("more than two names")
    if corpus.mentions(text.lower(), "he") and corpus.mentions(text.lower(), "she"):
        found.append("he and she")
    if hero[:1].isupper():
        return found if corpus.mentions(continuation, hero) else [*found, f"{hero} is not named again"]
    naming = NAMING.search(text)
    if naming is None and not any(corpus.mentions(continuation, name) for name in corpus.NAMES):
        found.append("nobody has a name")
    elif hero and naming is None:
        found.append(f"the {hero} gets no name")
    elif hero and naming.group(1) and naming.group(1) != hero:
        found.append(f"the {hero} became a {naming.group(1)}")
    return found


def honest_answers(storyteller: Storyteller) -> Figure:
    """Requests that it cannot fulfil, written by hand: is the answer one of the honest ones?"""
    answers = generate(storyteller, [corpus.chat_prompt(request) for request in hand_written.REQUESTS], 64)
    honest = [is_honest(answer.text) for answer in answers]
    return Figure("hand-written requests answered honestly", statistics.mean(honest), 0.90, len(honest))


def is_honest(text: str) -> bool:
    """Whether the text is an answer of `typed.UNKNOWN`, with any animal in it."""
    answers = [answer for _, answers in typed.UNKNOWN.values() for answer in answers]
    return any(re.fullmatch(re.escape(answer).replace(r"\{a_animal\}", r"an? \w+"), text) for answer in answers)


# --- generation -----------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    storyteller: Storyteller, prompts: list[str], most_new_tokens: int = MOST_NEW_TOKENS, temperature: float = 0.0
) -> list[Answer]:
    """Continue each prompt until an end token or the limit; greedy at temperature 0."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    answers = []
    for first in range(0, len(prompts), BATCH):
        batch = storyteller.tokenizer(
            prompts[first : first + BATCH], return_tensors="pt", padding=True, padding_side="left"
        )
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}  # [B, T] each
        rows = storyteller.model.generate(**inputs, max_new_tokens=most_new_tokens, **sampling)
        answers += [read_answer(storyteller, row) for row in rows[:, batch.input_ids.shape[1] :].tolist()]
    return answers


def read_answer(storyteller: Storyteller, ids: list[int]) -> Answer:
    """New token ids up to and with the first end token."""
    ends = set(storyteller.model.generation_config.eos_token_id)
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    text = storyteller.tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
    return Answer(text, len(ids) if stop is None else stop + 1, stop is not None)


# --- report ---------------------------------------------------------------------------------------


def table_line(figure: Figure) -> str:
    """`name  measured  target  cases`, shares in per cent."""
    sign = "≤" if figure.at_most else "≥"
    target = "" if figure.target is None else f"{sign} {figure.target:g}"
    verdict = {True: "reached", False: "MISSED", None: ""}[figure.reached]
    return f"{figure.name:<48} {figure.measured:8.3f}  {target:<7} {verdict:<8} {figure.cases:>6} cases"


def record(storyteller: Storyteller, figures: list[Figure], args: argparse.Namespace, seconds: float) -> dict:
    """What eval.json holds: the figures, when and with what they were measured, and greedy examples."""
    prompts = [*PLAIN_PROMPTS, *(corpus.chat_prompt(question) for question in CHAT_PROMPTS)]
    return {
        "figures": [
            figure._asdict() | {"reached": figure.reached, "measured": round(figure.measured, 4)} for figure in figures
        ],
        "date": date.today().isoformat(),
        "machine": args.machine,
        "seconds": round(seconds),
        "threads": args.threads,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "greedy": {prompt: generate(storyteller, [prompt])[0].text for prompt in prompts},
    }


def update_card(card: Path, recorded: dict) -> None:
    """Replace what stands between the two marks of the model card by the figures just recorded."""
    before, after = split_card(card)
    measured = f"Measured on {recorded['date']} on {recorded['machine']} in {recorded['seconds']} s."
    card.write_text(f"{before}{CARD_MARKS[0]}\n{measured}\n\n{card_table(recorded['figures'])}\n{CARD_MARKS[1]}{after}")


def split_card(card: Path) -> tuple[str, str]:
    """What stands before and behind the figures in the model card. Raises ConfigError without the two marks."""
    parts = re.split("|".join(map(re.escape, CARD_MARKS)), read_text(card, "the model card"))
    if len(parts) != 3:
        raise ConfigError(f"{card} does not hold the two lines {' and '.join(CARD_MARKS)}, once each")
    return parts[0], parts[2]


def card_table(figures: list[dict]) -> str:
    """The figures of eval.json as a Markdown table."""
    lines = ["| figure | measured | target | cases |", "|---|---|---|---|"]
    for figure in figures:
        sign = "≤" if figure["at_most"] else "≥"
        target = (
            "" if figure["target"] is None else f"{sign} {figure['target']:g}{'' if figure['reached'] else ' (missed)'}"
        )
        lines.append(f"| {figure['name']} | {figure['measured']:.3f} | {target} | {figure['cases']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
