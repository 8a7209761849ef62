"""Made-up requests: when they arrive, how long their prompts and outputs are. The same seed gives the same requests."""

import json
import math
import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from minillm.engine.request import Request
from minillm.errors import ConfigError
from minillm.sampling_params import SamplingParams

Draw = Callable[[random.Random], int]  # a length in tokens, at least 1


# --- lengths ---------------------------------------------------------------------------------------------------------


def fixed(length: int) -> Draw:
    """Always the same length. Raises ConfigError if it is below 1."""
    _check_lengths(length, length)
    return lambda rng: length


def uniform(low: int, high: int) -> Draw:
    """Every length from `low` to `high`, both included, equally often. Raises ConfigError unless 1 <= low <= high."""
    _check_lengths(low, high)
    return lambda rng: rng.randint(low, high)


def lognormal(median: float, sigma: float, longest: int) -> Draw:
    """Half below `median`, a long tail above: the logarithm is normal with deviation `sigma`. Cut off at `longest`.

    Raises ConfigError unless 1 <= median <= longest and sigma >= 0.
    """
    _check_lengths(median, longest)
    if not sigma >= 0:
        raise ConfigError(f"sigma is {sigma}; it must not be negative")
    return lambda rng: min(longest, max(1, round(rng.lognormvariate(math.log(median), sigma))))


def _check_lengths(low: float, high: float) -> None:
    if not 1 <= low <= high:
        raise ConfigError(f"lengths from {low} to {high} are impossible; use 1 <= shortest <= longest")


# --- arrivals --------------------------------------------------------------------------------------------------------


def all_at_once() -> Iterator[float]:
    """Everybody at time 0."""
    while True:
        yield 0.0


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """`rate` requests a second on average, independent of each other. Raises ConfigError unless it is positive."""
    _check_positive("rate", rate)
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now


def bursts(size: int, every: float) -> Iterator[float]:
    """`size` requests together, every so many seconds. Raises ConfigError unless both are positive."""
    _check_positive("burst size", size)
    _check_positive("seconds between bursts", every)
    index = 0
    while True:
        yield (index // size) * every
        index += 1


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value}; it must be positive and finite")


# --- requests --------------------------------------------------------------------------------------------------------


def make_requests(
    num_requests: int,
    prompt_length: Draw,
    output_length: Draw,
    *,
    arrivals: str = "at once",
    rate: float = 1.0,
    burst_size: int = 16,
    seed: int = 0,
) -> list[Request]:
    """Requests in order of arrival, their lengths drawn independently.

    `arrivals`: "at once"; "poisson" with `rate` requests a second; "bursts" of `burst_size` requests, as far apart as
    makes `rate` a second. Raises ConfigError for bad values.
    """
    if num_requests < 1:
        raise ConfigError(f"num_requests is {num_requests}; ask for at least 1")
    rng = random.Random(f"lengths {seed}")
    times = arrival_times(arrivals, rate, burst_size, seed)
    return [made_request(f"req {i}", next(times), prompt_length(rng), output_length(rng)) for i in range(num_requests)]


def arrival_times(arrivals: str, rate: float, burst_size: int, seed: int) -> Iterator[float]:
    """The endless sequence of arrival times, in seconds, that `make_requests` takes from."""
    _check_positive("rate", rate)
    if arrivals == "at once":
        return all_at_once()
    if arrivals == "poisson":
        return poisson(rate, random.Random(f"arrivals {seed}"))
    if arrivals == "bursts":
        return bursts(burst_size, burst_size / rate)
    raise ConfigError(f"arrivals {arrivals!r} is not one of 'at once', 'poisson', 'bursts'")


def made_request(
    request_id: str, arrival_time: float, num_prompt_tokens: int, num_output_tokens: int, **more
) -> Request:
    """A request whose output has exactly the given length; its prompt is the ids 0, 1, 2, ..., which mean nothing."""
    params = _exactly(num_output_tokens)
    return Request(request_id, range(num_prompt_tokens), params, arrival_time=arrival_time, **more)


@lru_cache(maxsize=4096)
def _exactly(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


# --- files -----------------------------------------------------------------------------------------------------------

_FILE_FIELDS = {"arrival_time": 0.0, "num_prompt_tokens": None, "num_output_tokens": None, "priority": 0}


def load_requests(path: str | Path) -> list[Request]:
    """Requests from JSON lines, in order of arrival: one object each with `num_prompt_tokens` and `num_output_tokens`.

    Optional: `request_id`, `arrival_time` (seconds, 0), `priority` (0). Raises ConfigError, naming the line.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the requests in {path}: {error.strerror}") from error
    requests = [_read_line(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not requests:
        raise ConfigError(f"{path} holds no requests; write one JSON object a line")
    return sorted(requests, key=lambda request: request.arrival_time)


def _read_line(path: str | Path, number: int, line: str) -> Request:
    where = f"{path}, line {number}"
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is no JSON: {error.msg}") from error
    if not isinstance(given, dict) or not given.keys() <= {"request_id", *_FILE_FIELDS}:
        raise ConfigError(f"{where} must be an object with the fields request_id, {', '.join(_FILE_FIELDS)} only")
    values = {name: given.get(name, default) for name, default in _FILE_FIELDS.items()}
    for name in ("num_prompt_tokens", "num_output_tokens", "priority"):
        if type(values[name]) is not int or (name != "priority" and values[name] < 1):
            raise ConfigError(f"{where}: {name} is {values[name]!r}; it must be a whole number, lengths at least 1")
    if type(values["arrival_time"]) not in (int, float) or not 0 <= values["arrival_time"] < math.inf:
        raise ConfigError(f"{where}: arrival_time is {values['arrival_time']!r}; it must be seconds, 0 or more")
    return made_request(str(given.get("request_id", f"req {number - 1}")), **values)


def save_requests(path: str | Path, requests: list[Request]) -> None:
    """Write requests as `load_requests` reads them."""
    lines = []
    for request in requests:
        values = (request.arrival_time, request.num_prompt_tokens, request.params.max_tokens, request.priority)
        lines.append(json.dumps({"request_id": request.request_id, **dict(zip(_FILE_FIELDS, values, strict=True))}))
    Path(path).write_text("".join(line + "\n" for line in lines))
