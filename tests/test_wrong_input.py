"""Whatever is given wrong is a MiniLLMError: every argument of every public callable, replaced by every odd value."""

import dataclasses
import math
import random
import signal
from collections import Counter
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import minillm
from minillm import costs
from minillm.attention import attention, masks
from minillm.costs import activations as memory
from minillm.costs.memory_ledger import CacheLimits
from minillm.costs.shapes import H200, Card
from minillm.course import student
from minillm.engine.block_manager import BlockManager
from minillm.engine.queue import WaitingQueue
from minillm.engine.request import Request
from minillm.engine.scheduler import Scheduler, SchedulerConfig
from minillm.errors import MiniLLMError
from minillm.ladder import kv_cache
from minillm.ladder.padded_schedulers import DynamicScheduler, StaticScheduler
from minillm.simulation import clock, cost_model, reporting, running, workload
from minillm.simulation.executor import SimulatedExecutor
from minillm.trace.chrome import save_chrome_trace
from minillm.trace.files import load_trace, save_trace
from tiny_models import BASE, ScriptedModel

# Each is made anew, because a generator can be read once.
ODD_VALUES: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "an empty str": lambda: "",
    "a str": lambda: "x",
    "half a character": lambda: "\ud800",
    "a zero byte": lambda: "a\0b",
    "nan": lambda: math.nan,
    "inf": lambda: math.inf,
    "-inf": lambda: -math.inf,
    "a huge int": lambda: 10**30,
    "beyond floats": lambda: 10**400,
    "beyond 32 bits": lambda: 2**40,
    "beyond 64 bits, negative": lambda: -(10**30),
    "a huge float": lambda: 1e308,
    "a tiny float": lambda: 1e-308,
    "a fraction": lambda: 0.5,
    "-1": lambda: -1,
    "-0.5": lambda: -0.5,
    "0": lambda: 0,
    "True": lambda: True,
    "bytes": lambda: b"1",
    "a complex number": lambda: 1j,
    "a generator": lambda: (i for i in (1, 2)),
    "numpy's 2": lambda: np.int64(2),
    "numpy's 0.25": lambda: np.float32(0.25),
    "numpy's nan": lambda: np.float64("nan"),
    "numpy's True": lambda: np.bool_(True),
    "an array": lambda: np.arange(3),
    "a tensor": lambda: torch.ones(2, 2),
    "a list": lambda: [],
    "a list of None": lambda: [None],
    "a list of nan": lambda: [math.nan],
    "a dict": lambda: {"a": 1},
    "an object": object,
}
SECONDS = 20  # a call that takes so long hangs: valid ones take milliseconds


class Case(NamedTuple):
    """A public callable with valid arguments, made anew for each call."""

    call: Callable
    arguments: Callable[[], dict]


def first(iterator):
    """What a generator function gives first: until then it has not run."""
    return next(iterator)


# --- small things to give --------------------------------------------------------------------------------------------

TINY = minillm.ModelConfig(
    **{name: BASE[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
    **{name: BASE[name] for name in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")},
    head_dim=16,
)


def trace() -> minillm.Trace:
    made = workload.make_requests(2, workload.fixed(3), workload.fixed(2))
    return running.compare_batching(made, SchedulerConfig(), roofline(), batching=["continuous"])["continuous"].trace


def roofline() -> cost_model.Roofline:
    return cost_model.preset("Qwen3-0.6B", "h200")


def request(request_id: str = "a") -> Request:
    return Request(request_id, [1, 2, 3], minillm.SamplingParams(max_tokens=2))


def qkv() -> dict:
    return {"q": torch.ones(2, 4, 8), "k": torch.ones(3, 2, 8), "v": torch.ones(3, 2, 8)}


def mask() -> torch.Tensor:
    return torch.ones(2, 3, dtype=torch.bool)


def attend(make: Callable) -> Callable:
    """Call an `attend` callable made by `make` as the model does, on one token."""

    def call(**arguments):
        heads = [(TINY.num_attention_heads, 16), *[(TINY.num_key_value_heads, 16)] * 2]
        return make(**arguments)(0, *(torch.ones(2, *shape) for shape in heads))

    return call


def model() -> ScriptedModel:
    return ScriptedModel([5, 6, 7, 8], num_prompt_tokens=2)


@pytest.fixture(scope="module")
def llm():
    """A real engine on a random model; no test leaves a request in it."""
    torch.manual_seed(0)
    with minillm.LLM(
        minillm.Decoder(TINY), num_blocks=40, max_model_len=64, verbose=False, scheduling_policy="priority"
    ) as made:
        yield made


def stream(llm):
    return lambda **arguments: list(llm.stream(**arguments))


def add(llm):
    """Add a request, and end it at once."""

    def call(**arguments):
        llm.engine.add_request(**arguments)
        llm.engine.abort_request(arguments["request_id"])

    return call


def simulated(**arguments):
    """`run` on a virtual clock, with a scheduler of its own."""
    virtual = clock.VirtualClock()
    given = {
        "scheduler": Scheduler(SchedulerConfig(), virtual),
        "executor": SimulatedExecutor(roofline(), virtual),
        "requests": [request()],
        "clock": virtual,
    }
    return running.run(**given | arguments)


GENERATE = {"prompt_token_ids": [1, 2], "params": minillm.SamplingParams(max_tokens=2)}
HOW = {"tokenizer": None, "on_token": None, "kernel": minillm.sdpa_attention}
PARAMS = minillm.SamplingParams(max_tokens=2)
COUNTS = {"config": TINY, "num_prompt_tokens": 5, "num_output_tokens": 4}

CASES: dict[str, Case] = {
    # configurations
    "EngineConfig": Case(
        minillm.EngineConfig, lambda: {f.name: f.default for f in dataclasses.fields(minillm.EngineConfig)}
    ),
    "SchedulerConfig": Case(SchedulerConfig, lambda: dataclasses.asdict(SchedulerConfig())),
    "CacheLimits": Case(CacheLimits, lambda: dataclasses.asdict(CacheLimits(4, 100))),
    "RopeConfig": Case(minillm.RopeConfig, lambda: dataclasses.asdict(minillm.RopeConfig())),
    "RopeConfig, llama3": Case(
        minillm.RopeConfig, lambda: dataclasses.asdict(minillm.RopeConfig()) | {"scaling": "llama3", "factor": 2.0}
    ),
    "ModelConfig": Case(
        minillm.ModelConfig,
        lambda: (
            {f.name: getattr(TINY, f.name) for f in dataclasses.fields(TINY)}
            | {"sliding_windows": (None, 4, None), "num_tokens": 100, "eos_token_ids": (3,)}
        ),
    ),
    "Card": Case(Card, lambda: {"name": "a card", "memory_bytes": 10**9, "bandwidth": 1e12, "flops": 1e14}),
    # masks and attention
    "causal": Case(masks.causal, lambda: {"num_tokens": 5, "window": 2, "device": "cpu"}),
    "rectangular": Case(masks.rectangular, lambda: {"num_queries": 2, "num_keys": 5, "window": 2, "device": "cpu"}),
    "left_padded": Case(masks.left_padded, lambda: {"num_tokens": 2, "padded_length": 5, "window": 2}),
    "padded": Case(
        masks.padded, lambda: {"num_queries": 2, "num_keys": 3, "num_rows": 4, "num_columns": 5, "window": None}
    ),
    "block_diagonal": Case(masks.block_diagonal, lambda: {"lengths": [2, 3], "window": None, "device": None}),
    "visible": Case(masks.visible, lambda: {"positions": torch.arange(3), "num_keys": 4, "window": 2}),
    "masked_attention": Case(minillm.masked_attention, lambda: qkv() | {"mask": mask()}),
    "sdpa_attention": Case(minillm.sdpa_attention, lambda: qkv() | {"mask": mask()}),
    "attention_weights": Case(
        attention.attention_weights, lambda: {"q": torch.ones(2, 4, 8), "k": torch.ones(3, 2, 8), "mask": mask()}
    ),
    "CausalAttention": Case(
        attend(minillm.CausalAttention), lambda: {"config": TINY, "kernel": minillm.sdpa_attention}
    ),
    "BlockDiagonalAttention": Case(
        attend(minillm.BlockDiagonalAttention),
        lambda: {"config": TINY, "lengths": [1, 1], "dense": True, "kernel": minillm.sdpa_attention},
    ),
    "CachedAttention": Case(
        attend(minillm.CachedAttention),
        lambda: {"config": TINY, "cache": minillm.KVCache(TINY, 4, torch.float32), "kernel": minillm.sdpa_attention},
    ),
    # caches and arithmetic
    "KVCache": Case(minillm.KVCache, lambda: {"config": TINY, "capacity": 4, "dtype": torch.float32, "device": "cpu"}),
    "KVCache.append": Case(
        minillm.KVCache(TINY, 4, torch.float32).append,
        lambda: {"layer": 0, "k": torch.ones(2, 2, 16), "v": torch.ones(2, 2, 16)},
    ),
    "KVCache.advance": Case(minillm.KVCache(TINY, 10**6, torch.float32).advance, lambda: {"num_tokens": 2}),
    "RowCache": Case(
        kv_cache.RowCache,
        lambda: {"config": TINY, "num_rows": 2, "capacity": 4, "dtype": torch.float32, "device": None},
    ),
    "RowCache.take": Case(
        lambda num_tokens: kv_cache.RowCache(TINY, 1, 4, torch.float32).take(num_tokens), lambda: {"num_tokens": 2}
    ),
    "RowCache.release": Case(
        lambda row: _taken(kv_cache.RowCache(TINY, 1, 4, torch.float32)).release(row), lambda: {"row": 0}
    ),
    "kv_bytes_per_token": Case(minillm.kv_bytes_per_token, lambda: {"config": TINY, "dtype_bytes": 2}),
    "what_fits": Case(
        minillm.what_fits, lambda: {"config": TINY, "card_bytes": 10**9, "dtype_bytes": 2, "reserved_share": 0.1}
    ),
    "MemoryFit.num_requests": Case(minillm.what_fits(TINY, 10**9).num_requests, lambda: {"tokens_each": 10}),
    "matmul_parameters": Case(costs.matmul_parameters, lambda: {"config": TINY}),
    "num_layer_parameters": Case(costs.num_layer_parameters, lambda: {"config": TINY}),
    "tokenwise_flops": Case(costs.tokenwise_flops, lambda: {"config": TINY, "num_tokens": 5, "num_logit_rows": 1}),
    "attention_flops": Case(costs.attention_flops, lambda: {"config": TINY, "score_entries": 25}),
    "naive_flops": Case(costs.naive_flops, lambda: dict(COUNTS)),
    "cached_flops": Case(costs.cached_flops, lambda: dict(COUNTS)),
    "step_seconds": Case(
        costs.step_seconds,
        lambda: {
            "config": TINY,
            "card": H200,
            "num_tokens": 5,
            "num_logit_rows": 1,
            "cached_tokens": 3,
            "score_entries": 9,
            "dtype_bytes": 2,
        },
    ),
    "prefill_seconds": Case(
        costs.prefill_seconds, lambda: {"config": TINY, "card": H200, "num_tokens": 5, "dtype_bytes": 2}
    ),
    "decode_seconds": Case(
        costs.decode_seconds,
        lambda: {"config": TINY, "card": H200, "context": 5, "batch_size": 2, "dtype_bytes": 2},
    ),
    "causal_entries": Case(costs.causal_entries, lambda: {"start": 2, "end": 5}),
    "workload_seconds": Case(
        costs.workload_seconds, lambda: {"config": TINY, "card": H200, "lengths": [(5, 4), (3, 2)], "dtype_bytes": 2}
    ),
    "trace_seconds": Case(
        costs.trace_seconds, lambda: {"config": TINY, "card": H200, "steps": trace().steps, "dtype_bytes": 2}
    ),
    "compute_bound_batch": Case(costs.compute_bound_batch, lambda: {"card": H200, "dtype_bytes": 2}),
    "PeakMemory": Case(costs.PeakMemory, lambda: {"device": "cpu"}),
    "activation_bytes": Case(
        memory.activation_bytes,
        lambda: {"config": TINY, "chunk_size": 4, "num_keys": 8, "dtype_bytes": 2, "fused": False},
    ),
    "chunk_that_fits": Case(
        memory.chunk_that_fits,
        lambda: {"config": TINY, "free_bytes": 10**6, "num_prompt_tokens": 8, "dtype_bytes": 2, "fused": False},
    ),
    # schedulers
    "WaitingQueue": Case(WaitingQueue, lambda: {"policy": "fcfs", "ageing": 1.0}),
    "Request": Case(
        Request,
        lambda: {
            "request_id": "a",
            "prompt_token_ids": [1, 2],
            "params": PARAMS,
            "eos_token_ids": (3,),
            "arrival_time": 0.0,
            "priority": 0,
            "predicted_output_tokens": None,
            "cache_salt": "",
        },
    ),
    "BlockManager": Case(
        BlockManager,
        lambda: {"num_blocks": 8, "block_size": 4, "num_host_blocks": 2, "enable_prefix_caching": True},
    ),
    **{
        kind.__name__: Case(
            kind,
            lambda: {
                "config": SchedulerConfig(),
                "clock": clock.VirtualClock(),
                "trace": True,
                "block_manager": BlockManager(8),
                "depth": 2,
                "max_trace_steps": 5,
                "preemption_mode": "swap",
                "watermark": 0.01,
            },
        )
        for kind in (Scheduler, StaticScheduler, DynamicScheduler)
    },
    "Scheduler.add_request": Case(
        lambda request: Scheduler(SchedulerConfig()).add_request(request), lambda: {"request": request()}
    ),
    "Scheduler.add_request, with blocks": Case(
        lambda request: Scheduler(SchedulerConfig(), block_manager=BlockManager(8)).add_request(request),
        lambda: {"request": request()},
    ),
    "Scheduler.abort_request": Case(
        lambda request_id: Scheduler(SchedulerConfig()).abort_request(request_id), lambda: {"request_id": "a"}
    ),
    # generation
    "generate_naive": Case(minillm.generate_naive, lambda: {"model": model()} | GENERATE | HOW),
    "generate_cached": Case(minillm.generate_cached, lambda: {"model": model()} | GENERATE | HOW),
    "generate_chunked": Case(minillm.generate_chunked, lambda: {"model": model(), "chunk_size": 1} | GENERATE | HOW),
    "generate_ragged": Case(
        minillm.generate_ragged,
        lambda: {
            "model": minillm.Decoder(TINY),
            "prompts": [[1, 2], [3]],
            "params": PARAMS,
            "dense": True,
            "tokenizer": None,
            "kernel": minillm.sdpa_attention,
        },
    ),
    # simulation
    "VirtualClock": Case(clock.VirtualClock, lambda: {"now": 0.0}),
    "VirtualClock.advance": Case(lambda seconds: _advanced(seconds), lambda: {"seconds": 1.0}),
    "VirtualClock.advance_to": Case(clock.VirtualClock().advance_to, lambda: {"moment": 1.0}),
    "RealClock": Case(clock.RealClock, lambda: {"timer": lambda: 0.0}),
    "RealClock.advance_to": Case(lambda moment: _late().advance_to(moment), lambda: {"moment": 0.0}),
    "fixed": Case(lambda length: _drawn(workload.fixed(length)), lambda: {"length": 5}),
    "uniform": Case(lambda low, high: _drawn(workload.uniform(low, high)), lambda: {"low": 2, "high": 5}),
    "lognormal": Case(
        lambda **arguments: _drawn(workload.lognormal(**arguments)),
        lambda: {"median": 20.0, "sigma": 0.5, "longest": 100, "shortest": 2},
    ),
    "poisson": Case(
        lambda rate, rng: first(workload.poisson(rate, rng)), lambda: {"rate": 1.0, "rng": random.Random(0)}
    ),
    "bursts": Case(lambda size, every: first(workload.bursts(size, every)), lambda: {"size": 2, "every": 1.0}),
    "arrival_times": Case(
        lambda **arguments: first(workload.arrival_times(**arguments)),
        lambda: {"arrivals": "bursts", "rate": 1.0, "burst_size": 2, "seed": 0},
    ),
    "make_requests": Case(
        workload.make_requests,
        lambda: {
            "num_requests": 3,
            "prompt_length": workload.fixed(5),
            "output_length": workload.fixed(4),
            "arrivals": "poisson",
            "rate": 1.0,
            "burst_size": 2,
            "seed": 0,
        },
    ),
    "course_requests": Case(
        workload.course_requests,
        lambda: {
            "num_requests": 3,
            "vocab_size": 9,
            "arrivals": "poisson",
            "rate": 1.0,
            "burst_size": 2,
            "seed": 0,
        },
    ),
    "made_request": Case(
        workload.made_request,
        lambda: {"request_id": "a", "arrival_time": 0.0, "num_prompt_tokens": 3, "num_output_tokens": 2},
    ),
    "load_requests": Case(workload.load_requests, lambda: {"path": FILES.requests}),
    "save_requests": Case(workload.save_requests, lambda: {"path": FILES.new, "requests": [request()]}),
    "Roofline": Case(
        cost_model.Roofline, lambda: {"config": TINY, "card": H200, "dtype_bytes": 2, "launch_overhead": 1e-4}
    ),
    "preset": Case(cost_model.preset, lambda: {"shape": "Qwen3-8B", "card": "h200", "launch_overhead": 1e-4}),
    "Calibrated": Case(
        cost_model.Calibrated, lambda: {f.name: 1e-6 for f in dataclasses.fields(cost_model.Calibrated)}
    ),
    "Calibrated.fit": Case(cost_model.Calibrated.fit, lambda: {"measured": measured_steps()}),
    "SimulatedExecutor": Case(SimulatedExecutor, lambda: {"cost_model": roofline(), "clock": clock.VirtualClock()}),
    "SLO": Case(reporting.SLO, lambda: {"ttft": 1.0, "itl": 0.1, "e2e": 10.0}),
    "report": Case(reporting.report, lambda: {"trace": trace(), "slo": reporting.SLO()}),
    "run": Case(simulated, lambda: {"requests": [request()], "figures": reporting.ReportBuilder(), "on_step": None}),
    "compare_batching": Case(
        running.compare_batching,
        lambda: {
            "requests": [request()],
            "config": SchedulerConfig(),
            "executor": roofline(),
            "batching": ["static", "continuous"],
            "slo": reporting.SLO(),
        },
    ),
    # files
    "save_trace": Case(save_trace, lambda: {"trace": trace(), "path": FILES.new}),
    "load_trace": Case(load_trace, lambda: {"path": FILES.trace}),
    "save_chrome_trace": Case(save_chrome_trace, lambda: {"trace": trace(), "path": FILES.new}),
    "student.prepare": Case(
        student.prepare,
        lambda: {"folder": FILES.folder, "names": ["01"], "force": ["01"], "source": None},
    ),
    "load_model": Case(
        lambda **arguments: minillm.load_model(**arguments).model.dtype,
        lambda: {
            "name_or_path": "storyteller",
            "dtype": "float32",
            "device": "cpu",
            "skip_tokenizer_init": True,
        },
    ),
}


def _taken(cache):
    cache.take(1)
    return cache


def _drawn(draw) -> int:
    rng = random.Random(0)
    drawn = [draw(rng) for _ in range(50)]
    assert all(type(length) is int and length >= 1 for length in drawn), drawn
    return drawn[0]


def _advanced(seconds) -> float:
    made = clock.VirtualClock()
    made.advance(seconds)
    return made()


def _late() -> clock.RealClock:
    """A clock on which everything is over, so that nobody waits."""
    times = iter([0.0, 1e300, 1e300])
    return clock.RealClock(lambda: next(times))


def measured_steps() -> list:
    plans = []
    simulated(on_step=lambda plan, updates: plans.append(cost_model.StepWork.of(plan)))
    return [(work, 0.1) for work in plans * 8]


FILES = SimpleNamespace()  # paths that the cases name; filled in by `files`


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    FILES.folder, FILES.new = folder / "learn", folder / "new"
    FILES.trace = save_trace(trace(), folder / "trace.jsonl")
    FILES.requests = folder / "requests.jsonl"
    workload.save_requests(FILES.requests, [request()])


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Paths such as "x" lie in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


# --- the test --------------------------------------------------------------------------------------------------------

COUNT = Counter()


def has_nan(value: object) -> bool:
    """Whether what came out is, or holds, a NaN or an infinite time."""
    if isinstance(value, float):
        return math.isnan(value)
    if isinstance(value, torch.Tensor):
        return bool(value.isnan().any()) if value.is_floating_point() else False
    if dataclasses.is_dataclass(value):
        return any(has_nan(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, list | tuple):
        return any(map(has_nan, value))
    return has_nan(list(value.values())) if isinstance(value, dict) else False


def of_another_kind(given: object, valid: object) -> bool:
    """Whether a value cannot mean what the valid one does; None may stand for a default anywhere."""
    kinds = {bool: bool, int: Integral, float: Real, str: str | Path}
    kind = kinds.get(type(valid), object)
    truth = isinstance(given, bool | np.bool_) and kind is not bool
    return given is not None and kind is not object and (truth or not isinstance(given, kind))


def odd_values_for(valid: object):
    """Name, value, and whether it is as good as the valid one."""
    for name, make in ODD_VALUES.items():
        yield name, make(), False
    if type(valid) in (int, float):
        yield "the valid number of numpy", (np.int64 if type(valid) is int else np.float64)(valid), True


def fault(case: Case, argument: str, given: object, is_good: bool) -> str | None:
    """What is wrong with what the call does: it must return something sensible or raise a MiniLLMError, and soon."""
    arguments = case.arguments()
    valid = arguments[argument]
    arguments[argument] = given

    def too_late(*_):
        raise TimeoutError(f"still not back after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(SECONDS)
    try:
        if has_nan(case.call(**arguments)):
            return "a NaN came out"
        return "was taken" if of_another_kind(given, valid) else None
    except MiniLLMError as error:
        if is_good:
            return f"was refused: {error}"
        return None if str(error).isprintable() else f"its message has more than one line: {error}"
    except BaseException as error:  # SystemExit and KeyboardInterrupt would be faults as well
        return f"{type(error).__name__}: {str(error)[:100]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def faults(name: str, case: Case) -> list[str]:
    """Every fault of a case, a line each. Fails if its valid arguments are refused."""
    case.call(**case.arguments())
    found = []
    for argument, valid in case.arguments().items():
        for what, given, is_good in odd_values_for(valid):
            COUNT["tried"] += 1
            problem = fault(case, argument, given, is_good)
            if problem:
                COUNT["faults"] += 1
                found.append(f"{name}({argument} = {what}): {problem}")
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_odd_value_works_or_is_a_typed_error(name):
    assert not (found := faults(name, CASES[name])), "\n".join(found)


@pytest.mark.parametrize("name", ["generate", "encode", "stream", "add_request", "abort_request"])
def test_an_odd_value_given_to_an_engine(llm, name):
    sampled = {"sampling_params": PARAMS}
    arguments = {
        "generate": lambda: {"prompts": [[1, 2], [3]], **sampled, "use_tqdm": False, "priority": [0, 1]},
        "encode": lambda: {"prompts": [[1, 2], [3]]},
        "stream": lambda: {"prompt": [1, 2], **sampled},
        "add_request": lambda: {
            "request_id": "a",
            "prompt": [1, 2],
            "params": PARAMS,
            "arrival_time": 0.0,
            "priority": 1,
            "output_kind": "delta",
        },
        "abort_request": lambda: {"request_id": "a"},
    }
    calls = {
        "generate": llm.generate,
        "encode": llm.encode,
        "stream": stream(llm),
        "add_request": add(llm),
        "abort_request": llm.engine.abort_request,
    }
    found = faults(name, Case(calls[name], arguments[name]))
    assert not found, "\n".join(found)
    assert not llm.engine.has_unfinished_requests()


def test_an_odd_value_given_to_a_new_engine():
    given = minillm.Decoder(TINY)

    def make(**arguments):
        minillm.LLM(**{"model": given, "num_blocks": 40, "max_model_len": 64} | arguments).shutdown()

    arguments = {"dtype": "float32", "device": "cpu", "skip_tokenizer_init": True, "verbose": False, "model": given}
    found = faults("LLM", Case(make, lambda: dict(arguments)))
    found += faults("LLM", Case(make, lambda: {"verbose": False, "num_host_blocks": 2, "gpu_memory_utilization": 0.5}))
    assert not found, "\n".join(found)


def test_every_public_name_is_tried():
    elsewhere = {"LLM", "LLMEngine"}  # in tests of their own above
    results = {"CompletionOutput", "GenerationResult", "RequestOutput", "MiniLLMError", "Trace", "Decoder"}
    in_their_own_files = {"SamplingParams", "encode", "masks", "token_texts"}
    assert set(minillm.__all__) - set(CASES) == elsewhere | results | in_their_own_files
