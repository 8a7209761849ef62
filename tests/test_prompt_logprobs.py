"""Log-probabilities of a prompt's own tokens: transformers' numbers, whatever else happens to the request."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from device_jobs import Job, run_jobs
from minillm import LLM, EngineConfig, LLMEngine, SamplingParams
from minillm.sampling import PROMPT_ROWS
from test_device_runner import BLOCK_SIZE, JOB_BLOCKS, WAYS
from test_logits_processors import run_engine
from tiny_models import all_logits, random_token_ids

KIND = "llama-mqa"
CONFIG = EngineConfig(num_blocks=17, block_size=4, max_model_len=60, max_num_seqs=4, max_num_batched_tokens=12)


@pytest.fixture(scope="module")
def model(load):
    return load(KIND, torch.float64)


def engine_of(folder, **changes):
    return LLMEngine(folder, dtype="float64", config=replace(CONFIG, **changes), skip_tokenizer_init=True)


def assert_right(told, logits, prompt, most, tolerance=1e-9):
    """`told` is what [T, V] logits of the prompt give: rank, values, and the likeliest in their order."""
    assert told[0] is None and len(told) == len(prompt)
    for row, token_id, entry in zip(logits.log_softmax(-1), prompt[1:], told[1:], strict=False):
        top = row.topk(most).indices.tolist()
        assert list(entry) == [token_id, *(each for each in top if each != token_id)]
        assert entry[token_id].rank == 1 + int((row > row[token_id]).sum())
        for each in entry:
            assert entry[each].logprob == pytest.approx(row[each].item(), abs=tolerance)


def jobs():
    """Prompts of one token, of a few and of more than are computed at once; two of them begin alike."""
    prompts = [[7], random_token_ids(2, 190, 1), random_token_ids(PROMPT_ROWS + 9, 190, 2)]
    prompts += [prompts[2][:20] + random_token_ids(3, 190, 3), random_token_ids(11, 190, 4)]
    params = [SamplingParams(max_tokens=16, prompt_logprobs=k, logprobs=k or None) for k in (2, 0, 3, 20, 1)]
    more = [Job("unasked", random_token_ids(9, 190, 5), SamplingParams(max_tokens=12))]
    return [Job(f"job {i}", *each, 0, 7) for i, each in enumerate(zip(prompts, params, strict=True))] + more


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("fails_at", [(), (2, 9)], ids=["", "steps fail"])
def test_they_are_the_models_in_chunks_after_preemption_and_failures(ahead, mode, fails_at, checkpoint, model):
    engine = engine_of(checkpoint(KIND), async_scheduling=ahead, preemption_mode=mode, num_host_blocks=17)
    told = run_engine(engine, jobs(), fails_at)
    for job in jobs()[:-1]:
        output = told[job.request_id]
        assert_right(output.prompt_logprobs, all_logits(model, job.prompt), job.prompt, job.params.prompt_logprobs)
        assert output.num_cached_tokens == 0
    assert told["unasked"].prompt_logprobs is None
    steps = engine.trace.steps
    assert mode in {each.mode for step in steps for each in step.preempted}
    chunks = [part.request_id for step in steps for part in step.scheduled if part.why == "prefill"]
    assert len(chunks) > len(set(chunks))


def test_they_are_transformers(checkpoint, load_reference):
    prompt = random_token_ids(30)
    with LLM(checkpoint("llama"), dtype="float64", num_blocks=40, skip_tokenizer_init=True, verbose=False) as llm:
        (output,) = llm.generate(prompt, SamplingParams(max_tokens=1, prompt_logprobs=4), use_tqdm=False)
    with torch.inference_mode():
        logits = load_reference("llama", torch.float64)(torch.tensor([prompt])).logits[0]
    assert_right(output.prompt_logprobs, logits.double(), prompt, 4, tolerance=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_every_runner_says_the_same(way, model):
    """Also of a chunk of one token, which lies among the decodes."""
    wanted = [job._replace(joins=i % 2, chunk=1 + 4 * (i % 3)) for i, job in enumerate(jobs())]

    found = {job.request_id: [None] * len(job.prompt) for job in wanted}
    for output in run_jobs(WAYS[way](model), wanted, JOB_BLOCKS, BLOCK_SIZE, ahead=True)[1]:
        for request_id, (start, entries) in output.prompt_logprobs.items():
            assert found[request_id][start : start + len(entries)] == [None] * len(entries)  # told once
            found[request_id][start : start + len(entries)] = entries
    assert found.pop("unasked") == [None] * 9
    for job in wanted[:-1]:
        logits = all_logits(model, job.prompt)
        told = [None, *(as_told(*each) for each in zip(found[job.request_id][1:], job.prompt[1:], strict=True))]
        assert_right(told, logits, job.prompt, job.params.prompt_logprobs)


def as_told(entry, token_id):
    """As an engine tells of it, in the form that `assert_right` looks at."""
    others = zip(entry.top_ids, entry.top_logprobs, strict=True)
    told = {token_id: SimpleNamespace(logprob=entry.logprob, rank=entry.rank)}
    return told | {each: SimpleNamespace(logprob=value) for each, value in others if each != token_id}


def test_such_a_request_reads_no_cache_but_leaves_its_prompt_there(checkpoint):
    engine = engine_of(checkpoint(KIND))
    prompt = random_token_ids(21)
    asked = SamplingParams(max_tokens=2, prompt_logprobs=1)
    plain = replace(asked, prompt_logprobs=None)
    cached = []
    for i, params in enumerate([asked, plain, asked, plain]):
        output = run_engine(engine, [Job(str(i), prompt, params)])[str(i)]
        cached.append(output.num_cached_tokens)
        assert (output.prompt_logprobs is None) == (params is plain)
        if params is asked:
            assert None not in output.prompt_logprobs[1:]
    assert cached == [0, 20, 0, 20]


@pytest.mark.parametrize("n", [1, 3])
def test_streams_tell_them_once_and_others_every_time(checkpoint, n):
    params = SamplingParams(max_tokens=4, prompt_logprobs=0, n=n, temperature=1.0, seed=1, ignore_eos=True)
    told = {}
    for kind in ("delta", "cumulative", "final_only"):
        engine = engine_of(checkpoint(KIND))
        engine.add_request("a", random_token_ids(15), params, output_kind=kind)
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        told[kind] = [output.prompt_logprobs for output in outputs]
    (whole,) = told["final_only"]
    assert len(whole) == 15 and whole[0] is None
    assert told["delta"] == [whole] + [None] * (len(told["delta"]) - 1)
    assert told["cumulative"] == [whole] * len(told["cumulative"])


def test_a_request_that_fails_says_what_it_knows(checkpoint):
    engine = engine_of(checkpoint(KIND))
    prompt = random_token_ids(20)
    bad = next(each for each in range(190) if each not in prompt)
    with torch.no_grad():
        engine.model.embed_tokens.weight[bad] = torch.nan
    job = Job("a", [*prompt[:15], bad, *prompt[15:]], SamplingParams(max_tokens=3, prompt_logprobs=1))
    output = run_engine(engine, [job])["a"]
    assert output.outputs[0].finish_reason == "error"
    known = [position for position, entry in enumerate(output.prompt_logprobs) if entry is not None]
    assert known == list(range(1, 13))  # the first chunk is of 12 tokens


def test_their_texts_are_those_of_the_prompt():
    with LLM(num_blocks=40, max_model_len=200, verbose=False) as llm:
        whole, broken = (llm.tokenizer.encode(f"Once upon a time, there was{end}") for end in ("", " a 🦊"))
        for token_ids in (whole, broken[:-1]):
            params = SamplingParams(max_tokens=1, prompt_logprobs=1)
            (output,) = llm.generate({"prompt_token_ids": token_ids}, params, use_tqdm=False)
            pairs = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
            said = [entry[token_id].decoded_token for token_id, entry in pairs]
            assert llm.tokenizer.decode(token_ids[:1]) + "".join(said) == llm.tokenizer.decode(token_ids)
    assert said[-1].endswith("\N{REPLACEMENT CHARACTER}")


def test_an_id_used_again_while_its_old_prompt_is_in_flight_has_its_own(checkpoint, model):
    engine = engine_of(checkpoint(KIND), async_scheduling=True)
    old, new = random_token_ids(30, 190, 1), random_token_ids(20, 190, 2)
    engine.add_request("a", old, SamplingParams(max_tokens=3, prompt_logprobs=5))
    engine.step()
    engine.abort_request("a")
    engine.add_request("a", new, SamplingParams(max_tokens=3, prompt_logprobs=2), output_kind="final_only")
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert_right(outputs[-1].prompt_logprobs, all_logits(model, new), new, 2)
