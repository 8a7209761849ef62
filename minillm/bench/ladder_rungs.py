"""The rungs of `minillm bench ladder`: ways to serve the same requests, each with less waste than the previous one.

A rung has `jobs`, which may be only the first few, and `run()`, which serves them once and returns a `RungRun`. All
rungs share one `Budget` of cache, and report how many bytes they allocate before anything runs.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

from minillm.bench.contenders import BLOCK_SIZE, ContinuousBatches, Job, Ours, StaticBatches
from minillm.bench.measuring import measure, seconds_of_processes
from minillm.bench.peer_process import TIMERS
from minillm.costs import kv_bytes_per_token
from minillm.engine import Request, SchedulerConfig
from minillm.errors import ConfigError
from minillm.ladder import GenerationResult
from minillm.model import Decoder, ModelConfig
from minillm.sampling import SamplingParams
from minillm.trace import RequestRecord, ScheduledTokens, StepEvent, Trace

Seconds = dict[str, float]  # on each timer


class RungRun(NamedTuple):
    """One run of a rung."""

    seconds: Seconds
    outputs: list[tuple[int, ...]]  # of its jobs, in order
    trace: Trace | None  # on the wall clock; None if there is none
    steps: int
    computed_tokens: int  # padding included
    token_times: list[list[float]]  # job -> seconds from the start to each of its tokens
    until: list[Seconds] = []  # noqa: RUF012 - never changed. Serving one at a time: the end of each job
    load: float | None = None  # of the machine, in the minute before

    def seconds_of_first(self, num_jobs: int) -> Seconds:
        """Seconds of the first `count` jobs."""
        return self.until[num_jobs - 1] if num_jobs < len(self.outputs) else self.seconds


# --- the budget ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Bytes of cache, the same for every rung: as rows of the longest possible request, or as blocks."""

    num_bytes: int
    bytes_per_token: int
    longest: int  # tokens of a row: the longest prompt and the longest output, which a left-padded batch may need

    @classmethod
    def of(cls, jobs: Sequence[Job], config: ModelConfig, dtype_bytes: int, num_bytes: int | None = None) -> "Budget":
        """The budget, by default a quarter of what all jobs need together. Raises ConfigError if no row fits."""
        per_token = kv_bytes_per_token(config, dtype_bytes)
        num_bytes = num_bytes or sum(job.num_tokens for job in jobs) * per_token // 4
        longest = max(len(job.prompt) for job in jobs) + max(job.num_outputs for job in jobs)
        budget = cls(num_bytes, per_token, longest)
        if budget.rows < 1:
            raise ConfigError(
                f"a cache of {num_bytes:,} bytes has no room for one row of {longest} tokens, which are "
                f"{longest * per_token:,} bytes; give a larger --budget or more --requests"
            )
        return budget

    @property
    def rows(self) -> int:
        """Requests that run together if each reserves the longest."""
        return self.num_bytes // (self.longest * self.bytes_per_token)

    @property
    def num_blocks(self) -> int:
        """Blocks of a pool, the null block included."""
        return self.num_bytes // (BLOCK_SIZE * self.bytes_per_token)

    def check(self, who: str, num_bytes: int) -> int:
        """Returns the bytes that a rung allocates. Raises ConfigError if they are more than the budget."""
        if num_bytes > self.num_bytes:
            raise ConfigError(
                f"{who} sets {num_bytes:,} bytes of cache aside, the budget is {self.num_bytes:,}; give it fewer rows"
            )
        return num_bytes


# --- ours ------------------------------------------------------------------------------------------------------------


class Rung:
    """A way to serve its `jobs`. `placed` sets the last four attributes, its place on the ladder."""

    jobs: Sequence[Job]
    budget: Budget
    set_aside: int  # bytes that it allocates or, if it allocates step by step, may hold at most
    settings: Mapping = {}
    is_alone = False  # it serves one request after the other, and records the end of each
    shares = False  # a slot of the cache may count for several requests
    name: str
    label: str
    before: str | None  # the rung that its factor is relative to
    is_aside = False  # it serves different requests from the ladder's

    def placed(self, name: str, label: str, before: str | None, is_aside: bool = False) -> "Rung":
        """Sets its place on the ladder; returns the rung."""
        self.name, self.label, self.before, self.is_aside = name, label, before, is_aside
        return self

    def reserves(self, request_id: str) -> int:
        """Tokens of cache reserved for a running request; 0 for a paged pool, whose trace records them."""
        return 0

    def run(self) -> RungRun:
        """Serve the jobs."""
        raise NotImplementedError

    def close(self) -> None:
        """Release its memory."""


class Alone(Rung):
    """One request after the other, by one of the ladder's functions."""

    is_alone = True

    def __init__(
        self,
        generate: Callable[..., GenerationResult],
        model: Decoder,
        jobs: Sequence[Job],
        budget: Budget,
        keeps: bool,
    ):
        """`keeps`: with a cache, of as many tokens as the request may reach."""
        self.generate, self.model, self.jobs, self.budget, self.keeps = generate, model, jobs, budget, keeps
        self.settings = {"batch_size": 1}
        most = max(self.reserves(name_of(number)) for number in range(len(jobs)))
        self.set_aside = budget.check("a request alone", most * budget.bytes_per_token)

    def reserves(self, request_id: str) -> int:
        """All tokens except the last output, which is never fed back."""
        return self.jobs[number_of(request_id)].num_tokens - 1 if self.keeps else 0

    def run(self) -> RungRun:
        elapsed, until, traces, outputs = stop_watch(), [], [], []
        for job in self.jobs:
            began = elapsed()["wall"]
            result = self.generate(self.model, job.prompt, params_of(job))
            until.append(elapsed())
            traces.append((began, result.trace))
            outputs.append(result.token_ids)
        return run_of(until[-1], outputs, one_after_the_other(traces), until)


class Rows(Rung):
    """One of the three batching policies; each request gets a row of the longest length."""

    def __init__(self, batching: str, model: Decoder, jobs: Sequence[Job], budget: Budget, max_num_batched_tokens: int):
        self.batching, self.model, self.jobs, self.budget = batching, model, jobs, budget
        self.config = SchedulerConfig(budget.rows, max_num_batched_tokens, budget.longest)
        self.settings = {"batching": batching, "max_num_seqs": budget.rows, "max_model_len": budget.longest}
        self.set_aside = budget.check(batching, budget.rows * budget.longest * budget.bytes_per_token)

    def reserves(self, request_id: str) -> int:
        return self.budget.longest

    def run(self) -> RungRun:
        run = measure(self.model, requests_of(self.jobs), self.batching, self.config, "wall")
        return run_of(run.seconds, [run.outputs[name_of(number)] for number in range(len(self.jobs))], run.trace)


class Paged(Rung):
    """The engine, with the budget as blocks. For a worker process, `model` is a folder."""

    def __init__(self, model: Decoder | Path, jobs: Sequence[Job], budget: Budget, limits: Mapping, **arguments):
        self.jobs, self.budget = jobs, budget
        arguments = {
            "block_size": BLOCK_SIZE,
            "num_blocks": budget.num_blocks,
            "max_model_len": budget.longest,
            "enable_prefix_caching": False,
            **limits,
            **arguments,
        }
        self.set_aside = budget.check("the pool", arguments["num_blocks"] * BLOCK_SIZE * budget.bytes_per_token)
        self.shares = arguments["enable_prefix_caching"]
        self.engine = Ours(model, arguments)
        self.settings = self.engine.settings

    def run(self) -> RungRun:
        llm = self.engine.llm
        llm.engine.reset_prefix_cache()
        pids = [worker.pid for worker in llm.engine.executor.workers if hasattr(worker, "pid")]
        elapsed, before = stop_watch(), seconds_of_processes(pids)
        outputs = self.engine.generate(self.jobs)
        seconds, after = elapsed(), seconds_of_processes(pids)
        seconds |= {timer: seconds[timer] + after[timer] - before[timer] for timer in after}
        return run_of(seconds, outputs, self.engine.trace)

    def close(self) -> None:
        self.engine.close()


# --- transformers ----------------------------------------------------------------------------------------------------


class Forwards:
    """Records the time and the shape of every forward pass of a transformers model within the block."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.calls: list[tuple[float, int, int]] = []  # time.perf_counter, rows, columns

    def __enter__(self) -> "Forwards":
        self._handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()

    def _note(self, model, arguments: tuple, named: Mapping) -> None:
        self.calls.append((time.perf_counter(), *named["input_ids"].shape))


class TransformersBatches(Rung):
    """transformers' `generate`, left-padded, in batches of `rows`. Its passes are recorded, not assumed."""

    def __init__(self, model: PreTrainedModel, jobs: Sequence[Job], budget: Budget, rows: int, use_cache: bool = True):
        self.jobs, self.budget, self.rows, self.use_cache = jobs, budget, rows, use_cache
        self.is_alone = rows == 1
        self.batches = StaticBatches(model, rows, use_cache=use_cache)
        self.settings = self.batches.settings | {"use_cache": use_cache}
        self.set_aside = budget.check(
            "transformers", rows * self.reserves(name_of(0)) * budget.bytes_per_token if use_cache else 0
        )

    def reserves(self, request_id: str) -> int:
        return self.budget.longest if self.use_cache else 0

    def run(self) -> RungRun:
        outputs, steps, until = [], [], []
        elapsed, zero = stop_watch(), time.perf_counter()
        for first in range(0, len(self.jobs), self.rows):
            batch = self.jobs[first : first + self.rows]
            with Forwards(self.batches.model) as forwards:
                outputs += self.batches.generate(batch)
            until.append(elapsed())
            steps += self._steps(batch, first, forwards.calls, time.perf_counter(), zero, len(steps))
        trace = Trace([record_of(number, job) for number, job in enumerate(self.jobs)], steps)
        return run_of(until[-1], outputs, trace, until if self.rows == 1 else ())

    def _steps(self, batch: Sequence[Job], first: int, calls: list, end: float, zero: float, before: int):
        """The batch's passes as steps of a trace. Raises AssertionError for a pass of unexpected shape."""
        width = max(len(job.prompt) for job in batch)
        ends = [when - zero for when, *_ in calls[1:]] + [end - zero]
        ids = tuple(name_of(first + number) for number in range(len(batch)))
        for number, (began, rows, columns) in enumerate(calls):
            expected = width + number if number == 0 or not self.use_cache else 1
            if (rows, columns) != (len(batch), expected):
                raise AssertionError(f"transformers computed {rows} x {columns} tokens, not {len(batch)} x {expected}")
            parts, held = [], 0
            for request_id, job in zip(ids, batch, strict=True):
                live = number < job.num_outputs
                real = (len(job.prompt) + number if columns > 1 else 1) if live else 0
                start = 0 if columns > 1 else len(job.prompt) + number - 1
                why = "prefill" if number == 0 else "decode" if self.use_cache else "recompute"
                if real:
                    parts.append(ScheduledTokens(request_id, start, real, why, 1))
                if columns > real:
                    parts.append(ScheduledTokens(request_id, 0, columns - real, "padding"))
                held += len(job.prompt) + min(number, job.num_outputs - 1)
            last = number == len(calls) - 1
            yield StepEvent(
                before + number,
                began - zero,
                ends[number],
                tuple(parts),
                ids if last else (),
                num_waiting=len(self.jobs) - first - len(batch),
                cached_tokens=held if self.use_cache and not last else 0,
            )


class TransformersContinuous(Rung):
    """transformers' own continuous batching, with the budget as blocks. Its steps are recorded, its blocks are
    unknown."""

    def __init__(self, model: PreTrainedModel, jobs: Sequence[Job], budget: Budget, max_requests: int, max_tokens: int):
        self.jobs, self.budget, self.model = jobs, budget, model
        self.set_aside = budget.check("the manager", budget.num_blocks * BLOCK_SIZE * budget.bytes_per_token)
        self.manager = ContinuousBatches(model, jobs, max_requests, max_tokens, num_blocks=budget.num_blocks)
        self.settings = self.manager.settings

    def run(self) -> RungRun:
        elapsed, zero = stop_watch(), time.perf_counter()
        with Forwards(self.model) as forwards:
            outputs = self.manager.generate(self.jobs)
        seconds = elapsed()
        times = [[moment - zero for moment in result.timestamps] for result in self.manager.results]
        computed = sum(rows * columns for _, rows, columns in forwards.calls)
        return RungRun(seconds, outputs, None, len(forwards.calls), computed, times)

    def close(self) -> None:
        self.manager.close()


# --- shared by all rungs --------------------------------------------------------------------------------------------


def name_of(number: int) -> str:
    """The id of a job's request."""
    return f"req {number}"


def number_of(request_id: str) -> int:
    """The number of a request's job."""
    return int(request_id.removeprefix("req "))


def params_of(job: Job) -> SamplingParams:
    """Greedy, with the job's number of tokens."""
    return SamplingParams(temperature=0.0, max_tokens=job.num_outputs, ignore_eos=True)


def requests_of(jobs: Sequence[Job]) -> list[Request]:
    """Requests that all arrive at 0."""
    return [Request(name_of(number), job.prompt, params_of(job)) for number, job in enumerate(jobs)]


def record_of(number: int, job: Job) -> RequestRecord:
    return RequestRecord(name_of(number), 0.0, len(job.prompt))


def one_after_the_other(traces: Sequence[tuple[float, Trace]]) -> Trace:
    """One trace from traces of one request each and their start times, as if all requests had arrived at 0."""
    whole = Trace()
    for number, (began, trace) in enumerate(traces):
        whole.requests.append(RequestRecord(name_of(number), 0.0, trace.requests[0].num_prompt_tokens))
        for step in trace.steps:
            parts = tuple(replace(part, request_id=name_of(number)) for part in step.scheduled)
            finished = tuple(name_of(number) for _ in step.finished)
            whole.steps.append(
                replace(
                    step,
                    step=len(whole.steps),
                    start_time=began + step.start_time,
                    end_time=began + step.end_time,
                    scheduled=parts,
                    finished=finished,
                    num_waiting=len(traces) - number - 1,
                    cached_tokens=0 if finished else step.cached_tokens,
                )
            )
    return whole


def run_of(seconds: Seconds, outputs: list, trace: Trace, until: Sequence[Seconds] = ()) -> RungRun:
    """The `RungRun` of a trace."""
    zero = min(record.arrival_time for record in trace.requests)
    times = {record.request_id: [] for record in trace.requests}
    for step in trace.steps:
        for part in step.scheduled:
            times[part.request_id] += [step.end_time - zero] * part.num_sampled
    computed = sum(step.num_tokens for step in trace.steps)
    return RungRun(seconds, outputs, trace, len(trace.steps), computed, list(times.values()), list(until))


def stop_watch() -> Callable[[], Seconds]:
    """Returns a function that gives the seconds since now on each timer."""
    began = {name: read() for name, read in TIMERS.items()}
    return lambda: {name: read() - began[name] for name, read in TIMERS.items()}
