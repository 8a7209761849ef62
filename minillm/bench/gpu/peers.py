"""Other engines beside ours: the two of transformers, and any other on the import path.

    minillm bench gpu --peer package.module:factory

`factory(shape, jobs, settings)` is called once per model shape, with no other engine's data on the device:

    shape      a `minillm.model.config.ModelConfig`: the architecture the peer must run, with random weights of its own
    jobs       what will be generated: a list of `Job(prompt, num_outputs)`, prompts being lists of token ids
    settings   a dict: temperature, dtype ("bfloat16"), device ("cuda"), max_num_seqs, max_model_len,
               max_num_batched_tokens, gpu_memory_utilization

and returns an object with

    name, version, settings    of the peer, for the record; `settings` is a dict that JSON can hold
    generate(jobs)             the output token ids of every job, in their order; exactly `num_outputs` of each,
                               ignoring eos. Called several times; only the calls are timed
    close()                    free the device's memory

It is imported from the import path and never part of this package. For a shape that it cannot run it raises, and the
record says so. Its start (loading, compiling, capturing graphs) belongs in the factory, so that it is not timed.

How to adapt nano-vllm: its LLM takes a folder, so the factory writes a checkpoint of the shape into a temporary one.
That is transformers' `save_pretrained` of a random model made with `minillm.bench.gpu.models.random_peer`, and any
tokenizer beside it, because the LLM loads one. It then makes nano-vllm's LLM from that folder with enforce_eager=False,
max_model_len, max_num_seqs, max_num_batched_tokens and gpu_memory_utilization from `settings`. `generate` makes one of
its SamplingParams for each job (temperature as in `settings`, which must be above zero, max_tokens=num_outputs,
ignore_eos=True), calls the LLM's generate with the list of prompts as token ids, the list of parameters and
use_tqdm=False, and returns "token_ids" of every result. `close` calls the LLM's exit. nano-vllm needs flash-attn; if
that is missing, a module of the same name with its two functions is enough.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Protocol

import torch

from minillm.bench.contenders import ContinuousBatches, Job, StaticBatches
from minillm.bench.gpu.models import random_peer
from minillm.bench.gpu.scale import Scale
from minillm.bench.gpu.workloads import TEMPERATURE
from minillm.costs import kv_bytes_per_token
from minillm.errors import ConfigError
from minillm.model import ModelConfig

GPU_MEMORY_UTILIZATION = 0.85  # of the card, for every engine with this setting
PAGES = DEFAULTS, OURS = "its own defaults", "minillm's pages and budget"  # settings tried for its continuous batching
PILOT = 8  # outputs are this many times shorter in the run that decides which is faster


class Peer(Protocol):
    """The interface of what a factory returns."""

    name: str
    version: str
    settings: dict

    def generate(self, jobs: Sequence[Job]) -> list[Sequence[int]]:
        """The output token ids of every job, in order."""

    def close(self) -> None:
        """Free the device's memory."""


def outside_peer(path: str, shape: ModelConfig, jobs: Sequence[Job], scale: Scale) -> Peer:
    """The peer that `--peer path` names, ready to generate. Raises ConfigError if there is no such factory."""
    settings = {
        "temperature": TEMPERATURE,
        "dtype": str(scale.dtype).removeprefix("torch."),
        "device": scale.device,
        "max_num_seqs": scale.max_num_seqs,
        "max_model_len": max(job.num_tokens for job in jobs),
        "max_num_batched_tokens": scale.max_num_batched_tokens,
        "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
    }
    return find_factory(path)(shape, list(jobs), settings)


def find_factory(path: str) -> Callable[..., Peer]:
    """The function that "package.module:factory" names. Raises ConfigError that says which half is missing."""
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise ConfigError(f"--peer {path!r} is not of the form package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # it is foreign code
        raise ConfigError(
            f"--peer {path!r}: {module_name} cannot be imported ({error}); put it on PYTHONPATH"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"--peer {path!r}: {module_name} has no function {name!r}")
    return factory


def static_peer(shape: ModelConfig, jobs: Sequence[Job], scale: Scale, batch_size: int) -> StaticBatches:
    """transformers' `generate`."""
    return StaticBatches(random_peer(shape, scale.dtype, scale.torch_device), batch_size, TEMPERATURE)


def largest_static_batch(shape: ModelConfig, jobs: Sequence[Job], scale: Scale) -> int:
    """The most requests, a multiple of 8, that fit beside the weights if each becomes as long as any can.

    Only half of the free memory counts: `generate` allocates a new cache for each token, which leaves gaps.
    """
    if scale.torch_device.type != "cuda":
        return scale.static_batches[-1]
    free, _ = torch.cuda.mem_get_info(scale.torch_device)
    itemsize = scale.dtype.itemsize
    longest = max(len(job.prompt) for job in jobs) + max(job.num_outputs for job in jobs)
    room = (free - shape.num_parameters * itemsize) // 2
    fitting = min(len(jobs), room // (longest * kv_bytes_per_token(shape, itemsize)))
    return max(1, fitting if fitting < 8 else fitting // 8 * 8)


def continuous_peer(shape: ModelConfig, jobs: Sequence[Job], scale: Scale) -> ContinuousBatches:
    """transformers' continuous batching, with the pages and the budget under which it is fastest; see `PAGES`.

    Raises the last error if it runs with none of them.
    """
    pilot = [Job(job.prompt, max(1, job.num_outputs // PILOT)) for job in jobs]
    tried, failed = {}, None
    for name in PAGES if scale.is_full else (OURS,):  # on a CPU its defaults need gigabytes
        try:
            with closing(_continuous(name, shape, jobs, scale)) as peer:
                peer.generate(pilot[:PILOT])  # a warm-up
                began = time.perf_counter()
                peer.generate(pilot)
                tried[name] = time.perf_counter() - began
        except Exception as error:  # unknown settings, or not enough memory for them
            failed = error
    if not tried:
        raise failed
    peer = _continuous(min(tried, key=tried.get), shape, jobs, scale)
    peer.settings |= {"pages_and_budget": min(tried, key=tried.get), "seconds_of_a_pilot": tried}
    return peer


def _continuous(pages: str, shape: ModelConfig, jobs: Sequence[Job], scale: Scale) -> ContinuousBatches:
    budget = scale.max_num_batched_tokens if pages == OURS else None
    model = random_peer(shape, scale.dtype, scale.torch_device)
    return ContinuousBatches(model, jobs, scale.max_num_seqs, budget, TEMPERATURE)
