"""An engine in a process of its own that reads commands as lines of JSON; `live.py` is the other end.

    PYTHON -I peer_process.py

PYTHON is that of an environment with vLLM. So this file imports only the standard library before the load command, and
nothing of minillm. The first input line is {"do": "load", "cores": [...], "arguments": {...}}, each of the others
{"do": "generate", "jobs": [[prompt, number of outputs], ...]}. Each is answered by one line, {"error": "..."} if it
failed. The process ends when its input does.
"""

import json
import os
import platform
import sys
import time
import traceback

# Seconds: CPU time of all threads with the system's part, wall clock, and CPU time without the system's part.
TIMERS = {"cpu": time.process_time, "wall": time.perf_counter, "user": lambda: os.times().user}


def serve(load) -> None:
    """Answer commands. `load(**arguments)` returns `generate(jobs) -> outputs` and its settings."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library's output goes to stderr
    generate = None
    for line in sys.stdin:
        wanted = json.loads(line)
        try:
            if wanted["do"] == "load":
                bind(wanted["cores"])
                generate, answer = load(**wanted["arguments"])
            else:
                seconds, outputs = timed(generate, wanted["jobs"])
                answer = {"seconds": seconds, "outputs": outputs}
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def bind(cores) -> None:
    """Bind this process and its future threads to these cores; None: no binding."""
    if cores is not None:
        os.sched_setaffinity(0, cores)


def timed(work, *given) -> tuple:
    """Seconds on each timer, and what `work(*given)` returned."""
    began = {name: read() for name, read in TIMERS.items()}
    result = work(*given)
    return {name: read() - began[name] for name, read in TIMERS.items()}, result


def load_vllm(**arguments) -> tuple:
    """vLLM's LLM in this process, greedy, without text."""
    import torch
    import transformers
    import vllm  # first, so that a missing vLLM is reported at once

    llm = vllm.LLM(**arguments)

    def generate(jobs: list) -> list:
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in jobs]
        params = [
            vllm.SamplingParams(temperature=0.0, max_tokens=number, ignore_eos=True, detokenize=False)
            for _, number in jobs
        ]
        return [list(result.outputs[0].token_ids) for result in llm.generate(prompts, params, use_tqdm=False)]

    versions = {each.__name__: each.__version__ for each in (vllm, torch, transformers)}
    return generate, {"versions": versions | {"python": platform.python_version()}, "threads": torch.get_num_threads()}


if __name__ == "__main__":
    serve(load_vllm)
