"""When a request ends, its final output, and which requests are refused before any work."""

import json
import shutil

import pytest
import torch

from minillm import (
    KVCache,
    SamplingParams,
    generate_cached,
    generate_chunked,
    generate_naive,
    generate_ragged,
    load_model,
)
from minillm.errors import ConfigError, PromptError, SamplingParamsError
from tiny_models import ScriptedModel, random_token_ids

GENERATE = [generate_naive, generate_cached]
EOS = 900


def say(script, params, generate=generate_cached, **options):
    """Run a model that says `script` after a prompt of one token; eos is 900 or 901."""
    return generate(ScriptedModel(script, eos_token_ids=(EOS, EOS + 1)), [1], params, **options)


# --- when it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generate", GENERATE)
@pytest.mark.parametrize(
    ("params", "token_ids", "finish_reason", "stop_reason"),
    [
        ({"max_tokens": 3}, (10, 11, 12), "length", None),
        ({"max_tokens": 1}, (10,), "length", None),
        ({"max_tokens": 9}, (10, 11, 12, 13, EOS), "stop", None),
        ({"max_tokens": 5}, (10, 11, 12, 13, EOS), "stop", None),  # eos as the last token allowed
        ({"max_tokens": 7, "ignore_eos": True}, (10, 11, 12, 13, EOS, 14, EOS + 1), "length", None),
        ({"max_tokens": 9, "stop_token_ids": (12, 11)}, (10, 11), "stop", 11),
        ({"max_tokens": 9, "stop_token_ids": (14,)}, (10, 11, 12, 13, EOS), "stop", None),
        ({"max_tokens": 9, "stop_token_ids": (EOS,), "ignore_eos": True}, (10, 11, 12, 13, EOS), "stop", EOS),
    ],
)
def test_output_ends_at_eos_at_a_stop_id_or_at_max_tokens(generate, params, token_ids, finish_reason, stop_reason):
    result = say([10, 11, 12, 13, EOS, 14, EOS + 1, 15, 16, 17], SamplingParams(**params), generate)
    assert result.token_ids == token_ids
    assert (result.finish_reason, result.stop_reason) == (finish_reason, stop_reason)
    assert result.prompt_token_ids == (1,)
    assert result.text is None
    assert result.counters.forward_passes == len(token_ids)


@pytest.mark.parametrize("generate", GENERATE)
def test_without_max_tokens_the_output_may_fill_the_context_and_a_number_that_does_not_fit_is_refused(generate):
    result = say([7] * CONTEXT, SamplingParams(), generate)
    assert len(result.token_ids) == CONTEXT - 1 and result.finish_reason == "length"
    with pytest.raises(PromptError, match=f"max_tokens = {CONTEXT}"):
        say([7] * CONTEXT, SamplingParams(max_tokens=CONTEXT), generate)


def test_any_of_several_eos_ends_the_output():
    assert say([10, EOS + 1, 11], SamplingParams(max_tokens=3)).token_ids == (10, EOS + 1)


def test_eos_of_generation_config_ends_it_where_transformers_ends(checkpoint, load_reference, tmp_path):
    prompt = random_token_ids(30, seed=3)
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    free = load_reference("llama").generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)[0, 30:].tolist()
    eos = [max(free, key=free.index), 198]  # the token that comes for the first time last, and one that does not come
    written = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(written | {"eos_token_id": eos}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": eos[1]}))
    model, _ = load_model(folder, skip_tokenizer_init=True)
    assert model.config.eos_token_ids == tuple(eos)
    result = generate_cached(model, prompt, SamplingParams(max_tokens=20))
    assert list(result.token_ids) == free[: free.index(eos[0]) + 1]
    assert len(result.token_ids) > 2
    assert result.finish_reason == "stop"


# --- stop strings and streaming --------------------------------------------------------------------------------------


@pytest.mark.parametrize("generate", GENERATE)
@pytest.mark.parametrize(
    ("text", "stop", "said"),
    [
        ("the fox saw the river", ("saw",), "the fox "),
        ("the fox saw the river", ("x sa", "river"), "the fo"),  # across a token border
        ("the fox\n\nThe end", ("\n\n",), "the fox"),
        ("a 🦊 b", ("🦊",), "a "),  # a character of four tokens
        ("a 🦊 b", (" b",), "a 🦊"),
        ("the fox", ("the",), ""),
    ],
)
def test_a_stop_string_ends_the_output_and_is_cut_from_it(generate, text, stop, said, tokenizer):
    script = tokenizer.encode(text)
    result = say([*script, 5, 5, 5], SamplingParams(max_tokens=50, stop=stop), generate, tokenizer=tokenizer)
    assert result.text == said
    assert result.finish_reason == "stop"
    assert result.stop_reason in stop
    assert list(result.token_ids) == script[: len(result.token_ids)]
    assert result.stop_reason in tokenizer.decode(result.token_ids)


def test_a_stop_string_that_comes_only_in_part_is_given_out_at_the_end(tokenizer):
    script = tokenizer.encode("the fox")
    params = SamplingParams(max_tokens=len(script), stop=("fox!",))
    result = say(script, params, tokenizer=tokenizer)
    assert (result.text, result.finish_reason, result.stop_reason) == ("the fox", "length", None)


@pytest.mark.parametrize("generate", GENERATE)
@pytest.mark.parametrize("stop", [(), ("saw",), ("never",)])
def test_streamed_texts_are_the_text_and_every_token_is_announced(generate, stop, tokenizer):
    announced = []
    script = tokenizer.encode("the fox 🦊 saw a crêpe") + [EOS]
    result = say(
        script, SamplingParams(max_tokens=99, stop=stop), generate, tokenizer=tokenizer, on_token=announced.append
    )
    assert "".join(token.text for token in announced) == result.text
    assert tuple(token.token_id for token in announced) == result.token_ids
    times = [token.time for token in announced]
    assert times == sorted(times)


def test_special_tokens_are_counted_but_not_shown(tokenizer):
    end = tokenizer.eos_token_id
    model = ScriptedModel([*tokenizer.encode("the fox"), end], eos_token_ids=(end,))
    result = generate_cached(model, [1], tokenizer=tokenizer)
    assert result.text == "the fox"
    assert result.token_ids[-1] == end


# --- refused before any work -----------------------------------------------------------------------------------------

CONTEXT = 500


@pytest.fixture
def no_work(monkeypatch):
    """Allocating a cache or calling the model fails the test."""

    def work(*args, **kwargs):
        pytest.fail("work was done for a request that should have been refused")

    monkeypatch.setattr(KVCache, "__init__", work)
    monkeypatch.setattr(ScriptedModel, "__call__", work)


REFUSED = {
    "empty prompt": ([], {}, PromptError, ["empty"]),
    "prompt fills the context": ([1] * CONTEXT, {}, PromptError, ["500", "context", "499"]),
    "prompt longer than the context": ([1] * 700, {}, PromptError, ["700", "500", "499"]),
    "no room for max_tokens": ([1] * 490, {"max_tokens": 11}, PromptError, ["490", "11", "500", "10"]),
    "token id one too large": ([1, 2, 1000], {}, PromptError, ["1000", "position 2"]),
    "negative token id": ([-1, 2], {}, PromptError, ["-1", "position 0", "1000"]),
    "text instead of ids": ("Once upon a time", {}, PromptError, ["'Once upon a time'", "encode"]),
    "stop string without a tokenizer": ([1], {"stop": "end"}, SamplingParamsError, ["tokenizer"]),
}


@pytest.mark.parametrize("generate", GENERATE)
@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_before_any_work(name, generate, no_work):
    prompt, params, kind, said = REFUSED[name]
    with pytest.raises(kind) as error:
        generate(ScriptedModel([7]), prompt, SamplingParams(**params))
    for part in said:
        assert part in str(error.value)


def test_one_bad_prompt_refuses_the_whole_ragged_call(no_work):
    with pytest.raises(PromptError, match="token id 1000 at position 1"):
        generate_ragged(ScriptedModel([7]), [[1, 2], [3, 1000]])


def test_chunks_of_no_tokens_are_refused(no_work):
    with pytest.raises(ConfigError, match="chunk_size is 0.*at least 1"):
        generate_chunked(ScriptedModel([7]), [1], chunk_size=0)


def test_prompt_and_output_may_fill_the_context_exactly():
    result = generate_cached(ScriptedModel([7] * 10, num_prompt_tokens=490), [1] * 490, SamplingParams(max_tokens=10))
    assert len(result.token_ids) == 10
