"""Requests planned by hand for the runner's tests: known lengths, and who computes what in which step."""

import random
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from typing import NamedTuple

from minillm import SamplingParams, generate_cached
from minillm.costs.kv_bytes import blocks_needed
from minillm.runtime.plan import NewRequest, ScheduledRequest, SchedulerOutput


class Job(NamedTuple):
    """A request, and when and how it is computed. It gets `params.max_tokens` tokens, whatever they are."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    joins: int = 0  # step
    chunk: int = 1000  # tokens of its prompt in a step, at most


def ladder(model, jobs):
    """request id -> the tokens that each of them gets alone, on a contiguous cache."""
    params = [replace(job.params, ignore_eos=True) for job in jobs]
    pairs = zip(jobs, params, strict=True)
    return {job.request_id: list(generate_cached(model, job.prompt, each).token_ids) for job, each in pairs}


def run_jobs(runner, jobs, num_blocks, block_size, ahead=False, launching=nullcontext):
    """request id -> its tokens, and all outputs. `ahead`: each step is launched before the last one has been read.

    `launching` is a context manager around each launch. A failed request is heard of no more.
    """
    known, outputs, unread = defaultdict(list), [], None
    for plan in plans(jobs, num_blocks, block_size):
        with launching():
            pending = runner.launch(plan)
        to_read, unread = (unread, pending) if ahead else (pending, None)
        if to_read is not None:
            take(to_read, known, outputs)
    if unread is not None:
        take(unread, known, outputs)
    return {job.request_id: known[job.request_id] for job in jobs}, outputs


def take(pending, known, outputs):
    output = pending.result()
    outputs.append(output)
    for request_id, token_id in output.token_ids.items():
        known[request_id].append(token_id)


def shuffled_blocks(num_blocks):
    """The blocks in the order in which they will be handed out, the first one last."""
    return random.Random(0).sample(range(1, num_blocks), num_blocks - 1)


def plans(jobs, num_blocks, block_size):
    """One plan after the other. Freed blocks and rows go to whoever comes next."""
    free = shuffled_blocks(num_blocks)
    computed, tables, ended = {}, {}, []
    for step in count():
        plan = SchedulerOutput(step, 0.0, finished_ids=ended)
        for name in ended:
            free += tables.pop(name)
        ended = []
        for job in jobs:
            name, start = job.request_id, computed.get(job.request_id, 0)
            if job.joins > step or start is None:
                continue
            if start == 0:
                plan.new_requests.append(NewRequest(name, job.params, job.prompt))
                tables[name] = []
            end = min(start + job.chunk, len(job.prompt)) if start < len(job.prompt) else start + 1
            new_blocks = [free.pop() for _ in range(blocks_needed(end, block_size) - len(tables[name]))]
            if end > len(job.prompt) and not new_blocks:
                plan.decodes[name] = start
            else:
                part = (name, start, end - start, end >= len(job.prompt), "decode", len(tables[name]), new_blocks)
                plan.others.append(ScheduledRequest(*part))
            plan.num_tokens += end - start
            tables[name] += new_blocks
            computed[name] = end
            if end == len(job.prompt) + job.params.max_tokens - 1:
                computed[name] = None
                ended.append(name)
        if not plan.num_requests:
            return
        yield plan
