"""Carries out plans on a paged cache: follows the block tables, prepares the inputs, one forward pass, new tokens."""

import time
from collections.abc import Mapping, Sequence
from itertools import chain
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from minillm.kernels import Backend
from minillm.model import Decoder
from minillm.runtime.cache_engine import CacheEngine
from minillm.runtime.fused_decoder import FusedDecoder
from minillm.runtime.kernel_attention import KernelAttention, attention_inputs
from minillm.runtime.paged_attention import Chunk, PagedAttention, PagedBatch
from minillm.runtime.plan import PENDING, ModelOutput, ScheduledRequest, SchedulerOutput
from minillm.sampling import (
    PromptLogprobs,
    SamplingState,
    prompt_logprobs,
    sample,
    sample_rows,
    to_device,
    token_logprobs,
)

FEWEST_ROWS = 4  # that the CPU's matrix product takes at once: it does 2 or 3 one after the other, 3 slower than 4


def rows_computed(num_rows: int, device: torch.device) -> int:
    """How many rows a step of so many is padded to. 135M parameters on one CPU thread: 3 rows 64 ms, 4 rows 41 ms."""
    return FEWEST_ROWS if device.type == "cpu" and 1 < num_rows < FEWEST_ROWS else num_rows


class PagedRunner:
    """Runs the plans of a `PagedScheduler` on a model.

    It remembers of a request what plans do not repeat: its block table and how it is sampled; and of the last step what
    was sampled, because the next one may have been planned before that was known.
    """

    def __init__(
        self, model: Decoder, cache: CacheEngine, backend: Backend | None = None, ops: ModuleType | None = None
    ):
        """With a `backend` its kernels attend, and small operations are `ops`, fused; else both are plain torch."""
        self.model = model
        self.cache = cache
        self.backend = backend
        self.fused = FusedDecoder(model, ops) if ops else None
        self.sample_rows = ops.sample_rows if ops else sample_rows
        self.states: dict[str, tuple[SamplingState, int]] = {}  # of every request announced, and its prompt's length
        self.prompts: dict[str, Sequence[int]] = {}  # of those among them that want its log-probabilities
        self.sampled: Mapping[str, int] = {}  # in the last step: what PENDING stands for in the next
        self.mask_bytes = 0  # of the last step

    @torch.inference_mode()
    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """One forward pass over all that is planned; new tokens for the requests whose last token was computed.

        A request whose logits are not finite gets no token and is listed in `failed`; the others are not touched by it.
        """
        self.follow(plan)
        if not plan.scheduled:
            return ModelOutput({}, 0)
        batch, newest_rows = self.prepare(plan)
        attend = self.attention(batch)
        begin = time.perf_counter()
        output = self._compute(plan, batch, newest_rows, attend)
        self.sampled = output.token_ids
        return output._replace(score_entries=attend.score_entries, device_times=(begin, time.perf_counter()))

    def attention(self, batch: PagedBatch) -> PagedAttention | KernelAttention:
        """What attends in a step: all that its layers have in common, made once."""
        if self.backend is None:
            attend = PagedAttention(self.cache, batch, self.model.device)
            self.mask_bytes = attend.mask_bytes
            return attend
        inputs = attention_inputs(batch, rows_computed(len(batch.positions), self.model.device))
        return KernelAttention(self.cache, inputs, self.backend)

    def _compute(
        self,
        plan: SchedulerOutput,
        batch: PagedBatch,
        newest_rows: dict[str, int],
        attend: PagedAttention | KernelAttention,
    ) -> ModelOutput:
        token_ids, positions = self._padded(batch.token_ids), self._padded(batch.positions)
        hidden = self._forward(token_ids, positions, attend)  # [T, hidden]
        judged = self._judge_prompts(plan, hidden, newest_rows) if self.prompts else {}
        output = self._sample_newest(plan, hidden, newest_rows)
        return output._replace(prompt_logprobs={each: judged[each] for each in judged if each not in output.failed})

    def _sample_newest(self, plan: SchedulerOutput, hidden: Tensor, newest_rows: dict[str, int]) -> ModelOutput:
        """What comes of the requests' newest tokens, whose hidden states are in these rows."""
        failed, samplers = {}, newest_rows
        unfinished = [part[0] for part in plan.scheduled if not part[3]]  # request_id, samples: once a token as well
        if unfinished:
            samplers = {request_id: row for request_id, row in newest_rows.items() if request_id not in unfinished}
            newest = hidden[[newest_rows[request_id] for request_id in unfinished]]
            failed = self._not_finite(unfinished, newest.abs())
        if not samplers:
            return ModelOutput({}, 0, failed=failed)
        rows = self._padded(np.fromiter(samplers.values(), np.int64, len(samplers)))
        logits = self.model.logits(hidden.index_select(0, rows))[: len(samplers)]  # [R, ids]
        failed |= self._not_finite(list(samplers), logits)
        ends = {part.request_id: part.start + len(part.token_ids) for part in plan.scheduled}
        return self._sample(ends, list(samplers), logits, failed)

    def _forward(self, token_ids: Tensor, positions: Tensor, attend: PagedAttention | KernelAttention) -> Tensor:
        if self.fused is None:
            return self.model(token_ids, positions, attend)
        return self.fused(token_ids, positions, attend)

    def _judge_prompts(
        self, plan: SchedulerOutput, hidden: Tensor, newest_rows: dict[str, int]
    ) -> dict[str, PromptLogprobs]:
        """Log-probabilities of prompts' tokens, each made of the hidden state before it."""
        judged = {}
        for request_id, start, token_ids, *_ in plan.scheduled:
            following = self.prompts.get(request_id, ())[start + 1 : start + len(token_ids) + 1]
            if following:
                first = newest_rows[request_id] - len(token_ids) + 1
                rows, ids = hidden[first : first + len(following)], to_device(following, hidden.device)
                most = self.states[request_id][0].params.prompt_logprobs
                judged[request_id] = PromptLogprobs(start + 1, prompt_logprobs(self.model.logits, rows, ids, most))
        return judged

    def follow(self, plan: SchedulerOutput) -> None:
        """Do what the plan says of requests and blocks before anything is computed."""
        changed = self.cache.follow(plan)
        for request_id in plan.finished_ids:
            self.states.pop(request_id, None)
            self.prompts.pop(request_id, None)
        for move in plan.block_moves:
            self.cache.move(move)
        if self.backend is None:  # masked attention multiplies what it does not see by 0; kernels do not read it
            self.cache.clear(changed)
        for new in plan.new_requests:
            state = SamplingState.of(
                new.params,
                self.model.config.num_sampled_ids,
                self.model.device,
                prompt_token_ids=new.prompt_token_ids,
                output_token_ids=new.output_token_ids,
                ending_ids=new.ending_ids,
            )
            self.states[new.request_id] = state, new.num_tokens_at_most - new.params.max_tokens
            if new.params.prompt_logprobs is not None:
                self.prompts[new.request_id] = new.prompt_token_ids

    def prepare(self, plan: SchedulerOutput) -> tuple[PagedBatch, dict[str, int]]:
        """The inputs of the step, and for every request in it the row of its newest token.

        Requests with one new token first, by position; then those with several. Column by column, because the lines
        that run once a request and step are what an engine waits for.
        """
        decodes, chunks = plan.scheduled, []
        if plan.num_tokens > len(decodes):
            decodes = [part for part in plan.scheduled if len(part.token_ids) == 1]
            chunks = [part for part in plan.scheduled if len(part.token_ids) > 1]
        batch, newest_rows = self._prepare_decodes(decodes)
        if chunks:
            batch = self._with_chunks(batch, chunks, newest_rows)
        return batch, newest_rows

    def _prepare_decodes(self, parts: list[ScheduledRequest]) -> tuple[PagedBatch, dict[str, int]]:
        if not parts:
            nothing = np.zeros(0, dtype=np.int64)
            return PagedBatch(nothing, nothing, nothing, nothing.reshape(0, 0), []), {}
        cache, count = self.cache, len(parts)
        request_ids, starts, token_ids, *_ = zip(*parts, strict=True)
        starts = np.fromiter(starts, np.int64, count)
        order = np.argsort(starts, kind="stable")
        positions = starts[order]
        table_rows = np.fromiter(map(cache.rows.__getitem__, request_ids), np.int64, count)[order]
        width = 1 + int(positions[-1]) // cache.block_size
        tables = cache.block_tables[table_rows, :width]  # [decodes, W]
        block_numbers, offsets = np.divmod(positions, cache.block_size)
        slots = tables[np.arange(count), block_numbers] * cache.block_size + offsets
        token_ids = np.fromiter(chain.from_iterable(token_ids), np.int64, count)
        for number in np.flatnonzero(token_ids == PENDING):  # 0: it failed, and what comes of this is not wanted
            token_ids[number] = self.sampled.get(request_ids[number], 0)
        token_ids = token_ids[order]
        newest_rows = {request_ids[number]: row for row, number in enumerate(order.tolist())}
        return PagedBatch(token_ids, positions, slots, tables, []), newest_rows

    def _with_chunks(self, batch: PagedBatch, parts: list[ScheduledRequest], newest_rows: dict[str, int]) -> PagedBatch:
        """The inputs with those of requests that compute several tokens behind them; completes `newest_rows`."""
        cache = self.cache
        token_ids, positions, slots, chunks = [batch.token_ids], [batch.positions], [batch.slots], []
        row = len(batch.tables)
        for part in parts:
            table = cache.block_tables[cache.rows[part.request_id]]
            chunk = Chunk(part.request_id, row, part.start, part.start + len(part.token_ids), table)
            new = np.arange(chunk.start, chunk.end)
            block_numbers, offsets = np.divmod(new, cache.block_size)
            chunks.append(chunk)
            token_ids.append(np.array(part.token_ids, dtype=np.int64))
            positions.append(new)
            slots.append(table[block_numbers] * cache.block_size + offsets)
            row = chunk.end_row
            newest_rows[part.request_id] = row - 1
        whole = (np.concatenate(each) for each in (token_ids, positions, slots))
        return PagedBatch(*whole, batch.tables, chunks)

    def _padded(self, values: np.ndarray) -> Tensor:
        """One number a row, with zeros for the rows of padding, on the model's device."""
        num_pads = rows_computed(len(values), self.model.device) - len(values)
        if num_pads:
            values = np.concatenate((values, np.zeros(num_pads, values.dtype)))
        return torch.from_numpy(values).to(self.model.device)

    def _not_finite(self, request_ids: list[str], values: Tensor) -> dict[str, str]:
        """The requests whose row of [R, ...] values is not finite, and how to say so.

        Before its last chunk a request has no logits, but whatever is not finite in its cache has reached the hidden
        state of its newest token: nothing of it gets into the prefix cache.
        """
        finite = values.amax(-1).isfinite()  # [R]; for amax NaN is the largest of all
        if finite.all():
            return {}
        failed = [request_id for request_id, good in zip(request_ids, finite.tolist(), strict=True) if not good]
        return {
            request_id: f"what the model computed for request {request_id!r} is not finite; its cache was discarded"
            for request_id in failed
        }

    def _sample(
        self, ends: dict[str, int], request_ids: list[str], logits: Tensor, failed: dict[str, str]
    ) -> ModelOutput:
        """New tokens for the requests that have not failed, each from its row of logits."""
        if failed:
            rows = [row for row, request_id in enumerate(request_ids) if request_id not in failed]
            request_ids, logits = [request_ids[row] for row in rows], logits[rows]
        if not request_ids:
            return ModelOutput({}, 0, failed=failed)
        states, num_prompt_tokens = zip(*[self.states[request_id] for request_id in request_ids], strict=True)
        draws = [ends[request_id] - num for request_id, num in zip(request_ids, num_prompt_tokens, strict=True)]
        token_ids = sample(logits, states, draws, self.sample_rows)
        asked = token_logprobs(logits, [state.params for state in states], token_ids)
        return ModelOutput(
            dict(zip(request_ids, token_ids.tolist(), strict=True)),
            0,
            logprobs={request_ids[row]: each for row, each in asked.items()},
            failed=failed,
        )
