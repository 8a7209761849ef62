"""Contenders in a process of their own: vLLM's CPU build, and ours with a different number of threads.

`minillm bench engine --vllm PYTHON` takes the Python of an environment with vLLM; CONTRIBUTING.md says how to make one.

vLLM runs with its best settings: compiled, with the recommended allocator and OpenMP preloaded, its default block size,
and one process. To be fair, both engines have the same cores, limits, weights, prompts and output lengths. Both are
greedy, ignore eos, share no prefixes and make no text. Loading and whole warm-ups are not timed.
"""

import ctypes.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from minillm.bench import peer_process
from minillm.bench.contenders import Job, Ours
from minillm.errors import ConfigError, PeerError, shown

MOST_SECONDS = 1200  # for one answer: vLLM compiles for one or two minutes before its first
TOLD = 3  # last output lines of a dead process that an error quotes
CACHE_GIB = 2  # of vLLM's pool; the workloads need less


class LiveProcess:
    """An engine in another process, with the protocol of `peer_process`. Raises PeerError if it fails or ends."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: dict,
        cores: Sequence[int] | None,
        load: dict,
        advice: str = "",
    ):
        """`environment` is added to ours; `cores` to bind it to, None for any; `load`: the arguments of its load.

        `advice` is appended to errors.
        """
        self.name, self.advice = name, advice
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  its output, for errors; closed in `close`
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
            text=True,
            env=os.environ | environment,
        )
        try:
            answer = self._ask(do="load", cores=cores and list(cores), arguments=load)
        except BaseException:
            self.close()
            raise
        self.settings = {"engine": name, **load, **answer, "cores": cores, "environment": environment}
        del self.settings["model"]  # a folder of this machine
        self.seconds: dict[str, float] = {}  # on each timer, of the last `generate`, measured in that process

    def generate(self, jobs: Sequence[Job]) -> list[tuple[int, ...]]:
        answer = self._ask(do="generate", jobs=jobs)
        self.seconds = answer["seconds"]
        return [tuple(output) for output in answer["outputs"]]

    def _ask(self, **wanted) -> dict:
        """Send one line, return its answer."""
        patience = threading.Timer(MOST_SECONDS, self.process.kill)
        patience.start()
        try:
            print(json.dumps(wanted), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            patience.cancel()
        if not line:
            raise PeerError(f"the process of {self.name} ended with status {self.process.wait()}{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name} could not {wanted['do']}: {answer['error']}{self._last_words()}")
        return answer

    def _last_words(self) -> str:
        """The last lines of its output, and the advice, as the rest of a sentence."""
        self.said.seek(0)
        lines = [line.strip() for line in self.said if line.strip()]
        said = f"; it said last: {' | '.join(lines[-TOLD:])}" if lines else ""
        return f"{said}{self.advice}"

    def close(self) -> None:
        """End the process."""
        self.process.stdout.close()
        try:
            self.process.stdin.close()
            self.process.wait(10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.said.close()


def vllm(python: str, folder: Path, dtype: str, limits: dict, threads: int, cores: Sequence[int] | None, eager: bool):
    """vLLM in the environment of `python`, with the checkpoint in `folder`, compiled unless `eager`.

    `limits` are max_num_seqs, max_num_batched_tokens and max_model_len.
    """
    load = {
        "model": str(folder),
        "dtype": dtype,
        "enforce_eager": eager,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,  # the prompts are the same in every turn
        "disable_log_stats": True,
        **limits,
    }
    environment = thread_environment(threads) | {
        "LD_PRELOAD": ":".join(preloads(python)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind" if cores is None else ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
    }
    advice = "; CONTRIBUTING.md says how an environment for it is made; without --vllm none is needed"
    process = LiveProcess("vllm", [python, "-I", peer_process.__file__], environment, cores, load, advice)
    process.settings["environment"] = environment | {"LD_PRELOAD": [Path(each).name for each in preloads(python)]}
    return process


def check_vllm(python: str) -> str:
    """The path of the program `python`. Raises ConfigError if it, or a library to preload, is missing."""
    found = shutil.which(python)
    if found is None:
        raise ConfigError(f"--vllm {shown(python)} is no program; give the Python of an environment with vLLM")
    preloads(found)
    return found


def preloads(python: str) -> list[str]:
    """The libraries vLLM's documentation says to preload. Raises ConfigError if one is missing: vLLM would be slow."""
    found = {"libtcmalloc_minimal (Debian: libtcmalloc-minimal4)": ctypes.util.find_library("tcmalloc_minimal")}
    if platform.machine() == "x86_64":
        openmp = Path(python).absolute().parent.parent / "lib" / "libiomp5.so"
        found["libiomp5 (pip install intel-openmp, in vLLM's environment)"] = openmp.exists() and str(openmp)
    if missing := [name for name, library in found.items() if not library]:
        raise ConfigError(f"--vllm: vLLM is not at its best without {' and '.join(missing)}; install that")
    return list(found.values())


# --- ours ------------------------------------------------------------------------------------------------------------


def ours(folder: Path, dtype: str, arguments: dict, threads: int, cores: Sequence[int] | None) -> LiveProcess:
    """Our engine with a different number of threads, which must be set before torch is loaded."""
    load = {"model": str(folder), "dtype": dtype, "arguments": arguments}
    command = [sys.executable, "-m", "minillm.bench.live"]
    return LiveProcess(f"minillm with {threads} threads", command, thread_environment(threads), cores, load)


def thread_environment(threads: int) -> dict[str, str]:
    """The environment variables of a process that computes in `threads` threads."""
    return {"OMP_NUM_THREADS": str(threads)}


def load_ours(model: str, dtype: str, arguments: dict) -> tuple:
    """The `load` of `peer_process.serve`."""
    engine = Ours(Path(model), arguments, dtype=dtype)
    return lambda jobs: engine.generate([Job(*job) for job in jobs]), {"threads": torch.get_num_threads()}


if __name__ == "__main__":
    peer_process.serve(load_ours)
