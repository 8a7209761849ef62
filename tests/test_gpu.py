"""On a CUDA device: the engine says the same in every way of running it, and as exactly as transformers.

What needs no GPU is tested without one: the kernels in their own files, the runner in test_device_runner.py.
"""

import time
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

import minillm
from device_jobs import Job, ladder, run_jobs
from minillm import LLM, SamplingParams
from minillm.engine.engine_config import EngineConfig
from minillm.engine.llm_engine import LLMEngine
from minillm.kernels.dispatch import AttentionInputs, PagedAttention, choose
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.plan import RunnerOptions
from minillm.runtime.runner import Runner
from minillm.runtime.worker import Worker, small_operations
from tiny_models import BASE, all_logits, random_token_ids

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BLOCK_SIZE, NUM_BLOCKS = 16, 40
KINDS = ["llama-mqa", "qwen3", "qwen2-window", "mistral-window"]
CLOSE_CALL = 1e-3  # of the logits' spread: two tokens so near each other may change places in float32
WIDE = {
    "qwen3-128": Qwen3Config(**BASE | {"hidden_size": 512, "num_attention_heads": 8}, head_dim=128),
    "llama-64": LlamaConfig(**BASE | {"hidden_size": 512, "num_attention_heads": 8, "initializer_range": 0.05}),
}


@pytest.fixture
def on_gpu(checkpoint):
    """(kind, dtype) -> our model on the device."""

    def load(kind, dtype=torch.float32):
        return minillm.load_model(checkpoint(kind), dtype=dtype, device=DEVICE, skip_tokenizer_init=True).model

    return load


# --- the same tokens in every way ------------------------------------------------------------------------------------

REQUESTS = [(5, 30), (40, 25), (17, 40), (1, 35), (33, 20), (16, 38), (60, 10)]  # tokens of prompt and output


def prompt_of(i):
    """Some have a common beginning; the last token is their own."""
    num_tokens = REQUESTS[i][0]
    return (random_token_ids(16, 190)[: num_tokens - 1] + random_token_ids(num_tokens, 190, i))[:num_tokens]


def greedy_params(i, num_output):
    return SamplingParams(max_tokens=num_output, ignore_eos=True)


def generate(model, params_of=greedy_params, **config):
    """Seven requests by an engine of their own; their tokens and the trace."""
    limits = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "max_num_seqs": 6, "max_model_len": 96}
    engine = LLMEngine(model, config=EngineConfig(**limits | {"max_num_batched_tokens": 24} | config))
    for i, (_, num_output) in enumerate(REQUESTS):
        engine.add_request(f"{i}", prompt_of(i), params_of(i, num_output))
    tokens = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    engine.shutdown()
    return tokens, engine.trace


def assert_same(model_on_cpu, tokens, expected):
    """The same tokens, except after two that were equally likely in float32."""
    assert {name: len(ids) for name, ids in tokens.items()} == {name: len(ids) for name, ids in expected.items()}
    close_calls = 0
    for i in range(len(REQUESTS)):
        ours, theirs = tokens[f"{i}"], expected[f"{i}"]
        place = next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if place is not None:
            logits = all_logits(model_on_cpu, prompt_of(i) + theirs[:place])[-1]
            gap = (logits[theirs[place]] - logits[ours[place]]).abs() / (logits.max() - logits.min())
            assert gap < CLOSE_CALL, f"request {i}, token {place}: {ours[place]} instead of {theirs[place]}"
            close_calls += 1
    assert close_calls <= 1


WAYS = {
    "plain": {"enforce_eager": True, "fused_ops": False, "async_scheduling": False},
    "fused": {"enforce_eager": True, "async_scheduling": False},
    "graphs": {"async_scheduling": False},
    "overlapped": {"async_scheduling": True},
    "overlapped, eager": {"async_scheduling": True, "enforce_eager": True},
    "whole prompts": {"max_num_batched_tokens": 400},
    "recomputed": {"num_blocks": 15},
    "swapped": {"num_blocks": 15, "preemption_mode": "swap"},
    "reference kernels": {"attention_backend": "reference"},
    "cuda kernels": {"attention_backend": "cuda"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_same_in_every_way(load, on_gpu, kind):
    on_cpu = load(kind)
    expected, _ = generate(on_cpu)
    ways = WAYS if kind == "qwen3" else {name: WAYS[name] for name in ("graphs", "overlapped", "recomputed")}
    for name, config in ways.items():
        tokens, trace = generate(on_gpu(kind), **config)
        assert_same(on_cpu, tokens, expected)
        modes = {each.mode for step in trace.steps for each in step.preempted}
        assert modes == {"recomputed": {"recompute"}, "swapped": {"swap"}}.get(name, set()), name
        chunked = [part for step in trace.steps for part in step.scheduled if part.num_tokens > 1 and part.start > 0]
        assert chunked or name == "whole prompts"
        assert all(step.device[0] < step.device[1] for step in trace.steps), name


def test_drawn_tokens_are_the_same_in_every_way(load, on_gpu):
    def params_of(i, n):
        return SamplingParams(temperature=1.0, seed=i, max_tokens=n, ignore_eos=True, top_k=20 if i == 3 else 0)

    expected, _ = generate(on_gpu("qwen3"), params_of, **WAYS["fused"])
    for name in ("plain", "graphs", "overlapped", "recomputed", "swapped"):
        tokens, _ = generate(on_gpu("qwen3"), params_of, **WAYS[name])
        differing = [request_id for request_id in expected if tokens[request_id] != expected[request_id]]
        assert len(differing) <= 1, f"{name}: {differing}"  # one close call may be float32's
    greedy, _ = generate(on_gpu("qwen3"), **WAYS["graphs"])
    assert all(greedy[request_id] != expected[request_id] for request_id in greedy)


# --- the runner ------------------------------------------------------------------------------------------------------


def runner_of(model, eager=False, backend="auto"):
    options = RunnerOptions(backend, eager, max_num_seqs=6, max_model_len=64, block_size=BLOCK_SIZE)
    worker = Worker(model, options)
    worker.init_cache(NUM_BLOCKS)
    return worker.runner


def greedy_jobs():
    sizes = [(9, 24, 0, 4), (1, 20, 0, 1), (37, 26, 1, 15), (6, 14, 2, 1000), (21, 13, 4, 2), (3, 10, 12, 1)]
    return [
        Job(f"job {i}", random_token_ids(n, 190, i), SamplingParams(max_tokens=outputs), joins, chunk)
        for i, (n, outputs, joins, chunk) in enumerate(sizes)
    ]


def run(runner, jobs=None, **how):
    return run_jobs(runner, jobs or greedy_jobs(), NUM_BLOCKS, BLOCK_SIZE, **how)


@contextmanager
def nobody_waits():
    """torch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("eager", [True, False])
def test_a_launch_waits_for_nothing(on_gpu, eager):
    model = on_gpu("qwen3")
    expected, _ = run(runner_of(model, eager))  # every kernel has been compiled then
    began = time.perf_counter()
    tokens, outputs = run(runner_of(model, eager), ahead=True, launching=nobody_waits)
    assert tokens == expected
    times = [moment for output in outputs for moment in output.device_times]
    assert times == sorted(times)
    assert began - 2e-3 < times[0] and times[-1] < time.perf_counter() + 2e-3  # the clocks are the same


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "mistral-window"])
def test_what_is_not_a_requests_own_never_leaks(on_gpu, kind, eager):
    model = on_gpu(kind)
    expected, _ = run(runner_of(model, eager))
    runner = runner_of(model, eager)
    for pool in (runner.cache.keys, runner.cache.values):
        pool.fill_(torch.nan)
    runner.batch.device_tables[:-1] = 10**6  # no such block; the last row is for padding
    assert run(runner, ahead=True)[0] == expected


@pytest.mark.parametrize("eager", [True, False])
def test_a_request_that_is_not_finite_fails_alone(on_gpu, eager):
    model = on_gpu("llama-mqa")
    first, *others = greedy_jobs()
    expected, _ = run(runner_of(model, eager))
    elsewhere = {*first.prompt, *(id_ for job in others for id_ in (*job.prompt, *expected[job.request_id]))}
    bad = next(id_ for id_ in (*expected["job 0"][1:-1], *range(190, 199)) if id_ not in elsewhere)
    with torch.no_grad():
        model.embed_tokens.weight[bad] = torch.nan
    spoiled = first._replace(prompt=[*first.prompt[:2], bad, *first.prompt[3:]])
    for job in (first, spoiled):
        tokens, outputs = run(runner_of(model, eager), [job, *others], ahead=True)
        assert all(tokens[each.request_id] == expected[each.request_id] for each in others)
        failed = {request_id for output in outputs for request_id in output.failed}
        assert failed == ({"job 0"} if job is spoiled or bad in expected["job 0"] else set())


def test_graphs_hold_no_more_than_was_left_for_them(on_gpu):
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 64, "max_model_len": 128}
    worker = Worker(on_gpu("qwen3"), RunnerOptions(**limits, block_size=BLOCK_SIZE))
    profile = worker.profile()
    left = worker._measure_graphs()
    worker.init_cache(NUM_BLOCKS)
    assert len(worker.runner.graphs) == 8 and "replay graphs of 1, 2, 4, 8, 16, 32, 48, 64 requests" in worker.why
    assert 0 < worker.runner.graph_bytes <= left < profile.activations
    worker.shutdown()


def test_the_storyteller_says_on_the_card_what_it_says_on_the_cpu():
    """As a user has it, with the arguments that nobody gave; at the end the memory is there again."""
    prompts, told, params = ["Once upon a time", "The fox"], {}, SamplingParams(max_tokens=40)
    for device in ("cpu", DEVICE):
        with LLM(device=device, verbose=False) as llm:
            streamed = "".join(output.outputs[0].text for output in llm.stream(prompts[0], params))
            texts = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
            assert texts[0] == streamed
            told[device] = texts
            vectors = [vector.cpu() for vector in llm.encode(prompts)]
            if device == "cpu":
                expected = vectors
                continue
            torch.testing.assert_close(vectors, expected, atol=1e-3, rtol=1e-3)
            assert any(step.planned is not None for step in llm.trace.steps)  # before the last one was read
            assert "graphs of 1, 2, 4, 8, 16, 32, 48, 64 requests" in llm.engine.executor.why
            held = torch.cuda.mem_get_info()[0]
    assert told[DEVICE] == told["cpu"]
    assert torch.cuda.mem_get_info()[0] - held > 0.99 * llm.engine.ledger.cache


def test_host_blocks_are_pinned(on_gpu):
    cache = CacheEngine(on_gpu("qwen3").config, 4, BLOCK_SIZE, torch.float32, DEVICE, num_host_blocks=3)
    assert all(block.is_pinned() for block in (*cache.host_keys, *cache.host_values))


# --- as exact as transformers ----------------------------------------------------------------------------------------


@torch.inference_mode()
def teacher_forced(model, token_ids, num_decoded, backend_name="auto", block_size=BLOCK_SIZE):
    """[T, ids] logits of a sequence: a chunk, another one behind it, and the last `num_decoded` tokens one by one."""
    backend = choose(backend_name, model.config, model.dtype, DEVICE, block_size)
    options = RunnerOptions(max_num_seqs=1, max_model_len=len(token_ids), enforce_eager=True)
    cache = CacheEngine(model.config, 40, block_size, model.dtype, DEVICE)
    runner = Runner(model, cache, backend, small_operations(model, backend, block_size), options)
    table = torch.randperm(39, device=DEVICE)[None, : -(-len(token_ids) // block_size)].int() + 1
    ends = [len(token_ids) // 3, *range(len(token_ids) - num_decoded, len(token_ids) + 1)]
    logits, start = [], 0
    for end in ends:
        positions = torch.arange(start, end, device=DEVICE)
        slots = table[0].long()[positions // block_size] * block_size + positions % block_size
        length = torch.tensor([end], dtype=torch.int32, device=DEVICE)
        starts = torch.tensor([0, end - start], dtype=torch.int32, device=DEVICE)
        if end - start == 1:
            inputs = AttentionInputs(slots, 1, table, length, table[:0], starts[:1], length[:0], 0)
        else:
            inputs = AttentionInputs(slots, 0, table[:0], length[:0], table, starts, length, end - start)
        ids = torch.tensor(token_ids[start:end], device=DEVICE)
        attend = PagedAttention(backend, model.config, cache.layers, inputs)
        logits.append(model.logits(model(ids, positions, attend, runner.layers)))
        start = end
    return torch.cat(logits).double().cpu()


@pytest.fixture(scope="module")
def any_checkpoint(checkpoint, tmp_path_factory):
    """As `checkpoint`, with models whose heads are as wide as large ones'."""

    def folder_of(kind):
        if kind not in WIDE:
            return checkpoint(kind)
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind)
        AutoModelForCausalLM.from_config(WIDE[kind]).eval().save_pretrained(folder)
        return folder

    return folder_of


@pytest.mark.parametrize("kind", ["llama-mqa", "qwen3", "mistral-window", *WIDE])
def test_bfloat16_is_as_exact_as_transformers(any_checkpoint, kind):
    folder, token_ids = any_checkpoint(kind), random_token_ids(150, 190)
    ours = minillm.load_model(folder, dtype="bfloat16", device=DEVICE, skip_tokenizer_init=True).model
    exact = minillm.load_model(folder, dtype="bfloat16", skip_tokenizer_init=True).model.to(torch.float64)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).eval()
    truth = all_logits(exact, token_ids)
    with torch.inference_mode():
        peer = theirs(torch.tensor([token_ids], device=DEVICE)).logits[0].double().cpu()
    peer_error = root_mean_square(peer - truth)
    assert root_mean_square(truth - truth.mean(-1, keepdim=True)) > 10 * peer_error > 0  # there is something to compare
    for backend in ("triton", "reference", "cuda"):
        error = root_mean_square(teacher_forced(ours, token_ids, 40, backend) - truth)
        assert error <= 2 * peer_error, f"{backend}: {error / peer_error:.2f} times transformers' error"


def root_mean_square(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("kind", ["llama-mqa", "qwen3", "qwen2-window"])
def test_float32_is_what_the_cpu_computes(load, on_gpu, kind):
    token_ids = random_token_ids(150, 190)
    truth = all_logits(load(kind, torch.float64), token_ids)
    spread = truth.max() - truth.min()
    assert (teacher_forced(on_gpu(kind), token_ids, 40) - truth).abs().max() < 1e-4 * spread


def test_the_gpus_own_kernels_are_picked(load, on_gpu):
    runner = runner_of(on_gpu("qwen3"))
    assert runner.batch.is_mirrored and runner.graphs and runner.backend.name == "triton"
    expected = ladder(load("qwen3", torch.float64), greedy_jobs())
    tokens, _ = run(runner)
    differing = [request_id for request_id in expected if tokens[request_id] != expected[request_id]]
    assert len(differing) <= 1  # one close call may be float32's


@pytest.mark.parametrize("asked", [{"temperature": 1.0, "top_k": 3, "seed": 1}, {"logprobs": 2}])
def test_a_step_in_which_somebody_asks_is_a_graph_too(on_gpu, asked):
    model = on_gpu("qwen3")
    expected, _ = run(runner_of(model))
    asking = Job("asking", random_token_ids(5, 190, 2), SamplingParams(max_tokens=20, **asked))
    alone, _ = run(runner_of(model, eager=True), [asking])
    for launching in (nullcontext, nobody_waits):  # what samples for those who ask is compiled the first time
        runner, replays = runner_of(model), []
        for graph in runner.graphs.values():
            graph.replay = partial(counted, graph.replay, replays)
        tokens, _ = run(runner, [*greedy_jobs()[:5], asking], ahead=True, launching=launching)
        differing = [name for name, ids in tokens.items() if ids != (alone | expected)[name]]
        assert len(differing) <= 1 and len(replays) > 10  # one close call may be float32's


def counted(replay, replays):
    replays.append(replay)
    return replay()
