"""How long a step takes, from what it computes: a roofline for any shape and card, and a fit to this machine.

Both are linear in counts read off the plan (`StepWork`), so they show where a step's time goes.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from minillm.costs import (
    A10G,
    A100_40GB,
    A100_80GB,
    H200,
    LLAMA_7B,
    LLAMA_13B,
    RTX_4090,
    SHAPES,
    Card,
    StepPrices,
)
from minillm.errors import (
    ConfigError,
    Positive,
    check_choice,
    check_fields,
    check_items,
    check_kind,
    check_number,
    check_seconds,
    checked,
)
from minillm.model import ModelConfig
from minillm.runtime import SchedulerOutput

CARDS = {"4090": RTX_4090, "a10g": A10G, "a100-40gb": A100_40GB, "a100": A100_80GB, "h200": H200}
MODELS = SHAPES | {"LLaMA-7B": LLAMA_7B, "LLaMA-13B": LLAMA_13B}
KERNELS_A_LAYER = 9  # norm, qkv, rotate, store, attend, out, norm, gate-up, down: fused as in engines
LAUNCH_SECONDS = 5e-6  # one kernel launch without a CUDA graph; the usual order of magnitude


class StepWork(NamedTuple):
    """What one step computes. Score entries are query-key pairs in one head of one layer."""

    computed_tokens: int  # tokens pushed through the model, padding included
    rows: int  # requests that take part, rows of padding included
    rectangles: int  # 1 for a padded step, 0 for a ragged one
    chunks: int  # of those, how many compute several tokens in a ragged step
    logit_rows: int  # rows of the output head
    score_entries: int
    keys_read: int  # cached tokens whose keys and values attention reads, in one layer

    @classmethod
    def of(cls, plan: SchedulerOutput) -> "StepWork":
        """The work of `ContiguousExecutor`: rectangles are scored whole, single tokens together up to the longest."""
        if plan.row_length is not None:
            return cls._of_rectangle(plan)
        chunks = chunk_scores = chunk_keys = longest = logit_rows = 0
        for part in plan.scheduled:
            logit_rows += part.samples
            if part.num_tokens > 1:
                chunks += 1
                chunk_keys += part.end
                chunk_scores += part.num_tokens * part.end
            elif part.end > longest:
                longest = part.end
        rows = plan.num_requests
        decode_keys = (rows - chunks) * longest
        scores, keys = chunk_scores + decode_keys, chunk_keys + decode_keys
        return cls(plan.num_tokens, rows, 0, chunks, logit_rows, scores, keys)

    @classmethod
    def _of_rectangle(cls, plan: SchedulerOutput) -> "StepWork":
        rows = plan.num_requests + len(plan.padding_rows)
        keys = rows * max(part.start + part.num_tokens for part in plan.scheduled)
        logit_rows = sum(part.samples for part in plan.scheduled)
        return cls(rows * plan.row_length, rows, 1, 0, logit_rows, plan.row_length * keys, keys)

    @classmethod
    def of_variable_length_kernel(cls, plan: SchedulerOutput) -> "StepWork":
        """The work of an engine whose kernel reads each request's own keys only, and scores no masked pair.

        Rectangles stay rectangles: padding is computed and scored, as `of` counts it.
        """
        return cls.of_own_tokens(plan) if plan.row_length is None else cls._of_rectangle(plan)

    @classmethod
    def of_own_tokens(cls, plan: SchedulerOutput) -> "StepWork":
        """The same without any padding, even where the plan is a rectangle.

        The row of an ended request still computes a token, which attends to nothing.
        """
        # From `decodes` itself: `scheduled` would make an object per request.
        decodes, pads = len(plan.decodes), len(plan.padding_rows)
        keys = scores = sum(plan.decodes.values()) + decodes
        logit_rows, chunks = decodes, 0
        for part in plan.others:
            logit_rows += part.samples
            chunks += part.num_tokens > 1
            keys += part.end
            scores += part.num_tokens * part.start + part.num_tokens * (part.num_tokens + 1) // 2
        return cls(plan.num_tokens + pads, plan.num_requests + pads, 0, chunks, logit_rows, scores, keys)

    @classmethod
    def of_padded_rows(cls, plan: SchedulerOutput) -> "StepWork":
        """The work of rectangles, even where the plan has none: prompts padded to the longest, single tokens beside
        them, and all attending to as many keys as the longest request has.
        """
        if plan.row_length is not None:
            return cls._of_rectangle(plan)
        prompts = [part for part in plan.others if part.num_tokens > 1]
        singles = plan.num_requests - len(prompts)
        longest = max([*(part.end for part in plan.others), *(start + 1 for start in plan.decodes.values())], default=0)
        row_length = max((part.num_tokens for part in prompts), default=0)
        computed = len(prompts) * row_length + singles
        logit_rows = len(plan.decodes) + sum(part.samples for part in plan.others)
        keys = plan.num_requests * longest
        return cls(computed, plan.num_requests, 0, len(prompts), logit_rows, computed * longest, keys)


@runtime_checkable
class CostModel(Protocol):
    """What the simulated executor needs."""

    def work(self, plan: SchedulerOutput) -> StepWork:
        """What the step computes."""

    def seconds(self, work: StepWork) -> float:
        """How long that takes."""


class Roofline:
    """The least time a card needs, by `costs.StepPrices`, and the time to launch the kernels."""

    @checked
    def __init__(
        self, config: ModelConfig, card: Card, dtype_bytes: Positive = 2, launch_overhead: float | None = None
    ):
        """`launch_overhead` is in seconds per step; by default 9 launches per layer at 5 microseconds."""
        self.config = config
        self.card = card
        if launch_overhead is None:
            launch_overhead = config.num_hidden_layers * KERNELS_A_LAYER * LAUNCH_SECONDS
        self.launch_overhead = check_seconds("launch_overhead", launch_overhead, 0)
        self._prices = StepPrices.of(config, card, dtype_bytes)

    def work(self, plan: SchedulerOutput) -> StepWork:
        """The counts of a variable-length kernel."""
        return StepWork.of_variable_length_kernel(plan)

    def seconds(self, work: StepWork) -> float:
        """Launches, then `costs.step_seconds`."""
        least = self._prices.seconds(work.computed_tokens, work.logit_rows, work.keys_read, work.score_entries)
        return self.launch_overhead + least


@dataclass(frozen=True)
class WithHost:
    """A cost model, plus seconds per step in which the host works and the device is idle."""

    costs: CostModel
    host_seconds: float

    def __post_init__(self):
        check_kind("costs", self.costs, CostModel)
        check_seconds("host_seconds", self.host_seconds, 0)

    def work(self, plan: SchedulerOutput) -> StepWork:
        """The work as the inner cost model counts it."""
        return self.costs.work(plan)

    def seconds(self, work: StepWork) -> float:
        """First the host, then the device."""
        return self.host_seconds + self.costs.seconds(work)


def preset(shape: str, card: str, launch_overhead: float | None = None) -> Roofline:
    """The roofline of a published shape on a card, in 16 bits, both by name. Raises ConfigError for unknown names."""
    check_choice("shape", shape, tuple(MODELS))
    check_choice("card", card, tuple(CARDS))
    return Roofline(MODELS[shape], CARDS[card], launch_overhead=launch_overhead)


@dataclass(frozen=True)
class Calibrated:
    """A machine's own cost model: seconds per step, and seconds for each count of the work."""

    per_step: float
    per_computed_token: float
    per_row: float
    per_rectangle: float
    per_chunk: float
    per_logit_row: float
    per_score_entry: float
    per_key_read: float

    def __post_init__(self):
        check_fields(self)
        for name, price in vars(self).items():
            check_seconds(name, price, 0)

    def work(self, plan: SchedulerOutput) -> StepWork:
        """The counts of `ContiguousExecutor`, which was measured."""
        return StepWork.of(plan)

    def seconds(self, work: StepWork) -> float:
        """The sum of every count times its price; the step itself counts as 1."""
        return sum(price * count for price, count in zip(self.prices, (1, *work), strict=True))

    @property
    def prices(self) -> tuple[float, ...]:
        """Seconds, in the order of the fields."""
        return astuple(self)

    @classmethod
    def fit(cls, measured: Sequence[tuple[StepWork, float]]) -> "Calibrated":
        """Prices that fit measured (work, seconds) pairs: least squares, no price below 0.

        Errors count relative to a first fit, so that long steps do not outweigh the many short ones. Steps that took
        more than three times as long as that were disturbed, and are left out. Raises ConfigError for fewer pairs than
        prices.
        """
        measured = check_items("measured", measured, "(StepWork, seconds) pairs")
        for pair in measured:
            work, seconds = check_kind("measured", pair, tuple[StepWork, float])
            check_number("seconds", seconds, "a positive number", lambda s: s > 0)
        if len(measured) < len(cls.__dataclass_fields__):
            raise ConfigError(f"{len(measured)} measured steps cannot fix {len(cls.__dataclass_fields__)} prices")
        first = cls._fit(measured, [seconds for _, seconds in measured])
        calm = [(work, seconds) for work, seconds in measured if seconds <= 3 * first.seconds(work)]
        return cls._fit(calm, [first.seconds(work) for work, _ in calm])

    @classmethod
    def _fit(cls, measured: Sequence[tuple[StepWork, float]], units: Sequence[float]) -> "Calibrated":
        """Least squares of the errors, each in its own unit."""
        rows = [[count / unit for count in (1, *work)] for (work, _), unit in zip(measured, units, strict=True)]
        targets = [seconds / unit for (_, seconds), unit in zip(measured, units, strict=True)]
        return cls(*non_negative_least_squares(rows, targets))


def non_negative_least_squares(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """The x >= 0 with the smallest sum of (rows x - targets)^2, by coordinate descent (Franc et al. 2005).

    Each round sets every x in turn to its best value given the rest, or 0 if that is negative.
    """
    size = len(rows[0])
    scale = [max(abs(row[i]) for row in rows) or 1.0 for i in range(size)]  # columns of one magnitude converge faster
    scaled = [[value / scale[i] for i, value in enumerate(row)] for row in rows]
    gram = [[sum(row[i] * row[j] for row in scaled) for j in range(size)] for i in range(size)]
    slope = [sum(row[i] * target for row, target in zip(scaled, targets, strict=True)) for i in range(size)]
    x = [0.0] * size
    for _ in range(20_000):
        moved = 0.0
        for i in range(size):
            if gram[i][i] == 0:
                continue
            best = max(
                0.0, x[i] + (slope[i] - sum(g * value for g, value in zip(gram[i], x, strict=True))) / gram[i][i]
            )
            moved = max(moved, abs(best - x[i]))
            x[i] = best
        if moved <= 1e-9 * max(x):
            break
    return [value / scale[i] for i, value in enumerate(x)]
