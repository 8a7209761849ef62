"""What happens to logits before temperature: forbidden endings, biases and penalties."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from minillm.sampling.params import SamplingParams
from minillm.sampling.tensors import to_device


class LogitsProcessor:
    """What one request asks for before its temperature; it counts the tokens that the request has.

    In vLLM's order: `min_tokens` (ending tokens get -infinity), `logit_bias`, then the penalties. All counts stay on
    the device, so that no step waits for a token.
    """

    def __init__(
        self,
        params: SamplingParams,
        num_ids: int,
        device: torch.device | str = "cpu",
        *,
        prompt_token_ids: Iterable[int] = (),
        output_token_ids: Iterable[int] = (),
        ending_ids: Iterable[int] = (),
    ):
        """The tokens that the request has already, and those that end it. Ids from `num_ids` on have no logits."""

        def known(token_ids: Iterable[int]) -> list[int]:
            return [token_id for token_id in token_ids if token_id < num_ids]

        self.params = params
        self._ending_ids = to_device(known(ending_ids) if params.min_tokens else [], device)
        biased = known(params.logit_bias or ())
        self._biased_ids = to_device(biased, device)
        self._biases = to_device([params.logit_bias[token_id] for token_id in biased], device, torch.float32)
        if params.penalizes:
            self._in_prompt = torch.zeros(num_ids, dtype=torch.bool, device=device)
            self._in_prompt.index_fill_(0, to_device(known(prompt_token_ids), device), True)
            self._counts = torch.zeros(num_ids, device=device)  # how often each token is in the output
            self.count(to_device(known(output_token_ids), device))

    def process(self, logits: Tensor, draw: Tensor) -> None:
        """Change the [V] logits of the request's output token number `draw` in place; float32 or float64."""
        params = self.params
        if params.min_tokens:
            ending = logits.index_select(0, self._ending_ids)
            logits.index_copy_(0, self._ending_ids, ending.masked_fill(draw < params.min_tokens, -math.inf))
        if params.logit_bias:
            logits.index_add_(0, self._biased_ids, self._biases.to(logits.dtype))
        if params.penalizes:
            in_output = self._counts > 0
            repeated = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits.copy_(torch.where(self._in_prompt | in_output, repeated, logits))
            logits -= params.frequency_penalty * self._counts + params.presence_penalty * in_output

    def count(self, token_ids: Tensor) -> None:
        """[n] tokens that the request has got; -1 for one that failed, which does not count."""
        if self.params.penalizes:
            self._counts.index_add_(0, token_ids.clamp(min=0), torch.ones_like(token_ids, dtype=self._counts.dtype))
