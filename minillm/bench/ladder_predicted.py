"""The ladder without the model: the same schedulers, with prices fitted to this machine on other requests.

Each way to compute has its own prices, because the same step takes different times: a single request, rows of a
contiguous cache, a paged cache in torch, and one in C++. They are fitted to requests that the ladder does not serve, in
turns with it, so that the machine's load is the same for both.
"""

import statistics
from collections.abc import Mapping, Sequence

from minillm.bench.contenders import Job, Ours
from minillm.bench.ladder_report import factor, median_error, relative, requests_compared, speed
from minillm.bench.ladder_rungs import Alone, Paged, Rows, Rung, RungRun, params_of, requests_of
from minillm.bench.measuring import measure, simulate
from minillm.bench.peer_process import TIMERS
from minillm.engine import BlockManager, Scheduler, SchedulerConfig
from minillm.simulation import Calibrated, SimulatedExecutor, StepWork, VirtualClock, run
from minillm.trace import StepEvent

FEW = 2  # output tokens of a request that is served to price its prompt
Steps = list[tuple[StepWork, float]]  # work and seconds


class OwnKeys(Calibrated):
    """Prices of kernels that read only each request's own keys."""

    def work(self, plan) -> StepWork:
        return StepWork.of_variable_length_kernel(plan)


class Prices:
    """The steps measured so far for each way to compute, and the prices fitted to them."""

    def __init__(self, timer: str):
        self.timer = "cpu" if timer == "user" else timer  # the system counts user time in hundredths of a second
        self.steps: dict[str, Steps] = {}

    def calibrate(self, rungs: Mapping[str, Rung], jobs: Sequence[Job]) -> None:
        """Serve these calibration jobs once in every way that a rung uses; in slow ways, only the first quarter."""
        longest = min(rung.budget.longest for rung in rungs.values())
        jobs = [shortened(job, longest) for job in jobs]
        for rung in rungs.values():
            family = family_of(rung)
            if family and (rung is first_of(family, rungs) or isinstance(rung, Alone)):
                self.steps.setdefault(family, []).extend(self._steps(rung, jobs))

    def _steps(self, rung: Rung, jobs: Sequence[Job]) -> Steps:
        if isinstance(rung, Alone):
            return self._steps_alone(rung, jobs)
        if isinstance(rung, Paged):
            return self._steps_of_engine(rung.engine, jobs, family_of(rung))
        steps, jobs = [], jobs[: quarter(jobs)]
        for rows in sorted({1, rung.config.max_num_seqs, 2 * rung.config.max_num_seqs}):
            config = SchedulerConfig(rows, rung.config.max_num_batched_tokens, max(job.num_tokens for job in jobs))
            for batching in ("static", "dynamic", "continuous"):
                steps += measure(rung.model, requests_of(jobs), batching, config, self.timer).steps
        return steps

    def _steps_alone(self, rung: Alone, jobs: Sequence[Job]) -> Steps:
        """Every pass gives one token, so a step lasts from one token to the next."""
        clock, steps = TIMERS[self.timer], []
        for job in jobs[: min(len(rung.jobs), quarter(jobs))]:
            moments = [clock()]
            rung.generate(rung.model, job.prompt, params_of(job), on_token=lambda _, m=moments: m.append(clock()))
            seconds = [end - start for start, end in zip(moments, moments[1:], strict=False)]
            steps += zip(works_alone(job, rung.keeps), seconds, strict=True)
        return [(work, each) for work, each in steps if each > 0]

    def _steps_of_engine(self, ours: Ours, jobs: Sequence[Job], family: str) -> Steps:
        """All jobs together; then prompts of all lengths with few output tokens, to measure the price of prompts."""
        longest = ours.llm.engine.config.max_model_len - FEW
        pairs = [(one.prompt + other.prompt)[:longest] for one, other in zip(jobs[::2], jobs[1::2], strict=False)]
        prompts = [Job(prompt, FEW) for prompt in (*pairs, *[job.prompt[:longest] for job in jobs])]
        return [step for each in (jobs, prompts) for step in self._serve(ours, each, family)]

    def _serve(self, ours: Ours, jobs: Sequence[Job], family: str) -> Steps:
        engine, clock, seconds = ours.llm.engine, TIMERS[self.timer], []
        engine.reset_prefix_cache()
        began = engine.scheduler.clock()
        for number, job in enumerate(jobs):
            engine.add_request(f"calibration {number}", job.prompt, params_of(job), output_kind="final_only")
        while engine.has_unfinished_requests():
            start = clock()
            engine.step()
            seconds.append(clock() - start)
        events = [step for step in engine.trace.steps if step.start_time >= began]
        works = [work_of(step, own_keys=family == "kernels") for step in events]
        return [(work, each) for work, each in zip(works, seconds, strict=True) if each > 0]

    def fit(self) -> dict[str, Calibrated]:
        """The prices of every way to compute."""
        return {
            family: (OwnKeys if family == "kernels" else Calibrated).fit(steps) for family, steps in self.steps.items()
        }


def shortened(job: Job, longest: int) -> Job:
    """A job cut to fit a cache of `longest` tokens per request."""
    outputs = min(job.num_outputs, longest // 2)
    return Job(job.prompt[: longest - outputs], outputs)


def quarter(jobs: Sequence[Job]) -> int:
    return max(1, len(jobs) // 4)


def family_of(rung: Rung) -> str | None:
    """Which prices apply to a rung; None for other engines, and for two processes that overlap."""
    if isinstance(rung, Alone):
        return "alone"
    if isinstance(rung, Rows):
        return "rows"
    if isinstance(rung, Paged) and rung.engine.model is not None:
        return "paged" if rung.engine.settings.get("attention_backend") == "reference" else "kernels"
    return None


def first_of(family: str, rungs: Mapping[str, Rung]) -> Rung:
    return next(rung for rung in rungs.values() if family_of(rung) == family)


def works_alone(job: Job, keeps: bool) -> list[StepWork]:
    """The work of a single request, pass by pass."""
    works = []
    for end in range(len(job.prompt), job.num_tokens):
        new = 1 if keeps and end > len(job.prompt) else end
        works.append(StepWork(new, 1, 0, int(new > 1), 1, new * end, end))
    return works


def work_of(step: StepEvent, own_keys: bool) -> StepWork:
    """The work of a ragged step, as `StepWork.of` has it for a plan, from the trace."""
    spans: dict[str, tuple[int, int]] = {}
    for part in step.scheduled:  # recomputed tokens come before new ones
        start, _ = spans.get(part.request_id, (part.start, 0))
        spans[part.request_id] = start, part.end
    chunks = [(start, end) for start, end in spans.values() if end - start > 1]
    ends = [end for start, end in spans.values() if end - start == 1]
    decode_keys = sum(ends) if own_keys else len(ends) * max(ends, default=0)
    scores = sum((end - start) * (start + end + 1) // 2 if own_keys else (end - start) * end for start, end in chunks)
    keys = sum(end for _, end in chunks) + decode_keys
    rows = sum(part.num_sampled for part in step.scheduled)
    return StepWork(step.num_tokens, len(spans), 0, len(chunks), rows, scores + decode_keys, keys)


# --- predictions -----------------------------------------------------------------------------------------------------


def seconds_of(rung: Rung, prices: Calibrated, num_jobs: int) -> float:
    """Simulated seconds of the first `count` jobs on this rung."""
    if isinstance(rung, Alone):
        works = [work for job in rung.jobs[:num_jobs] for work in works_alone(job, rung.keeps)]
        return sum(map(prices.seconds, works))
    if isinstance(rung, Rows):
        return simulate(prices, requests_of(rung.jobs), rung.batching, rung.config).makespan
    config, clock = rung.engine.llm.engine.config, VirtualClock()
    blocks = BlockManager(config.num_blocks, config.block_size, enable_prefix_caching=config.enable_prefix_caching)
    scheduler = Scheduler(config, clock, block_manager=blocks, watermark=config.watermark)
    run(scheduler, SimulatedExecutor(prices, clock), requests_of(rung.jobs), clock)
    return clock()


def compare(rungs: Mapping[str, Rung], turns: Sequence[Mapping[str, RungRun]], prices: Prices) -> dict:
    """The record: measured and predicted seconds and factor of every rung that has prices."""
    timer, fitted = prices.timer, prices.fit()
    predicted = {name: fitted[family_of(rung)] for name, rung in rungs.items() if family_of(rung)}
    records = {}
    for name, price in predicted.items():
        rung = rungs[name]
        measured = statistics.median(turn[name].seconds[timer] for turn in turns)
        records[name] = {
            "label": rung.label,
            "seconds": relative(seconds_of(rung, price, len(rung.jobs)), measured),
            "over_before": None,
        }
        if rung.before in predicted:
            counts = requests_compared(rungs[rung.before], rung)
            before, after = (
                speed(rungs[each], seconds_of(rungs[each], predicted[each], number), number)
                for each, number in zip((rung.before, name), counts, strict=True)
            )
            found = factor(rung.before, name, rungs, turns, timer)["median"]
            records[name]["over_before"] = relative(after / before, found)
    return {
        "rungs": records,
        "left_out": [rung.label for name, rung in rungs.items() if name not in predicted],
        "median_error": median_error([each["over_before"] for each in records.values()]),
        "median_error_of_seconds": median_error([each["seconds"] for each in records.values()]),
        "prices": {family: vars(each) for family, each in fitted.items()},
        "timer": timer,
    }
