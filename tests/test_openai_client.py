"""OpenAI's own client, and a fuzzer that reads /openapi.json, against the server on a port of this machine."""

import asyncio
import json
import subprocess
import sys

import openai
import pytest

import minillm
from minillm.engine import EngineConfig, LLMEngine
from minillm.serving import AsyncEngine, ServerOptions, create_app
from served import served, soon

STORY = "Once upon a time"
CHAT = [{"role": "user", "content": "What color is the sky?"}]
KEY = "key-1"


@pytest.fixture(scope="module")
def engine():
    engine = AsyncEngine(LLMEngine("storyteller", config=EngineConfig(num_blocks=512)), model_name="storyteller")
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def url(engine):
    with served(create_app(engine, ServerOptions(api_key=KEY))) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def expected():
    """What the engine says in a program: (text, chat)."""
    params = minillm.SamplingParams(max_tokens=24)
    with minillm.LLM("storyteller", num_blocks=256, verbose=False) as llm:
        (text,), (chat,) = llm.generate(STORY, params, use_tqdm=False), llm.chat(CHAT, params, use_tqdm=False)
    return text.outputs[0].text, chat.outputs[0].text


GIVEN = {"model": "storyteller", "max_tokens": 24, "temperature": 0}


def test_whole_answers(client, expected):
    completion = client.completions.create(prompt=STORY, **GIVEN)
    chat = client.chat.completions.create(messages=CHAT, **GIVEN)
    assert (completion.choices[0].text, chat.choices[0].message.content) == expected
    assert completion.usage.completion_tokens > 0 and chat.usage.total_tokens > chat.usage.completion_tokens
    assert completion.choices[0].finish_reason in ("stop", "length") and chat.object == "chat.completion"


def test_streams(client, expected):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = client.completions.create(prompt=STORY, **GIVEN, **options)
    assert "".join(event.choices[0].text for event in events) == expected[0]
    assert last.choices == [] and last.usage.completion_tokens == 24
    *events, last = client.chat.completions.create(messages=CHAT, **GIVEN, **options)
    deltas = [event.choices[0].delta for event in events]
    assert deltas[0].role == "assistant" and "".join(delta.content or "" for delta in deltas) == expected[1]


def test_many_at_once_from_coroutines(url, expected):
    async def text(client) -> str:
        return (await client.completions.create(prompt=STORY, **GIVEN)).choices[0].text

    async def streamed(client) -> str:
        stream = await client.chat.completions.create(messages=CHAT, stream=True, **GIVEN)
        return "".join([event.choices[0].delta.content or "" async for event in stream])

    async def many() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(each(client) for each in [text, streamed] * 12))

    assert asyncio.run(many()) == list(expected) * 12


def test_a_stream_that_is_left_ends_its_request(client, engine):
    given = {**GIVEN, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    with client.completions.create(prompt=STORY, stream=True, **given) as stream:
        next(iter(stream))
        soon(lambda: engine.num_running == 1)
    soon(lambda: engine.num_running == 0 and engine.cache_usage == 0)


def test_everything_a_client_may_ask_for(client):
    more = {"top_k": 20, "min_p": 0.01, "ignore_eos": True, "repetition_penalty": 1.1, "min_tokens": 2}
    asked = {"n": 2, "seed": 5, "temperature": 0.7, "top_p": 0.9, "stop": ["zzz"], "presence_penalty": 0.1,
             "frequency_penalty": 0.1, "logit_bias": {"300": -5}, "user": "me", "extra_body": more}  # fmt: skip
    chat = client.chat.completions.create(
        model="storyteller", messages=CHAT, max_completion_tokens=5, logprobs=True, top_logprobs=3, **asked
    )
    assert [choice.index for choice in chat.choices] == [0, 1]
    assert [len(each.top_logprobs) for each in chat.choices[1].logprobs.content] == [3] * 5
    completion = client.completions.create(
        model="storyteller", prompt=[STORY, "The fox"], max_tokens=5, logprobs=2, echo=True, **asked
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert completion.choices[3].text.startswith("The fox") and completion.choices[0].logprobs.token_logprobs[0] is None


def test_models_and_embeddings(client):
    assert [model.id for model in client.models.list()] == ["storyteller"]
    assert client.models.retrieve("storyteller").owned_by == "minillm"
    with minillm.LLM("storyteller", num_blocks=256, verbose=False) as llm:
        (vector,) = llm.encode("A small dog")
    for how in ({}, {"encoding_format": "float"}):  # without it the client asks for base64
        found = client.embeddings.create(model="storyteller", input=["A small dog", "x"], **how)
        assert found.data[0].embedding == vector.tolist() and found.usage.prompt_tokens > 1


def test_errors_are_the_clients_own(client, url):
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="storyteller", prompt=STORY, max_tokens=0)
    assert wrong.value.param == "max_tokens" and wrong.value.status_code == 400
    with pytest.raises(openai.NotFoundError) as wrong:
        client.completions.create(model="gpt-4", prompt=STORY)
    assert wrong.value.param == "model" and wrong.value.request_id
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="storyteller", messages=[], stream=True)


def test_a_full_queue_and_a_dead_engine():
    engine = AsyncEngine(LLMEngine("storyteller", config=EngineConfig(num_blocks=256, max_num_seqs=1)), max_queue=0)
    with served(create_app(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        given = {"model": "storyteller", "prompt": STORY, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
        with client.completions.create(stream=True, **given) as stream:
            events = iter(stream)
            next(events)
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(**given)
            assert int(full.value.response.headers["retry-after"]) >= 1
            engine.shutdown()
            with pytest.raises(openai.APIError, match="shut down"):  # the error is an event of the stream
                list(events)
        with pytest.raises(openai.InternalServerError) as dead:
            client.completions.create(**given)
        assert dead.value.status_code == 503


def test_the_description_of_the_server_is_true():
    """Requests made up from it, right and wrong: no 5xx, documented statuses and fields alone, wrong ones refused."""
    engine = AsyncEngine(LLMEngine("storyteller", config=EngineConfig(num_blocks=256, max_model_len=64)))
    checks = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "negative_data_rejection"]
    checks += ["response_schema_conformance", "unsupported_method", "allow_header_conformance", "ignored_auth"]
    with served(create_app(engine, ServerOptions(api_key=KEY))) as url:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--max-examples", "8"]
        command += ["--checks", ",".join(checks), "--phases", "fuzzing", "--seed", "1", "--no-color"]
        command += ["-H", f"Authorization: Bearer {KEY}", "--generation-database", "none"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    engine.shutdown()
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "9 selected" in done.stdout or "Tested: " in done.stdout


def test_the_description_names_every_field_of_a_request(engine):
    app = create_app(engine)
    schemas = app.openapi()["components"]["schemas"]
    assert {"prompt", "max_tokens", "echo", "cache_salt"} <= schemas["CompletionRequest"]["properties"].keys()
    assert schemas["CompletionRequest"]["required"] == ["prompt"] and "ChatChunk" in schemas
    text = json.dumps(app.openapi())
    assert "422" not in {
        status for path in app.openapi()["paths"].values() for each in path.values() for status in each
    }
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= schemas.keys()
