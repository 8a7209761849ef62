"""A worker holds the model and its paged cache on one device, measures what steps need, and carries out plans."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from minillm.memory import PeakMemory
from minillm.memory_ledger import MemoryProfile, available_memory
from minillm.model import Decoder
from minillm.plan import ModelOutput, NewRequest, ScheduledRequest, SchedulerOutput, blocks_needed
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.paged_runner import PagedRunner
from minillm.sampling_params import MOST_LOGPROBS, SamplingParams
from minillm.weights import as_device, as_dtype, find_checkpoint, load_decoder, read_config

# All that sampling can be asked to do at once, as the worst step does for every request.
DEAREST_PARAMS = SamplingParams(temperature=1.0, top_k=2, top_p=0.5, min_p=0.01, seed=0, logprobs=MOST_LOGPROBS)


class Worker:
    """Runs one model on one device: `profile`, then `init_cache`, then `execute_model` for every step."""

    def __init__(self, model: Decoder):
        self.model = model
        self.runner: PagedRunner | None = None  # from `init_cache` on

    @classmethod
    def load(
        cls, model: str | Path, *, dtype: str = "float32", device: str = "cpu", num_tokens: int | None = None
    ) -> "Worker":
        """A worker for a model by name, folder or hub id, which samples among the first `num_tokens` ids.

        The tokenizer, which tells how many ids there are, stays with the engine. Raises what `load_model` raises.
        """
        dtype, device = as_dtype(dtype), as_device(device)
        folder = find_checkpoint(model)
        decoder = load_decoder(folder, replace(read_config(folder), num_tokens=num_tokens), dtype, device)
        decoder.pack()
        return cls(decoder)

    def profile(
        self, max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int = 16
    ) -> MemoryProfile:
        """Run a step that needs as much as any within these limits, and say what it needed beside weights and cache."""
        model = self.model
        activations, masks = self._measure(
            worst_plan(max_num_batched_tokens, max_num_seqs, max_model_len, block_size), block_size
        )
        host = available_memory()
        available, card_bytes = (host, None) if model.device.type == "cpu" else card_memory(model.device)
        return MemoryProfile(
            weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            activations=activations,
            masks=masks,
            bytes_per_block=CacheEngine.bytes_per_block(model.config, block_size, model.dtype),
            available=available,
            host_available=host,
            card_bytes=card_bytes,
        )

    def _measure(self, plan: SchedulerOutput, block_size: int) -> tuple[int, int]:
        """Bytes of a step at its peak, beside weights and cache: without its masks, and of these."""
        model, num_blocks = self.model, 1 + max(max(part.block_ids) for part in plan.scheduled)
        runner = PagedRunner(model, CacheEngine(model.config, num_blocks, block_size, model.dtype, model.device))
        with first_layer_alone(model), PeakMemory(model.device) as memory:
            runner.execute_model(plan)
        return memory.peak_bytes - runner.mask_bytes, runner.mask_bytes

    def init_cache(self, num_blocks: int, block_size: int = 16, num_host_blocks: int = 0) -> int:
        """Allocate the pool, of exactly this size; returns its bytes, host blocks not counted."""
        model = self.model
        cache = CacheEngine(
            model.config, num_blocks, block_size, model.dtype, model.device, num_host_blocks=num_host_blocks
        )
        self.runner = PagedRunner(model, cache)
        return cache.num_bytes

    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """Carry out the plan of one step: one forward pass over all that is planned, and the new tokens."""
        return self.runner.execute_model(plan)

    def shutdown(self) -> None:
        """Give the pool's memory back."""
        self.runner = None


def card_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that this process can still allocate on a CUDA device, and bytes of the whole device."""
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's, of no tensor
    return free + kept, total


@contextmanager
def first_layer_alone(model: Decoder) -> Iterator[None]:
    """The layers run one after the other and are alike: one of them alone needs as much memory as all."""
    layers = model.layers
    model.layers = layers[:1]
    try:
        yield
    finally:
        model.layers = layers


def worst_plan(max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int) -> SchedulerOutput:
    """A step that needs at least as much memory as any within these limits.

    As many requests as there can be, each at the end of the context; the first ones compute chunks as long as the
    budget allows and all others still one token, so that it is exceeded by less than `max_num_seqs`. All read and write
    the same blocks, 1, 2, ...: what is computed means nothing.
    """
    table = range(1, blocks_needed(max_model_len, block_size) + 1)
    plan = SchedulerOutput(step=0, start_time=0.0)
    left = max_num_batched_tokens
    for index in range(min(max_num_seqs, max_num_batched_tokens)):
        chunk = min(max_model_len, max(1, left))
        left -= chunk
        name, start = f"profile {index}", max_model_len - chunk
        plan.new_requests.append(NewRequest(name, DEAREST_PARAMS, max_model_len))
        plan.scheduled.append(ScheduledRequest(name, start, [0] * chunk, True, "prefill", block_ids=table))
        plan.num_tokens += chunk
    return plan
