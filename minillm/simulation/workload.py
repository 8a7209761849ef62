"""Synthetic requests: their arrival times, prompt and output lengths. The same seed gives the same requests."""

import json
import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import NormalDist

from minillm.engine import Request
from minillm.errors import (
    MOST_SECONDS,
    ConfigError,
    Count,
    Positive,
    check_choice,
    check_fields,
    check_kind,
    check_number,
    check_seconds,
    checked,
    read_text,
    write_text,
)
from minillm.sampling import SamplingParams

MOST_REQUESTS = 10**7
Draw = Callable[[random.Random], int]  # a length in tokens, at least 1


# --- lengths ---------------------------------------------------------------------------------------------------------


@checked
def fixed(length: Positive) -> Draw:
    """Always the same length. Raises ConfigError if it is below 1."""
    return lambda rng: length


@checked
def uniform(low: Positive, high: Positive) -> Draw:
    """Every length from `low` to `high`, both included, equally often. Raises ConfigError unless 1 <= low <= high."""
    _check_lengths(low, high)
    return lambda rng: rng.randint(low, high)


@checked
def lognormal(median: float, sigma: float, longest: Positive, shortest: Positive = 1) -> Draw:
    """Half below `median`, a long tail above: the logarithm is normal with deviation `sigma`. Clipped at both ends.

    Raises ConfigError unless 1 <= shortest <= median <= longest and sigma >= 0.
    """
    _check_lengths(shortest, median)
    _check_lengths(median, longest)
    check_number("sigma", sigma, "0 or a positive number", lambda number: number >= 0)

    def draw(rng: random.Random) -> int:
        logarithm = min(math.log(longest), rng.normalvariate(math.log(median), sigma))  # else exp might overflow
        return min(longest, max(shortest, round(math.exp(logarithm))))

    return draw


@dataclass(frozen=True)
class ChatLengths:
    """Lengths of prompts and outputs as in a collection of chats with two given means: both are log-normal.

    Published: the means of ShareGPT, 161.31 tokens in and 337.99 out (Kwon et al. 2023, figure 11), and what vLLM's
    `benchmark_throughput.py` leaves out of it: fewer than 4 tokens on either side, prompts beyond 1,024, pairs beyond
    2,048. Not published, and assumed here: the shape of the law, the two deviations of the logarithm (how heavy the
    tails are), and that prompt and output are independent except for the last limit. The medians follow: they make the
    lengths that are kept have the means.
    """

    prompt_mean: float = 161.31
    output_mean: float = 337.99
    prompt_sigma: float = 1.3
    output_sigma: float = 0.9
    shortest: Positive = 4
    longest_prompt: Positive = 1024
    longest: Positive = 2048  # prompt and output together

    def __post_init__(self):
        check_fields(self)
        for name in ("prompt_sigma", "output_sigma"):
            check_number(name, getattr(self, name), "a number above 0, at most 3", lambda sigma: 0 < sigma <= 3)
        if not self.shortest < self.prompt_mean < self.longest_prompt <= self.longest - self.shortest:
            raise ConfigError(
                f"prompts from {self.shortest} to {self.longest_prompt} of {self.longest} tokens cannot have a mean of "
                f"{self.prompt_mean}; use shortest < prompt_mean < longest_prompt <= longest - shortest"
            )
        self.medians()  # raises if there are none

    def pairs(self, num_requests: Count, seed: int) -> list[tuple[int, int]]:
        """`num_requests` pairs (prompt, output); the same seed gives the same, and more requests only append."""
        prompt_median, output_median = self.medians()
        rng = random.Random(f"chat lengths {seed}")
        pairs = []
        for _ in range(num_requests):
            prompt = _drawn(rng, prompt_median, self.prompt_sigma, self.shortest, self.longest_prompt)
            output = _drawn(rng, output_median, self.output_sigma, self.shortest, self.longest - prompt)
            pairs.append((prompt, output))
        return pairs

    def medians(self) -> tuple[float, float]:
        """Medians of the two laws before anything is left out. Raises ConfigError if no law has these means."""
        return _chat_medians(self)


@lru_cache
def _chat_medians(law: ChatLengths) -> tuple[float, float]:
    low, high = law.shortest - 0.5, law.longest_prompt + 0.5  # what rounds to a length that is kept
    prompt = _median(
        "prompt", law.prompt_mean, law.longest_prompt, lambda m: _mean_between(m, law.prompt_sigma, low, high)
    )
    prompts = [_quantile(prompt, law.prompt_sigma, low, high, (i + 0.5) / 64) for i in range(64)]

    def output_mean(median: float) -> float:
        return sum(_mean_between(median, law.output_sigma, low, law.longest + 0.5 - p) for p in prompts) / len(prompts)

    return prompt, _median("output", law.output_mean, law.longest, output_mean)


def _median(what: str, mean: float, most: float, mean_of: Callable[[float], float]) -> float:
    """The median for which `mean_of(median)`, which rises with it, is `mean`: by bisection of its logarithm."""
    low, high = 1e-3, 1e3 * most
    if not mean_of(low) < mean < mean_of(high):
        raise ConfigError(f"no median gives a mean {what} of {mean:g} tokens within the limits; widen them")
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if mean_of(middle) < mean else (low, middle)
    if not most / 100 < middle < most:
        raise ConfigError(
            f"a mean {what} of {mean:g} tokens needs a law with a median of {middle:.3g}, of which limits up to "
            f"{most:g} keep little; use a mean farther from the limits"
        )
    return middle


def _shares(median: float, sigma: float, *bounds: float) -> list[float]:
    """How much of a log-normal law lies below each bound."""
    return [0.5 * math.erfc(math.log(median / bound) / (sigma * math.sqrt(2))) for bound in bounds]


def _mean_between(median: float, sigma: float, low: float, high: float) -> float:
    """Mean of a log-normal law of which only what lies between two bounds is kept."""
    below, above = _shares(median, sigma, low, high)
    weighted_below, weighted_above = _shares(median * math.exp(sigma**2), sigma, low, high)
    if above - below < 1e-12:  # almost nothing is kept: the nearer bound
        return low if median < low else high
    return median * math.exp(sigma**2 / 2) * (weighted_above - weighted_below) / (above - below)


def _quantile(median: float, sigma: float, low: float, high: float, share: float) -> float:
    below, above = _shares(median, sigma, low, high)
    return median * math.exp(sigma * NormalDist().inv_cdf(below + share * (above - below)))


def _drawn(rng: random.Random, median: float, sigma: float, low: int, high: int) -> int:
    """Draw until a length lies within the bounds, as a benchmark leaves out the others."""
    while True:
        length = math.exp(min(rng.normalvariate(math.log(median), sigma), 700))  # exp would overflow beyond
        if low - 0.5 <= length < high + 0.5:
            return max(low, min(high, round(length)))


def _check_lengths(low: float, high: float) -> None:
    if not 1 <= low <= high:
        raise ConfigError(f"lengths from {low} to {high} are impossible; use 1 <= shortest <= longest")


# --- arrivals --------------------------------------------------------------------------------------------------------


def all_at_once() -> Iterator[float]:
    """All requests at time 0."""
    while True:
        yield 0.0


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """`rate` requests per second on average, independent of each other. Raises ConfigError unless it is positive."""
    _check_positive("rate", rate)
    check_kind("rng", rng, random.Random)
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def bursts(size: int, every: float) -> Iterator[float]:
    """`size` requests together, `every` seconds apart. Raises ConfigError unless both are positive."""
    check_kind("size", size, Positive)
    _check_positive("seconds between bursts", every)
    index = 0
    while True:
        yield (index // size) * every
        index += 1


def _check_positive(name: str, value: float) -> None:
    check_number(name, value, "positive and finite", lambda number: number > 0)


# --- requests --------------------------------------------------------------------------------------------------------


@checked
def stream_requests(
    num_requests: Positive,
    prompt_length: Draw,
    output_length: Draw,
    *,
    arrivals: str = "at once",
    rate: float = 1.0,
    burst_size: Positive = 16,
    seed: int = 0,
) -> Iterator[Request]:
    """Requests in order of arrival, their lengths drawn independently; each is made when it is taken.

    `arrivals`: "at once"; "poisson" with `rate` requests per second; "bursts" of `burst_size` requests, spaced to give
    `rate` per second. Raises ConfigError for bad values.
    """
    rng = random.Random(f"lengths {seed}")
    arriving = _arriving(num_requests, arrivals, rate, burst_size, seed)
    return (made_request(f"req {i}", at, prompt_length(rng), output_length(rng)) for i, at in enumerate(arriving))


def make_requests(num_requests: Positive, prompt_length: Draw, output_length: Draw, **arriving) -> list[Request]:
    """`stream_requests` as a list, with its options and errors."""
    return list(stream_requests(num_requests, prompt_length, output_length, **arriving))


COURSE_SEED = 7  # of the workload that the course and its benchmarks serve


@checked
def course_requests(
    num_requests: Positive = 64,
    *,
    vocab_size: Positive | None = None,
    arrivals: str = "at once",
    rate: float = 1.0,
    burst_size: Positive = 16,
    seed: int = COURSE_SEED,
) -> list[Request]:
    """The course's own workload, the hero of chapters 1 to 11: 64 requests, always the same.

    `minillm bench ladder`, `bench engine` and `bench serve` serve them too, so what a chapter counts or simulates can
    be compared with what was measured. The logarithms of the lengths are normal, so both have long tails: a prompt has
    exp(N(4.0, 0.8)) tokens, clipped to 8 to 256, an output exp(N(3.8, 0.9)), clipped to 4 to 256. Together the 64 have
    4,647 tokens of prompt and 3,188 of output. Fewer requests are the first of the 64, and more only append.

    With `vocab_size` prompts are random token ids below it, for a model to compute; without, the ids 0, 1, 2, ... The
    lengths are drawn before the first token, so they are the same for every vocabulary. `arrivals`, `rate` (requests
    per second) and `burst_size` as in `stream_requests`, whose errors it raises.
    """
    rng = random.Random(seed)
    prompt_length = lognormal(math.exp(4.0), 0.8, 256, shortest=8)
    output_length = lognormal(math.exp(3.8), 0.9, 256, shortest=4)
    arriving = list(_arriving(num_requests, arrivals, rate, burst_size, seed))
    lengths = [(prompt_length(rng), output_length(rng)) for _ in arriving]
    requests = []
    for i, (at, (prompt, output)) in enumerate(zip(arriving, lengths, strict=True)):
        token_ids = range(prompt) if vocab_size is None else [rng.randrange(vocab_size) for _ in range(prompt)]
        requests.append(Request(f"req {i}", token_ids, _exactly(output, 1), arrival_time=at))
    return requests


@checked
def prefixed_requests(
    num_prefixes: Positive,
    num_each: Positive,
    prefix_length: Draw,
    question_length: Draw,
    output_length: Draw,
    *,
    arrivals: str = "at once",
    rate: float = 1.0,
    burst_size: Positive = 16,
    seed: int = 0,
) -> Iterator[Request]:
    """`num_each` requests for each of some system prompts, in a random order: each adds a question to a system prompt.

    Each request is made when it is taken. No two questions, and no two system prompts, begin with the same token.
    `arrivals` as in `stream_requests`, whose errors it raises.
    """
    arriving = _arriving(num_prefixes * num_each, arrivals, rate, burst_size, seed)
    rng = random.Random(f"prefixes {seed}")
    starts = range(MOST_REQUESTS, MOST_REQUESTS * (num_prefixes + 1), MOST_REQUESTS)
    prefixes = [tuple(range(start, start + prefix_length(rng))) for start in starts]
    asked = array("I", (number for number in range(num_prefixes) for _ in range(num_each)))
    rng.shuffle(asked)

    def request(i: int, at: float) -> Request:
        token_ids = [*prefixes[asked[i]], i, *range(question_length(rng) - 1)]
        return Request(f"req {i}", token_ids, _exactly(output_length(rng), 1), arrival_time=at)

    return (request(i, at) for i, at in enumerate(arriving))


def _arriving(num_requests: int, arrivals: str, rate: float, burst_size: int, seed: int) -> Iterator[float]:
    """When each of `num_requests` arrives. Raises ConfigError, at once, if they are too many or too late."""
    if num_requests > MOST_REQUESTS:
        raise ConfigError(f"num_requests is {num_requests}; memory has room for about {MOST_REQUESTS}")
    for number, at in enumerate(islice(arrival_times(arrivals, rate, burst_size, seed), num_requests)):
        if at > MOST_SECONDS:
            raise ConfigError(
                f"at a rate of {rate} per second request {number} of {num_requests} arrives beyond "
                f"{MOST_SECONDS:g} s, where time is too coarse to measure a step; raise the rate"
            )
    return islice(arrival_times(arrivals, rate, burst_size, seed), num_requests)  # again, so that none is kept


@checked
def arrival_times(arrivals: str, rate: float, burst_size: Positive, seed: int) -> Iterator[float]:
    """The endless sequence of arrival times, in seconds, that `stream_requests` takes from."""
    _check_positive("rate", rate)
    if arrivals == "at once":
        return all_at_once()
    if arrivals == "poisson":
        return poisson(rate, random.Random(f"arrivals {seed}"))
    check_choice("arrivals", arrivals, ("at once", "poisson", "bursts"))
    return bursts(burst_size, burst_size / rate)


@checked
def made_request(
    request_id: str,
    arrival_time: float,
    num_prompt_tokens: Positive,
    num_output_tokens: Positive,
    n: Positive = 1,
    **more,
) -> Request:
    """A request with `n` outputs of exactly the given length; its prompt is the meaningless ids 0, 1, 2, ..."""
    params = _exactly(num_output_tokens, n)
    return Request(request_id, range(num_prompt_tokens), params, arrival_time=arrival_time, **more)


@lru_cache(maxsize=4096)
def _exactly(num_tokens: int, n: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True, n=n, temperature=0.0 if n == 1 else 1.0)


# --- files -----------------------------------------------------------------------------------------------------------

_FILE_FIELDS = {"arrival_time": 0.0, "num_prompt_tokens": None, "num_output_tokens": None, "priority": 0}


def load_requests(path: str | Path) -> list[Request]:
    """Requests from JSON lines, in order of arrival: one object each with `num_prompt_tokens` and `num_output_tokens`.

    Optional: `request_id`, `arrival_time` (seconds, 0), `priority` (0). The second request that is called "a" becomes
    "a#2", so that both may even run together. Raises ConfigError, naming the line.
    """
    lines = read_text(path, "the requests in").splitlines()
    requests = [_read_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise ConfigError(f"{path} holds no requests; write one JSON object per line")
    _tell_apart(requests)
    return sorted(requests, key=lambda request: request.arrival_time)


def _tell_apart(requests: Iterable[Request]) -> None:
    """Number those that have the id of one before them."""
    taken: set[str] = set()
    times = Counter[str]()
    for request in requests:
        given = request.request_id
        while request.request_id in taken:
            times[given] += 1
            request.request_id = f"{given}#{times[given] + 1}"
        taken.add(request.request_id)


def _read_line(path: str | Path, number: int, line: str) -> Request:
    where = f"{path}, line {number}"
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, or a number of thousands of digits
        raise ConfigError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(given, dict) or not given.keys() <= {"request_id", *_FILE_FIELDS}:
        raise ConfigError(f"{where} must be an object with the fields request_id, {', '.join(_FILE_FIELDS)} only")
    values = {name: given.get(name, default) for name, default in _FILE_FIELDS.items()}
    for name in ("num_prompt_tokens", "num_output_tokens"):
        check_kind(f"{where}: {name}", values[name], Positive)
    check_kind(f"{where}: priority", values["priority"], int)
    check_seconds(f"{where}: arrival_time", values["arrival_time"], 0)
    request_id = check_kind(f"{where}: request_id", given.get("request_id", f"req {number - 1}"), str | int)
    return made_request(str(request_id), **values)


def save_requests(path: str | Path, requests: list[Request]) -> None:
    """Write requests as `load_requests` reads them."""
    lines = []
    for request in check_kind("requests", requests, Iterable[Request]):
        values = (request.arrival_time, request.num_prompt_tokens, request.params.max_tokens, request.priority)
        lines.append(json.dumps({"request_id": request.request_id, **dict(zip(_FILE_FIELDS, values, strict=True))}))
    write_text(path, "".join(line + "\n" for line in lines))
