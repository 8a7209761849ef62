"""The three workloads, the same on every machine: W1 (nano-vllm's benchmark), W2 (one user), W3 (Anyscale's).

W1's lengths and tokens come from Python's `random` with seed 0 in the order in which nano-vllm's bench.py draws them:
for each request the length of its prompt and then its tokens, and after all prompts the length of each output.
W3: Anyscale, "How continuous batching enables 23x throughput in LLM inference" (2023), its widest distribution.
"""

import random
from collections.abc import Sequence

from minillm.bench.contenders import Job
from minillm.bench.gpu.scale import Lengths, Scale

TEMPERATURE = 0.6  # of all three, as in nano-vllm's benchmark
W1_TOTALS = (142_827, 133_966)  # prompt and output tokens of the workload in published results


def w1_jobs(scale: Scale) -> list[Job]:
    """nano-vllm's requests. Raises AssertionError if the full workload differs from the published one."""
    jobs = uniform_jobs(scale.w1)
    if scale.is_full and totals(jobs) != W1_TOTALS:
        raise AssertionError(f"W1 has {totals(jobs)} prompt and output tokens instead of {W1_TOTALS}")
    return jobs


def uniform_jobs(lengths: Lengths) -> list[Job]:
    """Prompts and outputs of uniform length, both ends included."""
    rng = random.Random(0)

    def length() -> int:
        return rng.randint(lengths.shortest, lengths.longest)

    prompts = [[rng.randint(0, lengths.highest_token) for _ in range(length())] for _ in range(lengths.requests)]
    return [Job(prompt, length()) for prompt in prompts]


def w2_jobs(scale: Scale) -> list[Job]:
    """One request of a single user."""
    prompt_tokens, output_tokens = scale.w2_tokens
    return [Job(list(range(1, prompt_tokens + 1)), output_tokens)]


def w3_jobs(scale: Scale) -> list[Job]:
    """Prompts of one length, outputs of exponential length, rounded, at least 1 and at most the cap."""
    rng = random.Random(0)
    outputs = [rng.expovariate(1 / scale.w3_mean_output) for _ in range(scale.w3_requests)]
    return [
        Job(
            [rng.randint(0, scale.w1.highest_token) for _ in range(scale.w3_prompt)],
            min(scale.w3_longest_output, max(1, round(output))),
        )
        for output in outputs
    ]


def totals(jobs: Sequence[Job]) -> tuple[int, int]:
    """The total number of prompt tokens and of output tokens."""
    return sum(len(job.prompt) for job in jobs), sum(job.num_outputs for job in jobs)
