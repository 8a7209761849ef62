"""The endpoints: what is answered, field by field, and what is refused and how; against a real engine."""

import asyncio
import json
import logging
import socket
import time
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter

import minillm
from minillm.engine import EngineConfig, LLMEngine
from minillm.errors import ConfigError
from minillm.player import FILES, FOLDER
from minillm.serving import AsyncEngine, Metrics, ServerOptions, create_app
from minillm.serving import protocol as p
from minillm.trace import Trace
from served import served, soon

STORY = "Once upon a time"
CHAT = [{"role": "user", "content": "Hello"}]
SECRET = "xyzzy-secret"  # of a body: it must be in no error and in no line of the log
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


def make_engine(max_queue: int = 256, **arguments) -> AsyncEngine:
    config = EngineConfig(**{"num_blocks": 1024, "max_num_seqs": 16} | arguments)
    return AsyncEngine(LLMEngine("storyteller", config=config), max_queue=max_queue, model_name="storyteller")


@contextmanager
def engine_with(**arguments):
    engine = make_engine(**arguments)
    try:
        yield engine
    finally:
        engine.shutdown()


@pytest.fixture(scope="module")
def engine():
    with engine_with() as engine:
        yield engine


@pytest.fixture(scope="module")
def app(engine):
    return create_app(engine, ServerOptions())


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """After each test that used the shared engine: no request, and all blocks are back."""
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        soon(lambda: engine.num_running == engine.num_waiting == 0 and engine.cache_usage == 0)


def ask(app, path: str, body=None, *, method: str = "", **how) -> httpx.Response:
    """One request, in this process. `body`: a dict as JSON, or bytes as they are."""

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            if isinstance(body, bytes):
                how.setdefault("headers", {}).setdefault("Content-Type", "application/json")
            content = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
            return await client.request(method or ("GET" if body is None else "POST"), path, **content, **how)

    return asyncio.run(send())


def error_of(response: httpx.Response) -> tuple[int, str | None]:
    """(status, param) of an error, whose shape is looked at."""
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code and error["type"].endswith("Error") and error["message"]
    assert SECRET not in response.text
    return response.status_code, error["param"]


def events_of(response: httpx.Response) -> list[dict]:
    """The events of a stream, up to [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "") and all(event.startswith("data: {") for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def check_fields(answer: dict, kind: type) -> None:
    """That it has the fields that the protocol says, and no others."""
    TypeAdapter(with_no_more(kind)).validate_python(answer)


def with_no_more(kind: type) -> type:
    for each in vars(p).values():
        if isinstance(each, type(p.Usage)):
            each.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    return kind


# --- what is answered ------------------------------------------------------------------------------------------------


def test_a_completion_has_the_fields_of_the_protocol(app):
    answer = ask(app, COMPLETIONS, {"prompt": STORY, "max_tokens": 5, "temperature": 0}).json()
    check_fields(answer, p.CompletionAnswer)
    assert answer["id"].startswith("cmpl-") and answer["object"] == "text_completion"
    assert answer["model"] == "storyteller" and abs(answer["created"] - time.time()) < 60
    (choice,) = answer["choices"]
    assert (choice["index"], choice["finish_reason"], choice["stop_reason"]) == (0, "length", None)
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 5


def test_it_is_the_text_of_the_engine_in_a_program(app):
    with minillm.LLM("storyteller", num_blocks=256, verbose=False) as llm:
        params = minillm.SamplingParams(max_tokens=30, temperature=0.8, seed=3, top_k=20, n=2)
        (told,) = llm.generate(STORY, params, use_tqdm=False)
    body = {"prompt": STORY, "max_tokens": 30, "temperature": 0.8, "seed": 3, "top_k": 20, "n": 2}
    assert [each["text"] for each in ask(app, COMPLETIONS, body).json()["choices"]] == [
        each.text for each in told.outputs
    ]


def test_a_chat_answer_has_the_fields_of_the_protocol(app):
    answer = ask(app, CHATS, {"messages": CHAT, "max_completion_tokens": 4, "temperature": 0}).json()
    check_fields(answer, p.ChatAnswer)
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant" and message["content"]
    with minillm.LLM("storyteller", num_blocks=256, verbose=False) as llm:
        (told,) = llm.chat(CHAT, minillm.SamplingParams(max_tokens=4), use_tqdm=False)
    assert message["content"] == told.outputs[0].text


def test_content_is_text_or_parts_of_it(app):
    def answer(content) -> str:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0}
        return ask(app, CHATS, body).json()["choices"][0]["message"]["content"]

    parts = [{"type": "text", "text": "What color"}, {"type": "text", "text": "is the sky?"}]
    assert answer(parts) == answer("What color\nis the sky?")
    assert ask(app, CHATS, {"messages": [{"role": "user", "content": ""}], "max_tokens": 2}).status_code == 200


def test_prompts_are_texts_ids_or_lists_of_both_and_their_choices_are_counted_through(app, engine):
    ids = engine.tokenizer.encode("The fox")
    body = {"max_tokens": 6, "temperature": 0.5, "seed": 1, "n": 2}

    def texts(prompt) -> list[str]:
        choices = ask(app, COMPLETIONS, {"prompt": prompt, **body}).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]

    alone = texts(STORY) + texts(ids)
    assert len(alone) == 4 and texts([STORY, ids]) == alone
    assert texts(["The fox"]) == texts([ids]) == texts(ids)
    answer = ask(app, COMPLETIONS, {"prompt": [STORY, ids], **body}).json()
    assert answer["usage"]["prompt_tokens"] == len(engine.tokenizer.encode(STORY)) + len(ids)
    assert answer["usage"]["completion_tokens"] == 24


@pytest.mark.parametrize(
    ("path", "prompt", "default"), [(COMPLETIONS, {"prompt": STORY}, 16), (CHATS, {"messages": CHAT}, None)]
)
def test_how_many_tokens_there_are_without_max_tokens(path, prompt, default):
    with engine_with(max_model_len=64) as engine:
        app = create_app(engine)
        answer = ask(app, path, {**prompt, "temperature": 0, "ignore_eos": True}).json()
        usage = answer["usage"]
        assert usage["completion_tokens"] == (default or 64 - usage["prompt_tokens"])
        cut = ask(app, path, {**prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 64}).json()
        assert cut["usage"]["total_tokens"] == 64 and cut["choices"][0]["finish_reason"] == "length"


def test_the_newer_name_of_max_tokens_counts(app):
    body = {"messages": CHAT, "max_tokens": 9, "max_completion_tokens": 3, "ignore_eos": True}
    assert ask(app, CHATS, body).json()["usage"]["completion_tokens"] == 3


def test_log_probabilities_of_a_completion(app):
    body = {"prompt": STORY, "max_tokens": 4, "temperature": 0, "logprobs": 3}
    found = ask(app, COMPLETIONS, body).json()["choices"][0]
    logprobs = found["logprobs"]
    assert "".join(logprobs["tokens"]) == found["text"]
    assert logprobs["text_offset"] == [found["text"].index(token) for token in logprobs["tokens"]]
    for token, value, top in zip(
        *(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert list(top)[0] == token and top[token] == value == max(top.values()) <= 0 and len(top) == 3


def test_echo_repeats_the_prompt_with_its_log_probabilities(app, engine):
    ids = engine.tokenizer.encode(STORY)
    body = {"max_tokens": 3, "temperature": 0, "logprobs": 1, "echo": True}
    text, of_ids = (ask(app, COMPLETIONS, {"prompt": prompt, **body}).json()["choices"][0] for prompt in (STORY, ids))
    assert text["text"].startswith(STORY) and of_ids == text
    logprobs = text["logprobs"]
    assert "".join(logprobs["tokens"]) == text["text"] and len(logprobs["tokens"]) == len(ids) + 3
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    plain = ask(app, COMPLETIONS, {"prompt": STORY, **body, "echo": False}).json()["choices"][0]
    assert text["text"] == STORY + plain["text"]


def test_log_probabilities_of_a_chat(app):
    body = {"messages": CHAT, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    choice = ask(app, CHATS, body).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in content) == choice["message"]["content"]
    for each in content:
        assert each["bytes"] == list(each["token"].encode()) and len(each["top_logprobs"]) == 2
        assert each["top_logprobs"][0] == {name: each[name] for name in ("token", "logprob", "bytes")}
    del body["top_logprobs"]
    alone = ask(app, CHATS, body).json()["choices"][0]["logprobs"]["content"]
    assert [each["top_logprobs"] for each in alone] == [[], [], []]


def test_token_ids_and_prompt_logprobs_are_told_on_request(app, engine):
    ids = engine.tokenizer.encode(STORY)
    body = {"prompt": STORY, "max_tokens": 3, "temperature": 0, "return_token_ids": True, "prompt_logprobs": 1}
    choice = ask(app, COMPLETIONS, body).json()["choices"][0]
    assert choice["prompt_token_ids"] == ids and engine.tokenizer.decode(choice["token_ids"]) == choice["text"]
    assert choice["prompt_logprobs"][0] is None
    assert [list(place)[0] for place in choice["prompt_logprobs"][1:]] == [str(each) for each in ids[1:]]
    check_fields(ask(app, COMPLETIONS, {**body, "prompt_logprobs": None}).json(), p.CompletionAnswer)


@pytest.mark.parametrize("stop", [" little", [" nothing", " little"]])
def test_a_stop_string_ends_the_text_and_is_named(app, stop):
    body = {"prompt": STORY, "max_tokens": 40, "temperature": 0, "stop": stop}
    choice = ask(app, COMPLETIONS, body).json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", " little") and " little" not in choice["text"]
    choice = ask(app, COMPLETIONS, {**body, "include_stop_str_in_output": True}).json()["choices"][0]
    assert choice["text"].endswith(" little")


def test_a_stop_id_is_named(app, engine):
    (comma,) = engine.tokenizer.encode(",")
    body = {"prompt": STORY, "max_tokens": 40, "temperature": 0, "stop_token_ids": [comma]}
    assert ask(app, COMPLETIONS, body).json()["choices"][0]["stop_reason"] == comma


def test_a_bias_keeps_a_token_out(app, engine):
    (comma,) = engine.tokenizer.encode(",")
    body = {"prompt": STORY, "max_tokens": 1, "temperature": 0}
    assert ask(app, COMPLETIONS, body).json()["choices"][0]["text"] == ","
    assert ask(app, COMPLETIONS, {**body, "logit_bias": {str(comma): -100}}).json()["choices"][0]["text"] != ","


def test_a_salt_keeps_prefixes_apart(app):
    body = {"prompt": STORY * 20, "max_tokens": 1}

    def cached(**more) -> int:
        usage = ask(app, COMPLETIONS, {**body, **more}).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() > 0 and cached(cache_salt="mine") == 0 and cached(cache_salt="mine") > 0


def test_priority_needs_its_policy(app):
    body = {"prompt": STORY, "max_tokens": 1, "priority": -3}
    assert error_of(ask(app, COMPLETIONS, body)) == (400, "priority")
    with engine_with(scheduling_policy="priority") as engine:
        assert ask(create_app(engine), COMPLETIONS, body).status_code == 200


def test_fields_that_are_not_known_are_named_in_the_log_and_their_values_are_not(app, caplog):
    caplog.set_level(logging.INFO, logger="minillm")
    body = {"prompt": STORY, "max_tokens": 1, "best_before": SECRET, "x" * 500: 1}
    answer = ask(app, COMPLETIONS, body, headers={"X-Request-Id": "mine"})
    assert answer.status_code == 200
    (line,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert line.startswith("mine: ") and "'best_before'" in line and SECRET not in caplog.text and len(line) < 300


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_of_text(app):
    body = {"prompt": STORY, "max_tokens": 5, "temperature": 0}
    events = events_of(ask(app, COMPLETIONS, {**body, "stream": True}))
    for event in events:
        check_fields(event, p.CompletionAnswer)
    assert len({event["id"] for event in events}) == len({event["created"] for event in events}) == 1
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert set(reasons[:-1]) <= {None} and reasons[-1] == "length"  # on a busy machine several tokens are one event
    assert not any("usage" in event for event in events)


def test_a_stream_of_chat_begins_with_the_role(app):
    events = events_of(ask(app, CHATS, {"messages": CHAT, "max_tokens": 5, "stream": True, "n": 2}))
    for event in events:
        check_fields(event, p.ChatChunk)
    for index in (0, 1):
        deltas = [each["delta"] for event in events for each in event["choices"] if each["index"] == index]
        assert deltas[0] == {"role": "assistant", "content": ""} and not any("role" in delta for delta in deltas[1:])


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
def test_a_stream_tells_its_usage_at_the_end_or_all_the_time(app, path):
    body = {"prompt": STORY} if path == COMPLETIONS else {"messages": CHAT}
    body |= {"max_tokens": 5, "stream": True, "ignore_eos": True, "n": 2}
    whole = ask(app, path, {**body, "stream": False, "seed": 1}).json()["usage"]
    *events, last = events_of(ask(app, path, {**body, "seed": 1, "stream_options": {"include_usage": True}}))
    assert last["choices"] == [] and not any("usage" in event for event in events)
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][name] for name in counts] == [whole[name] for name in counts]
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = events_of(ask(app, path, {**body, "stream_options": options}))
    told = [
        event["usage"]["completion_tokens"] for event in events if "usage" in event and event["choices"][0]["index"]
    ]
    assert told == sorted(told) and told[-1] == 5 and last["usage"]["completion_tokens"] == 10


def put_together(events: list[dict]) -> dict[int, dict]:
    """The choices of a stream, as the whole answer has them."""
    choices: dict[int, dict] = {}
    for part in (choice for event in events for choice in event["choices"]):
        text = part["text"] if "text" in part else part["delta"].get("content", "")
        whole = choices.setdefault(part["index"], {"text": "", "logprobs": None, "finish_reason": None})
        assert whole["finish_reason"] is None  # nothing comes behind the end
        whole["text"] += text
        whole["finish_reason"], whole["stop_reason"] = part["finish_reason"], part.get("stop_reason")
        if part["logprobs"] is not None:
            whole["logprobs"] = whole["logprobs"] or {name: [] for name in part["logprobs"]}
            for name, values in part["logprobs"].items():
                whole["logprobs"][name] += values
        if "token_ids" in part:
            whole.setdefault("token_ids", []).extend(part["token_ids"])
    return choices


OPTIONS = {
    "temperature": st.sampled_from([0, 0.7, 1.5, 5.0]),  # at 5 broken characters come
    "top_p": st.sampled_from([0.5, 1]),
    "top_k": st.sampled_from([-1, 0, 5]),
    "min_p": st.sampled_from([0, 0.1]),
    "max_tokens": st.integers(1, 24),
    "min_tokens": st.sampled_from([0, 1]),
    "stop": st.sampled_from([None, " the", ["e ", "a", "\ufffd"], [" was a little", "zzz"], "<|end|>"]),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "repetition_penalty": st.sampled_from([1, 1.3]),
    "presence_penalty": st.sampled_from([0, 0.5]),
    "frequency_penalty": st.sampled_from([0, -0.5]),
    "return_token_ids": st.booleans(),
}
OF_COMPLETIONS = {
    "prompt": st.sampled_from([STORY, [STORY, "The fox"], [[260, 300, 4], STORY]]),
    "logprobs": st.sampled_from([None, 0, 2]),
    "echo": st.booleans(),
}
OF_CHATS = {
    "messages": st.just(CHAT),
    "logprobs": st.booleans(),
    "top_logprobs": st.sampled_from([None, 2]),
}


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_stream_put_together_is_the_whole_answer(app, data):
    path = data.draw(st.sampled_from([COMPLETIONS, CHATS]))
    body = {name: data.draw(values, name) for name, values in OPTIONS.items()}
    body |= {name: data.draw(values, name) for name, values in (OF_CHATS if path == CHATS else OF_COMPLETIONS).items()}
    body |= {"seed": data.draw(st.integers(0, 2**31)), "n": data.draw(st.integers(1, 3)) if body["temperature"] else 1}
    if path == CHATS and not body["logprobs"]:
        del body["top_logprobs"]
    body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    answer = ask(app, path, body).json()
    events = events_of(ask(app, path, {**body, "stream": True, "stream_options": {"include_usage": True}}))
    whole = {}
    for choice in answer["choices"]:
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        whole[choice["index"]] = {"text": text, "logprobs": choice["logprobs"]}
        whole[choice["index"]] |= {name: choice[name] for name in ("finish_reason", "stop_reason")}
        if body["return_token_ids"]:
            whole[choice["index"]]["token_ids"] = choice["token_ids"]
    assert put_together(events) == whole and len(whole) == body["n"] * (
        len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    )
    usages = [{**usage, "prompt_tokens_details": None} for usage in (events[-1]["usage"], answer["usage"])]
    assert usages[0] == usages[1]
    for choice in whole.values():
        stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"] or []
        told = choice["text"].removeprefix(body["prompt"] if isinstance(body.get("prompt"), str) else "")
        if not body["include_stop_str_in_output"] and not body.get("echo") and not body["min_tokens"]:
            assert not any(stop in told for stop in stops)


# --- what is refused -------------------------------------------------------------------------------------------------

HUGE = 10**18
REFUSED = {  # body beside a prompt -> the param named
    "max_tokens": [0, -1, HUGE, 1e18, "5", True, 2049, 1.5, [], 10**40],
    "n": [0, -1, "1", True, 1e9, 129],
    "temperature": [-1, "1", True, [], 10**400, float("inf")],
    "top_p": [0, 1.1, -0.5, "x"],
    "top_k": [-2, 0.5, True],
    "min_p": [-0.1, 2],
    "presence_penalty": [3, "0"],
    "frequency_penalty": [-3],
    "repetition_penalty": [0, -1],
    "logit_bias": [{"a": 1}, {"1": "x"}, {"99999": 1}, {"-1": 1}, [1], {"1": True}, {str(n): 1 for n in range(2000)}],
    "seed": [2**63, -(2**63) - 1, "1", 1.5, True],
    "stop": [1, [1], "", [""], ["a"] * 17, "x" * 257, {}],
    "stop_token_ids": [[-1], ["a"], 5, [True], [1] * 1025],
    "min_tokens": [-1, 2000, "1"],
    "ignore_eos": [1, "true"],
    "stream": ["yes", 1],
    "stream_options": [{}, {"include_usage": True}],
    "prompt_logprobs": [-1, 21],
    "priority": ["1", 1.5, 2**63, 3],
    "cache_salt": ["", 1],
    "model": [1, ["storyteller"]],
    "suffix": [SECRET],
    "logprobs": [-1, 21, True],
    "echo": [1],
    "prompt": [
        "",
        [],
        [[]],
        [""],
        None,
        1,
        {"prompt": SECRET},
        [1, "a"],
        [-1],
        [1900],
        [True],
        ["a", None],
        [[1], [1.5]],
    ],
}
CASES = [(field, value) for field, values in REFUSED.items() for value in values]


@pytest.mark.parametrize(("field", "value"), CASES, ids=[f"{field}-{str(value)[:20]}" for field, value in CASES])
def test_a_wrong_value_is_400_and_its_field_is_named(app, field, value):
    body = json.dumps({"prompt": f"{STORY} {SECRET}", field: value}).replace("Infinity", "1e999").encode()
    assert error_of(ask(app, COMPLETIONS, body)) == (400, field)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": SECRET}, "messages"),
        ({"messages": [{"role": SECRET, "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": SECRET}]}, "messages"),
        ({"messages": [{"role": SECRET, "content": None}]}, "messages"),
        ({"messages": [{"content": SECRET}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]}, "messages"),
        ({"messages": [SECRET]}, "messages"),
        ({"messages": CHAT, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": CHAT, "logprobs": 1}, "logprobs"),
        ({"messages": CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": CHAT, "max_completion_tokens": 4000}, "max_tokens"),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": CHAT, "continue_final_message": True}, "continue_final_message"),
        ({"messages": CHAT, "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"messages": CHAT, "chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"messages": CHAT, "stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"messages": CHAT, "n": 2, "temperature": 0}, "n"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "input_tokens"),
    ],
)
def test_a_wrong_chat_is_400_and_its_field_is_named(app, body, param):
    assert error_of(ask(app, CHATS, body)) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"prompt":' * 50_000,
        b'{"prompt": "a", "x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b"[]",
        b"5",
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "max_tokens": ' + b"9" * 5_000 + b"}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\udc00\\ud800"}',
        b"{'prompt': 'a'}",
        b'{"prompt": "a",}',
        b"\x00",
        b'\xef\xbb\xbf{"prompt": "a"}',
    ],
    ids=lambda body: repr(body[:25]),
)
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/embeddings", "/tokenize", "/detokenize", CHATS])
def test_what_is_no_json_object_is_400(app, path, body):
    assert error_of(ask(app, path, body))[0] == 400


def test_nul_is_a_character_like_others(app):
    assert ask(app, COMPLETIONS, b'{"prompt": "a\\u0000b", "max_tokens": 2}').status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "nonsense"])
def test_the_body_must_be_called_json(app, kind):
    headers = {} if kind is None else {"Content-Type": kind}

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post(COMPLETIONS, content=json.dumps({"prompt": SECRET}), headers=headers)

    assert error_of(asyncio.run(send())) == (400, None)


@pytest.mark.parametrize(("num_tokens", "param"), [(2047, None), (2048, "max_tokens"), (2049, "input_tokens")])
def test_a_prompt_must_leave_room_in_the_context(app, num_tokens, param):
    answer = ask(app, COMPLETIONS, {"prompt": [300] * num_tokens, "max_tokens": 5, "ignore_eos": True})
    if param is None:
        assert answer.json()["usage"]["completion_tokens"] == 1
    else:
        assert error_of(answer) == (400, param)


def test_a_text_that_can_never_fit_is_refused_before_its_tokens_are_counted(app, engine, monkeypatch):
    monkeypatch.setattr(type(engine.tokenizer), "encode", lambda *given, **named: 1 / 0)
    assert error_of(ask(app, COMPLETIONS, {"prompt": "a" * 1_000_000})) == (400, "input_tokens")
    assert error_of(ask(app, CHATS, {"messages": [{"role": "user", "content": "a" * 1_000_000}]}))[1] == "input_tokens"
    assert error_of(ask(app, "/v1/embeddings", {"input": ["a", "a" * 1_000_000]}))[1] == "input_tokens"


@pytest.mark.parametrize("stream", [True, False])
def test_a_row_that_is_not_finite_fails_its_request_alone(stream):
    with engine_with() as engine:
        app, good = create_app(engine), {"prompt": STORY, "max_tokens": 20, "temperature": 0}
        before = ask(app, COMPLETIONS, good).json()["choices"]
        engine._engine.model.embed_tokens.weight.data[1899] = float("nan")
        answer = ask(app, COMPLETIONS, {"prompt": [1899, 5], "stream": stream})
        if stream:
            (event,) = events_of(answer)
            assert event["error"]["code"] == 500
        else:
            assert error_of(answer) == (500, None)
        assert ask(app, COMPLETIONS, good).json()["choices"] == before


def test_more_outputs_than_can_ever_wait_are_refused(app):
    assert error_of(ask(app, COMPLETIONS, {"prompt": ["a"] * 100, "n": 20})) == (400, "n")


def test_a_model_that_is_not_here_is_404_and_none_is_the_one_that_is(app):
    for name in ("gpt-4", SECRET, "x" * 10_000):
        for path, body in [(COMPLETIONS, {"prompt": "a"}), (CHATS, {"messages": CHAT}), ("/tokenize", {"prompt": "a"}),
                           ("/v1/embeddings", {"input": "a"}), ("/detokenize", {"tokens": [5]})]:  # fmt: skip
            assert error_of(ask(app, path, {**body, "model": name})) == (404, "model")
    for name in (None, "", "storyteller"):
        assert ask(app, COMPLETIONS, {"prompt": "a", "max_tokens": 1, "model": name}).json()["model"] == "storyteller"


def test_paths_and_methods_that_are_not_there(app):
    assert error_of(ask(app, "/v1/nothing"))[0] == 404
    assert error_of(ask(app, COMPLETIONS))[0] == 405
    assert error_of(ask(app, "/v1/models", {}))[0] == 405
    assert ask(app, COMPLETIONS).headers["allow"] == "POST"


def test_without_a_chat_template_chat_says_so_and_text_goes_on(app, engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    answer = ask(app, CHATS, {"messages": CHAT})
    assert error_of(answer)[0] == 400 and "no chat template" in answer.json()["error"]["message"]
    assert ask(app, COMPLETIONS, {"prompt": STORY, "max_tokens": 1}).status_code == 200


def test_without_a_tokenizer_ids_are_served():
    engine = LLMEngine("storyteller", config=EngineConfig(num_blocks=256), skip_tokenizer_init=True)
    engine = AsyncEngine(engine)
    try:
        app = create_app(engine)
        for path, body in [
            (COMPLETIONS, {"prompt": SECRET}),
            (CHATS, {"messages": CHAT}),
            ("/tokenize", {"prompt": "a"}),
            ("/v1/embeddings", {"input": SECRET}),
            ("/detokenize", {"tokens": [5]}),
        ]:
            assert error_of(ask(app, path, body))[0] == 400
        body = {"prompt": [300, 301], "max_tokens": 2, "return_token_ids": True, "logprobs": 1, "echo": True}
        whole = ask(app, COMPLETIONS, body).json()["choices"][0]
        assert len(whole["token_ids"]) == 2 and whole["text"] == ""
        assert whole["logprobs"]["tokens"][0] == "token_id:300" and len(whole["logprobs"]["tokens"]) == 4
    finally:
        engine.shutdown()


# --- limits, keys, ids -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(engine):
    """With a key, and little patience and room."""
    return create_app(engine, ServerOptions(api_key="key-1", max_body_mib=1, body_timeout=0.3))


KEY = {"Authorization": "Bearer key-1"}


@pytest.mark.parametrize(
    "header",
    [None, "key-1", "Bearer", "Bearer ", "Bearer key-2", "Basic key-1", "Bearer k\xe9y", "Bearer key-1 x"],
)
@pytest.mark.parametrize("path", ["/v1/models", COMPLETIONS, "/tokenize", "/nothing", "/live/control"])
def test_without_the_key_it_is_401(narrow, path, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = ask(narrow, path, {"prompt": SECRET} if path == COMPLETIONS else None, headers=headers)
    assert error_of(answer) == (401, None) and answer.headers["www-authenticate"] == "Bearer"


def test_with_the_key_it_is_answered_and_some_paths_need_none(narrow):
    assert ask(narrow, "/v1/models", headers=KEY).status_code == 200
    assert ask(narrow, "/v1/models", headers={"Authorization": "bearer key-1"}).status_code == 200
    assert [ask(narrow, path).status_code for path in ("/health", "/version", "/openapi.json")] == [200] * 3
    operation = ask(narrow, "/openapi.json").json()["paths"][COMPLETIONS]["post"]
    assert operation["security"] == [{"key": []}]


def test_a_body_that_is_too_large_is_413_declared_or_not(narrow):
    too_large = json.dumps({"prompt": SECRET * 100_000}).encode()
    assert error_of(ask(narrow, COMPLETIONS, too_large, headers={**KEY})) == (413, None)

    async def chunks():
        for _ in range(30):
            yield b"x" * 100_000

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(narrow), base_url="http://test") as client:
            headers = {**KEY, "Content-Type": "application/json"}
            return await client.post(COMPLETIONS, content=chunks(), headers=headers)

    answer = asyncio.run(send())
    assert error_of(answer) == (413, None) and answer.headers["connection"] == "close"


@pytest.mark.parametrize("declared", [True, False])
def test_413_reaches_a_client_that_is_still_sending(narrow, declared):
    with served(narrow) as url:
        size = 30_000_000
        with connection(url) as client:
            head = f"Content-Length: {size}" if declared else "Transfer-Encoding: chunked"
            client.sendall(request_head(COMPLETIONS, head, "Authorization: Bearer key-1"))
            part = b"x" * 100_000
            part = part if declared else b"%x\r\n%s\r\n" % (len(part), part)
            with pytest.raises(OSError) if not declared else no_error():
                for _ in range(size // 100_000):
                    client.sendall(part)
                client.settimeout(5)
                assert b" 413 " in client.recv(4096)
                if not declared:
                    raise OSError


def test_a_body_that_does_not_come_is_408(narrow):
    with served(narrow) as url, connection(url) as client:
        client.sendall(request_head(COMPLETIONS, "Content-Length: 100", "Authorization: Bearer key-1") + b'{"prompt"')
        answer = read_all(client)
        assert b" 408 " in answer and b'"code":408' in answer


def test_the_queue_has_an_end():
    with engine_with(max_queue=1, max_num_seqs=1) as engine:
        app = create_app(engine)

        async def many():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
                body = {"prompt": STORY, "max_tokens": 30, "ignore_eos": True}
                return await asyncio.gather(
                    *(client.post(COMPLETIONS, json={**body, "stream": i % 2 > 0}) for i in range(9))
                )

        answers = asyncio.run(many())
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 2
        for answer in answers:
            if answer.status_code == 429:
                assert error_of(answer) == (429, None) and int(answer.headers["retry-after"]) >= 1
        assert error_of(ask(app, COMPLETIONS, {"prompt": [STORY] * 3})) == (400, "n")


def test_a_server_that_ends_takes_nothing_new_and_a_dead_engine_says_so():
    with engine_with() as engine:
        app = create_app(engine)
        asyncio.run(engine.drain(1.0))
        assert error_of(ask(app, COMPLETIONS, {"prompt": STORY})) == (503, None)
        assert error_of(ask(app, COMPLETIONS, {"prompt": STORY, "stream": True})) == (503, None)
        assert error_of(ask(app, "/health")) == (503, None)
    for path, body in [(COMPLETIONS, {"prompt": STORY}), ("/v1/embeddings", {"input": "a"}), ("/health", None)]:
        assert error_of(ask(app, path, body)) == (503, None)
    assert ask(app, "/tokenize", {"prompt": "a"}).status_code == 200


def test_a_failure_in_mid_stream_is_an_event_and_then_done():
    engine = make_engine()
    app = create_app(engine)

    async def send():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            body = {"prompt": STORY, "max_tokens": 2000, "ignore_eos": True, "stream": True}
            answer = asyncio.ensure_future(client.post(COMPLETIONS, json=body))
            while engine.num_running == 0:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            await asyncio.to_thread(engine.shutdown)
            return await answer

    *events, error = events_of(asyncio.run(send()))
    assert events and error["error"]["code"] == 503


def test_an_id_goes_in_and_comes_out_everywhere(app, engine, caplog):
    caplog.set_level(logging.INFO, logger="minillm")
    answer = ask(app, COMPLETIONS, {"prompt": STORY, "max_tokens": 1}, headers={"X-Request-Id": "my-id.7"})
    assert answer.headers["x-request-id"] == "my-id.7" and answer.json()["id"] == "cmpl-my-id.7"
    assert any('my-id.7 "POST /v1/completions" 200' in record.getMessage() for record in caplog.records)
    trace: Trace = engine._engine.trace
    assert "my-id.7" in {request.request_id for request in trace.requests}


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", 'a"b', "a\\b", "\u00e9"])
def test_an_id_that_would_harm_the_log_is_replaced(app, given):
    answer = ask(app, "/v1/models", headers={"X-Request-Id": given.encode()})
    assert answer.headers["x-request-id"] not in ("", given) and len(answer.headers["x-request-id"]) == 32


def test_requests_with_the_same_id_at_the_same_time_are_both_served(app):
    async def both():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            headers, body = {"X-Request-Id": "twin"}, {"prompt": [STORY, "The fox"], "max_tokens": 30}
            return await asyncio.gather(*(client.post(COMPLETIONS, json=body, headers=headers) for _ in range(3)))

    answers = asyncio.run(both())
    assert [answer.status_code for answer in answers] == [200] * 3
    assert sorted(answer.headers["x-request-id"] for answer in answers) == ["twin", "twin~2", "twin~3"]


# --- clients that go -------------------------------------------------------------------------------------------------


def connection(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def request_head(path: str, *headers: str) -> bytes:
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: test", "Content-Type: application/json", *headers, "", ""]
    ).encode()


def read_all(client: socket.socket) -> bytes:
    client.settimeout(20)
    return b"".join(iter(lambda: client.recv(4096), b""))


@contextmanager
def no_error():
    yield


@pytest.mark.parametrize("how", ["closed", "half-closed", "reset"])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
def test_a_client_that_goes_ends_its_request(how, stream, queued):
    with engine_with(max_num_seqs=1) as engine, served(create_app(engine)) as url:
        fill = {"prompt": STORY, "max_tokens": 2000, "ignore_eos": True}
        with httpx.stream("POST", url + COMPLETIONS, json={**fill, "stream": True}, timeout=60) as other:
            if queued:
                lines = other.iter_lines()  # keeps the stream open
                assert next(lines)
            else:
                other.close()
                soon(lambda: engine.num_running == 0)
            body = json.dumps({**fill, "n": 1 if queued else 2, "prompt": [STORY, STORY], "stream": stream}).encode()
            client = connection(url)
            client.sendall(request_head(COMPLETIONS, f"Content-Length: {len(body)}") + body)
            soon(lambda: engine.num_waiting >= 1 + queued)
            if how == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            elif how == "half-closed":
                client.shutdown(socket.SHUT_WR)
            if how != "half-closed":
                client.close()
            soon(lambda: engine.num_waiting == 0 and engine.num_running == int(queued))
            client.close()
        soon(lambda: engine.num_running == 0 and engine.cache_usage == 0)


# --- the other endpoints ---------------------------------------------------------------------------------------------


def test_models(app):
    (card,) = ask(app, "/v1/models").json()["data"]
    check_fields(card, p.ModelCard)
    assert (card["id"], card["max_model_len"]) == ("storyteller", 2048)
    assert ask(app, "/v1/models/storyteller").json() == card
    assert error_of(ask(app, "/v1/models/other/one")) == (404, "model")


def test_a_model_may_be_served_under_another_name(engine):
    app = create_app(engine, ServerOptions(served_model_name="org/tale-1"))
    assert ask(app, "/v1/models/org/tale-1").json()["root"] == "storyteller"
    assert ask(app, COMPLETIONS, {"prompt": "a", "max_tokens": 1}).json()["model"] == "org/tale-1"
    assert error_of(ask(app, COMPLETIONS, {"prompt": "a", "model": "storyteller"})) == (404, "model")


def test_embeddings_are_those_of_the_engine_as_numbers_or_bytes(app, engine):
    import base64

    import numpy as np

    body = {"input": ["A small dog", engine.tokenizer.encode("A house")]}
    answer = ask(app, "/v1/embeddings", body).json()
    check_fields(answer, p.EmbeddingAnswer)
    vectors = [each["embedding"] for each in answer["data"]]
    with minillm.LLM("storyteller", num_blocks=256, verbose=False) as llm:
        expected = [each.tolist() for each in llm.encode(["A small dog", "A house"])]
    assert vectors == expected and [each["index"] for each in answer["data"]] == [0, 1]
    coded = ask(app, "/v1/embeddings", {**body, "encoding_format": "base64"}).json()["data"]
    decoded = [np.frombuffer(base64.b64decode(each["embedding"]), "<f4").tolist() for each in coded]
    assert decoded == expected
    for wrong, param in [({"input": ""}, "input"), ({"input": [300] * 2049}, "input"), ({"input": [1900]}, "input"),
                         ({"input": "a", "dimensions": 5}, "dimensions"), ({}, "input")]:  # fmt: skip
        assert error_of(ask(app, "/v1/embeddings", wrong)) == (400, param)


def test_text_becomes_ids_and_ids_become_text(app, engine):
    answer = ask(app, "/tokenize", {"prompt": STORY, "return_token_strs": True}).json()
    check_fields(answer, p.TokenizeAnswer)
    assert answer["tokens"] == engine.tokenizer.encode(STORY) and answer["count"] == len(answer["token_strs"])
    assert ask(app, "/detokenize", {"tokens": answer["tokens"]}).json() == {"prompt": STORY}
    assert ask(app, "/tokenize", {"prompt": ""}).json()["tokens"] == []
    chat = ask(app, "/tokenize", {"messages": CHAT}).json()
    assert chat["count"] == ask(app, CHATS, {"messages": CHAT, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    for wrong in ([-1], [1900], ["a"], [True], None):
        assert error_of(ask(app, "/detokenize", {"tokens": wrong})) == (400, "tokens")


def test_health_and_version(app):
    assert (ask(app, "/health").status_code, ask(app, "/health").content) == (200, b"")
    assert ask(app, "/version").json() == {"version": minillm.__version__}


def test_metrics_are_told_under_the_prefix_that_was_asked_for(app):
    assert error_of(ask(app, "/metrics"))[0] == 404  # this engine counts nothing
    config = EngineConfig(num_blocks=256)
    engine = AsyncEngine(LLMEngine("storyteller", config=config), metrics=Metrics("vllm", "storyteller"))
    try:
        counted = create_app(engine)
        ask(counted, COMPLETIONS, {"prompt": STORY, "max_tokens": 7, "ignore_eos": True})
        answer = ask(counted, "/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        assert 'vllm:generation_tokens_total{engine="0",model_name="storyteller"} 7.0' in answer.text
    finally:
        engine.shutdown()


def test_the_page_and_its_files_are_there_unless_they_are_switched_off(app, engine):
    names = [name for name in FILES if name != "index.html" and (FOLDER / name).is_file()]
    assert len(names) >= 4
    for name in names:
        answer = ask(app, f"/player/{name}")
        assert answer.content == (FOLDER / name).read_bytes() and answer.headers["content-type"] == FILES[name]
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    for path in ("/player/../api_server.py", "/player/__init__.py", "/player/", "/player/%2e%2e/errors.py"):
        assert error_of(ask(app, path))[0] == 404
    without = create_app(engine, ServerOptions(page=False))
    assert [ask(without, path).status_code for path in ("/", f"/player/{names[0]}", "/live/control")] == [404] * 3
    assert "/live/control" not in app.openapi()["paths"]


def test_the_engine_is_controlled_by_json_from_here_alone(app, narrow):
    assert ask(app, "/live/control").json()["paused"] is False
    assert ask(app, "/live/control", {"paused": False}).json()["paused"] is False
    assert error_of(ask(app, "/live/control", {"paused": "maybe"}))[0] == 400
    assert error_of(ask(app, "/live/control", b"{}", headers={"Content-Type": "text/plain"}))[0] == 400
    assert ask(narrow, "/live/control", {"paused": False}).status_code == 401


def test_long_bodies_do_not_hold_up_others(app):
    """A megabyte of text is parsed and tokenised while the event loop goes on."""

    async def others():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            long = asyncio.ensure_future(client.post("/tokenize", json={"prompt": "a few words " * 40_000}))
            turns = 0
            while not long.done():
                turns += 1
                await asyncio.sleep(0.001)
            return long.result(), turns

    answer, turns = asyncio.run(others())
    assert answer.json()["count"] > 100_000 and turns > 20


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70_000},
        {"port": -1},
        {"api_key": ""},
        {"api_key": "\u00e9"},
        {"metrics_prefix": "a b"},
        {"max_queue": 0},
        {"drain_timeout": 0},
        {"body_timeout": float("nan")},
        {"served_model_name": ""},
        {"max_body_mib": 0},
    ],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong)).replace("api_key", "API key")) as refused:
        ServerOptions(**wrong)
    assert "\u00e9" not in str(refused.value)
