"""The setting in which vLLM was published as up to 24 times as fast as transformers, and what that factor is made of.

Claimed: LLaMA-13B on an A100 with 40 GB and LLaMA-7B on an A10G with 24 GB, lengths drawn from ShareGPT, 14 to 24 times
the throughput of Hugging Face transformers with one output per prompt, 8.5 to 15 times with three (vLLM's blog, 20 June
2023). Here both sides are simulated. Ours is the engine's own scheduler and block manager on a virtual clock. The other
is what `transformers.generate` did in 2023: ours with six causes of slowness, each of which can be switched:

- padding: prompts of a step are computed as a rectangle, as long as the longest of them;
- waiting: a batch is kept until its last request has ended (static batching);
- reservation: every row of the batch needs room for the longest request, and a prompt's outputs share nothing;
- copying: the cache grows by concatenation: every step writes all of it again, and needs room for both copies;
- padded keys: attention reads as many keys for every row as the longest has;
- host: the host launches every small operation by itself.

Times are least times (`Roofline`): losses of real kernels cancel in the ratio as far as both sides lose the same share.
Left out, because small: the output head's logits for every prompt token, and tables of scores in memory.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import count, islice, product
from typing import NamedTuple

from minillm.costs import (
    A10G,
    A100_40GB,
    LLAMA_2_7B,
    LLAMA_7B,
    LLAMA_13B,
    CacheLimits,
    Card,
    MemoryLedger,
    MemoryProfile,
    StepPrices,
    activation_bytes,
    kv_bytes_per_token,
    plan_cache,
)
from minillm.engine import BlockManager, Request, Scheduler, SchedulerConfig
from minillm.errors import ConfigError, Positive, check_choice, check_fields, check_seconds, checked
from minillm.ladder import StaticScheduler
from minillm.model import ModelConfig
from minillm.runtime import SchedulerOutput
from minillm.simulation.clock import VirtualClock
from minillm.simulation.cost_model import KERNELS_A_LAYER, StepWork
from minillm.simulation.executor import SimulatedExecutor
from minillm.simulation.factors import Coalition, Decomposition
from minillm.simulation.reporting import Report, ReportBuilder
from minillm.simulation.running import run
from minillm.simulation.workload import ChatLengths, arrival_times, made_request
from minillm.trace import Trace

DTYPE_BYTES = 2  # float16
BLOCK_SIZE = 16  # vLLM's
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 256, 2560  # vLLM's defaults in 2023
CAUSES = {  # cause -> what removes it
    "reservation": "PagedAttention: blocks are handed out as tokens come, and outputs share their prompt's",
    "copying": "a cache that is written where it lies",
    "padded keys": "an attention kernel for rows of different length",
    "waiting": "continuous batching (Orca, 2022)",
    "padding": "ragged batches",
    "host": "fused kernels",
}
PAGED_ATTENTION = ("reservation",)  # what only paging removes
CLAIMED = {1: (14.0, 24.0), 3: (8.5, 15.0)}  # outputs per prompt -> lowest and highest factor published
ABOUT_THREE = (2.5, 3.5)


@dataclass(frozen=True)
class Setting:
    """A model on a card, in float16."""

    name: str
    config: ModelConfig
    card: Card


SETTINGS = {
    "13b": Setting("LLaMA-13B on an A100 with 40 GB", LLAMA_13B, A100_40GB),
    "7b": Setting("LLaMA-7B on an A10G with 24 GB", LLAMA_7B, A10G),
}


@dataclass(frozen=True)
class Assumptions:
    """What was not published, or not exactly. None of it was chosen to reach a factor.

    Launches: transformers 5.23 launches 44 operations in a layer of LLaMA that decodes a token, counted by a test. With
    40 at 10 microseconds per batch of one takes what was measured then on an A100 (30.0 and 44.5 tokens per second of
    Llama-2-13B and -7B, ml-energy/leaderboard-v2 pull request 20, 2023-08-04: 33.3 and 22.5 ms; here 32.6 and 21.4).
    """

    lengths: ChatLengths = field(default_factory=ChatLengths)
    launch_seconds: float = 10e-6  # of the host, per operation, on both sides
    launches_per_layer: Positive = 40  # of eager transformers
    own_launches_per_layer: int = KERNELS_A_LAYER  # of the engine; 0: a CUDA graph, which vLLM did not have in 2023
    rows: Positive | None = None  # of the baseline's batch; None: as many as fit if the longest is reserved
    reserved_tokens: Positive = 2048  # for every row: the context, since output lengths are unknown
    gpu_memory_utilization: float = 0.9  # of the card, on both sides

    def __post_init__(self):
        check_fields(self)
        check_seconds("launch_seconds", self.launch_seconds, 0)
        if not 0 <= self.own_launches_per_layer <= self.launches_per_layer:
            raise ConfigError(
                f"own_launches_per_layer is {self.own_launches_per_layer}; it must be from 0 to launches_per_layer, "
                f"{self.launches_per_layer}"
            )
        if self.reserved_tokens > self.lengths.longest:
            raise ConfigError(
                f"reserved_tokens is {self.reserved_tokens}, but no request has more than {self.lengths.longest}; "
                "lower it"
            )

    @property
    def planning(self) -> tuple:
        """What plans depend on; launches only take time."""
        return self.lengths, self.rows, self.reserved_tokens, self.gpu_memory_utilization


class BothWays(NamedTuple):
    """The work of a step, with and without padding, so that one run can be priced for every coalition of costs."""

    own: StepWork
    padded: StepWork
    own_moved: int  # tokens of cache read and written if it grows by concatenation, in one layer
    padded_moved: int

    @classmethod
    def of(cls, plan: SchedulerOutput) -> "BothWays":
        """Moved are the old cache of every request that has one, and the new one."""
        starts = [*plan.decodes.values(), *(part.start for part in plan.others if part.start)]
        ends = [*(start + 1 for start in plan.decodes.values()), *(part.end for part in plan.others if part.start)]
        rows = len(starts) + len(plan.padding_rows)
        longest = max(starts, default=0) + max(ends, default=0)
        own, padded = StepWork.of_own_tokens(plan), StepWork.of_padded_rows(plan)
        return cls(own, padded, sum(starts) + sum(ends), rows * longest)

    @property
    def score_entries(self) -> int:
        """For the trace: the entries that are needed."""
        return self.own.score_entries


class GenerateOf2023:
    """The cost model of a coalition of causes; without any it is our own `Roofline`."""

    def __init__(self, setting: Setting, assumptions: Assumptions, causes: Coalition):
        launches = assumptions.launches_per_layer if "host" in causes else assumptions.own_launches_per_layer
        self.causes = causes
        self.host_seconds = setting.config.num_hidden_layers * launches * assumptions.launch_seconds
        self.prices = StepPrices.of(setting.config, setting.card, DTYPE_BYTES)
        self.seconds_per_token_moved = self.prices.key if "copying" in causes else 0.0

    def work(self, plan: SchedulerOutput) -> BothWays:
        """The counts of a step; they do not depend on the causes."""
        return BothWays.of(plan)

    def seconds(self, work: BothWays) -> float:
        """The time of a step with this work."""
        tokens = work.padded if "padding" in self.causes else work.own
        keys, moved = (work.padded, work.padded_moved) if "padded keys" in self.causes else (work.own, work.own_moved)
        least = self.prices.seconds(tokens.computed_tokens, tokens.logit_rows, keys.keys_read, keys.score_entries)
        return self.host_seconds + least + moved * self.seconds_per_token_moved


class Published:
    """The published setting under some assumptions: runs of any coalition of causes, each computed once.

    `num_requests` prompts with `n` outputs each, of lengths by the assumed law, or `pairs` of (prompt, output) tokens.
    They arrive "at once", or as a "poisson" stream of `rate` prompts per second. At once, plans do not depend on the
    clock, so that one run serves all coalitions that plan alike. Raises ConfigError for bad values, OutOfMemoryError if
    the card does not hold the model and its longest request.
    """

    @checked
    def __init__(
        self,
        setting: str | Setting = "13b",
        assumptions: Assumptions | None = None,
        *,
        num_requests: Positive = 500,
        pairs: Sequence[tuple[Positive, Positive]] | None = None,
        n: Positive = 1,
        arrivals: str = "at once",
        rate: float = 1.0,
        seed: int = 0,
    ):
        if isinstance(setting, str):
            setting = SETTINGS[check_choice("setting", setting, tuple(SETTINGS))]
        self.setting, self.assumptions = setting, assumptions or Assumptions()
        self.n, self.rate, self.seed = n, rate, seed
        self.arrivals = check_choice("arrivals", arrivals, ("at once", "poisson"))
        self.pairs = pairs
        self.lengths = self.assumptions.lengths.pairs(num_requests, seed) if pairs is None else pairs
        times = arrival_times(arrivals, rate, 1, seed)
        if arrivals == "at once":  # one after the other, so that a prompt's outputs keep together in the queue
            times = ((i - len(self.lengths)) * 1e-9 for i in count())
        self.times = list(islice(times, len(self.lengths)))
        self._works: dict[tuple, list[BothWays]] = {}
        self._seconds: dict[Coalition, float] = {}

    def under(self, assumptions: Assumptions) -> "Published":
        """The same under other assumptions; the requests change only with the law of their lengths."""
        same = {name: getattr(self, name) for name in ("pairs", "n", "arrivals", "rate", "seed")}
        other = Published(self.setting, assumptions, num_requests=len(self.lengths), **same)
        other._works = self._works
        return other

    @property
    def total(self) -> float:
        """How many times as long the baseline takes as ours."""
        return self.seconds(CAUSES) / self.seconds(())

    @cached_property
    def ledger(self) -> MemoryLedger:
        """Where the card's memory goes in our engine; the baseline gets the same bytes for its cache."""
        config, card, limits = self.setting.config, self.setting.card, self._limits
        weights = config.num_parameters * DTYPE_BYTES
        step = activation_bytes(
            config, MAX_NUM_BATCHED_TOKENS, max(MAX_NUM_BATCHED_TOKENS, limits.max_model_len), DTYPE_BYTES, fused=True
        )
        block = BLOCK_SIZE * kv_bytes_per_token(config, DTYPE_BYTES)
        available = card.memory_bytes - weights
        return plan_cache(
            MemoryProfile(weights, step.total, 0, block, available, available, card_bytes=card.memory_bytes), limits
        )

    @property
    def _limits(self) -> CacheLimits:
        share = self.assumptions.gpu_memory_utilization
        longest = self.assumptions.lengths.longest
        return CacheLimits(MAX_NUM_SEQS, longest, BLOCK_SIZE, gpu_memory_utilization=share)

    @property
    def num_cache_tokens(self) -> int:
        """Tokens of cache that the card holds beside everything else."""
        return (self.ledger.num_blocks - 1) * BLOCK_SIZE

    def num_rows(self, causes: Iterable[str]) -> int:
        """Rows of a batch if each reserves the longest request; copying needs every one twice."""
        if self.assumptions.rows is not None:
            return self.assumptions.rows
        copies = 2 if "copying" in known(causes) else 1
        return max(1, self.num_cache_tokens // (copies * self.assumptions.reserved_tokens))

    def seconds(self, causes: Iterable[str]) -> float:
        """From the first arrival to the last token, with these causes of slowness."""
        causes = known(causes)
        if causes not in self._seconds:
            self._seconds[causes] = self._priced(causes) if self.arrivals == "at once" else self.report(causes).makespan
        return self._seconds[causes]

    def output_tokens_per_second(self, causes: Iterable[str]) -> float:
        """Throughput, as benchmarks report it."""
        return self.n * sum(output for _, output in self.lengths) / self.seconds(causes)

    def report(self, causes: Iterable[str]) -> Report:
        """Report of a separate run on the clock, with latencies, whatever the arrivals."""
        causes, figures = known(causes), ReportBuilder()
        self._run(causes, GenerateOf2023(self.setting, self.assumptions, causes), figures)
        return figures.report()

    def trace(self, causes: Iterable[str]) -> Trace:
        """The trace of such a run. It contains the host's time of each step."""
        causes = known(causes)
        return self._run(causes, GenerateOf2023(self.setting, self.assumptions, causes), trace=True)

    def decomposition(self) -> Decomposition:
        """Seconds of all coalitions; the factor, and what each cause is worth in it."""
        return Decomposition.of(tuple(CAUSES), self.seconds)

    def _priced(self, causes: Coalition) -> float:
        cost_model = GenerateOf2023(self.setting, self.assumptions, causes)
        deciding = causes & {"waiting", "reservation"}
        if "copying" in causes and not (self.assumptions.rows and "reservation" in causes):
            deciding |= {"copying"}  # it leaves less room
        plans_alike = (deciding, *self.assumptions.planning)
        if plans_alike not in self._works:
            noted = Noting(cost_model)
            self._run(deciding, noted)
            self._works[plans_alike] = noted.works
        return math.fsum(map(cost_model.seconds, self._works[plans_alike]))

    def _run(
        self,
        causes: Coalition,
        cost_model: "GenerateOf2023 | Noting",
        figures: ReportBuilder | None = None,
        trace: bool = False,
    ) -> Trace | None:
        clock = VirtualClock()
        scheduler = self._scheduler(causes, clock, trace)
        return run(scheduler, SimulatedExecutor(cost_model, clock), self.requests(causes), clock, figures=figures)

    def requests(self, causes: Iterable[str]) -> list[Request]:
        """The prompts; where outputs of a prompt cannot share its blocks, one request each."""
        copies = self.n if "reservation" in known(causes) else 1
        return [
            made_request(f"{i}/{copy}", time, prompt, output, n=self.n // copies)
            for i, (time, (prompt, output)) in enumerate(zip(self.times, self.lengths, strict=True))
            for copy in range(copies)
        ]

    def _scheduler(self, causes: Coalition, clock: VirtualClock, trace: bool = False) -> Scheduler:
        kind = StaticScheduler if "waiting" in causes else Scheduler
        longest, rows, pool = self.assumptions.lengths.longest, MAX_NUM_SEQS, None
        if "reservation" in causes:
            rows = self.num_rows(causes)
        else:
            tokens = self.num_cache_tokens // (2 if "copying" in causes else 1)
            pool = BlockManager(1 + tokens // BLOCK_SIZE, BLOCK_SIZE, enable_prefix_caching=False)
        config = SchedulerConfig(rows, max(rows, MAX_NUM_BATCHED_TOKENS), longest)
        return kind(config, clock, trace=trace, block_manager=pool)


class Noting:
    """A cost model that keeps the work of every step, while no time passes."""

    def __init__(self, cost_model: GenerateOf2023):
        self.cost_model = cost_model
        self.works: list[BothWays] = []

    def work(self, plan: SchedulerOutput) -> BothWays:
        """The counts of a step, kept if anything is computed."""
        work = self.cost_model.work(plan)
        if plan.num_requests:
            self.works.append(work)
        return work

    def seconds(self, work: BothWays) -> float:
        """No time: when requests arrive at once, plans do not depend on it."""
        return 0.0


def known(causes: Iterable[str]) -> Coalition:
    """The causes as a set. Raises ConfigError for an unknown one."""
    causes = frozenset(causes)
    for cause in causes:
        check_choice("cause", cause, tuple(CAUSES))
    return causes


# --- how sure is that? -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Band:
    """The factor if one assumption is lower or higher than assumed; the other assumptions stay."""

    what: str
    low: str  # the lower assumption, in words
    high: str
    at_low: float  # the factor with it
    at_high: float


def varied(assumptions: Assumptions) -> dict[str, dict[str, Assumptions]]:
    """What is varied -> the lower and the higher assumption, by their description."""

    def lengths(**changes: float) -> Assumptions:
        return replace(assumptions, lengths=replace(assumptions.lengths, **changes))

    return {
        "host of the baseline": {
            "25 launches a layer of 6 µs": replace(
                assumptions, launches_per_layer=25, launch_seconds=6e-6, own_launches_per_layer=9
            ),
            "50 launches a layer of 10 µs": replace(assumptions, launches_per_layer=50),
        },
        "rows of the baseline": {
            "16 rows": replace(assumptions, rows=16),
            "1 row": replace(assumptions, rows=1),
        },
        "tails of the lengths": {
            "deviations 1.0 in, 0.6 out": lengths(prompt_sigma=1.0, output_sigma=0.6),
            "deviations 1.6 in, 1.2 out": lengths(prompt_sigma=1.6, output_sigma=1.2),
        },
        "host of the engine": {
            "20 launches a layer": replace(assumptions, own_launches_per_layer=20),
            "CUDA graphs": replace(assumptions, own_launches_per_layer=0),
        },
    }


def sensitivity(published: Published) -> list[Band]:
    """The factor under each assumption of `varied`."""
    bands = []
    for what, pair in varied(published.assumptions).items():
        (low, lower), (high, higher) = pair.items()
        bands.append(Band(what, low, high, published.under(lower).total, published.under(higher).total))
    return bands


class Variant(NamedTuple):
    """A baseline that could have been measured, and the factor against it."""

    rows: int
    launches_per_layer: int
    copying: bool
    factor: float


@dataclass(frozen=True)
class Verdict:
    """Under which assumptions the claim holds, where the factor is about 3, and which part is not PagedAttention."""

    claimed: tuple[float, float]
    total: float
    holds: list[Variant]  # baselines that are slower by a factor within the claim
    about_three: dict[str, float]  # causes that together come to about 3, in words -> the factor
    without: Mapping[str, float]  # the factor against a baseline from which one cause has been taken away
    paged_share: float  # of the total, in logarithms, by Shapley values: what only paging removes
    not_paged: float  # the factor of all other causes together, by Shapley values
    as_measured: tuple[float, float]  # the total, if our side were as far from its least time as in `observations`

    def as_dict(self) -> dict:
        """Everything, for JSON."""
        return asdict(self) | {"holds": [variant._asdict() for variant in self.holds]}


@checked
def verdict(
    published: Published, rows: Sequence[Positive] = (1, 2, 4, 8, 16, 32), launches: Sequence[Positive] = (25, 40, 50)
) -> Verdict:
    """Judge the claim for this setting. Raises ConfigError if nothing was claimed for `n` outputs per prompt.

    The baselines tried have these `rows` and `launches` per layer, with and without copying. More rows than fit with
    the longest reserved mean that the lengths were known.
    """
    claimed = CLAIMED[check_choice("n", published.n, tuple(CLAIMED))]
    variants = []
    for num_rows, num_launches, copying in product(rows, launches, (True, False)):
        baseline = published.under(replace(published.assumptions, rows=num_rows, launches_per_layer=num_launches))
        seconds = baseline.seconds(CAUSES if copying else CAUSES.keys() - {"copying"})
        variants.append(Variant(num_rows, num_launches, copying, seconds / published.seconds(())))
    parts = published.decomposition()
    share = parts.share(PAGED_ATTENTION)
    slower = [seen.ratio for seen in observations() if seen.is_engine]
    threes = {causes: parts.ratio(causes) for causes in parts.seconds if causes}
    return Verdict(
        claimed,
        parts.total,
        [variant for variant in variants if claimed[0] <= variant.factor <= claimed[1]],
        {
            " + ".join(cause for cause in CAUSES if cause in causes): factor
            for causes, factor in threes.items()
            if ABOUT_THREE[0] <= factor <= ABOUT_THREE[1]
        },
        {cause: parts.ratio(CAUSES.keys() - {cause}) for cause in CAUSES},
        share,
        parts.total ** (1 - share),
        (parts.total / max(slower), parts.total / min(slower)),
    )


def under_load(
    published: Published, rates: Iterable[float] | Mapping[str, Iterable[float]]
) -> dict[str, dict[float, Report]]:
    """Reports of both sides for prompts that arrive as a Poisson stream, by side and rate: for `viz.LoadCurves`.

    `rates` are prompts per second, or those of "baseline" and of "engine". A report's throughput counts the end of a
    run, too, when no prompt comes any more: give enough prompts. Its requests are outputs: `n` for each prompt.
    """
    of_side = rates if isinstance(rates, Mapping) else dict.fromkeys(("baseline", "engine"), tuple(rates))
    runs: dict[str, dict[float, Report]] = {"baseline": {}, "engine": {}}
    for side, causes in (("baseline", CAUSES), ("engine", ())):
        for rate in of_side[side]:
            stream = Published(
                published.setting,
                published.assumptions,
                num_requests=len(published.lengths),
                pairs=published.pairs,
                n=published.n,
                arrivals="poisson",
                rate=rate,
                seed=published.seed,
            )
            runs[side][rate] = stream.report(causes)
    return runs


# --- what others measured --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observation:
    """A measurement published in or about 2023, and its simulation."""

    what: str
    source: str
    unit: str
    measured: float
    simulated: float
    is_engine: bool  # vLLM, which ours stands for; else transformers
    is_fitted: bool = False  # an assumption was taken from it, so it proves nothing

    @property
    def ratio(self) -> float:
        """Simulated / measured; above 1 the simulation is too fast."""
        return self.simulated / self.measured


BAICHUAN_13B = replace(LLAMA_13B, intermediate_size=13_696, vocab_size=64_000, max_position_embeddings=4096)
LLAMA_2_13B = replace(LLAMA_13B, max_position_embeddings=4096)
PR_530 = "vllm-project/vllm, pull request 530, 2023-07-20"
PR_20 = "ml-energy/leaderboard-v2, pull request 20, 2023-08-04"
NM_VLLM = "neuralmagic/nm-vllm, benchmark of vLLM 0.2.0, commit 4c041221"


def observations(num_requests: Positive = 500) -> list[Observation]:
    """Both sides beside measurements of others. They say how far real kernels and hosts are from the least times.

    The third comes from vLLM's own script, run for both sides on the published card with a model of this size: it gave
    6.1 times, with a batch of 4 for transformers.
    """
    one = Assumptions(rows=1)
    found = []
    for name, config, speed, length in (("13B", LLAMA_2_13B, 30.0059, 379), ("7B", LLAMA_2_7B, 44.4687, 420)):
        alone = Published(Setting(name, config, A100_40GB), one, pairs=[(64, length)])
        simulated = alone.output_tokens_per_second(CAUSES)
        what = f"transformers, Llama-2-{name}, a batch of one on an A100"
        found.append(Observation(what, PR_20, "output tokens/s", speed, simulated, False, is_fitted=True))
    baichuan = Setting("Baichuan-13B on an A100 with 40 GB", BAICHUAN_13B, A100_40GB)
    sides = (("transformers, batches of 4", 89.44, 100, tuple(CAUSES)), ("vLLM 0.1", 548.05, num_requests, ()))
    for name, speed, most, causes in sides:
        run_of = Published(baichuan, Assumptions(rows=4), num_requests=min(most, num_requests))
        tokens = sum(map(sum, run_of.lengths))
        what = f"{name}, Baichuan-13B, ShareGPT on an A100 with 40 GB"
        simulated = tokens / run_of.seconds(causes)
        found.append(Observation(what, PR_530, "tokens/s, prompts included", speed, simulated, not causes))
    chat = Published(Setting("", LLAMA_2_7B, A10G), pairs=[(256, 128)] * num_requests)
    what = "vLLM 0.2, Llama-2-7B, 256 tokens in and 128 out on an A10G"
    found.append(Observation(what, NM_VLLM, "prompts/s", 3.8367, num_requests / chat.seconds(()), True))
    return found
