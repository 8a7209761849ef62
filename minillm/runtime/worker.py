"""A worker holds the model and its paged cache on one device, measures what steps need, and carries out plans."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from minillm.costs import MemoryProfile, PeakMemory, available_memory, blocks_needed
from minillm.errors import KernelError
from minillm.kernels import Backend, choose, ops
from minillm.model import WHOLE, Decoder, Shard, load_decoder, locate, read_config
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.plan import (
    DEFAULT_OPTIONS,
    ModelOutput,
    NewRequest,
    PendingOutput,
    RunnerOptions,
    ScheduledRequest,
    SchedulerOutput,
)
from minillm.runtime.pooling import mean_hidden_state
from minillm.runtime.runner import Runner
from minillm.runtime.step_graph import bucket_sizes, free_bytes
from minillm.sampling import MOST_LOGPROBS, PROMPT_ROWS, SamplingParams

# All that sampling can be asked to do at once; the worst step does it for every request.
COSTLIEST_PARAMS = SamplingParams(
    temperature=1.0, top_k=2, top_p=0.5, min_p=0.01, seed=0, max_tokens=1, min_tokens=1, logit_bias={0: 1.0},
    presence_penalty=1.0, frequency_penalty=1.0, repetition_penalty=2.0, logprobs=MOST_LOGPROBS,
    prompt_logprobs=MOST_LOGPROBS,
)  # fmt: skip
GRAPH_BYTES = 16 << 20  # room for one graph's list of kernels and their arguments; reasoned, not measured
RECORDING_BYTES = 64 << 20  # room for workspaces that libraries take for recordings; reasoned, not measured


class Worker:
    """Runs one model on one device: `profile`, then `init_cache`, then `execute_model` for every step."""

    def __init__(self, model: Decoder, options: RunnerOptions = DEFAULT_OPTIONS):
        self.model = model
        self.options = options
        self.backend: Backend | None = None  # from `profile` or `init_cache` on; `backend.why` says how it was picked
        self.runner: Runner | None = None  # from `init_cache` on
        self._is_profiled = False  # kernels have run a step like those to come

    @classmethod
    def load(
        cls,
        model: str | Path,
        options: RunnerOptions = DEFAULT_OPTIONS,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        num_tokens: int | None = None,
        shard: Shard = WHOLE,
    ) -> "Worker":
        """A worker for a model by name, folder or hub id, which samples among the first `num_tokens` ids.

        The tokenizer, which knows how many ids there are, stays with the engine. With a `shard` it is a rank, and the
        other ranks need the same calls. Raises what `load_model` raises.
        """
        folder, dtype, device = locate(model, dtype, device)
        config = replace(read_config(folder), num_tokens=num_tokens)
        return cls(load_decoder(folder, config, dtype, device, pack=True, shard=shard), options)

    def profile(self) -> MemoryProfile:
        """Run a step that needs as much as any within the limits; returns what it needed beside weights and cache.

        Raises KernelError, before anything is allocated, if the backend asked for does not take the model.
        """
        model, options = self.model, self.options
        self.backend = self._choose()
        activations, masks = self._measure(
            worst_plan(options.max_num_batched_tokens, options.max_num_seqs, options.max_model_len, options.block_size)
        )
        if self._records_graphs:
            activations += self._measure_graphs()
        self._is_profiled = True
        host = available_memory()
        available, card_bytes = (host, None) if model.device.type == "cpu" else card_memory(model.device)
        return MemoryProfile(
            weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            activations=activations,
            masks=masks,
            bytes_per_block=CacheEngine.bytes_per_block(model.config, options.block_size, model.dtype),
            available=available,
            host_available=host,
            card_bytes=card_bytes,
        )

    def _measure(self, plan: SchedulerOutput) -> tuple[int, int]:
        """Peak bytes of a step beside weights and cache: without its masks, and of the masks."""
        model, num_blocks = self.model, 1 + max(max(part.block_ids) for part in plan.others)
        cache = CacheEngine(model.config, num_blocks, self.options.block_size, model.dtype, model.device)
        with first_layer_alone(model), PeakMemory(model.device) as memory:
            runner = self._new_runner(cache, replace(self.options, enforce_eager=True))
            unread = runner.launch(plan)
            if runner.batch.is_mirrored:  # read late: what log-probabilities need is kept meanwhile
                runner.launch(replace(plan, new_requests=[])).result()
            unread.result()
        return memory.peak_bytes - runner.mask_bytes, runner.mask_bytes

    def _measure_graphs(self) -> int:
        """Bytes to leave for graphs: they share the memory of the largest decode step, which only they use."""
        options = self.options
        plan = decode_plan(options.max_num_seqs, options.max_model_len, options.block_size)
        return self._measure(plan)[0] + RECORDING_BYTES + GRAPH_BYTES * len(bucket_sizes(options.max_num_seqs))

    def init_cache(self, num_blocks: int, *, num_host_blocks: int = 0) -> int:
        """Allocate the pool, of exactly this size, and record graphs; returns the pool's bytes, without host blocks.

        Raises KernelError, before anything is allocated, if the backend asked for does not take the model.
        """
        model = self.model
        self.backend = self._choose()
        self.runner = None  # free its pool before the new one is allocated
        size = (num_blocks, self.options.block_size)
        cache = CacheEngine(model.config, *size, model.dtype, model.device, num_host_blocks=num_host_blocks)
        self.runner = self._new_runner(cache, self.options, trusted=self._is_profiled)
        return cache.num_bytes

    # --- what runs the steps ---

    @property
    def why(self) -> str:
        """One line, from `init_cache` on: which kernels were picked and why, and how they are launched."""
        return f"{self.backend.why}; {self.runner.why}" if self.runner.batch.is_mirrored else self.backend.why

    def _choose(self) -> Backend:
        model, options = self.model, self.options
        return choose(options.attention_backend, model.config, model.dtype, model.device, options.block_size)

    @property
    def _records_graphs(self) -> bool:
        return self.model.device.type == "cuda" and self.backend.capturable and not self.options.enforce_eager

    def _new_runner(self, cache: CacheEngine, options: RunnerOptions, *, trusted: bool = False) -> Runner:
        operations = small_operations(self.model, self.backend, cache.block_size) if options.fused_ops else None
        return Runner(self.model, cache, self.backend, operations, options, trusted=trusted)

    # --- steps ---

    def launch(self, plan: SchedulerOutput) -> PendingOutput:
        """Begin the plan of one step: one forward pass over all that is planned, and the new tokens."""
        return self.runner.launch(plan)

    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """Carry out the plan of one step and wait for its output."""
        return self.launch(plan).result()

    def encode(self, token_ids: Sequence[int]) -> Tensor:
        """[hidden] a prompt's vector, see `mean_hidden_state`; computed without the cache."""
        return mean_hidden_state(self.model, token_ids, self.options.max_num_batched_tokens)

    def check_alive(self) -> None:
        """It lives as long as this process."""

    def shutdown(self) -> None:
        """Give the memory of pool and graphs back; on a GPU, other processes can then use it."""
        self.runner = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def small_operations(model: Decoder, backend: Backend, block_size: int) -> ModuleType | None:
    """The operations around attention, fused: the backend's own, else Triton's where it takes the model, else torch's.

    None: the model's own, which are as fast on a CPU as torch's fused ones.
    """
    if backend.name == "cpu":
        return backend.kernels
    if model.device.type == "cpu" and backend.name == "reference":
        return None
    try:
        choose("triton", model.config, model.dtype, model.device, block_size)
    except KernelError:
        return ops
    return import_module("minillm.kernels.triton_ops")


def card_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that this process can still allocate on a CUDA device, and bytes of the whole device.

    Memory that torch caches counts only once it has been given back: some of it belongs to live graphs.
    """
    return free_bytes(device), torch.cuda.mem_get_info(device)[1]


@contextmanager
def first_layer_alone(model: Decoder) -> Iterator[None]:
    """The layers run one after the other and are alike: one layer needs as much memory as all."""
    layers = model.layers
    model.layers = layers[:1]
    try:
        yield
    finally:
        model.layers = layers


def worst_plan(max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int) -> SchedulerOutput:
    """A step that needs at least as much memory as any within these limits.

    As many requests as there can be, each at the end of the context. The first ones compute chunks as long as the
    budget allows, and all others one token, so the budget is exceeded by less than `max_num_seqs`. All read and write
    the same blocks, 1, 2, ...: the results mean nothing.
    """
    chunks, left = [], max_num_batched_tokens
    for _ in range(min(max_num_seqs, max_num_batched_tokens)):
        chunks.append(min(max_model_len, max(1, left)))
        left -= chunks[-1]
    return _plan_of(chunks, COSTLIEST_PARAMS, max_model_len, block_size)


def decode_plan(num_seqs: int, max_model_len: int, block_size: int) -> SchedulerOutput:
    """A step of `num_seqs` requests with one new token each, at the end of the context, as in `worst_plan`."""
    return _plan_of([1] * num_seqs, SamplingParams(temperature=1.0, max_tokens=1), max_model_len, block_size)


def _plan_of(chunks: Sequence[int], params: SamplingParams, max_model_len: int, block_size: int) -> SchedulerOutput:
    table = range(1, blocks_needed(max_model_len, block_size) + 1)
    plan = SchedulerOutput(step=0, start_time=0.0, num_tokens=sum(chunks))
    for index, chunk in enumerate(chunks):
        name, start = f"profile {index}", max_model_len - chunk
        # Log-probabilities of prompts are made one after the other, a few rows at a time: once is enough.
        prompt = [0] * (1 if index else min(max_model_len, start + 1 + PROMPT_ROWS))
        plan.new_requests.append(NewRequest(name, params, prompt))
        plan.others.append(ScheduledRequest(name, start, chunk, True, "prefill", block_ids=table))
    return plan
