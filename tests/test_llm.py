"""LLM: prompts of every form, text, streams, chat, vectors and log-probabilities; what fails changes nothing."""

import os
import signal

import pytest
import torch
from transformers import AutoModel

import minillm
from minillm import LLM, SamplingParams, encode, generate_cached
from minillm.engine import llm as llm_module
from minillm.errors import ConfigError, PromptError, SamplingParamsError, WorkerDiedError
from tiny_models import TOLERANCE, random_token_ids

ONCE = "Once upon a time, there was a"
QUIET = {"use_tqdm": False}


@pytest.fixture(scope="module")
def storyteller():
    """In float64, so that no rounding decides between tokens."""
    with LLM(dtype="float64", num_blocks=200, max_model_len=400, max_num_seqs=4, verbose=False) as llm:
        yield llm


@pytest.fixture
def llm(storyteller):
    """The storyteller; whatever a test did with it, all blocks are back afterwards."""
    yield storyteller
    assert_idle(storyteller)


@pytest.fixture(scope="module")
def tiny(checkpoint):
    with LLM(checkpoint("llama"), dtype="float64", num_blocks=40, skip_tokenizer_init=True, verbose=False) as llm:
        yield llm
        assert_idle(llm)


def assert_idle(llm):
    assert not llm.engine.has_unfinished_requests()
    assert llm.engine.scheduler.block_manager.usage.used == 0
    llm.engine.scheduler.block_manager.check()


def alone(llm, prompt, params):
    """What the request gives by itself, with a contiguous cache."""
    token_ids = encode(llm.tokenizer, prompt) if isinstance(prompt, str) else prompt
    return generate_cached(llm.engine.model, token_ids, params, tokenizer=llm.tokenizer)


def assert_is(output, expected):
    """A completion is the result of the ladder's rung."""
    assert tuple(output.token_ids) == expected.token_ids and output.text == expected.text
    assert (output.finish_reason, output.stop_reason) == (expected.finish_reason, expected.stop_reason)


# --- prompts ---------------------------------------------------------------------------------------------------------


def forms(llm):
    ids = encode(llm.tokenizer, ONCE)
    return {
        "text": ONCE,
        "texts": [ONCE, ONCE],
        "ids": ids,
        "tuple of ids": tuple(ids),
        "lists of ids": [ids, ids],
        "dict of ids": {"prompt_token_ids": ids},
        "dict of text": {"prompt": ONCE},
        "mixed": [ONCE, ids, {"prompt_token_ids": ids}, {"prompt": ONCE, "cache_salt": "mine"}],
    }


@pytest.mark.parametrize(
    "form", ["text", "texts", "ids", "tuple of ids", "lists of ids", "dict of ids", "dict of text", "mixed"]
)
def test_every_form_of_a_prompt_gives_what_it_gives_alone(llm, form):
    params = SamplingParams(max_tokens=12)
    prompts = forms(llm)[form]
    outputs = llm.generate(prompts, params, **QUIET)
    assert len(outputs) == (len(prompts) if form in ("texts", "lists of ids", "mixed") else 1)
    for output in outputs:
        assert_is(output.outputs[0], alone(llm, ONCE, params))
        assert output.prompt_token_ids == encode(llm.tokenizer, ONCE) and output.finished
    assert outputs[0].prompt == (ONCE if form in ("text", "texts", "dict of text", "mixed") else None)


def test_results_come_in_the_order_of_the_prompts_each_by_its_own_params(llm):
    prompts = [ONCE, "The fox", "Hello", "A dog ran", "One day", "The sun"]
    params = [SamplingParams(max_tokens=n) for n in (30, 3, 17, 1, 9, 40)]
    outputs = llm.generate(prompts, params, **QUIET)
    finished = [request_id for step in llm.trace.steps for request_id in step.finished]
    order = [finished.index(output.request_id) for output in outputs]
    assert order != sorted(order), "the order of ending differs from that of the prompts, or nothing is shown"
    for output, prompt, each in zip(outputs, prompts, params, strict=True):
        assert output.prompt == prompt
        assert_is(output.outputs[0], alone(llm, prompt, each))


def test_no_prompts_are_no_outputs(llm):
    assert llm.generate([], **QUIET) == []


def test_a_prefix_computed_before_is_found_again_only_under_its_salt(llm):
    ids = encode(llm.tokenizer, "One sunny day, a cat and a dog went to the park to play. " * 3)
    params = SamplingParams(max_tokens=4)
    cached = [
        llm.generate({"prompt_token_ids": ids, "cache_salt": salt}, params, **QUIET)[0].num_cached_tokens
        for salt in ("a", "a", "b", "b")
    ]
    block_size = llm.engine.config.block_size
    assert cached == [0, (len(ids) - 1) // block_size * block_size] * 2 and cached[1] > 0


# --- refusals --------------------------------------------------------------------------------------------------------

BAD_PROMPTS = [
    ("", PromptError, "prompt is empty"),
    ([ONCE, ""], PromptError, "prompt is empty"),
    ([ONCE, []], PromptError, "prompt is empty"),
    ([ONCE, 7], PromptError, "prompt 1 is the number 7"),
    ([[5, "a"]], PromptError, "token id 'a' at position 1"),
    ([[5, 1.5]], PromptError, "token id 1.5 at position 1"),
    ([5, 10**6], PromptError, "token id 1000000 at position 1 is outside"),
    ([[5, -1]], PromptError, "token id -1 at position 1 is outside"),
    ([ONCE, b"bytes"], PromptError, "got bytes"),
    (None, PromptError, "got NoneType"),
    ({"text": "a"}, PromptError, "no key 'text'"),
    ({"prompt": 3}, PromptError, "needs 'prompt'"),
    ({}, PromptError, "needs 'prompt'"),
    ({"prompt": "a", "cache_salt": 3}, PromptError, "cache_salt is 3"),
    ("half \ud83e", PromptError, "surrogate"),
    ([ONCE, [5] * 390], PromptError, "max_model_len is 400"),
    ([ONCE, [5] * 3000], PromptError, "context is 2048|encode takes max_model_len = 400"),
]


@pytest.mark.parametrize(("prompts", "error", "message"), BAD_PROMPTS, ids=[message for *_, message in BAD_PROMPTS])
def test_a_bad_prompt_is_refused_before_anything_changes(llm, prompts, error, message):
    steps, requests = len(llm.trace.steps), len(llm.trace.requests)
    for call in (llm.generate, llm.encode, llm.stream) if message != "max_model_len is 400" else (llm.generate,):
        if call == llm.stream and isinstance(prompts, list) and isinstance(prompts[0], str | list):
            continue  # several prompts
        arguments = (prompts,) if call == llm.encode else (prompts, SamplingParams(max_tokens=20))
        with pytest.raises(error, match=message):
            call(*arguments)
        assert (len(llm.trace.steps), len(llm.trace.requests)) == (steps, requests)
        assert_idle(llm)


def test_arrays_are_refused_with_what_to_do(llm):
    for prompts in (torch.tensor([5, 6]), [torch.tensor([5, 6])], [torch.tensor([5, 6]), torch.tensor([7, 8])]):
        with pytest.raises(PromptError, match=r"got Tensor; an array becomes a list with \.tolist"):
            llm.generate(prompts)
    with pytest.raises(PromptError, match="at position 0 is no whole number"):
        llm.stream([torch.tensor([5, 6])])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sampling_params": [SamplingParams()]}, SamplingParamsError, "1 sampling parameters for 2 prompts"),
        ({"sampling_params": [SamplingParams(), 5]}, SamplingParamsError, "params is 5; it must be a SamplingParams"),
        ({"priority": [1]}, ConfigError, "1 priorities for 2 prompts"),
        ({"priority": [0, 1]}, ConfigError, "priority is 1, which scheduling_policy 'fcfs'"),
        ({"sampling_params": SamplingParams(max_tokens=2048)}, PromptError, "max_tokens = 2048 do not fit"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(llm, arguments, error, message):
    requests = len(llm.trace.requests)
    with pytest.raises(error, match=message):
        llm.generate([ONCE, ONCE], **arguments)
    assert len(llm.trace.requests) == requests


def test_without_a_tokenizer_text_is_refused_and_none_comes_back(tiny):
    with pytest.raises(PromptError, match="no tokenizer"):
        tiny.generate(ONCE)
    with pytest.raises(SamplingParamsError, match="stop strings need a tokenizer"):
        tiny.generate([5, 6], SamplingParams(max_tokens=2, stop="a"))
    with pytest.raises(PromptError, match="chat needs the tokenizer"):
        tiny.chat([{"role": "user", "content": "a"}])
    assert tiny.generate([5, 6], SamplingParams(max_tokens=2), **QUIET)[0].outputs[0].text is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seq": 4}, "'max_num_seq' is no engine argument; did you mean 'max_num_seqs'"),
        ({"seed": 4}, "'seed' is no engine argument; there are: .*block_size"),  # nothing is near
        ({"zzz": 4}, "'zzz' is no engine argument"),
        ({"max_model_len": 5000}, "max_model_len is 5000, the model's context only 2048"),
        ({"num_blocks": 10}, "num_blocks is 10, but one request of max_model_len = 2048 tokens needs 129"),
    ],
)
def test_engine_arguments_are_checked_before_the_weights_are_read(arguments, message, monkeypatch):
    monkeypatch.setattr("minillm.engine.llm_engine.load_decoder", lambda *_: pytest.fail("read the weights"))
    with pytest.raises(ConfigError, match=message):
        LLM(**arguments)


# --- when something fails on the way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("fails_at", [0, 3])
def test_if_a_step_fails_the_requests_end_and_the_next_call_is_right(llm, monkeypatch, error, fails_at):
    right, calls = llm.engine.executor.launch, []

    def launch(plan):
        calls.append(plan)
        if len(calls) > fails_at:
            raise error
        return right(plan)

    params = SamplingParams(max_tokens=10)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.executor, "launch", launch)
        with pytest.raises(type(error)):
            llm.generate([ONCE, "The fox"], params, **QUIET)
    assert len(calls) == fails_at + 1
    assert_idle(llm)
    for output, prompt in zip(llm.generate([ONCE, "The fox"], params, **QUIET), [ONCE, "The fox"], strict=True):
        assert_is(output.outputs[0], alone(llm, prompt, params))


def test_the_progress_bar_counts_requests_and_can_be_off(llm, monkeypatch):
    bars = []

    class Bar(llm_module.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append((options, self))

    monkeypatch.setattr(llm_module, "tqdm", Bar)
    llm.generate([ONCE, "The fox"], SamplingParams(max_tokens=2))
    llm.generate(ONCE, SamplingParams(max_tokens=2), use_tqdm=False)
    assert [(options["total"], options["disable"]) for options, _ in bars] == [(2, False), (1, True)]
    assert bars[0][1].disable or bars[0][1].n == 2


# --- stop strings and streams ----------------------------------------------------------------------------------------


def stop_across_tokens(llm, prompt, max_tokens):
    """A string in the greedy text that begins inside one token and ends inside a later one."""
    token_ids = alone(llm, prompt, SamplingParams(max_tokens=max_tokens)).token_ids
    texts = minillm.token_texts(llm.tokenizer, token_ids)
    place = next(i for i in range(3, len(texts)) if len(texts[i]) > 3 and len(texts[i + 1]) > 3)
    return texts[place][2:] + texts[place + 1][:2]


def test_a_stop_string_across_tokens_ends_the_request_there(llm):
    stop = stop_across_tokens(llm, ONCE, 30)
    params = SamplingParams(max_tokens=30, stop=stop)
    output = llm.generate(ONCE, params, **QUIET)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert stop not in output.text and len(output.token_ids) < 30
    assert_is(output, alone(llm, ONCE, params))
    request_id = llm.trace.requests[-1].request_id
    last = llm.trace.parts(request_id)
    assert sum(part.num_sampled for _, part in last) == len(output.token_ids), "nothing was computed behind it"
    assert llm.trace.steps[-1].finished == (request_id,)


@pytest.mark.parametrize("asked", [{}, {"max_tokens": None}])
def test_without_max_tokens_as_many_as_fit_and_only_a_number_is_refused(asked, checkpoint):
    with LLM(
        checkpoint("llama"), dtype="float64", max_model_len=40, skip_tokenizer_init=True, num_blocks=9, verbose=False
    ) as llm:
        (output,) = llm.generate([[5, 6, 7]], SamplingParams(ignore_eos=True, **asked), **QUIET)
        assert len(output.outputs[0].token_ids) == 37
        assert output.outputs[0].finish_reason == "length"
        with pytest.raises(PromptError, match=r"3 prompt \+ max_tokens 38"):
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=38), **QUIET)
        with pytest.raises(SamplingParamsError, match="min_tokens is 38, above max_tokens = 37"):
            llm.generate([[5, 6, 7]], SamplingParams(min_tokens=38), **QUIET)
        assert_idle(llm)


def test_an_eos_or_stop_id_ends_the_request(llm):
    token_ids = alone(llm, ONCE, SamplingParams(max_tokens=10)).token_ids
    params = SamplingParams(max_tokens=10, stop_token_ids=[token_ids[5]])
    output = llm.generate(ONCE, params, **QUIET)[0].outputs[0]
    assert (output.finish_reason, output.stop_reason) == ("stop", token_ids[5])
    assert_is(output, alone(llm, ONCE, params))


@pytest.mark.parametrize("stops", [False, True], ids=["to the end", "with a stop string"])
def test_the_pieces_of_a_stream_are_the_whole(llm, stops):
    stop = [stop_across_tokens(llm, ONCE, 30)] if stops else []
    params = SamplingParams(max_tokens=30, stop=stop, logprobs=1)
    outputs = list(llm.stream(ONCE, params))
    pieces = [output.outputs[0] for output in outputs]
    expected = alone(llm, ONCE, params)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(outputs) == len(expected.token_ids) and all(len(piece.token_ids) == 1 for piece in pieces)
    assert tuple(token_id for piece in pieces for token_id in piece.token_ids) == expected.token_ids
    assert "".join(piece.text for piece in pieces) == expected.text
    assert {piece.finish_reason for piece in pieces[:-1]} == {None}
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == (expected.finish_reason, expected.stop_reason)
    whole = llm.generate(ONCE, params, **QUIET)[0].outputs[0]
    assert [entry for piece in pieces for entry in piece.logprobs] == whole.logprobs


def test_a_stream_closed_early_gives_its_blocks_back(llm):
    stream = llm.stream(ONCE, SamplingParams(max_tokens=100))
    next(stream), next(stream)
    assert llm.engine.scheduler.block_manager.usage.used > 0
    stream.close()
    assert_idle(llm)
    assert list(stream) == []


def test_a_stream_never_begun_holds_nothing_and_one_aborted_from_outside_ends(llm):
    llm.stream(ONCE, SamplingParams(max_tokens=100))
    assert_idle(llm)
    stream = llm.stream(ONCE, SamplingParams(max_tokens=100))
    first = next(stream)
    assert llm.engine.abort_request(first.request_id)
    (last,) = stream
    assert last.finished and last.outputs[0].finish_reason == "abort"
    assert last.request_id == first.request_id and last.outputs[0].token_ids == []


def aborting(llm, monkeypatch, request_ids, after):
    """Abort these requests through the engine when so many steps have been launched."""
    right, calls = llm.engine.executor.launch, []

    def launch(plan):
        calls.append(plan)
        if len(calls) == after:
            for request_id in request_ids(plan):
                assert llm.engine.abort_request(request_id)
        return right(plan)

    monkeypatch.setattr(llm.engine.executor, "launch", launch)


@pytest.mark.parametrize("n", [1, 2])
def test_a_request_aborted_through_the_engine_comes_back_with_what_it_had(llm, monkeypatch, n):
    params = SamplingParams(temperature=1.0, seed=3, n=n, max_tokens=12, logprobs=0)
    whole = llm.generate([ONCE, "The fox"], params, **QUIET)
    first = []

    def request_ids(plan):
        first.append(min(int(part.request_id.split(".")[0].removeprefix("req ")) for part in plan.scheduled))
        return [f"req {first[0]}"]

    aborting(llm, monkeypatch, request_ids, after=5)
    cut, other = llm.generate([ONCE, "The fox"], params, **QUIET)
    for got, expected in zip(cut.outputs, whole[0].outputs, strict=True):
        num_tokens = len(got.token_ids)
        assert got.finish_reason == "abort" and got.stop_reason is None and 1 <= num_tokens <= 4
        assert got.token_ids == expected.token_ids[:num_tokens] and expected.text.startswith(got.text)
        assert len(got.logprobs) == num_tokens
    assert cut.finished and [each.token_ids for each in other.outputs] == [each.token_ids for each in whole[1].outputs]


def test_if_all_are_aborted_the_call_ends_and_the_next_is_right(llm, monkeypatch):
    params = SamplingParams(max_tokens=9)
    with monkeypatch.context() as patch:
        aborting(llm, patch, lambda plan: [part.request_id for part in plan.scheduled], after=3)
        outputs = llm.generate([ONCE, "The fox"], params, **QUIET)
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort", "abort"]
    assert_is(llm.generate(ONCE, params, **QUIET)[0].outputs[0], alone(llm, ONCE, params))


def test_an_aborted_stream_loses_nothing_it_had_not_told(llm):
    """A stop string may begin in the text that is held back; what was computed for others to read comes first."""
    params = SamplingParams(max_tokens=30, stop="never in a story")
    expected = alone(llm, ONCE, SamplingParams(max_tokens=30))
    stream = llm.stream(ONCE, params)
    pieces = [next(stream) for _ in range(3)]
    llm.generate("The fox", SamplingParams(max_tokens=4), **QUIET)
    llm.engine.abort_request(pieces[0].request_id)
    pieces += stream
    token_ids = [token_id for piece in pieces for token_id in piece.outputs[0].token_ids]
    assert [piece.finished for piece in pieces[:-1]] == [False] * (len(pieces) - 1) and pieces[-1].finished
    assert len(token_ids) >= 6 and token_ids == list(expected.token_ids[: len(token_ids)])
    told = "".join(piece.outputs[0].text for piece in pieces)
    assert told == alone(llm, ONCE, SamplingParams(max_tokens=len(token_ids))).text


def test_an_id_that_the_engines_caller_uses_is_neither_taken_nor_ended(llm):
    params = SamplingParams(max_tokens=5)
    number = int(llm.generate(ONCE, params, **QUIET)[0].request_id.removeprefix("req "))
    stream = llm.stream(ONCE, params)  # gets its id now, and begins later
    llm.engine.add_request(f"req {number + 1}", "The fox", params, output_kind="final_only")
    llm.engine.add_request(f"req {number + 2}", "The fox", params, output_kind="final_only")
    with pytest.raises(PromptError, match=f"'req {number + 1}' is in use"):
        next(stream)
    assert llm.engine.is_unfinished(f"req {number + 1}")
    assert llm.generate(ONCE, params, **QUIET)[0].request_id == f"req {number + 3}"
    while llm.engine.has_unfinished_requests():
        llm.engine.step()


def test_streams_may_be_interleaved_with_each_other_and_with_generate(llm):
    params = SamplingParams(max_tokens=20)
    one, two = llm.stream(ONCE, params), llm.stream("The fox", params)
    texts = [next(one).outputs[0].text + next(one).outputs[0].text, next(two).outputs[0].text]
    assert_is(llm.generate("Hello", params, **QUIET)[0].outputs[0], alone(llm, "Hello", params))
    texts[1] += "".join(output.outputs[0].text for output in two)
    texts[0] += "".join(output.outputs[0].text for output in one)
    assert texts == [alone(llm, prompt, params).text for prompt in (ONCE, "The fox")]


# --- several outputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [ONCE, ONCE * 8], ids=["within a block", "over several blocks"])
def test_n_outputs_are_those_of_n_seeds(llm, prompt):
    output = llm.generate(prompt, SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=15), **QUIET)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    for i, completion in enumerate(output.outputs):
        assert_is(completion, alone(llm, prompt, SamplingParams(temperature=1.0, seed=7 + i, max_tokens=15)))


def test_n_outputs_in_a_stream_are_told_apart_by_their_index(llm):
    texts, params = [""] * 3, SamplingParams(temperature=1.0, seed=7, n=3, max_tokens=15)
    for output in llm.stream(ONCE, params):
        for completion in output.outputs:
            texts[completion.index] += completion.text
    assert output.finished
    assert texts == [completion.text for completion in llm.generate(ONCE, params, **QUIET)[0].outputs]


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_puts_a_conversation_into_the_models_template(llm):
    conversation = [{"role": "user", "content": "What is 3 + 4?"}]
    params = SamplingParams(max_tokens=20)
    text = llm.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    ids = llm.tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    outputs = llm.chat(conversation, params, **QUIET)
    outputs += llm.chat([conversation, conversation], params, **QUIET)
    assert len(outputs) == 3
    for output in outputs:
        assert output.prompt == text and output.prompt_token_ids == ids
        assert_is(output.outputs[0], alone(llm, ids, params))
        assert output.outputs[0].text == "3 + 4 = 7."


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([[]], "conversation is empty"),
        ([{"role": "user"}], "message 0 is"),
        (["hello"], "conversation is 'hello'; it must be a list of messages"),
        ("hello", "messages is 'hello'; it must be a list of messages"),
        ({"role": "user", "content": "Hello"}, r"messages is {'content'.*it must be a list of messages, \[{'role'"),
        (None, "messages is None; it must be a list"),
        ([{"role": "user", "content": 3}], "content of message 0 is 3; it must be a str"),
        ([{"role": "user", "content": None}], "refuses these messages"),  # the storyteller's template
        ([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], "refuses these messages"),
        ([{"role": "user", "content": "ab\ud83e"}], "surrogate"),
        ([{"role": "tool", "content": "a"}], "refuses these messages"),
    ],
)
def test_a_conversation_that_is_none_is_refused(llm, messages, message):
    with pytest.raises(PromptError, match=message):
        llm.chat(messages)


EVERYTHING = """{{ bos_token }}{% for tool in tools or [] %}<tool {{ tool }}>{% endfor %}{% for message in messages %}\
{{ message.role }}:{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}{{ message.tool_calls or "" }};\
{% endfor %}{{ mood }}{% if add_generation_prompt %}assistant:{% endif %}"""
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "He"}


def text_of_chat(llm, monkeypatch, messages, template=EVERYTHING, **options):
    """What a conversation becomes in a template that knows all that a message may have."""
    monkeypatch.setattr(llm.tokenizer, "chat_template", template)
    (output,) = llm.chat(messages, SamplingParams(max_tokens=1), **options, **QUIET)
    assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt, add_special_tokens=False)
    return output.prompt.removeprefix(llm.tokenizer.bos_token or "")


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "system", "content": ""}, USER], "system:;user:Hi;assistant:"),
        (iter([USER]), "user:Hi;assistant:"),
        ([{"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]}], "user:Hi;assistant:"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": ["c"]}], "user:Hi;assistant:['c'];assistant:"),
        ([USER, {"role": "assistant", "tool_calls": ["c"]}], "user:Hi;assistant:['c'];assistant:"),
    ],
)
def test_what_a_content_may_be_is_the_templates_business(llm, monkeypatch, messages, text):
    assert text_of_chat(llm, monkeypatch, messages) == text


def test_options_of_the_chat_template_reach_it(llm, monkeypatch):
    tool = {"type": "function", "function": {"name": "add"}}
    text = text_of_chat(llm, monkeypatch, [USER], tools=[tool], chat_template_kwargs={"mood": "merry;"})
    assert text == f"<tool {tool}>user:Hi;merry;assistant:"
    assert text_of_chat(llm, monkeypatch, [USER], add_generation_prompt=False) == "user:Hi;"
    going_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert text_of_chat(llm, monkeypatch, [USER, ANSWER], **going_on) == "user:Hi;assistant:He"
    assert text_of_chat(llm, monkeypatch, [USER], chat_template_kwargs={"add_generation_prompt": False}) == "user:Hi;"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"continue_final_message": True}, "set add_generation_prompt=False"),
        ({"chat_template_kwargs": {"continue_final_message": True}}, "set add_generation_prompt=False"),
        ({"chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs is 'enable_thinking'; it must be a dict"),
        ({"tools": {"type": "function"}}, "tools is .* it must be a list"),
        ({"add_generation_prompt": "no"}, "add_generation_prompt 'no' is not one of False, True"),
    ],
)
def test_options_of_chat_that_contradict_each_other_are_refused(llm, options, message):
    with pytest.raises(ConfigError, match=message):
        llm.chat([USER, ANSWER], **options)


def test_a_template_that_prints_a_list_of_parts_is_not_believed(llm, monkeypatch):
    parts = [{"type": "text", "text": "Hello"}]
    with pytest.raises(PromptError, match="does not read a list of parts, the content of message 0; give a str"):
        text_of_chat(llm, monkeypatch, [{"role": "user", "content": parts}], "{{ messages[0].content }}")
    with pytest.raises(PromptError, match="prompt is empty: the chat template makes no text"):
        text_of_chat(llm, monkeypatch, [{"role": "user", "content": ""}], "{{ messages[0].content }}")


def test_a_model_without_a_template_does_not_chat(llm, monkeypatch):
    monkeypatch.setattr(llm.tokenizer, "chat_template", None)
    with pytest.raises(PromptError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hello"}])


# --- vectors and log-probabilities -----------------------------------------------------------------------------------

PROMPTS = [random_token_ids(n, seed=n) for n in (1, 5, 30)]


@pytest.mark.parametrize("kind", ["llama", "mistral-window", "qwen3"])
def test_encode_is_the_mean_of_transformers_last_hidden_states(kind, checkpoint):
    reference = AutoModel.from_pretrained(checkpoint(kind), dtype=torch.float64)
    llm = LLM(
        checkpoint(kind),
        dtype="float64",
        num_blocks=40,
        max_num_seqs=8,
        max_num_batched_tokens=8,
        skip_tokenizer_init=True,
        verbose=False,
    )
    rows = []
    llm.engine.model.embed_tokens.register_forward_hook(lambda *args: rows.append(len(args[1][0])))
    for vector, prompt in zip(llm.encode(PROMPTS), PROMPTS, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([prompt])).last_hidden_state[0].mean(0)
        assert (vector - expected).abs().max() <= TOLERANCE[torch.float64] * expected.abs().max()
    assert max(rows) == 8 and len(rows) == 1 + 1 + 4


def test_encode_takes_a_prompt_as_long_as_the_model_and_no_longer(llm):
    assert len(llm.encode([5] * 400)) == 1
    with pytest.raises(PromptError, match="prompt has 401 tokens; encode takes max_model_len = 400"):
        llm.encode([5] * 401)


def test_the_tokenizer_can_be_had(llm, tiny):
    assert llm.get_tokenizer() is llm.tokenizer
    with pytest.raises(ConfigError, match="no tokenizer"):
        tiny.get_tokenizer()


def test_encode_takes_text_and_is_float32_at_least(llm, checkpoint):
    by_text, by_ids = llm.encode([ONCE, encode(llm.tokenizer, ONCE)])
    assert torch.equal(by_text, by_ids) and by_text.dtype == torch.float64
    with LLM(
        checkpoint("llama"), dtype="bfloat16", num_blocks=40, skip_tokenizer_init=True, verbose=False
    ) as half_precision:
        assert half_precision.encode([1, 2, 3])[0].dtype == torch.float32


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_transformers_log_softmax(tiny, load_reference, temperature):
    reference = load_reference("llama", torch.float64)
    counts = [0, 3, 5, None]
    params = [SamplingParams(max_tokens=9, logprobs=k, temperature=temperature, seed=3) for k in counts]
    outputs = tiny.generate([PROMPTS[1]] * 4, params, **QUIET)
    for k, output in zip(counts, outputs, strict=True):
        completion = output.outputs[0]
        if k is None:
            assert completion.logprobs is None and completion.cumulative_logprob is None
            continue
        with torch.inference_mode():
            logits = reference(torch.tensor([PROMPTS[1] + completion.token_ids])).logits[0]
        expected = logits[len(PROMPTS[1]) - 1 : -1].double().log_softmax(-1)  # [outputs, V]
        tolerance = TOLERANCE[torch.float64] * (logits.max() - logits.min()).item()
        for row, token_id, entry in zip(expected, completion.token_ids, completion.logprobs, strict=True):
            top = row.topk(k).indices.tolist()
            assert list(entry) == [token_id, *(each for each in top if each != token_id)]
            assert all(abs(entry[each].logprob - row[each].item()) <= tolerance for each in entry)
            assert [entry[each].rank for each in top] == list(range(1, k + 1))
            assert entry[token_id].rank == 1 + int((row > row[token_id]).sum())
        sampled = [entry[each].logprob for entry, each in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert completion.cumulative_logprob == pytest.approx(sum(sampled))
    ranks = {next(iter(entry.values())).rank for entry in outputs[1].outputs[0].logprobs}  # of the sampled tokens
    assert (ranks == {1}) == (temperature == 0)


def test_logprobs_name_their_tokens_with_the_space_before_them(llm):
    output = llm.generate(ONCE, SamplingParams(max_tokens=8, logprobs=2), **QUIET)[0].outputs[0]
    said = [entry[token_id].decoded_token for entry, token_id in zip(output.logprobs, output.token_ids, strict=True)]
    assert "".join(said) == output.text and said[0].startswith(" ")


def test_a_stop_id_is_text_only_if_it_is_to_be_included(llm):
    token_ids = alone(llm, ONCE, SamplingParams(max_tokens=10)).token_ids
    for included, last in ((False, 5), (True, 6)):
        params = SamplingParams(
            max_tokens=10, stop_token_ids=[token_ids[5]], include_stop_str_in_output=included, logprobs=0
        )
        output = llm.generate(ONCE, params, **QUIET)[0].outputs[0]
        assert output.text == minillm.model.text.Detokenizer(llm.tokenizer).take(token_ids[:last], "length")
        assert len(output.token_ids) == 6 and (output.finish_reason, output.stop_reason) == ("stop", token_ids[5])
        assert_is(output, alone(llm, ONCE, params))
        assert "".join(each.outputs[0].text for each in llm.stream(ONCE, params)) == output.text


def test_a_stop_string_is_text_only_if_it_is_to_be_included(llm):
    stop = stop_across_tokens(llm, ONCE, 30)
    for included in (False, True):
        params = SamplingParams(max_tokens=30, stop=stop, include_stop_str_in_output=included)
        output = llm.generate(ONCE, params, **QUIET)[0].outputs[0]
        assert output.text.endswith(stop) == included and output.stop_reason == stop
        assert_is(output, alone(llm, ONCE, params))
        assert "".join(each.outputs[0].text for each in llm.stream(ONCE, params)) == output.text


def test_the_name_of_a_special_token_stops(llm):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    prompt = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 3 + 4?"}], add_generation_prompt=True, return_dict=False
    )
    assert len(alone(llm, prompt, params).token_ids) == 30
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop="<|end|>")
    output = llm.generate(prompt, params, **QUIET)[0].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("3 + 4 = 7.", "stop", "<|end|>")
    assert_is(output, alone(llm, prompt, params))


# --- trace, worker, end ----------------------------------------------------------------------------------------------


def test_the_trace_tells_every_step_and_can_be_left_out(llm, checkpoint):
    before = len(llm.trace.steps)
    output = llm.generate(ONCE, SamplingParams(max_tokens=6), **QUIET)[0]
    steps = llm.trace.steps[before:]
    assert sum(part.num_sampled for step in steps for part in step.scheduled) == 6
    assert steps[-1].finished == (output.request_id,) and steps[-1].blocks.used == 0
    assert {step.blocks.total for step in steps} == {200}
    quiet = LLM(checkpoint("llama"), num_blocks=40, trace=False, skip_tokenizer_init=True, verbose=False)
    quiet.generate([1, 2], SamplingParams(max_tokens=2), **QUIET)
    assert quiet.trace is None


def test_where_the_memory_goes_is_printed_at_start_or_not(checkpoint, capsys):
    for verbose in (False, True):
        llm = LLM(checkpoint("llama"), num_blocks=40, skip_tokenizer_init=True, verbose=verbose)
        captured = capsys.readouterr()
        told = f"{llm.engine.ledger}\nkernels: {llm.engine.executor.why}\n"
        assert captured.out == "" and captured.err == (told if verbose else "")


def test_after_shutdown_everything_is_refused(checkpoint):
    with LLM(checkpoint("llama"), num_blocks=40, skip_tokenizer_init=True, verbose=False) as llm:
        stream = llm.stream([1, 2], SamplingParams(max_tokens=50, ignore_eos=True))
        next(stream)
    llm.shutdown()
    for use in (lambda: llm.generate([1, 2]), lambda: llm.encode([1, 2]), lambda: list(stream)):
        with pytest.raises(WorkerDiedError, match="shut down"):
            use()
    assert_idle(llm)


def test_a_worker_in_another_process_gives_the_same_and_its_death_fails_everything(checkpoint, tiny):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    with LLM(
        checkpoint("llama"),
        dtype="float64",
        num_blocks=40,
        worker="process",
        skip_tokenizer_init=True,
        verbose=False,
    ) as llm:
        assert [output.outputs for output in llm.generate(PROMPTS, params, **QUIET)] == [
            output.outputs for output in tiny.generate(PROMPTS, params, **QUIET)
        ]
        for vector, same in zip(llm.encode(PROMPTS), tiny.encode(PROMPTS), strict=True):
            assert vector.dtype == same.dtype and torch.equal(vector, same)
        stream = llm.stream(PROMPTS[0], params)
        next(stream)
        os.kill(llm.engine.executor.workers[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError, match="signal 9"):
            list(stream)  # a step that it had computed by then may be told of
        with pytest.raises(WorkerDiedError, match="signal 9"):
            llm.generate(PROMPTS, params, **QUIET)
        assert_idle(llm)
