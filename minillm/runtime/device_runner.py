"""Carries out plans without waiting for the device: tokens stay there, and results are read when somebody asks.

A step is prepared on the host (`DeviceBatch`), brought over in one copy, computed, its token ids sent back: all of it
is handed to the device's queue, and `launch` returns. The next step may be launched before: a request whose newest
token nobody has read yet is planned with PENDING, and the token is taken from where the device keeps it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.costs import mib
from minillm.kernels import Backend
from minillm.model import Decoder
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.device_batch import Announced, DeviceBatch, Step
from minillm.runtime.device_queue import Queue, queue_for
from minillm.runtime.fused_decoder import FusedDecoder
from minillm.runtime.kernel_attention import AttentionInputs, KernelAttention
from minillm.runtime.plan import (
    PENDING,
    FinishedOutput,
    ModelOutput,
    PendingOutput,
    RunnerOptions,
    SchedulerOutput,
)
from minillm.runtime.step_graph import bucket_sizes, record
from minillm.runtime.step_inputs import Layout, StepInputs, buffer_size, carve, carve_changes
from minillm.sampling import (
    PromptLogprobs,
    SamplingState,
    TokenLogprobs,
    prompt_logprobs,
    sample,
    to_device,
    token_logprobs,
)


class DeviceRunner:
    """Runs the plans of a `PagedScheduler` with a kernel backend; with the tokens of `PagedRunner`.

    A step in which somebody asks for more than a temperature is no graph, and reading log-probabilities waits for the
    step that was launched behind it. `ops` are the small operations, `kernels/ops.py` or `kernels/triton_ops.py`.
    """

    mask_bytes = 0  # kernels see by lengths

    def __init__(
        self,
        model: Decoder,
        cache: CacheEngine,
        backend: Backend,
        ops: ModuleType,
        options: RunnerOptions,
        queue: Queue | None = None,
    ):
        """Unless `options.enforce_eager`, records a graph for every size of a decode step, if the backend can be."""
        self.model = model
        self.cache = cache
        self.backend = backend
        self.ops = ops
        self.fused = FusedDecoder(model, ops) if options.fused_ops else None
        self.queue = queue or queue_for(model.device)
        self.requests: dict[str, Announced] = {}
        self.prompts: dict[str, Sequence[int]] = {}  # of those among them that want its log-probabilities
        self.batch = DeviceBatch(cache, options.max_num_seqs, options.max_model_len, model.device.type == "cuda")
        num_rows = options.max_num_seqs + 1
        self.tables = torch.zeros(num_rows, self.batch.width, dtype=torch.int32, device=model.device)
        self.newest = torch.zeros(num_rows, dtype=torch.int64, device=model.device)  # each request's last token
        self.graphs, self.graph_bytes = {}, 0  # by number of requests, rising; what they hold on a GPU
        if backend.capturable and not options.enforce_eager:
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
        """Hand the plan of one step to the device. Waits for nothing: neither for this step nor for one before.

        A request whose logits are not finite gets no token and will be listed in `failed`; the others are not touched.
        """
        self.follow(plan)
        if not plan.scheduled:
            return FinishedOutput(ModelOutput({}, 0))
        step = self.batch.prepare(plan, list(self.graphs))
        asking = [self.requests[request_id].sampling for request_id in step.sampled_ids] if step.asking else []
        judged = self._judged(plan) if self.prompts else []
        output = DeviceOutput(self.queue, step, asking, judged, self.batch.pinned)
        self.queue.run(partial(self._run, step, output))
        output.ended = self.queue.mark()
        return output

    def follow(self, plan: SchedulerOutput) -> None:
        """Do what the plan says of requests and blocks before anything is computed."""
        changed = self.cache.follow(plan)
        for request_id in plan.finished_ids:
            self.requests.pop(request_id, None)
            self.prompts.pop(request_id, None)
        for move in plan.block_moves:
            self.queue.run(partial(self.cache.move, move))
        for new in plan.new_requests:
            state = SamplingState.of(
                new.params,
                self.model.config.num_sampled_ids,
                self.model.device,
                prompt_token_ids=new.prompt_token_ids,
                output_token_ids=new.output_token_ids,
                ending_ids=new.ending_ids,
            )
            self.requests[new.request_id] = Announced(state, new.num_tokens_at_most - new.params.max_tokens)
            if new.params.prompt_logprobs is not None:
                self.prompts[new.request_id] = new.prompt_token_ids
        self.batch.follow(changed, self.requests)

    def _judged(self, plan: SchedulerOutput) -> list["JudgedPrompt"]:
        """The parts of prompts that the step computes, of requests that want their log-probabilities."""
        judged, first = [], 0
        for part in sorted(plan.scheduled, key=lambda part: len(part.token_ids) > 1):  # as `DeviceBatch` has them
            end = part.start + len(part.token_ids)
            following = self.prompts.get(part.request_id, ())[part.start + 1 : end + 1]
            if following:
                most = self.requests[part.request_id].sampling.params.prompt_logprobs
                judged.append(JudgedPrompt(part.request_id, part.start + 1, following, most, first))
            first += end - part.start
        return judged

    # --- on the device ---

    def _run(self, step: Step, output: "DeviceOutput") -> None:
        """All that a step is to the device, in its order."""
        buffer = self._static if step.graph else self._new_buffer(len(step.buffer))
        buffer[: len(step.buffer)].copy_(step.buffer, non_blocking=True)
        if step.num_changes:
            entries, blocks = carve_changes(buffer, step.layout, step.num_changes)
            self.tables.view(-1).index_copy_(0, entries, blocks)
        if step.graph:
            token_ids = self.graphs[step.graph].replay()
        else:
            token_ids = self._compute(carve(buffer, step.layout), step.max_queries, output)
        output.token_ids.copy_(token_ids[: len(output.token_ids)], non_blocking=True)

    def _new_buffer(self, size: int) -> Tensor:
        """Zeros: as the inputs of a step they are of no request, and only the null block is written to."""
        return torch.zeros(size, dtype=torch.int64, device=self.model.device)

    def _compute(self, inputs: StepInputs, max_queries: int = 0, output: "DeviceOutput | None" = None) -> Tensor:
        """[R + F] the new token of each request that gets one, and 0 for the others; -1 where it is not finite."""
        attend = KernelAttention(self.cache, self._attention_inputs(inputs, max_queries), self.backend)
        hidden = self._forward(self._token_ids(inputs), inputs.positions, attend)  # [T, hidden]
        if output is not None and output.judged:
            output.hidden, output.logits_of = hidden, self.model.logits
        found = []
        if len(inputs.sampled_rows):
            picked = hidden.index_select(0, inputs.picked) if len(inputs.picked) else hidden
            found.append(self._sample(self.model.logits(picked), inputs, output))
            # An unusable id must not be looked up: the failed request may be in a step that is launched already.
            self.newest.index_copy_(0, inputs.sampled_rows, found[0].clamp(min=0))
        if len(inputs.checked):
            finite = hidden.index_select(0, inputs.checked).isfinite().all(-1)  # [F]
            found.append(finite.to(torch.int64) - 1)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _attention_inputs(self, inputs: StepInputs, max_queries: int) -> AttentionInputs:
        return AttentionInputs(
            slots=inputs.slots,
            num_decodes=len(inputs.decode_rows),
            decode_tables=self.tables.index_select(0, inputs.decode_rows),
            decode_lengths=inputs.decode_lengths,
            chunk_tables=self.tables.index_select(0, inputs.chunk_rows),
            chunk_starts=inputs.chunk_starts,
            chunk_lengths=inputs.chunk_lengths,
            max_queries=max_queries,
        )

    def _token_ids(self, inputs: StepInputs) -> Tensor:
        """[T] the step's tokens; what is PENDING is what the request got last."""
        count = len(inputs.decode_rows)
        known = inputs.token_ids[:count]
        decodes = torch.where(known == PENDING, self.newest.index_select(0, inputs.decode_rows), known)
        return decodes if count == len(inputs.token_ids) else torch.cat((decodes, inputs.token_ids[count:]))

    def _forward(self, token_ids: Tensor, positions: Tensor, attend: KernelAttention) -> Tensor:
        if self.fused:
            return self.fused(token_ids, positions, attend)
        return self.model(token_ids, positions, attend)

    def _sample(self, logits: Tensor, inputs: StepInputs, output: "DeviceOutput | None") -> Tensor:
        """[R, ids] logits -> [R] token ids."""
        if output is None or not output.asking:
            return self.ops.sample_rows(logits, inputs.temperatures, inputs.seeds, inputs.draws)
        token_ids = sample(logits, output.asking, inputs.draws, self.ops.sample_rows)
        output.logits, output.sampled = logits, token_ids
        return token_ids

    # --- graphs ---

    def _record_graphs(self, sizes: Sequence[int]) -> None:
        """Record a decode step of each size; all read their inputs from the beginning of one buffer."""
        device = self.model.device
        self._static = self._new_buffer(buffer_size(Layout.of_decodes(sizes[-1]), self.tables.numel()))
        with torch.inference_mode():
            free = free_bytes(device)
            self.graphs = record({size: self._decode_step(size) for size in sizes}, device)
            self.graph_bytes = free - free_bytes(device)

    def _decode_step(self, size: int) -> Callable[[], Tensor]:
        inputs = carve(self._static, Layout.of_decodes(size))

        def compute() -> Tensor:
            return self._compute(inputs)

        return compute


# --- results ---


class JudgedPrompt(NamedTuple):
    """A part of a prompt whose log-probabilities are wanted."""

    request_id: str
    start: int  # position of the first token that is judged
    token_ids: Sequence[int]  # those
    most: int  # so many of the likeliest are told beside each
    first_row: int  # of the hidden states that they are judged by


class DeviceOutput:
    """A step that was launched. Reading it waits for this step alone, whatever was launched behind it.

    `asking` are the requests that get a token, if one of them asks for more than a temperature.
    """

    def __init__(
        self, queue: Queue, step: Step, asking: Sequence[SamplingState], judged: Sequence[JudgedPrompt], pinned: bool
    ):
        self.asking = asking
        self.judged = judged
        self.logits: Tensor | None = None  # [R, ids], of a step in which somebody is asking
        self.sampled: Tensor | None = None  # [R], the same of its tokens
        self.hidden: Tensor | None = None  # [T, hidden], of a step in which prompts are judged
        self.logits_of: Callable[[Tensor], Tensor] | None = None  # of such hidden states
        self._queue = queue
        self._step = step
        num_ids = len(step.sampled_ids) + len(step.checked_ids)
        self.token_ids = torch.empty(num_ids, dtype=torch.int64, pin_memory=pinned)
        self.began = queue.mark()
        self.ended = self.began
        self._output: ModelOutput | None = None

    def result(self) -> ModelOutput:
        """Wait for the step and read what came of it. Raises what the step raised. The same every time.

        Log-probabilities are computed now, behind what was launched since: whoever asks for them gives up the overlap.
        """
        if self._output is None:
            device_times = self._queue.wait(self.began, self.ended)
            self._output = self._read()._replace(device_times=device_times)
            self.logits = self.sampled = self.hidden = None
        return self._output

    def _read(self) -> ModelOutput:
        step, token_ids = self._step, self.token_ids.tolist()
        request_ids = [*step.sampled_ids, *step.checked_ids]
        failed = {
            request_id: f"what the model computed for request {request_id!r} is not finite; its cache was discarded"
            for request_id, token_id in zip(request_ids, token_ids, strict=True)
            if token_id < 0
        }
        sampled = dict(zip(step.sampled_ids, token_ids, strict=False))  # token ids of the others are none
        for request_id in failed:
            sampled.pop(request_id, None)
        logprobs = self._logprobs(failed) if self.asking else {}
        judged = {each.request_id: self._judge(each) for each in self.judged if each.request_id not in failed}
        return ModelOutput(sampled, step.score_entries, logprobs=logprobs, prompt_logprobs=judged, failed=failed)

    @torch.inference_mode()
    def _logprobs(self, failed: dict[str, str]) -> dict[str, TokenLogprobs]:
        """Of the requests that ask for them and have not failed."""
        params = [each.params for each in self.asking]
        entries = token_logprobs(self.logits, params, self.sampled.clamp(min=0))
        request_ids = self._step.sampled_ids
        return {request_ids[row]: entry for row, entry in entries.items() if request_ids[row] not in failed}

    @torch.inference_mode()
    def _judge(self, part: JudgedPrompt) -> PromptLogprobs:
        rows = self.hidden[part.first_row : part.first_row + len(part.token_ids)]
        token_ids = to_device(part.token_ids, rows.device)
        return PromptLogprobs(part.start, prompt_logprobs(self.logits_of, rows, token_ids, part.most))


def free_bytes(device: torch.device) -> int:
    """Bytes free on a GPU, with what torch keeps of no tensor given back before; 0 on a CPU, where nobody asks."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
