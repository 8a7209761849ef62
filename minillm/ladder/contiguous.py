"""The executor of chapters 5 to 7: every running request has one contiguous row of the cache."""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.ladder.attend import PaddedAttention, Part, RaggedAttention
from minillm.ladder.kv_cache import RowCache
from minillm.model import Decoder
from minillm.runtime import ModelOutput, ScheduledRequest, SchedulerOutput, not_finite
from minillm.sampling import SamplingState, sample, sample_rows

PAD_TOKEN_ID = 0  # what pads are computed as; they are not seen, so any id will do


class ContiguousExecutor:
    """Runs plans on a model: ragged ones as they are, padded ones as a rectangle with all its pads.

    Reserves `max_num_seqs` rows of `max_model_len` tokens when it is made.
    """

    def __init__(
        self, model: Decoder, max_num_seqs: int, max_model_len: int, sample_rows: Callable[..., Tensor] = sample_rows
    ):
        """`sample_rows` draws tokens; by default that of `sampling`."""
        self.model = model
        self.sample_rows = sample_rows
        self.cache = RowCache(model.config, max_num_seqs, max_model_len, model.dtype, model.device)
        self.rows: dict[str, int] = {}
        self.token_ids: dict[str, list[int]] = {}  # prompt and output of every running request
        self.states: dict[str, tuple[SamplingState, int]] = {}  # of every running request, and the length of its prompt

    @torch.inference_mode()
    def execute_model(self, plan: SchedulerOutput) -> ModelOutput:
        """One forward pass over the plan; returns new tokens for the requests whose last token was computed."""
        self._follow(plan)
        if not plan.num_requests:
            return ModelOutput({}, 0)
        padded = plan.row_length is not None
        hidden, last_rows, score_entries = self._padded_pass(plan) if padded else self._ragged_pass(plan)
        sampling = [row for row, part in zip(last_rows, plan.scheduled, strict=True) if part.samples]
        parts = [part for part in plan.scheduled if part.samples]
        if not parts:
            return ModelOutput({}, score_entries)
        states, num_prompt_tokens = zip(*(self.states[part.request_id] for part in parts), strict=True)
        draws = [part.end - num for part, num in zip(parts, num_prompt_tokens, strict=True)]
        token_ids = sample(self.model.logits(hidden[sampling]), states, draws, self.sample_rows).tolist()
        sampled, failed = {}, {}
        for part, token_id in zip(parts, token_ids, strict=True):
            if token_id < 0:
                failed[part.request_id] = not_finite(part.request_id)
            else:
                sampled[part.request_id] = token_id
                self.token_ids[part.request_id].append(token_id)
        return ModelOutput(sampled, score_entries, failed=failed)

    def _follow(self, plan: SchedulerOutput) -> None:
        """Give rows back and take new ones, as the plan says."""
        for request_id in plan.finished_ids:
            if request_id in self.rows:
                self.cache.release(self.rows.pop(request_id))
                del self.states[request_id], self.token_ids[request_id]
        for new in plan.new_requests:
            self.rows[new.request_id] = self.cache.take(new.num_tokens_at_most)
            self.token_ids[new.request_id] = [*new.prompt_token_ids, *new.output_token_ids]
            num_ids, device = self.model.config.num_sampled_ids, self.model.device
            state = SamplingState.of(new.params, num_ids, device, **new.known_tokens)
            self.states[new.request_id] = (state, len(new.prompt_token_ids))

    def _part(self, scheduled: ScheduledRequest) -> Part:
        return Part(self.rows[scheduled.request_id], scheduled.start, scheduled.num_tokens)

    def _new_ids(self, scheduled: ScheduledRequest) -> list[int]:
        return self.token_ids[scheduled.request_id][scheduled.start : scheduled.end]

    def _ragged_pass(self, plan: SchedulerOutput) -> tuple[torch.Tensor, list[int], int]:
        """All new tokens one after the other, [T]; returns hidden states, each request's last row, score entries."""
        parts = [self._part(scheduled) for scheduled in plan.scheduled]
        token_ids = [token_id for scheduled in plan.scheduled for token_id in self._new_ids(scheduled)]
        positions = [position for part in parts for position in range(part.start, part.end)]
        attend = RaggedAttention(self.model.config, self.cache, parts, self.model.device)
        hidden = self._forward(token_ids, positions, attend)
        last_rows, end = [], 0
        for part in parts:
            end += part.num_tokens
            last_rows.append(end - 1)
        return hidden, last_rows, attend.score_entries

    def _padded_pass(self, plan: SchedulerOutput) -> tuple[torch.Tensor, list[int], int]:
        """A rectangle of rows * row_length tokens, pads in front; rows of ended requests are only pads."""
        length = plan.row_length
        rows = [(self._part(scheduled), self._new_ids(scheduled)) for scheduled in plan.scheduled]
        rows += [(Part(self.rows[request_id], 0, 0), ()) for request_id in plan.padding_rows]
        order = sorted(range(len(rows)), key=lambda row: rows[row][0].row)  # neighbouring rows are read without a copy
        parts = [rows[row][0] for row in order]
        token_ids, positions, last_rows = [], [], [0] * len(rows)
        for row in order:
            part, new_ids = rows[row]
            num_pads = length - part.num_tokens
            token_ids += [PAD_TOKEN_ID] * num_pads + list(new_ids)
            positions += [0] * num_pads + list(range(part.start, part.end))
            last_rows[row] = len(token_ids) - 1
        attend = PaddedAttention(self.model.config, self.cache, parts, length, self.model.device)
        hidden = self._forward(token_ids, positions, attend)
        return hidden, last_rows[: plan.num_requests], attend.score_entries

    def _forward(self, token_ids: list[int], positions: list[int], attend) -> torch.Tensor:
        device = self.model.device
        return self.model(torch.tensor(token_ids, device=device), torch.tensor(positions, device=device), attend)
