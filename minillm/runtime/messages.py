"""Plans and results as bytes, for a worker in another process: JSON, so that reading them can run no code.

A tuple or dataclass is written as a list of its fields, by position: a plan repeats no field names.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from minillm.runtime.plan import BlockMove, ModelOutput, NewRequest, ScheduledRequest, SchedulerOutput
from minillm.sampling import PromptLogprobs, SamplingParams, TokenLogprobs


def encode(message: Any) -> bytes:
    """Numbers, strings, sequences, mappings with string keys, tuples and dataclasses of these -> bytes."""
    return json.dumps(message, default=_plain, separators=(",", ":")).encode()


def decode(message: bytes) -> Any:
    """The lists, dictionaries, numbers and strings of an encoded message."""
    return json.loads(message)


def _plain(value: Any) -> Any:
    """A value that json cannot write by itself, as one that it can."""
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    if hasattr(value, "tolist"):  # token ids handed over as numpy numbers or arrays
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} cannot be sent to a worker: {value!r}")


def plan_from(fields: Sequence[Any]) -> SchedulerOutput:
    """The plan that was encoded, sequences in it as lists. TypeError for a list that is not one."""
    plan = SchedulerOutput(*fields)
    plan.others = [ScheduledRequest(*part) for part in plan.others]
    plan.new_requests = [NewRequest(name, _params(fields), *rest) for name, fields, *rest in plan.new_requests]
    plan.block_moves = [BlockMove(*move) for move in plan.block_moves]
    return plan


def _params(fields: Sequence[Any]) -> SamplingParams:
    """The parameters that were encoded: in JSON even token ids are strings where they are keys."""
    named = dict(zip((field.name for field in dataclasses.fields(SamplingParams)), fields, strict=True))
    if named["logit_bias"] is not None:
        named["logit_bias"] = {int(token_id): bias for token_id, bias in named["logit_bias"].items()}
    return SamplingParams(**named)


def output_from(fields: Sequence[Any]) -> ModelOutput:
    """The result that was encoded, sequences in it as lists. TypeError for a list that is not one."""
    output = ModelOutput(*fields)
    logprobs = {request_id: TokenLogprobs(*entry) for request_id, entry in output.logprobs.items()}
    prompts = {
        request_id: PromptLogprobs(start, [TokenLogprobs(*entry) for entry in entries])
        for request_id, (start, entries) in output.prompt_logprobs.items()
    }
    times = output.device_times
    times = None if times is None else tuple(times)
    return output._replace(logprobs=logprobs, prompt_logprobs=prompts, device_times=times)
