"""The figures that Prometheus reads from a server, with vLLM's names and meanings, counted on the engine's thread.

Counting a step of 64 decodes takes 0.07 ms, a hundredth of the step: the counts are plain numbers, which become objects
of Prometheus only on request. All figures are those of `Trace`: a token's time is when the results of its step had been
read.
"""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.utils import floatToGoString

from minillm.engine import NotedStep, RequestOutput, output_id
from minillm.trace import RequestRecord

if TYPE_CHECKING:
    from minillm.serving.async_engine import AsyncEngine

SECONDS = [digit * 10.0**power for power in range(-3, 3) for digit in (1, 2.5, 5)]  # a millisecond to eight minutes
TOKENS = [2**power for power in range(18)]
SMALL_NUMBERS = [0, 1, 2, 5, 10, 20]
FINISH_REASONS = ("stop", "length", "abort", "error")

HISTOGRAMS = {
    "time_to_first_token_seconds": (SECONDS, "From a request's arrival to its first token."),
    "inter_token_latency_seconds": (SECONDS, "From one token of a request to the next."),
    "request_time_per_output_token_seconds": (SECONDS, "Mean time between a request's tokens."),
    "e2e_request_latency_seconds": (SECONDS, "From a request's arrival to its last token."),
    "request_queue_time_seconds": (SECONDS, "From a request's arrival to the plan of its first step."),
    "request_prefill_time_seconds": (SECONDS, "From the plan of a request's first step to its first token."),
    "request_decode_time_seconds": (SECONDS, "From a request's first token to its last."),
    "request_inference_time_seconds": (SECONDS, "From the plan of a request's first step to its last token."),
    "request_prompt_tokens": (TOKENS, "Tokens of a prompt."),
    "request_generation_tokens": (TOKENS, "Tokens generated for a request."),
    "iteration_tokens_total": (TOKENS, "Tokens that went through the model in a step."),
    "request_num_preemptions": (SMALL_NUMBERS, "How many times a request was preempted."),
}
COUNTERS = {
    "prefix_cache_queries": "Prompt tokens of requests when they were first admitted.",
    "prefix_cache_hits": "Those of them that were not computed, because they were in the cache.",
    "num_preemptions": "Running requests that lost their blocks to others.",
    "prompt_tokens": "Prompt tokens of requests that have got a token.",
    "generation_tokens": "Tokens generated.",
    "admission_rejections": "Requests refused because the queue was full.",
}


def together(texts: Mapping[str, bytes]) -> tuple[bytes, str]:
    """The expositions of replicas, by name, as one: every sample gets the label `replica`, every family stands once."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text.decode()):
            samples = [each._replace(labels={**each.labels, "replica": replica}) for each in family.samples]
            families.setdefault(family.name, Metric(family.name, family.documentation, family.type)).samples += samples
    return generate_latest(SimpleNamespace(collect=families.values)), CONTENT_TYPE_LATEST


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def buckets(self) -> list[tuple[str, int]]:
        """(bound, how many values up to it) as Prometheus has them."""
        found, total = [], 0
        for bound, count in zip((*self.bounds, float("inf")), list(self.counts), strict=True):
            total += count
            found.append((floatToGoString(bound), total))
        return found


class Progress:
    """What is known of a request that has not ended; times in seconds by the engine's clock."""

    __slots__ = ("arrival", "num_prompt_tokens", "planned", "first", "last", "num_tokens", "num_preemptions")

    def __init__(self, record: RequestRecord):
        self.arrival, self.num_prompt_tokens = record.arrival_time, record.num_prompt_tokens
        self.planned = self.first = self.last = None
        self.num_tokens = self.num_preemptions = 0


class Metrics:
    """The figures of one engine. A request with n outputs counts as n, as its outputs run and end by themselves.

    metrics = Metrics()
    engine = AsyncEngine(LLMEngine(), metrics=metrics)
    text, content_type = metrics.exposition()
    """

    def __init__(self, prefix: str = "minillm", model_name: str = "storyteller"):
        """Names begin with `prefix` and a colon; "vllm" suits existing dashboards."""
        self.prefix, self.labels = prefix, {"model_name": model_name, "engine": "0"}
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.finished = dict.fromkeys(FINISH_REASONS, 0)
        self.histograms = {name: Histogram(bounds) for name, (bounds, _) in HISTOGRAMS.items()}
        self._requests: dict[str, Progress] = {}  # by the trace's ids, until they end
        self._engine: AsyncEngine | None = None
        self._lock = threading.Lock()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def watch(self, engine: "AsyncEngine") -> None:
        """Set the engine whose queue and cache the gauges show."""
        self._engine = engine

    def exposition(self) -> tuple[bytes, str]:
        """All current figures as text, and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    # --- on the engine's thread, except `count_rejection` ---

    def take_news(self, news: list[RequestRecord | NotedStep]) -> None:
        """Count requests that have arrived and steps that are over, in order."""
        for each in news:
            if isinstance(each, NotedStep):
                self._take_step(each)
            else:
                self._requests[each.request_id] = Progress(each)

    def _take_step(self, step: NotedStep) -> None:
        counters, requests, gaps = self.counters, self._requests, []
        end, began = step.more["end_time"], step.more["planned"] or step.more["start_time"]
        for request_id, start, samples in step.computed():
            request = requests.get(request_id)
            if request is None:  # ended by the text of its last token, and counted already
                continue
            if request.planned is None:
                request.planned = began
                self.histograms["request_queue_time_seconds"].add(began - request.arrival)
                counters["prefix_cache_queries"] += request.num_prompt_tokens
                counters["prefix_cache_hits"] += start
            if not samples:
                continue
            if request.first is None:
                request.first = end
                self.histograms["time_to_first_token_seconds"].add(end - request.arrival)
                counters["prompt_tokens"] += request.num_prompt_tokens
            else:
                gaps.append(end - request.last)
            request.last = end
            request.num_tokens += 1
            counters["generation_tokens"] += 1
        for gap, times in Counter(gaps).items():  # most have waited for the same step
            self.histograms["inter_token_latency_seconds"].add(gap, times)
        self.histograms["iteration_tokens_total"].add(step.num_tokens)
        for preemption in step.more.get("preempted", ()):
            counters["num_preemptions"] += 1
            if preemption.request_id in requests:
                requests[preemption.request_id].num_preemptions += 1

    def take_output(self, output: RequestOutput, name_of: Callable[[str], str], is_delta: bool) -> None:
        """Count an output for its reader; `name_of` gives the trace's id for an id of the scheduler."""
        for part in output.outputs if is_delta or output.finished else ():
            if part.finish_reason is not None:
                self._end(name_of(output_id(output.request_id, part.index)), part.finish_reason)

    def _end(self, request_id: str, finish_reason: str) -> None:
        self.finished[finish_reason] += 1
        request = self._requests.pop(request_id, None)
        if request is None or request.first is None or finish_reason == "abort":
            return
        values = {
            "e2e_request_latency_seconds": request.last - request.arrival,
            "request_prefill_time_seconds": request.first - request.planned,
            "request_decode_time_seconds": request.last - request.first,
            "request_inference_time_seconds": request.last - request.planned,
            "request_prompt_tokens": request.num_prompt_tokens,
            "request_generation_tokens": request.num_tokens,
            "request_num_preemptions": request.num_preemptions,
        }
        if request.num_tokens > 1:
            seconds = request.last - request.first
            values["request_time_per_output_token_seconds"] = seconds / (request.num_tokens - 1)
        for name, value in values.items():
            self.histograms[name].add(value)

    def fail_all(self) -> None:
        """The engine has ended, and every request with it."""
        self.finished["error"] += len(self._requests)
        self._requests.clear()

    def count_rejection(self) -> None:
        """A request was refused because the queue was full. From any thread."""
        with self._lock:
            self.counters["admission_rejections"] += 1

    # --- when Prometheus asks ---

    def collect(self) -> Iterator[Metric]:
        """What `CollectorRegistry` calls."""
        names, labels = list(self.labels), list(self.labels.values())
        for name, value, text in self._gauges():
            gauge = GaugeMetricFamily(f"{self.prefix}:{name}", text, labels=names)
            gauge.add_metric(labels, value)
            yield gauge
        for name, text in COUNTERS.items():
            counter = CounterMetricFamily(f"{self.prefix}:{name}", text, labels=names)
            counter.add_metric(labels, self.counters[name])
            yield counter
        text = "Requests that have ended, by the reason."
        counter = CounterMetricFamily(f"{self.prefix}:request_success", text, labels=[*names, "finished_reason"])
        for reason, number in self.finished.items():
            counter.add_metric([*labels, reason], number)
        yield counter
        for name, (_, text) in HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"{self.prefix}:{name}", text, labels=names)
            histogram.add_metric(labels, self.histograms[name].buckets(), self.histograms[name].sum)
            yield histogram
        yield from self._cache_config()

    def _gauges(self) -> Iterator[tuple[str, float, str]]:
        if self._engine is not None:
            yield "num_requests_running", self._engine.num_running, "Requests that take part in steps."
            yield "num_requests_waiting", self._engine.num_waiting, "Requests that wait for a place, or for blocks."
            yield "kv_cache_usage_perc", self._engine.cache_usage, "Share of the blocks in use; 1 is all."

    def _cache_config(self) -> Iterator[Metric]:
        if self._engine is not None:
            config, ledger = self._engine.config, self._engine.ledger
            values = {
                "block_size": config.block_size,
                "num_gpu_blocks": ledger.num_blocks,
                "num_cpu_blocks": ledger.num_host_blocks,
                "enable_prefix_caching": config.enable_prefix_caching,
            }
            info = self.labels | {name: str(value) for name, value in values.items()}
            gauge = GaugeMetricFamily(f"{self.prefix}:cache_config_info", "How the cache is set up.", labels=list(info))
            gauge.add_metric(list(info.values()), 1)
            yield gauge
