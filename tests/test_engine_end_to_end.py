"""The whole engine under pressure: requests with shared prefixes in a pool far too small, some aborted on the way.

A finished request has the same output as alone, under every policy and both preemption modes. No request sees a word
of another's prompt. At the end all blocks are free. The same comparison must catch broken versions.
"""

import dataclasses
import random

import numpy as np
import pytest
import torch

from minillm import EngineConfig, LLMEngine, SamplingParams, generate_cached
from minillm.engine.outputs import RequestOutput
from minillm.engine.queue import SCHEDULING_POLICIES
from minillm.model.text import encode_chat
from minillm.runtime.batch import Batch
from minillm.runtime.cache_engine import CacheEngine
from minillm.storyteller import vocabulary
from tiny_models import BASE

NUM_REQUESTS = 64
PREFIXES = [[random.Random(f"prefix {i}").randrange(BASE["vocab_size"]) for _ in range(9 + 4 * i)] for i in range(4)]
CONFIG = EngineConfig(
    block_size=4,
    num_blocks=31,
    max_model_len=60,
    max_num_seqs=10,
    max_num_batched_tokens=24,
    enable_prefix_caching=True,
)
STOPS = range(6)  # with these, an output ends after about 30 tokens by itself

ASKED = [{}, {"repetition_penalty": 1.4}, {}, {"presence_penalty": 0.8, "frequency_penalty": 0.5}, {"min_tokens": 1}]


@dataclasses.dataclass(frozen=True)
class Job:
    """One request of the test."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int


def jobs() -> list[Job]:
    """A shared prefix, a tail of its own, every fourth sampled, every eighth with two outputs."""
    rng, made = random.Random(4), []
    for number in range(NUM_REQUESTS):
        tail = [rng.randrange(BASE["vocab_size"]) for _ in range(rng.randint(1, 9))]
        params = SamplingParams(
            temperature=1.0 if number % 4 == 3 else 0.0,
            seed=number,
            n=2 if number % 8 == 3 else 1,
            max_tokens=rng.randint(1, 25),
            stop_token_ids=STOPS,
            **ASKED[number % len(ASKED)],
        )
        made.append(Job(f"r{number}", PREFIXES[number % 4] + tail, params, rng.randint(-3, 3)))
    return made


JOBS = jobs()


@dataclasses.dataclass
class Run:
    """The results of one run."""

    engine: LLMEngine
    outputs: dict[str, RequestOutput]  # of the requests that ended by themselves
    aborted: set[str]


def run(engine: LLMEngine, wanted: list[Job], abort_every: int = 0, seed: int = 0) -> Run:
    """Requests come in at random, some are aborted at random, steps are made until all have ended."""
    rng, outputs, aborted, pending = random.Random(seed), {}, set(), wanted[::-1]
    heeds_priority = engine.config.scheduling_policy == "priority"
    steps = 0
    while pending or engine.has_unfinished_requests():
        for _ in range(min(rng.randint(0, 4), len(pending))):
            job = pending.pop()
            engine.add_request(
                job.request_id,
                job.prompt,
                job.params,
                priority=job.priority if heeds_priority else 0,
                output_kind="final_only",
            )
        for output in engine.step():
            assert output.request_id not in aborted | outputs.keys(), "one final output, and none after an abort"
            outputs[output.request_id] = output
        steps += 1
        assert steps < 3000, "nobody comes forward any more"
        alive = [job.request_id for job in wanted if engine.is_unfinished(job.request_id)]
        if abort_every and steps % abort_every == 0 and alive:
            request_id = rng.choice(alive)
            assert engine.abort_request(request_id) and not engine.abort_request(request_id)
            aborted.add(request_id)
    return Run(engine, outputs, aborted)


@pytest.fixture(scope="module")
def solo(load):
    """job -> its outputs, each computed by itself on a contiguous cache."""
    model, known = load("llama", torch.float64), {}

    def solo(job: Job) -> list[list[int]]:
        if job.request_id not in known:
            seeds = [job.params.seed + i for i in range(job.params.n)]
            each = [dataclasses.replace(job.params, n=1, seed=seed) for seed in seeds]
            known[job.request_id] = [list(generate_cached(model, job.prompt, params).token_ids) for params in each]
        return known[job.request_id]

    return solo


def make_engine(folder, policy: str, mode: str, **changes) -> LLMEngine:
    config = dataclasses.replace(CONFIG, scheduling_policy=policy, preemption_mode=mode, **changes)
    return LLMEngine(folder, dtype="float64", config=config, skip_tokenizer_init=True)


def differing(done: Run, solo) -> list[str]:
    """Requests whose output differs from their output alone."""
    return [
        job.request_id
        for job in JOBS
        if job.request_id in done.outputs
        and [completion.token_ids for completion in done.outputs[job.request_id].outputs] != solo(job)
    ]


def assert_all_given_back(engine: LLMEngine) -> None:
    blocks = engine.scheduler.block_manager
    blocks.check()
    assert blocks.usage.used == 0 and blocks.num_free == blocks.num_blocks - 1
    blocks.reset_prefix_cache()
    assert blocks.usage.free == blocks.num_blocks - 1, "at the end as at the beginning"


def assert_took_the_path(done: Run, mode: str) -> None:
    """The run took the path that it tests."""
    steps = done.engine.trace.steps
    preemptions = [each for step in steps for each in step.preempted]
    assert len(preemptions) >= 10 and mode in {each.mode for each in preemptions}
    parts = [part for step in steps for part in step.scheduled]
    assert mode == "swap" or any(part.why == "recompute" for part in parts)
    assert any(step.copied_blocks for step in steps), "several outputs of a prompt shared a block"
    chunks = [part.request_id for part in parts if part.why == "prefill"]
    assert len(chunks) > len(set(chunks)), "a prompt was cut into chunks"
    assert min(step.blocks.free + step.blocks.cached for step in steps) == 0, "the pool was full"


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("policy", SCHEDULING_POLICIES)
def test_every_output_is_that_of_the_request_alone(policy, mode, checkpoint, solo):
    done = run(make_engine(checkpoint("llama"), policy, mode), JOBS, abort_every=7)
    assert differing(done, solo) == []
    assert len(done.aborted) >= 5 and len(done.outputs) >= 40
    reasons = {each.finish_reason for output in done.outputs.values() for each in output.outputs}
    assert reasons == {"stop", "length"}
    assert done.outputs.keys() | done.aborted == {job.request_id for job in JOBS}
    assert_took_the_path(done, mode)
    assert any(output.num_cached_tokens for output in done.outputs.values()), "a prefix was found"
    assert_all_given_back(done.engine)


# --- secrets ---------------------------------------------------------------------------------------------------------


def secrets() -> list[str]:
    """Three words per request, in an order that no other request has."""
    rng = random.Random(11)
    each = set()
    while len(each) < NUM_REQUESTS:
        each.add(" ".join(rng.sample(vocabulary.OBJECTS + vocabulary.COLOURS + vocabulary.ANIMALS, 3)))
    return sorted(each)


SECRETS = secrets()


def tell_secrets(mode: str) -> Run:
    """Each request asks to hear its own secret again, in one of three conversations."""
    config = dataclasses.replace(CONFIG, num_blocks=28, max_model_len=64, preemption_mode=mode)
    engine, wanted = LLMEngine("storyteller", dtype="float64", config=config), []
    for number, secret in enumerate(SECRETS):
        before = ["Hello", "How are you?", "What is 3 + 4?"][number % 3]
        conversation = [{"role": "user", "content": before}, {"role": "assistant", "content": "Hello!"}]
        conversation.append({"role": "user", "content": f"Repeat after me: {secret}"})
        _, prompt = encode_chat(engine.tokenizer, conversation)
        wanted.append(Job(f"r{number}", prompt, SamplingParams(max_tokens=12), 0))
    return run(engine, wanted, abort_every=9, seed=2)


def leaks(done: Run) -> list[tuple[str, str]]:
    """(request, text) for all requests that output the secret of another."""
    return [
        (request_id, secret)
        for request_id, output in done.outputs.items()
        for number, secret in enumerate(SECRETS)
        if secret in output.outputs[0].text and request_id != f"r{number}"
    ]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_nobody_is_told_the_secret_of_another(mode):
    """The storyteller repeats its prompt: an answer shows whose prompt it has seen."""
    done = tell_secrets(mode)
    assert leaks(done) == []
    own = [SECRETS[int(request_id[1:])] in output.outputs[0].text for request_id, output in done.outputs.items()]
    assert len(done.aborted) >= 3 and len(own) >= 50 and sum(own) >= 0.8 * len(own), "they do say their own"
    preemptions = [each for step in done.engine.trace.steps for each in step.preempted]
    assert len(preemptions) >= 10 and mode in {each.mode for each in preemptions}
    assert any(output.num_cached_tokens for output in done.outputs.values()), "a prefix was found"
    assert_all_given_back(done.engine)


# --- broken twins ----------------------------------------------------------------------------------------------------


def blocks_are_not_moved(monkeypatch):
    """Neither swapping nor copy-on-write takes the keys and values along."""
    monkeypatch.setattr(CacheEngine, "move", lambda self, move: None)


def swapped_in_in_the_wrong_order(monkeypatch):
    right = CacheEngine.move

    def move(self, move):
        backwards = move.kind == "swap_in"
        right(self, move._replace(sources=list(move.sources)[::-1]) if backwards else move)

    monkeypatch.setattr(CacheEngine, "move", move)


def table_off_by_one(monkeypatch):
    """Every block is one entry late in its table."""
    right = Batch.set_blocks
    monkeypatch.setattr(
        Batch, "set_blocks", lambda self, part: right(self, part._replace(first_block=part.first_block + 1))
    )


def table_of_the_neighbour(monkeypatch):
    """A request that has joined a running batch reads another's blocks."""
    right = Batch._fill_decodes

    def fill_decodes(self, into, rows, starts):
        right(self, into, rows, starts)
        into.decode_rows[: len(rows)] = np.roll(rows, 1)

    monkeypatch.setattr(Batch, "_fill_decodes", fill_decodes)


def written_one_slot_early(monkeypatch):
    right = Batch._slots
    monkeypatch.setattr(Batch, "_slots", lambda self, rows, positions: right(self, rows, positions) - 1)


TWINS = {
    blocks_are_not_moved: "swap",
    swapped_in_in_the_wrong_order: "swap",
    table_off_by_one: "recompute",
    table_of_the_neighbour: "recompute",
    written_one_slot_early: "recompute",
}


@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
def test_a_broken_twin_is_noticed(twin, checkpoint, solo, monkeypatch):
    engine = make_engine(checkpoint("llama"), "fcfs", TWINS[twin])
    twin(monkeypatch)
    assert len(differing(run(engine, JOBS, abort_every=7), solo)) >= 5


def test_a_secret_that_leaks_is_noticed(monkeypatch):
    table_of_the_neighbour(monkeypatch)
    assert leaks(tell_secrets("recompute")) != []
