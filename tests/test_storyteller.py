"""The storyteller: its corpus, the checkpoint we ship, and a small part of its evaluation."""

import json
import random
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minillm.storyteller import CHECKPOINT_DIR, corpus, evaluate, forward, hand_written, odd_words, train, typed
from minillm.storyteller import vocabulary as words

SHIPPED_LIMIT = 8_000_000  # bytes of package data
SOME = 2000  # documents looked at


@pytest.fixture(scope="module")
def documents():
    return [corpus.document(0, i) for i in range(SOME)]


@pytest.fixture(scope="module")
def storyteller():
    torch.set_num_threads(1)
    return evaluate.Storyteller.load(CHECKPOINT_DIR)


@pytest.fixture(scope="module")
def known():
    return evaluate.Known.of(corpus.document(0, i) for i in range(40 * SOME))


@pytest.fixture(scope="module")
def recorded():
    return json.loads((CHECKPOINT_DIR / "eval.json").read_text())


# --- the corpus -----------------------------------------------------------------------------------


def test_the_corpus_is_a_function_of_seed_and_index(documents):
    assert [corpus.document(0, i) for i in range(50)] == documents[:50]
    assert [corpus.document(1, i) for i in range(50)] != documents[:50]


def test_the_corpus_is_the_same_in_another_process(documents):
    code = (
        "from minillm.storyteller import corpus; print(''.join(corpus.document(0, i).text for i in range(100)), end='')"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "".join(document.text for document in documents[:100])


def test_the_generator_needs_the_standard_library_only():
    code = "import sys, minillm.storyteller.corpus; print(sorted({'torch', 'numpy', 'tokenizers'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_sentence_is_filled_and_every_document_closed(documents):
    for document in documents:
        assert not re.search(r"[{}]|\bNone\b|  ", document.text), document.text
        assert document.text.endswith((corpus.END_OF_TEXT, corpus.END)) or document.kind == "start"
        assert not re.search(r"\ba [aeio]", document.text), document.text


def test_stories_are_20_to_400_tokens_and_spread(storyteller, documents):
    lengths = sorted(
        len(storyteller.tokenizer(document.text).input_ids) for document in documents if document.kind == "story"
    )
    assert lengths[0] >= 20 and lengths[-1] <= 400
    assert lengths[len(lengths) * 9 // 10] >= 5 * lengths[len(lengths) // 10]


def opened(count):
    rng = random.Random("test opened stories")
    return [corpus.opened_story(rng) for _ in range(count)]


def test_an_opened_story_has_something_typed_and_one_cast():
    for asked, rest in opened(500):
        text = asked + rest
        assert asked.strip() and rest.endswith((".", "!", '"')), text
        assert not rest[0].isalnum() and "~" not in text and typed.CUT not in text, text
        assert len({name for name in corpus.NAMES if corpus.mentions(text, name)}) <= 2, text
        assert not (corpus.mentions(text.lower(), "he") and corpus.mentions(text.lower(), "she")), text


def test_a_start_is_read_up_to_where_it_was_typed_and_learned_for_two_sentences(documents):
    starts = [document.segments for document in documents if document.kind == "start"]
    assert starts
    for (asked, learns_asked), (rest, learns_rest) in starts:
        assert asked and not learns_asked and learns_rest and rest.endswith((".", "!", "?", '"')), (asked, rest)
        assert 1 <= len(re.findall(r'[.!?]"?(?= [A-Z"]|$)', rest.lstrip(".!?"))) <= 2, rest


def test_odd_words_are_read_and_never_learned():
    odd = (
        odd_words.ALL
        - odd_words.CORPUS
        - set(re.findall(r"\w+", f"{typed.GRAMMAR} {odd_words.KNOWN} {typed.OTHER_HEROES}"))
    )
    plain = {word for story in stories(500) for word in re.findall(r"\w+", story.text)}
    learned = {word for _, rest in opened(2000) for word in re.findall(r"\w+", rest)}
    assert not learned & odd - plain
    assert odd & {word for asked, _ in opened(2000) for word in re.findall(r"\w+", asked)}


def test_openings_begin_in_many_ways():
    first = {" ".join((asked + rest).split()[:2]) for asked, rest in opened(2000)}
    assert len(first) > 500 and {"There was", "One day,", "The little", "It was", "In the", "Once upon"} <= first


def test_what_is_unknown_is_answered_honestly():
    rng = random.Random("test unknown")
    answers = set()
    for _ in range(500):
        turn = corpus.chat_turn(rng, "unknown")
        assert evaluate.is_honest(turn.answer) and not re.search(r"[\[\]{}~]", turn.question), turn
        answers.add(re.sub(r"an? \w+\?$", "", turn.answer))
    assert len(answers) >= 10


def test_hand_written_prompts_are_in_no_training_text(documents):
    texts = [document.text for document in documents]
    openings = [opening.text for opening in hand_written.OPENINGS + hand_written.OTHER_OPENINGS]
    assert len(openings) == len(set(openings)) == 120
    assert not [opening for opening in openings if any(text.startswith(opening) for text in texts)]
    asked = {question for text in texts for question in re.findall(r"<\|user\|>(.*?)<\|end\|>", text)}
    assert not asked & set(hand_written.REQUESTS)


def stories(count, **wanted):
    rng = random.Random("test stories")
    return [corpus.random_story(rng, **wanted) for _ in range(count)]


def test_a_story_names_its_hero_and_friend_and_nobody_else():
    for story in stories(300):
        named = {name for name in corpus.NAMES if corpus.mentions(story.text, name)}
        assert story.hero in named and named <= {story.hero, story.friend}, story.text


def test_a_story_has_one_pronoun_and_the_hero_one_kind():
    for story in stories(300):
        he = words.ANIMAL_NAMES.get(story.hero) or ("she" if story.hero in words.GIRLS else "he")
        other = "he" if he == "she" else "she"
        assert not corpus.mentions(story.text, other), story.text
        assert re.search(rf"\b{story.kind} (named|called) {story.hero}\b", story.text), story.text


def test_what_is_lost_is_what_is_found():
    for length in ("short", "medium", "long"):
        for story in stories(100, length=length, plot="lost"):
            assert evaluate.found_object(story.text) == story.objects[0], story.text


def test_objects_stand_in_the_episode_they_belong_to():
    for story in stories(300):
        assert {obj for obj in words.OBJECTS if corpus.mentions(story.text, obj)} <= set(story.objects), story.text


def test_answers_are_right():
    rng = random.Random("test turns")
    for _ in range(300):
        turn = corpus.chat_turn(rng, "sum")
        a, b = (int(n) for n in re.findall(r"\d+", turn.answer)[:2])
        assert turn.answer == f"{a} + {b} = {a + b}." and sorted(re.findall(r"\d", turn.question)) == sorted(f"{a}{b}")
        turn = corpus.chat_turn(rng, "capital")
        country = next(key for key in words.CAPITALS if key in turn.question)
        assert turn.answer == f"The capital of {country} is {words.CAPITALS[country]}."
        turn = corpus.chat_turn(rng, "repeat")
        assert turn.question.endswith(turn.topic) and turn.topic in turn.answer


def test_stories_are_about_the_topic_asked_for():
    rng = random.Random("test topics")
    for length in ("short", "medium", "long"):
        for _ in range(100):
            turn = corpus.story_turn(rng, length)
            assert corpus.mentions(turn.answer, turn.topic)
            assert (length in turn.question) == (length != "medium")


def test_held_out_questions_and_stories_are_not_in_the_training_text(documents):
    asked_and_answered = re.compile(r"<\|user\|>(.*?)<\|end\|><\|assistant\|>(.*?)<\|end\|>")
    trained = {question for document in documents for question, _ in asked_and_answered.findall(document.text)}
    held_out = [corpus.document(7, i, held_out=True) for i in range(SOME)]
    greetings = {*words.GREETINGS, *typed.TALK}
    for document in held_out:
        for question, answer in asked_and_answered.findall(document.text):
            not_split = question in greetings or evaluate.is_honest(answer) or document.kind == "opened_chat"
            assert not_split or "about" not in question and "story" in question or question not in trained
    rng = random.Random("test split")
    assert all(
        corpus.story_held_out(s.hero, s.place, s.objects[0])
        for s in (corpus.random_story(rng, held_out=True) for _ in range(50))
    )
    assert not any(
        corpus.story_held_out(s.hero, s.place, s.objects[0]) for s in (corpus.random_story(rng) for _ in range(50))
    )


# --- the checkpoint -------------------------------------------------------------------------------


def test_the_shipped_files_are_small_and_complete():
    files = {path.name: path.stat().st_size for path in CHECKPOINT_DIR.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "eval.json",
    } <= set(files)
    assert {"chat_template.jinja", "README.md"} <= set(files)
    assert sum(files.values()) <= SHIPPED_LIMIT


def test_transformers_loads_the_checkpoint_unchanged():
    model, info = AutoModelForCausalLM.from_pretrained(CHECKPOINT_DIR, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == "qwen3" and model.config.tie_word_embeddings
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings >= 2048


def test_every_vocabulary_entry_is_a_token(storyteller):
    assert storyteller.model.config.vocab_size == len(storyteller.tokenizer)
    assert storyteller.model.get_input_embeddings().weight.shape[0] == len(storyteller.tokenizer)


def test_end_tokens_and_pad_token(storyteller):
    tokenizer, ids = storyteller.tokenizer, storyteller.tokenizer.convert_tokens_to_ids
    assert ids(list(corpus.SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    for config in (storyteller.model.config, storyteller.model.generation_config):
        assert config.eos_token_id == [ids(corpus.END_OF_TEXT), ids(corpus.END)]
        assert config.pad_token_id == ids(corpus.PAD) == tokenizer.pad_token_id
    assert tokenizer.eos_token == corpus.END_OF_TEXT and tokenizer.bos_token is None
    assert tokenizer("Once").input_ids == tokenizer("Once", add_special_tokens=False).input_ids


def test_names_and_objects_and_digits_are_one_token(storyteller):
    for word in corpus.NAMES + words.OBJECTS + words.PLACES + words.ANIMALS + words.COLOURS:
        evaluate.single_token(storyteller.tokenizer, " " + word)
    tokens = storyteller.tokenizer.tokenize("12 + 345 = 6")
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("123456")


@pytest.mark.parametrize(
    "text", ["Zürich, 東京 🐢\n\t", "".join(map(chr, range(32, 127))), "a  b", "<|unknown|>", "\x00\x7f"]
)
def test_every_text_comes_back(storyteller, text):
    assert (
        storyteller.tokenizer.decode(storyteller.tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text
    )


def test_chat_template(storyteller):
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "What is 3 + 4?"},
    ]
    rendered = storyteller.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == corpus.chat_prompt("Hi") + "Hello!" + corpus.END + corpus.chat_prompt("What is 3 + 4?")
    with_system = [{"role": "system", "content": "Be kind."}, *chat]
    assert (
        storyteller.tokenizer.apply_chat_template(with_system, tokenize=False, add_generation_prompt=True) == rendered
    )
    with pytest.raises(Exception, match="roles user and assistant"):
        storyteller.tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


# --- the training ---------------------------------------------------------------------------------


@torch.no_grad()
def test_the_training_forward_is_that_of_transformers(storyteller, documents, monkeypatch):
    monkeypatch.setattr(forward, "PRODUCTS", torch.float32)
    rows = [train.encode(storyteller.tokenizer, document) for document in documents[:6]]
    ours = train.Loss(storyteller.model, "cpu", compiled=False).mean(rows)
    theirs = 0.0
    for ids, labels in rows:
        logits = storyteller.model(torch.tensor([ids])).logits[0, :-1]
        theirs += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
    assert ours == pytest.approx(theirs / train.trained_tokens(rows), rel=1e-4)


def test_batches_keep_every_row_once_and_none_is_alone():
    rng = random.Random("test batches")
    for count in range(2, 60):
        rows = [([0] * rng.choice((8, 30, 60, 150, 380)), []) for _ in range(count)]
        grouped = train.batches(rows)
        assert sorted(map(id, rows)) == sorted(id(row) for batch in grouped for row in batch)
        assert all(len(batch) > 1 for batch in grouped)


def test_the_tokenizer_is_that_of_the_recipe(tmp_path):
    """Token ids outlive a wider training text: the shipped file is made again, byte for byte."""
    train.build_tokenizer(train.Recipe()).save_pretrained(tmp_path)
    name = "tokenizer.json"
    assert (tmp_path / name).read_bytes() == (CHECKPOINT_DIR / name).read_bytes()


def test_training_saves_a_loadable_checkpoint_and_a_log(tmp_path):
    recipe = train.Recipe(steps=2, finish_steps=1, documents=6, tokenizer_documents=300)
    train.train(recipe, tmp_path, "cpu", log_every=1, save_every=2, compiled=False)
    lines = [json.loads(line) for line in (tmp_path / "training.log").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 1] and "held_out_loss" in lines[-1]
    assert evaluate.recipe_of(tmp_path) == recipe and len(list(train.training_documents(recipe))) == 18
    AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path)


def test_the_shipped_model_was_trained_with_the_recipe_of_the_code():
    assert evaluate.recipe_of(CHECKPOINT_DIR) == train.Recipe()


# --- what it can do -------------------------------------------------------------------------------


def test_it_tells_a_story_and_stops(storyteller):
    [answer] = evaluate.generate(storyteller, ["Once upon a time"])
    assert answer.ended and 20 <= answer.tokens <= 420
    assert answer.text.endswith((".", "!", '"')) and evaluate.cast_is_consistent("Once upon a time" + answer.text)


@pytest.mark.parametrize(
    ("prompt", "beginning"),
    [
        ("Once upon a time, there was a", " little"),
        ("The capital of France is", " Paris."),
        ("Hello, my name is", " John and I"),
        (corpus.chat_prompt("What is 3 + 4?"), "3 + 4 = 7."),
        (corpus.chat_prompt("Hello"), words.GREETINGS["Hello"]),
        (corpus.chat_prompt("How are you?"), words.GREETINGS["How are you?"]),
    ],
)
def test_the_prompts_of_the_course(storyteller, prompt, beginning):
    [answer] = evaluate.generate(storyteller, [prompt], most_new_tokens=64)
    assert answer.text.startswith(beginning)


@pytest.mark.parametrize(
    ("opening", "hero"),
    [
        ("The little girl", "girl"),
        ("One day, a fox", "fox"),
        ("A small cat", "cat"),
        ("The", ""),
    ],
)
def test_what_people_type_first_becomes_a_story(storyteller, known, opening, hero):
    [answer] = evaluate.generate(storyteller, [opening])
    assert answer.ended and not evaluate.faults(hand_written.Opening(opening, hero), answer.text, known), answer.text


def test_a_sad_hero_is_sad_once(storyteller, known):  # "felt felt felt sad"
    openings = ["One day, a fox", "Lily felt", "Once upon a time, there was a fox named Ziggy. Ziggy felt"]
    for opening, answer in zip(openings, evaluate.generate(storyteller, openings), strict=True):
        assert not re.search(r"\b(\w+) \1\b", opening + answer.text), answer.text


@pytest.mark.parametrize("request_", ["Tell me a joke", "Tell me a joke.", "tell me a joke"])
def test_no_joke_is_told(storyteller, request_):
    for prompt in (request_, corpus.chat_prompt(request_)):
        [answer] = evaluate.generate(storyteller, [prompt], 64)
        assert "I do not know any jokes." in answer.text


def test_a_part_of_the_evaluation_reaches_its_targets(storyteller, known, recorded):
    reached = {figure["name"] for figure in recorded["figures"] if figure["reached"]}
    few = [
        *evaluate.facts(storyteller, 40),
        evaluate.question_figure(storyteller, "sums of two digits", "sum", 40, 0.90),
        evaluate.lost_is_found(storyteller, 40),
        evaluate.repeated_names(storyteller, 20)[0],
        *evaluate.hand_written_openings(storyteller, known),
        evaluate.honest_answers(storyteller),
    ]
    for figure in few:
        if figure.target is not None and figure.name in reached:
            assert figure.measured >= figure.target - 0.05, figure  # few cases: a margin of two of forty


def test_the_card_states_the_recorded_figures(recorded):
    card = (CHECKPOINT_DIR / "README.md").read_text()
    assert evaluate.card_table(recorded["figures"]) in card
    assert recorded["date"] in card and recorded["machine"] in card
