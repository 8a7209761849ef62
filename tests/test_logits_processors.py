"""min_tokens, logit_bias and penalties: by hand, as transformers has them, and the same on every path."""

import math
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

import minillm
from device_jobs import Job, ladder, run_jobs
from minillm import EngineConfig, LLMEngine, SamplingParams, generate_cached, generate_chunked, generate_naive
from minillm.errors import SamplingParamsError
from minillm.runtime.worker_process import ProcessWorker
from minillm.sampling import LogitsProcessor, SamplingState, sample
from test_device_runner import BLOCK_SIZE, JOB_BLOCKS, WAYS
from tiny_models import ScriptedModel, all_logits, random_token_ids

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# What one request may ask for; eos or stop ids of its own are 0 to 5 below.
ASKED = {
    "repetition_penalty": {"repetition_penalty": 1.8},
    "its reward": {"repetition_penalty": 0.7},
    "presence_penalty": {"presence_penalty": 1.7},
    "frequency_penalty": {"frequency_penalty": -0.6},
    "logit_bias": {"logit_bias": {3: 2.5, 17: -4.0, 60: 3.0}},
    "min_tokens": {"min_tokens": 8, "stop_token_ids": range(100)},
    "all": {
        "min_tokens": 6,
        "stop_token_ids": range(100),
        "logit_bias": {3: 2.5, 60: 3.0},
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.9,
    },
}


def state_of(params, prompt=(), output=(), eos=(), num_ids=6):
    ending_ids = (*params.stop_token_ids, *eos)
    return SamplingState.of(params, num_ids, prompt_token_ids=prompt, output_token_ids=output, ending_ids=ending_ids)


def changed(logits, params, output=(), **tokens):
    logits = torch.tensor(logits)
    processor = state_of(params, output=output, **tokens).processor
    processor.process(logits, torch.tensor(len(output)))
    return logits.tolist()


# --- by hand ---------------------------------------------------------------------------------------------------------

LOGITS = [2.0, -1.0, 0.5, 3.0, 0.0, -2.0]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"presence_penalty": 0.5}, [2.0, -1.5, 0.0, 3.0, 0.0, -2.0]),  # tokens 1 and 2 are in the output
        ({"presence_penalty": -2.0}, [2.0, 1.0, 2.5, 3.0, 0.0, -2.0]),
        ({"frequency_penalty": 0.5}, [2.0, -1.5, -0.5, 3.0, 0.0, -2.0]),  # once and twice
        ({"repetition_penalty": 2.0}, [1.0, -2.0, 0.25, 3.0, 0.0, -2.0]),  # of the prompt's too: 0 and 4
        ({"repetition_penalty": 0.5}, [4.0, -0.5, 1.0, 3.0, 0.0, -2.0]),
        ({"logit_bias": {5: 4.0, 3: -1.0}}, [2.0, -1.0, 0.5, 2.0, 0.0, 2.0]),
        ({"min_tokens": 4}, [2.0, -1.0, 0.5, -math.inf, 0.0, -math.inf]),  # eos is 3, a stop id 5; 3 tokens so far
        ({"min_tokens": 3}, LOGITS),
        ({"min_tokens": 4, "ignore_eos": True}, [2.0, -1.0, 0.5, -math.inf, 0.0, -math.inf]),
        # The bias first, then the repetition penalty, then the others: (0.5 + 1.5) / 2 - 2 * 0.25 - 1 = -0.5.
        (
            {"logit_bias": {2: 1.5}, "repetition_penalty": 2.0, "frequency_penalty": 0.25, "presence_penalty": 1.0},
            [1.0, -3.25, -0.5, 3.0, 0.0, -2.0],
        ),
        # A bias brings no forbidden token back.
        ({"min_tokens": 9, "logit_bias": {3: 50.0}}, [2.0, -1.0, 0.5, -math.inf, 0.0, -math.inf]),
    ],
)
def test_what_happens_to_logits(asked, expected):
    params = SamplingParams(**asked, stop_token_ids=[5])
    found = changed(LOGITS, params, prompt=[0, 4, 0], output=[2, 1, 2], eos=[3])
    assert found == pytest.approx(expected)


def test_who_asks_for_nothing_has_no_processor():
    nothing = SamplingParams(logit_bias={}, min_tokens=0, repetition_penalty=1, stop_token_ids=[1])
    for state in (state_of(SamplingParams()), state_of(nothing), state_of(SamplingParams(top_k=5))):
        assert state.processor is None and not state.asks


@pytest.mark.parametrize("asked", [{"logprobs": 0}, {"min_tokens": 1}, {"temperature": 1.0, "top_k": 5}])
def test_who_asks_for_more_than_a_temperature_is_known(asked):
    assert state_of(SamplingParams(**asked)).asks


def test_ids_that_have_no_logits_do_no_harm():
    """Padding of the vocabulary may be in a prompt, and anything in stop_token_ids."""
    params = SamplingParams(repetition_penalty=2.0, logit_bias={7: 1.0}, min_tokens=1, stop_token_ids=[6, 2**62])
    assert changed([1.0, 1.0, -1.0], params, prompt=[0, 6], eos=[2], num_ids=3) == [0.5, 1.0, -math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_request_counts_the_tokens_it_gets_and_its_neighbours_logits_stay(dtype):
    logits = torch.tensor([[3.0, 2.5, 0.0], [3.0, 2.5, 0.0]], dtype=dtype)
    before = logits.clone()
    params = [SamplingParams(frequency_penalty=0.75), SamplingParams()]
    states = [state_of(each, prompt=[0], num_ids=3) for each in params]
    tokens = [sample(logits, states, [draw, draw]).tolist() for draw in range(4)]
    assert tokens == [[0, 0], [1, 0], [0, 0], [1, 0]]  # 3; 2.25 < 2.5; 2.25 > 1.75; 1.5 < 1.75
    assert torch.equal(logits, before)


def test_the_token_of_a_request_that_failed_does_no_harm():
    LogitsProcessor(SamplingParams(frequency_penalty=1.0), 3).count(torch.tensor([-1]))


def test_penalties_come_before_temperature_and_filters():
    """Bias makes the unlikely token likeliest: min_p = 1 and top_k = 1 keep it alone, at any temperature."""
    logits = torch.tensor([[4.0, 1.0, 0.0]]).repeat(20, 1)
    for more in ({"min_p": 1.0}, {"top_k": 1}, {"top_p": 0.01}):
        params = SamplingParams(temperature=4.0, logit_bias={2: 6.0}, **more)
        drawn = sample(logits, [state_of(params, num_ids=3)] * 20, range(20))
        assert set(drawn.tolist()) == {2}


def test_a_vocabulary_without_the_biased_id_refuses_it():
    with pytest.raises(SamplingParamsError, match="token id 1000, which is outside the vocabulary of 1000"):
        generate_cached(ScriptedModel([7]), [1], SamplingParams(logit_bias={5: 1.0, 1000: 1.0}))


# --- as transformers has them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.3, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_the_repetition_penalty_is_transformers(penalty, seed):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    prompt, output = random_token_ids(9, 40, seed), random_token_ids(7, 40, seed + 10)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits[None])
    ours = changed(
        logits.tolist(), SamplingParams(repetition_penalty=penalty), prompt=prompt, output=output, num_ids=40
    )
    assert ours == pytest.approx(theirs[0].tolist())


@pytest.mark.parametrize("num_output", [0, 2, 3, 4])
def test_min_tokens_are_transformers(num_output):
    logits, prompt, output = torch.arange(10.0), [1, 2, 3], [4] * num_output
    theirs = MinNewTokensLengthLogitsProcessor(3, 3, [7, 9])(torch.tensor([prompt + output]), logits[None].clone())
    params = SamplingParams(min_tokens=3, stop_token_ids=[9])
    assert changed(logits.tolist(), params, prompt=prompt, output=output, eos=[7], num_ids=10) == theirs[0].tolist()


def test_logit_bias_is_transformers():
    logits, bias = torch.randn(10, generator=torch.Generator().manual_seed(0)), {3: 1.5, 8: -2.25}
    theirs = SequenceBiasLogitsProcessor({(token_id,): each for token_id, each in bias.items()})
    expected = theirs(torch.tensor([[1, 2]]), logits[None])[0].tolist()
    assert changed(logits.tolist(), SamplingParams(logit_bias=bias), prompt=[1, 2], num_ids=10) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("generate", [generate_naive, generate_cached])
def test_greedy_outputs_are_those_of_transformers(generate, load, load_reference):
    prompt, bias, stops = random_token_ids(12), {5: 3.0, 77: 2.0, 8: -9.0}, list(range(60))
    theirs = LogitsProcessorList(
        [
            MinNewTokensLengthLogitsProcessor(12, 9, stops),
            SequenceBiasLogitsProcessor({(token_id,): each for token_id, each in bias.items()}),
            RepetitionPenaltyLogitsProcessor(1.4),
        ]
    )
    reference = load_reference("llama", torch.float64)
    whole = reference.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, logits_processor=theirs, eos_token_id=stops
    )
    params = SamplingParams(
        max_tokens=30, min_tokens=9, stop_token_ids=stops, logit_bias=bias, repetition_penalty=1.4, ignore_eos=True
    )
    ours = generate(load("llama", torch.float64), prompt, params).token_ids
    assert list(ours) == whole[0, 12:].tolist() and 10 <= len(ours) < 30


def plainly(model, prompt, params):
    """Greedy, token by token, from nothing but whole-sequence logits and the definitions."""
    output, ending = [], {*params.stop_token_ids, *model.config.eos_token_ids}
    while len(output) < params.max_tokens and not (output and output[-1] in ending):
        logits = all_logits(model, prompt + output)[-1].tolist()
        for token_id in range(len(logits)):
            if len(output) < params.min_tokens and token_id in ending:
                logits[token_id] = -math.inf
            logits[token_id] += (params.logit_bias or {}).get(token_id, 0.0)
            if token_id in prompt + output:
                factor = params.repetition_penalty
                logits[token_id] = logits[token_id] / factor if logits[token_id] > 0 else logits[token_id] * factor
            logits[token_id] -= params.frequency_penalty * output.count(token_id)
            logits[token_id] -= params.presence_penalty * (token_id in output)
        output.append(logits.index(max(logits)))
    return output


# --- the same on every path ------------------------------------------------------------------------------------------

KIND = "llama-mqa"


@pytest.fixture(scope="module")
def model(load):
    return load(KIND, torch.float64)


def jobs():
    """One of each kind, of several lengths, joining in several steps."""
    return [
        Job(name, random_token_ids(4 + 3 * i, 190, i), SamplingParams(max_tokens=14, **asked), i % 3, 5 + i)
        for i, (name, asked) in enumerate(ASKED.items())
    ]


@pytest.fixture(scope="module")
def expected(model):
    """job -> its output by the definitions; each differs from what the model says unasked."""
    outputs = {job.request_id: plainly(model, job.prompt, job.params) for job in jobs()}
    for job in jobs():
        free = replace(job.params, **dict.fromkeys(set(ASKED[job.request_id]) - {"stop_token_ids"}))
        assert outputs[job.request_id] != plainly(model, job.prompt, free), f"{job.request_id} changes nothing"
    assert any(len(output) < 14 for output in outputs.values()), "some end by eos or a stop id"
    return outputs


@pytest.mark.parametrize("generate", [generate_naive, generate_cached, lambda *a: generate_chunked(*a, chunk_size=3)])
def test_the_ladder_has_it_by_the_definitions(generate, model, expected):
    for job in jobs():
        assert list(generate(model, job.prompt, job.params).token_ids) == expected[job.request_id]


def test_ragged_batches_have_it_too(model, expected):
    results = minillm.generate_ragged(model, [job.prompt for job in jobs()], [job.params for job in jobs()])
    assert [list(result.token_ids) for result in results] == list(expected.values())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_every_runner_has_it_ahead_of_what_was_read_and_beside_others(way, drawn, model, expected):
    """Planned by hand, every request gets `max_tokens`; so an end by a stop id is not one here."""
    more = {"temperature": 0.8, "seed": 4} if drawn else {}
    wanted = [job._replace(params=replace(job.params, **more)) for job in jobs()]
    unasked = [Job(f"beside {i}", random_token_ids(6, 190, 40 + i), SamplingParams(max_tokens=9), i) for i in range(2)]
    at_once = [wanted[:4], wanted[4:]]  # a runner has six rows
    for asking in at_once:
        together, _ = run_jobs(WAYS[way](model), asking + unasked, JOB_BLOCKS, BLOCK_SIZE, ahead=True)
        alone = ladder(model, asking) if drawn else expected
        for job in asking:
            assert together[job.request_id][: len(alone[job.request_id])] == alone[job.request_id]
        assert {job.request_id: together[job.request_id] for job in unasked} == ladder(model, unasked)


CONFIG = EngineConfig(num_blocks=16, block_size=4, max_model_len=56, max_num_seqs=4, max_num_batched_tokens=12)


def engine_of(folder, **changes):
    return LLMEngine(folder, dtype="float64", config=replace(CONFIG, **changes), skip_tokenizer_init=True)


def run_engine(engine, wanted, fails_at=()):
    """Request -> its outputs; steps of these numbers fail."""
    right, calls, told = engine.executor.launch, [], {}

    def launch(plan):
        calls.append(plan)
        pending = right(plan)
        if len(calls) in fails_at:
            raise RuntimeError("lost")
        return pending

    engine.executor.launch = launch
    for job in wanted:
        engine.add_request(job.request_id, job.prompt, job.params, output_kind="final_only")
    while engine.has_unfinished_requests():
        with suppress(RuntimeError):
            told |= {output.request_id: output for output in engine.step()}
    engine.executor.launch = right
    return told


@pytest.mark.parametrize("ahead", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("fails_at", [(), (7,), (3, 12)], ids=["", "a step fails", "two steps fail"])
def test_an_engine_that_preempts_and_fails_has_it(ahead, mode, fails_at, checkpoint, expected):
    engine = engine_of(checkpoint(KIND), async_scheduling=ahead, preemption_mode=mode, num_host_blocks=16)
    told = run_engine(engine, jobs(), fails_at)
    assert {name: output.outputs[0].token_ids for name, output in told.items()} == expected
    preempted = {each.mode for step in engine.trace.steps for each in step.preempted}
    assert mode in preempted


def test_a_worker_process_has_it(checkpoint, expected):
    engine = engine_of(checkpoint(KIND), worker="process", num_blocks=60)
    assert isinstance(engine.executor.workers[0], ProcessWorker)
    told = run_engine(engine, jobs())
    engine.shutdown()
    assert {name: output.outputs[0].token_ids for name, output in told.items()} == expected


def test_each_of_n_outputs_counts_its_own_tokens(checkpoint, model):
    params = SamplingParams(
        temperature=1.0, seed=5, n=3, max_tokens=12, presence_penalty=2.0, repetition_penalty=1.5, logit_bias={9: 4.0}
    )
    prompt = random_token_ids(9)
    told = run_engine(engine_of(checkpoint(KIND)), [Job("a", prompt, params)])["a"].outputs
    for i, completion in enumerate(told):
        alone = generate_cached(model, prompt, replace(params, n=1, seed=5 + i))
        assert tuple(completion.token_ids) == alone.token_ids
    assert all(first.token_ids != second.token_ids for first, second in pairwise(told))


def test_log_probabilities_stay_those_of_the_model(checkpoint, model):
    job = Job("a", random_token_ids(9), SamplingParams(max_tokens=8, logprobs=1, **ASKED["all"]))
    told = run_engine(engine_of(checkpoint(KIND)), [job])["a"].outputs[0]
    logits = all_logits(model, job.prompt + told.token_ids[:-1])[len(job.prompt) - 1 :].log_softmax(-1)
    for row, token_id, entry in zip(logits, told.token_ids, told.logprobs, strict=True):
        assert entry[token_id].logprob == pytest.approx(row[token_id].item())
        assert row.argmax().item() in entry
