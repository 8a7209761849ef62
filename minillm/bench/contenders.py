"""The contenders of `minillm bench engine` and `minillm bench gpu`: engines that generate the same workload.

A contender has `settings` for the record, `generate(jobs)`, which returns the output tokens of every job in order, and
`close()`. One that computes in another process (`live.py`) also has `seconds`, measured there.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from minillm.costs import blocks_needed
from minillm.engine import LLM
from minillm.errors import ConfigError
from minillm.model import Decoder
from minillm.runtime import rows_computed
from minillm.sampling import SamplingParams
from minillm.simulation import COURSE_SEED, course_requests
from minillm.trace import StepEvent, Trace

BLOCK_SIZE = 16  # tokens, for ours and for transformers
STATIC_BATCH = 16  # requests in a left-padded batch
SPARE_BLOCKS = 1.25  # times the blocks of all jobs: transformers admits no request into the last 15 % of its pool
NO_EOS = -1
PAD_TOKEN_ID = 0  # of pads; they are masked, so any id will do


# --- the workload ----------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """One request: its prompt, and how many tokens it gets; eos does not end it."""

    prompt: list[int]
    num_outputs: int

    @property
    def num_tokens(self) -> int:
        """Length of prompt and output."""
        return len(self.prompt) + self.num_outputs


def make_jobs(num_jobs: int, vocab_size: int, seed: int = COURSE_SEED) -> list[Job]:
    """The first `count` of the course's requests, with prompts of random tokens: see `course_requests`."""
    requests = course_requests(num_jobs, vocab_size=vocab_size, seed=seed)
    return [Job(list(request.prompt_token_ids), request.params.max_tokens) for request in requests]


def num_blocks_for(jobs: Sequence[Job]) -> int:
    """Blocks of a pool that has room for all jobs at once; the same for ours and for transformers."""
    return math.ceil(SPARE_BLOCKS * sum(blocks_needed(job.num_tokens, BLOCK_SIZE) for job in jobs))


# --- the checkpoint --------------------------------------------------------------------------------------------------


SHAPE_135M = LlamaConfig(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49_152,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_id=None,
    initializer_range=0.05,  # larger than usual, so that rounding rarely decides between tokens
)


def write_random_checkpoint(config: LlamaConfig, folder: Path) -> Path:
    """Write a checkpoint of random weights, always the same."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


# --- the contenders --------------------------------------------------------------------------------------------------


class Contender(Protocol):
    """An engine ready to generate; its constructor loads and allocates everything."""

    settings: dict

    def generate(self, jobs: Sequence[Job]) -> list[tuple[int, ...]]:
        """The output tokens of every job."""

    def close(self) -> None:
        """Release its memory."""


def our_arguments(jobs: Sequence[Job], max_num_seqs: int, max_num_batched_tokens: int) -> dict:
    """Engine arguments with which all jobs fit at once."""
    return {
        "block_size": BLOCK_SIZE,
        "num_blocks": num_blocks_for(jobs),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max(job.num_tokens for job in jobs),
        "enable_prefix_caching": False,  # the prompts are the same in every turn
    }


class Ours:
    """`LLM`: paged cache, continuous batching. `model` is a checkpoint to load in `dtype`, or a Decoder."""

    def __init__(self, model: Path | Decoder, arguments: dict, temperature: float = 0.0, dtype: str | None = None):
        self.settings = {"engine": "minillm LLM", **arguments}
        self.temperature = temperature
        self.llm = LLM(model, dtype=dtype, skip_tokenizer_init=True, verbose=False, **arguments)
        self.settings["kernels"] = self.kernels
        self._began = 0.0  # the start of the last `generate`, on the engine's clock

    def generate(self, jobs: Sequence[Job]) -> list[tuple[int, ...]]:
        self._began = self.llm.engine.scheduler.clock()
        params = [
            SamplingParams(temperature=self.temperature, max_tokens=job.num_outputs, ignore_eos=True) for job in jobs
        ]
        results = self.llm.generate([job.prompt for job in jobs], params, use_tqdm=False)
        return [tuple(result.outputs[0].token_ids) for result in results]

    @property
    def kernels(self) -> str:
        """Which kernels its worker has chosen, and why."""
        return self.llm.engine.executor.workers[0].why

    @property
    def model(self) -> Decoder:
        """The model it runs."""
        return self.llm.engine.model

    @property
    def trace(self) -> Trace:
        """The trace of the last `generate`. It is made now, so that this is not part of the timed run."""
        every = self.llm.trace
        return Trace(
            [record for record in every.requests if record.arrival_time >= self._began],
            [step for step in every.steps if step.start_time >= self._began],
        )

    @property
    def steps(self) -> list[StepEvent]:
        """The steps of the trace."""
        return self.trace.steps

    def close(self) -> None:
        """Free the memory."""
        self.llm.shutdown()


class StaticBatches:
    """transformers' `generate` on left-padded batches in order of arrival; a batch ends with its longest output."""

    def __init__(
        self,
        model: PreTrainedModel,
        batch_size: int | None = None,
        temperature: float = 0.0,
        use_cache: bool = True,
    ):
        self.model = model
        self.batch_size = batch_size or STATIC_BATCH
        self.temperature = temperature
        self.use_cache = use_cache
        self.settings = {
            "engine": "transformers generate",
            "batch_size": self.batch_size,
            "attention": attention_of(model),
        }

    @torch.inference_mode()
    def generate(self, jobs: Sequence[Job]) -> list[tuple[int, ...]]:
        outputs = []
        for first in range(0, len(jobs), self.batch_size):
            outputs += self._generate_batch(jobs[first : first + self.batch_size])
        return outputs

    def _generate_batch(self, jobs: Sequence[Job]) -> Iterator[tuple[int, ...]]:
        width = max(len(job.prompt) for job in jobs)
        pads = [width - len(job.prompt) for job in jobs]
        token_ids = [[PAD_TOKEN_ID] * n + job.prompt for n, job in zip(pads, jobs, strict=True)]
        mask = [[0] * n + [1] * len(job.prompt) for n, job in zip(pads, jobs, strict=True)]
        config = generation_config(max(job.num_outputs for job in jobs), None, self.temperature)
        config.use_cache = self.use_cache
        inputs, mask = (torch.tensor(rows, device=self.model.device) for rows in (token_ids, mask))
        rows = self.model.generate(inputs, attention_mask=mask, generation_config=config)
        # [B, width + longest output]
        return (tuple(row[width : width + job.num_outputs].tolist()) for row, job in zip(rows, jobs, strict=True))

    def close(self) -> None:
        """Nothing to release except the model."""


class ContinuousBatches:
    """transformers' continuous batching: the manager behind `generate_batch`, kept for all turns.

    It calls the manager directly because `generate_batch` has one output length for all. Raises ConfigError if the
    installed transformers does not know the settings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        jobs: Sequence[Job],
        max_requests_per_batch: int,
        max_batch_tokens: int | None,
        temperature: float = 0.0,
        num_blocks: int | None = None,
    ):
        """`max_batch_tokens` None keeps the defaults of it, pages and pool; `num_blocks` None: room for all jobs.

        `results` are the manager's for the last `generate`, in the order of the jobs, with the times of their tokens.
        """
        known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
        arguments = {
            "max_requests_per_batch": max_requests_per_batch,
            "allow_block_sharing": False,
        }
        if max_batch_tokens is not None:
            page_size = "page_size" if "page_size" in known else "block_size"  # its name up to transformers 5.17
            arguments |= {
                page_size: BLOCK_SIZE,
                "num_blocks": num_blocks or num_blocks_for(jobs),
                "max_batch_tokens": max_batch_tokens,
            }
        if unknown := arguments.keys() - known:
            raise ConfigError(
                f"this transformers does not know {', '.join(sorted(unknown))} of its continuous batching; "
                "install 5.17 or later, or measure with --peers none"
            )
        self.manager = model.init_continuous_batching(
            generation_config=generation_config(max(job.num_outputs for job in jobs), NO_EOS, temperature),
            continuous_batching_config=ContinuousBatchingConfig(**arguments),
        )
        self.settings = {
            "engine": "transformers ContinuousBatchingManager",
            "attention": attention_of(model),  # the manager may have switched to a faster one
            **arguments,
        }
        self.results: list = []
        self.manager.warmup()
        self.manager.start()

    def generate(self, jobs: Sequence[Job]) -> list[tuple[int, ...]]:
        pause = getattr(self.manager, "pause", nullcontext)  # transformers 5.17 has none: it may begin with a few
        with pause():  # so that all are queued before the first step
            request_ids = [
                self.manager.add_request(
                    job.prompt, max_new_tokens=job.num_outputs, record_timestamps=True, eos_token_id=NO_EOS
                )
                for job in jobs
            ]
        results = {}
        while len(results) < len(jobs):
            result = self.manager.get_result(timeout=1)
            if result is not None:
                results[result.request_id] = result
            elif not self.manager.is_running():
                raise RuntimeError(f"transformers' manager stopped after {len(results)} of {len(jobs)} requests")
        failed = [result.error for result in results.values() if result.error is not None]
        if failed:
            raise RuntimeError(f"transformers' manager failed {len(failed)} requests: {failed[0]}")
        self.results = [results[request_id] for request_id in request_ids]
        return [tuple(result.generated_tokens) for result in self.results]

    def close(self) -> None:
        """End its thread."""
        self.manager.destroy()


def load_peer(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    """The checkpoint in transformers, with the attention that is fastest on a CPU; both its contenders share it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None  # otherwise `generate` would use it
    return model


def generation_config(max_new_tokens: int, eos_token_id: int | None, temperature: float) -> GenerationConfig:
    """Greedy at temperature 0, otherwise sampled from all tokens."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        **({"do_sample": False} | sampling),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        pad_token_id=PAD_TOKEN_ID,
    )


def attention_of(model: PreTrainedModel) -> str:
    return model.config._attn_implementation


# --- the limit -------------------------------------------------------------------------------------------------------


class GemmFloor:
    """Only the matrix products of a run: the same number of rows through the model's own weights, step by step.

    Rows and weights are as the engine computes them: padded where that is faster, packed if the model is.
    """

    def __init__(self, model: Decoder):
        self.model = model
        self.linears = [
            linear
            for layer in model.layers
            for linear in (
                layer.self_attn.qkv_proj,
                layer.self_attn.o_proj,
                layer.mlp.gate_up_proj,
                layer.mlp.down_proj,
            )
        ]

    @torch.inference_mode()
    def run(self, steps: Sequence[tuple[int, int]]) -> None:
        """`steps`: (tokens through the layers, rows through the output projection) of each."""
        computed = [[rows_computed(number, self.model.device) for number in step] for step in steps]
        longest = max(num_tokens for num_tokens, _ in computed)
        widths = {linear.in_features for linear in self.linears}
        inputs = {width: torch.randn(longest, width).to(self.model.dtype) for width in widths}
        for num_tokens, num_sampled in computed:
            for linear in self.linears:
                linear(inputs[linear.in_features][:num_tokens])
            if num_sampled:
                self.model.logits(inputs[self.model.config.hidden_size][:num_sampled])


def products_of(steps: Sequence[StepEvent]) -> list[tuple[int, int]]:
    """For `GemmFloor`: the number of tokens and of sampled rows of each step of a run."""
    return [(step.num_tokens, sum(part.num_sampled for part in step.scheduled)) for step in steps]
