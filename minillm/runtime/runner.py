"""Carries out plans: a step is prepared on the host, brought to the device in one copy, computed, its tokens sent back.

All of it is handed to the device's queue, and `launch` returns. The next step may be launched before this one is read:
it takes sampled tokens from the request's row of tokens on the device. On a CPU the work is done at once, and a step is
over when `launch` returns.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.costs import mib
from minillm.kernels import AttentionInputs, Backend, PagedAttention, choose, fused
from minillm.model import Decoder
from minillm.runtime.batch import Batch, Layout, Step, StepInputs, buffer_size, carve, carve_changes
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.device_queue import Queue, queue_for
from minillm.runtime.plan import (
    DEFAULT_OPTIONS,
    ModelOutput,
    PendingOutput,
    RunnerOptions,
    SchedulerOutput,
    not_finite,
)
from minillm.runtime.step_graph import bucket_sizes, free_bytes, record
from minillm.sampling import (
    PromptLogprobs,
    SamplingState,
    TokenLogprobs,
    prompt_logprobs,
    sample,
    sample_rows,
    to_device,
    token_logprobs,
)


class Runner:
    """Runs a scheduler's plans on a model with a paged cache, on any device.

    A request's random numbers follow only from its seed and the number of the token. The other requests of the step do
    not matter, nor how it is run, nor a restart. On a GPU a step in which every request decodes is one graph; requests
    with more than a temperature are sampled after it.
    """

    def __init__(
        self,
        model: Decoder,
        cache: CacheEngine,
        backend: Backend | None = None,
        operations: ModuleType | None = None,
        options: RunnerOptions = DEFAULT_OPTIONS,
        queue: Queue | None = None,
        *,
        trusted: bool = False,
    ):
        """`backend`: the kernels of attention, by default torch's. `operations`: a module of small operations that are
        fused (`kernels.ops`, `cpu`, `triton_ops`), by default the model's own.

        `trusted`: kernels need not check their arguments, because such a step has been tried before. Unless
        `options.enforce_eager`, records a graph for every size of a decode step, if the backend allows it.
        """
        self.model = model
        self.cache = cache
        config, device = model.config, model.device
        self.backend = backend or choose("reference", config, model.dtype, device, cache.block_size)
        self.layers = model.bound()
        if trusted:
            self.backend = replace(self.backend, kernels=self.backend.unchecked)
            operations = getattr(operations, "unchecked", operations)
        if operations is not None:
            self.layers = model.bound(fused(operations), fused(getattr(operations, "unchecked", operations)))
        self.sample_rows = getattr(operations, "sample_rows", sample_rows)
        # Triton's interpreter stands for a GPU, and so does a queue that lets work wait.
        is_mirrored = device.type != "cpu" or queue is not None or self.backend.name == "triton"
        self.queue = queue or queue_for(device)
        self.batch = Batch(options, cache.block_size, device, self.queue.run, is_mirrored)
        self.prompts: dict[str, Sequence[int]] = {}  # of requests that ask for prompt log-probabilities
        self.mask_bytes = 0  # of the last step
        self.graphs, self.graph_bytes = {}, 0  # by number of requests, rising; what they hold on a GPU
        if self.backend.capturable and not options.enforce_eager and is_mirrored:
            self._record_graphs(bucket_sizes(options.max_num_seqs))

    @property
    def why(self) -> str:
        """One line: how decode steps are run."""
        if self.graphs:
            sizes = ", ".join(map(str, self.graphs))
            return f"decode steps replay graphs of {sizes} requests, which hold {mib(self.graph_bytes)}"
        if not self.backend.capturable:
            return f"every kernel is launched from Python: the {self.backend.name} backend cannot be captured"
        return "every kernel is launched from Python: enforce_eager is set"

    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """Carry out the plan of one step and wait for it."""
        return self.launch(plan).result()

    @torch.inference_mode()
    def launch(self, plan: SchedulerOutput) -> PendingOutput:
        """Hand the plan of one step to the device. Waits neither for this step nor for one before.

        A request whose logits are not finite gets no token and will be listed in `failed`; the others are not affected.
        """
        self.follow(plan)
        if not plan.num_requests:
            return NOTHING
        step = self.batch.prepare(plan, list(self.graphs))
        output = StepOutput(self, step, self._judged(plan) if self.prompts else ())
        self.queue.run(partial(self._run, step, output))
        output.ended = self.queue.mark()
        if not self.batch.is_mirrored or (output.judged and self.model.shard.size > 1):
            output.result()  # keep nothing for log-probabilities once it is over; and ranks make them together
        return output

    def follow(self, plan: SchedulerOutput) -> None:
        """Apply what the plan says about requests and blocks, before anything is computed."""
        gone = (*plan.finished_ids, *plan.preempted_ids)
        self.batch.remove(gone)
        for request_id in gone:
            self.prompts.pop(request_id, None)
        for move in plan.block_moves:
            self.queue.run(partial(self.cache.move, move))
        for new in plan.new_requests:
            num_ids, device = self.model.config.num_sampled_ids, self.model.device
            self.batch.add(new, SamplingState.of(new.params, num_ids, device, **new.known_tokens))
            if new.params.prompt_logprobs is not None:
                self.prompts[new.request_id] = new.prompt_token_ids
        for part in plan.others:
            if part.block_ids:
                self.batch.set_blocks(part)
                if self.backend.reads_whole_blocks:
                    table = self.batch.block_table(part.request_id).tolist()
                    self.queue.run(partial(self.cache.clear, part, table))

    def _judged(self, plan: SchedulerOutput) -> list["JudgedPrompt"]:
        """The parts of prompts in this step whose log-probabilities are asked for."""
        judged, first = [], 0
        for part in sorted(plan.scheduled, key=lambda part: part.num_tokens > 1):  # as the batch has them
            following = self.prompts.get(part.request_id, ())[part.start + 1 : part.end + 1]
            if following:
                most = self.batch.states[part.request_id].params.prompt_logprobs
                judged.append(JudgedPrompt(part.request_id, part.start + 1, following, most, first))
            first += part.num_tokens
        return judged

    # --- on the device ---

    def _run(self, step: Step, output: "StepOutput") -> None:
        """The work of a step on the device, in order."""
        buffer = step.buffer
        if self.batch.is_mirrored:
            buffer = self._static if step.graph else self._new_buffer(len(step.buffer))
            buffer[: len(step.buffer)].copy_(step.buffer, non_blocking=True)
        if step.num_changes:
            entries, blocks = carve_changes(buffer, step.layout, step.num_changes)
            self.batch.device_tables.view(-1).index_copy_(0, entries, blocks)
        inputs = carve(buffer, step.layout)
        if step.graph:
            token_ids, logits = self.graphs[step.graph].replay()
        else:
            token_ids, logits = self._compute(inputs, step.max_queries, output)
        if step.asking:
            self._sample_asking(token_ids, logits, inputs, output)
        output.token_ids.copy_(token_ids[output.places], non_blocking=True)

    def _new_buffer(self, size: int) -> Tensor:
        """Zeros: as inputs of a step they belong to no request and write only to the null block."""
        return torch.zeros(size, dtype=torch.int64, device=self.model.device)

    def _compute(
        self, inputs: StepInputs, max_queries: int = 0, output: "StepOutput | None" = None
    ) -> tuple[Tensor, Tensor | None]:
        """One forward pass -> [R + F] the new token of each request that gets one, and 0 for the others, -1 where it is
        not finite; and the [R, ids] logits.
        """
        attend = self.attention(inputs, max_queries)
        token_ids = self.batch.tokens.view(-1).index_select(0, inputs.tokens)  # [T]
        hidden = self.model(token_ids, inputs.positions, attend, self.layers)  # [T, hidden]
        if output is not None and output.judged:
            output.hidden = hidden
        found, logits = [], None
        if len(inputs.sampled):
            logits = self.model.logits(hidden.index_select(0, inputs.picked) if len(inputs.picked) else hidden)
            found.append(self.sample_rows(logits, inputs.temperatures, inputs.seeds, inputs.draws))
            self._keep(inputs.sampled, found[0])
        if len(inputs.checked):
            finite = hidden.index_select(0, inputs.checked).isfinite().all(-1)  # [F]
            found.append(finite.to(torch.int64) - 1)
        return found[0] if len(found) == 1 else torch.cat(found), logits

    def attention(self, inputs: StepInputs, max_queries: int = 0) -> PagedAttention:
        """The attention of a step: what its layers have in common, made once."""
        tables = self.batch.device_tables
        attend = PagedAttention(
            self.backend,
            self.model.config,
            self.cache.layers,
            AttentionInputs(
                slots=inputs.slots,
                num_decodes=len(inputs.decode_rows),
                decode_tables=tables.index_select(0, inputs.decode_rows),
                decode_lengths=inputs.decode_lengths,
                chunk_tables=tables.index_select(0, inputs.chunk_rows),
                chunk_starts=inputs.chunk_starts,
                chunk_lengths=inputs.chunk_lengths,
                max_queries=max_queries,
            ),
        )
        self.mask_bytes = getattr(attend.state, "mask_bytes", 0)
        return attend

    def _keep(self, places: Tensor, token_ids: Tensor) -> None:
        """Put [R] new tokens where the next step finds them."""
        # An unusable id must not be looked up: the failed request may be in a step launched already.
        self.batch.tokens.view(-1).index_copy_(0, places, token_ids.clamp(min=0).to(torch.int32))

    def _sample_asking(self, token_ids: Tensor, logits: Tensor, inputs: StepInputs, output: "StepOutput") -> None:
        """Sample again, in place, for the requests that ask for more than a temperature."""
        rows = to_device(output.asking, logits.device)
        output.logits = logits.index_select(0, rows)  # [A, ids]
        draws = inputs.draws.index_select(0, rows)
        output.asked_ids = sample(output.logits, output.states, draws, self.sample_rows)
        token_ids.index_copy_(0, rows, output.asked_ids)
        self._keep(inputs.sampled.index_select(0, rows), output.asked_ids)

    # --- graphs ---

    def _record_graphs(self, sizes: Sequence[int]) -> None:
        """Record a decode step of each size; all read their inputs from the beginning of one buffer."""
        device = self.model.device
        self._static = self._new_buffer(buffer_size(Layout.of_decodes(sizes[-1]), self.batch.tables.size))
        with torch.inference_mode():
            free = free_bytes(device)
            num_ids = self.model.config.num_sampled_ids
            self._logits = torch.empty(sizes[-1], num_ids, dtype=self.model.dtype, device=device)  # of the last replay
            self.graphs = record({size: self._decode_step(size) for size in sizes}, device)
            self.graph_bytes = free - free_bytes(device)

    def _decode_step(self, size: int) -> Callable[[], tuple[Tensor, Tensor]]:
        inputs = carve(self._static, Layout.of_decodes(size))

        def compute() -> tuple[Tensor, Tensor]:
            token_ids, logits = self._compute(inputs)
            return token_ids, self._logits[:size].copy_(logits)

        return compute


# --- results ---


class JudgedPrompt(NamedTuple):
    """A part of a prompt whose log-probabilities are asked for."""

    request_id: str
    start: int  # position of the first token that is judged
    token_ids: Sequence[int]  # those
    most: int  # how many of the likeliest are listed with each
    first_row: int  # of the hidden states that they are judged by


class StepOutput:
    """A step that was launched. Reading it waits only for this step, whatever was launched after it."""

    def __init__(self, runner: Runner, step: Step, judged: Sequence[JudgedPrompt]):
        self.step = step
        self.judged = judged
        self.asking = step.asking
        self.states = [runner.batch.states[step.sampled_ids[row]] for row in step.asking]
        self.logits: Tensor | None = None  # [A, ids], of those who ask
        self.asked_ids: Tensor | None = None  # [A], their new tokens
        self.hidden: Tensor | None = None  # [T, hidden], of a step in which prompts are judged
        self._logits_of = runner.model.logits
        self._queue = runner.queue
        num_sampled, num_checked = len(step.sampled_ids), len(step.checked_ids)
        padded = step.layout.num_sampled
        self.places: slice | list[int] = slice(num_sampled + num_checked)  # of the ids that count
        if num_checked and padded > num_sampled:  # on a CPU, where a list of places costs no wait
            self.places = [*range(num_sampled), *range(padded, padded + num_checked)]
        pinned = runner.model.device.type == "cuda"
        self.token_ids = torch.empty(num_sampled + num_checked, dtype=torch.int64, pin_memory=pinned)
        self.began = self._queue.mark()
        self.ended = self.began
        self._output: ModelOutput | None = None

    def result(self) -> ModelOutput:
        """Wait for the step and return what it brought, the same every time. Raises what the step raised.

        Log-probabilities are computed now, after what was launched since, so asking for them costs the overlap.
        """
        if self._output is None:
            device_times = self._queue.wait(self.began, self.ended)
            self._output = self._read()._replace(device_times=device_times)
            self.logits = self.asked_ids = self.hidden = None
        return self._output

    def _read(self) -> ModelOutput:
        step, token_ids = self.step, self.token_ids.tolist()
        sampled = dict(zip(step.sampled_ids, token_ids, strict=False))  # the others have no token ids
        failed = {}
        if min(token_ids) < 0:
            for request_id, token_id in zip((*step.sampled_ids, *step.checked_ids), token_ids, strict=True):
                if token_id < 0:
                    sampled.pop(request_id, None)
                    failed[request_id] = not_finite(request_id)
        logprobs = self._logprobs(failed) if self.asking else {}
        judged = {each.request_id: self._judge(each) for each in self.judged if each.request_id not in failed}
        return ModelOutput(sampled, step.score_entries, logprobs=logprobs, prompt_logprobs=judged, failed=failed)

    @torch.inference_mode()
    def _logprobs(self, failed: dict[str, str]) -> dict[str, TokenLogprobs]:
        """Of the requests that ask for them and have not failed."""
        entries = token_logprobs(self.logits, [each.params for each in self.states], self.asked_ids.clamp(min=0))
        named = {self.step.sampled_ids[self.asking[number]]: entry for number, entry in entries.items()}
        return {request_id: entry for request_id, entry in named.items() if request_id not in failed}

    @torch.inference_mode()
    def _judge(self, part: JudgedPrompt) -> PromptLogprobs:
        rows = self.hidden[part.first_row : part.first_row + len(part.token_ids)]
        token_ids = to_device(part.token_ids, rows.device)
        return PromptLogprobs(part.start, prompt_logprobs(self._logits_of, rows, token_ids, part.most))


class FinishedOutput(NamedTuple):
    """A step that was over when it was launched."""

    output: ModelOutput

    def result(self) -> ModelOutput:
        """What it brought."""
        return self.output


NOTHING = FinishedOutput(ModelOutput({}, 0))  # of a plan without parts
