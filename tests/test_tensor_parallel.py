"""Several ranks say what one says; they share the work and the memory, and they end together."""

import copy
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minillm
from minillm import LLM, CausalAttention, SamplingParams
from minillm.engine.model_executor import ModelExecutor
from minillm.errors import ConfigError, WorkerDiedError
from minillm.model import WHOLE, Shard, load_decoder, read_config, shards, weights
from minillm.runtime import ranks
from minillm.runtime.plan import DEFAULT_OPTIONS
from planted import with_bug
from served import Answered, ServedProcess
from test_worker import is_running, is_there
from tiny_models import KINDS, all_logits, difference, random_token_ids

EXACT = 1e-10
CUT = [(kind, size) for kind in KINDS for size in (2, 4)]


pytestmark = pytest.mark.filterwarnings("ignore:. ranks on . cores")  # as many as CI has; one test looks at that


# --- a model in parts: its ranks are threads here ---------------------------------------------------------------------


def eventually(condition, seconds: float) -> bool:
    """Whether it holds before so many seconds are over."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


class Meeting:
    """What torch.distributed does, between threads."""

    def __init__(self, size: int, kind_of_shard: type = Shard):
        self.kind_of_shard = kind_of_shard
        self.barrier, self.brought, self.sums = threading.Barrier(size, timeout=20), [None] * size, 0

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self.brought[rank] = x.clone()
        self.barrier.wait()
        found = list(self.brought)
        self.barrier.wait()
        return found

    def shard(self, rank: int) -> Shard:
        def add_up(x: torch.Tensor) -> torch.Tensor:
            self.sums += rank == 0
            return sum(self.exchange(rank, x))

        size = len(self.brought)
        return self.kind_of_shard(rank, size, add_up, lambda x: torch.cat(self.exchange(rank, x), dim=-1))


def load_part(folder, shard: Shard, **shape) -> minillm.Decoder:
    return load_decoder(folder, replace(read_config(folder), **shape), torch.float64, "cpu", shard=shard)


def logits_in_parts(folder, size: int, token_ids: list[int], kind_of_shard=Shard, **shape):
    """[ranks, T, ids] what each rank has for logits, and how often they added up."""
    meeting, found = Meeting(size, kind_of_shard), [None] * size

    @torch.inference_mode()
    def compute(rank: int) -> None:
        model = load_part(folder, meeting.shard(rank), **shape)
        found[rank] = all_logits(model, token_ids, CausalAttention(model.config))

    threads = [threading.Thread(target=compute, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.stack(found), meeting.sums


@pytest.mark.parametrize(("kind", "size"), CUT)
def test_the_parts_of_a_model_compute_what_the_whole_does(checkpoint, load, kind, size):
    token_ids = random_token_ids(30)
    logits, sums = logits_in_parts(checkpoint(kind), size, token_ids)
    assert difference(logits[0], all_logits(load(kind, torch.float64), token_ids)) < EXACT
    assert all(torch.equal(each, logits[0]) for each in logits)  # to the bit: they sample the same
    assert sums == 1 + 2 * KINDS[kind].num_hidden_layers  # the embedding, then twice a layer


def test_ids_that_the_tokenizer_does_not_know_are_cut_off_behind_the_last_rank(checkpoint):
    whole, _ = logits_in_parts(checkpoint("llama"), 2, [7, 198, 0])
    for num_tokens in (190, 30):  # the second leaves whole ranks without an id
        cut, _ = logits_in_parts(checkpoint("llama"), 4, [7, 198, 0], num_tokens=num_tokens)
        assert cut.shape == (4, 3, num_tokens) and difference(cut[0], whole[0, :, :num_tokens]) < EXACT


BUGS = {  # kind of model -> of an expression that a rank's part hangs on, what a slip would make of it
    "no sum behind a product": ("llama", "lambda x: self.add_up(product(x))", "product"),
    "no sum of embeddings": ("llama", "self.add_up(embedding(", "(embedding("),
    "a row for an id of another rank": ("llama", ".masked_fill(of_others[:, None], 0)", ""),
    "the ids of rank 0": ("llama", "self.rank * num_rows", "0"),
    "every rank adds the bias": ("llama-biases-tied", "0 if self.rank else whole", "whole"),
    "the key-value heads of rank 0": ("llama", "self.rank * config.num_key_value_heads // self.size", "0"),
    "the columns of rank 0": ("llama", "self.rank * part, (self.rank + 1) * part", "0, part"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_in_the_cut_is_noticed(checkpoint, load, tmp_path, bug):
    kind, right, wrong = BUGS[bug]
    broken = with_bug(shards, right, wrong, tmp_path).Shard
    token_ids = random_token_ids(30)
    logits, _ = logits_in_parts(checkpoint(kind), 2, token_ids, broken)
    assert difference(logits[0], all_logits(load(kind, torch.float64), token_ids)) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "llama-mqa", "llama-biases-tied", "qwen3"])
def test_a_rank_reads_its_part_of_the_files_alone(checkpoint, monkeypatch, kind):
    """Together they read every number once, but for norms, biases that are added once, and shared key-value heads."""
    num_read = []

    def read(place, tensors, name):
        part = read_part(place, tensors, name)
        num_read.append(part.numel())
        return part

    read_part = weights.Placement.read
    monkeypatch.setattr(weights.Placement, "read", read)
    whole = load_part(checkpoint(kind), WHOLE)
    num_whole = sum(num_read)
    assert num_whole == sum(each.numel() for each in whole.parameters()) == whole.config.num_parameters
    num_read.clear()
    meeting = Meeting(2)
    parts = [load_part(checkpoint(kind), meeting.shard(rank)) for rank in range(2)]
    config = whole.config
    norms = sum(each.numel() for name, each in whole.named_parameters() if "norm" in name)
    shared = 2 * config.hidden_size * config.head_dim * config.num_hidden_layers if kind == "llama-mqa" else 0
    assert sum(num_read) == num_whole + norms + shared
    assert [len(each.embed_tokens.weight) for each in parts] == [100, 100]  # of 199: a row of zeros is left
    assert parts[1].embed_tokens.weight[-1].abs().sum() == 0


# --- what cannot be cut, or started -----------------------------------------------------------------------------------

HERE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
REFUSED = {  # model, ranks, device, environment
    "tensor_parallel_size is 3, which does not divide num_attention_heads = 4": ("llama", 3, "cpu", {}),
    "tensor_parallel_size is 8, which does not divide num_attention_heads = 4": ("llama", 8, "cpu", {}),
    "torch sees 0; lower it": ("llama", 2, "cuda", {}),
    "device is 'cuda:1' and tensor_parallel_size 2; ranks take cuda:0, cuda:1": ("llama", 2, "cuda:1", {}),
    "device is 'mps' and tensor_parallel_size 2": ("llama", 2, "mps", {}),
    "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT": ("llama", 2, "cpu", {"RANK": "0"}),
    "MASTER_PORT is 'x'; it must be a whole number": ("llama", 2, "cpu", HERE | {"MASTER_PORT": "x"}),
    "MASTER_PORT is 99999, where rank 0 cannot listen": ("llama", 2, "cpu", HERE | {"MASTER_PORT": "99999"}),
    "size is 4, but this is RANK 0 of WORLD_SIZE 2": ("llama", 4, "cpu", HERE),
    "size is 2, but this is RANK 2 of WORLD_SIZE 2": ("llama", 2, "cpu", HERE | {"RANK": "2"}),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_become_ranks_is_refused_by_name(checkpoint, why, monkeypatch):
    kind, size, device, environment = REFUSED[why]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=re.escape(why)):
        ranks.check_ranks(read_config(checkpoint(kind)), size, device, environment)


def test_heads_and_widths_that_do_not_divide_are_refused(load):
    config = load("llama").config
    six = replace(config, num_attention_heads=12, num_key_value_heads=6)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 4, but num_key_value_heads = 6"):
        Shard(size=4).config_of(six)
    with pytest.raises(ConfigError, match="does not divide intermediate_size = 97"):
        Shard(size=2).config_of(replace(config, intermediate_size=97))


def test_a_busy_port_is_refused_by_name(checkpoint):
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        environment = HERE | {"MASTER_PORT": str(port)}
        config = read_config(checkpoint("llama"))
        with pytest.raises(ConfigError, match=f"MASTER_PORT is {port}, where rank 0 cannot listen .*in use"):
            ranks.check_ranks(config, 2, "cpu", environment)
        ranks.check_ranks(config, 2, "cpu", environment | {"RANK": "1"})  # who listens is another process
        ranks.check_ranks(config, 2, "cpu", environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"})  # torchrun itself
    ranks.check_ranks(config, 2, "cpu", environment)


def test_nothing_is_started_for_what_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **named: pytest.fail("started"))
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3"):
        LLM(checkpoint("llama"), skip_tokenizer_init=True, tensor_parallel_size=3)
    with pytest.raises(ConfigError, match="tensor_parallel_size is 0"):
        LLM(checkpoint("llama"), tensor_parallel_size=0)
    with pytest.raises(ConfigError, match="not a Decoder"):
        LLM(load_part(checkpoint("llama"), WHOLE), tensor_parallel_size=2)


def test_more_ranks_than_cores_are_warned_of(checkpoint, recwarn, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    ranks.check_ranks(read_config(checkpoint("llama")), 2, "cpu", {})
    assert [str(each.message) for each in recwarn] == [
        "2 ranks on 1 cores: in every layer they wait for each other, and for a core"
    ]


# --- the same tokens: processes, joined by gloo -----------------------------------------------------------------------

ENGINE = {"block_size": 4, "num_blocks": 25, "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 96}
SYSTEM = random_token_ids(24, seed=5)
PROMPTS = [SYSTEM + random_token_ids(3 + 2 * index, seed=index) for index in range(5)]
PARAMS = [
    SamplingParams(max_tokens=18, logprobs=2, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(max_tokens=18, ignore_eos=True),
    SamplingParams(max_tokens=14, n=3, temperature=1.0, seed=1, logprobs=0, ignore_eos=True),
    SamplingParams(max_tokens=18, temperature=0.7, top_k=20, top_p=0.9, seed=2, ignore_eos=True),
    SamplingParams(max_tokens=18, repetition_penalty=1.3, ignore_eos=True),
]


def outputs_of(llm: LLM):
    """What every path brings: tokens, log-probabilities, and how they came to be."""
    first = llm.generate(PROMPTS[0], PARAMS[0], use_tqdm=False)
    rest = llm.generate(PROMPTS[1:], PARAMS[1:], use_tqdm=False)
    outputs = first + rest
    tokens = [[completion.token_ids for completion in output.outputs] for output in outputs]
    logprobs = [
        {rank: (token_id, entry.logprob) for token_id, entry in position.items() for rank in [entry.rank]}
        for output in outputs
        for entries in [output.prompt_logprobs or [], *(completion.logprobs or [] for completion in output.outputs)]
        for position in entries
        if position
    ]
    steps = llm.trace.steps
    assert any(step.preempted for step in steps)
    assert sum(output.num_cached_tokens for output in rest) >= 20  # of the prefix that the first one left
    assert sum(part.request_id == "req 0" and part.why == "prefill" for step in steps for part in step.scheduled) >= 2
    assert any(len(step.scheduled) > 1 for step in steps)
    return tokens, logprobs


@pytest.fixture(scope="module", params=[2, 4])
def group(request, checkpoint):
    """So many ranks in processes of their own, which load one model after the other."""
    worker = ranks.start_ranks(checkpoint("llama"), DEFAULT_OPTIONS, request.param, dtype="float64")
    yield worker
    worker.shutdown()
    assert not any(map(is_there, worker.pids))


def in_ranks(group, monkeypatch, folder, **engine) -> LLM:
    """An engine whose ranks are those of the group."""

    def start(model, config, **loading):
        group.load(model, config, **loading)
        return ModelExecutor([group])

    monkeypatch.setattr(ModelExecutor, "start", start)
    size = len(group.pids)
    try:
        return LLM(
            folder, dtype="float64", skip_tokenizer_init=True, verbose=False, tensor_parallel_size=size, **engine
        )
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("kind", ["llama", "llama-mqa", "llama-biases-tied", "mistral-window", "qwen2", "qwen3"])
def test_ranks_say_what_one_says(group, checkpoint, monkeypatch, kind):
    expected, their_logprobs = outputs_of(
        LLM(checkpoint(kind), dtype="float64", skip_tokenizer_init=True, verbose=False, **ENGINE)
    )
    llm = in_ranks(group, monkeypatch, checkpoint(kind), **ENGINE)
    tokens, logprobs = outputs_of(llm)
    assert tokens == expected
    assert len(logprobs) == len(their_logprobs) > 50
    for ours, theirs in zip(logprobs, their_logprobs, strict=True):
        assert ours.keys() == theirs.keys()
        for rank, (token_id, logprob) in ours.items():
            assert token_id == theirs[rank][0] and logprob == pytest.approx(theirs[rank][1], abs=1e-9)


def test_what_is_swapped_out_comes_back_on_every_rank(group, checkpoint, monkeypatch):
    alone = LLM(checkpoint("llama"), dtype="float64", skip_tokenizer_init=True, verbose=False, **ENGINE)
    llm = in_ranks(group, monkeypatch, checkpoint("llama"), preemption_mode="swap", **ENGINE)
    assert outputs_of(llm)[0] == outputs_of(alone)[0]
    assert any(each.mode == "swap" for step in llm.trace.steps for each in step.preempted)


def test_memory_is_told_of_each_rank(group, checkpoint, monkeypatch):
    alone = LLM(checkpoint("llama-mha"), dtype="float64", skip_tokenizer_init=True, verbose=False, **ENGINE)
    llm = in_ranks(group, monkeypatch, checkpoint("llama-mha"), **ENGINE)
    size = len(group.pids)
    ours, theirs = llm.engine.ledger, alone.engine.ledger
    assert ours.num_ranks == size and ours.bytes_per_block * size == theirs.bytes_per_block
    assert theirs.weights / size < ours.weights < theirs.weights / size * 1.1  # norms are whole on each
    assert ours.total < theirs.total / size * 1.3  # of what the machine has left, an equal part
    assert f"of each of {size} ranks" in str(ours).splitlines()[0] and "ranks" not in str(theirs)
    assert llm.engine.executor.why.endswith(f"; {size} ranks, joined by gloo")


def test_vectors_of_texts_are_the_same(group, checkpoint, monkeypatch):
    alone = LLM(checkpoint("qwen3"), dtype="float64", skip_tokenizer_init=True, verbose=False, **ENGINE)
    llm = in_ranks(group, monkeypatch, checkpoint("qwen3"), **ENGINE)
    assert torch.allclose(*(each.encode(PROMPTS[4])[0] for each in (llm, alone)), rtol=0, atol=1e-10)


def test_ranks_go_when_they_are_told_and_when_one_is_killed_that_the_first_does_not_miss(group):
    """The last test of a group: two of them are told; of four, one is killed while rank 0 does and hears nothing."""
    assert all(map(is_running, group.pids))
    if len(group.pids) == 2:
        group.shutdown()
        assert [process.returncode for process in group._processes] == [0, 0]
        return
    os.kill(group.pids[0], signal.SIGSTOP)
    answer = group._send("why")
    os.kill(group.pids[3], signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(
        WorkerDiedError, match=rf"process {group.pids[3]} \(rank 3\) was killed by signal 9 .* during why"
    ):
        group._wait(answer)
    assert time.monotonic() - killed_at < 5
    assert not any(map(is_there, group.pids))


# --- a bug in the processes, and their ends ---------------------------------------------------------------------------

FORGETFUL = """
from minillm.runtime.ranks import RankGroup
RankGroup.add_up = lambda group, x: x
"""


def test_an_all_reduce_that_is_forgotten_is_noticed_and_who_forgets_can_be_killed(checkpoint, tmp_path, monkeypatch):
    """First the one, then, with the same processes, the other."""
    (tmp_path / "sitecustomize.py").write_text(FORGETFUL)
    monkeypatch.syspath_prepend(tmp_path)  # the processes find it there, and Python reads it when they start
    greedy = SamplingParams(max_tokens=8, ignore_eos=True)
    options = {"dtype": "float64", "skip_tokenizer_init": True, "verbose": False, **ENGINE}
    alone = LLM(checkpoint("llama"), **options)
    llm = LLM(checkpoint("llama"), tensor_parallel_size=2, **options)
    expected, tokens = (
        [output.outputs[0].token_ids for output in each.generate(PROMPTS, greedy, use_tqdm=False)]
        for each in (alone, llm)
    )
    assert all(ours != theirs for ours, theirs in zip(tokens, expected, strict=True))

    worker = llm.engine.executor.workers[0]
    for number, prompt in enumerate(PROMPTS):
        llm.engine.add_request(str(number), prompt, SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in range(4):
        llm.engine.step()
    os.kill(worker.pids[1], signal.SIGKILL)
    killed_at = time.monotonic()
    with pytest.raises(WorkerDiedError, match=rf"process {worker.pids[1]} \(rank 1\) was killed by signal 9 .* during"):
        while llm.engine.has_unfinished_requests():
            llm.engine.step()
    assert time.monotonic() - killed_at < 5
    assert not any(map(is_there, worker.pids))
    assert not llm.engine.has_unfinished_requests()
    assert not os.path.exists(worker._folder)
    with pytest.raises(WorkerDiedError, match="rank 1.* was killed by signal 9"):
        llm.engine.add_request("later", PROMPTS[0])


PARENT = """
import sys
from minillm.runtime.plan import DEFAULT_OPTIONS
from minillm.runtime.ranks import start_ranks
worker = start_ranks(sys.argv[1], DEFAULT_OPTIONS, 2)
print(*worker.pids, flush=True)
sys.stdin.read()
"""


def test_ranks_end_when_the_engine_is_killed_also_one_that_waits_for_the_other(checkpoint):
    command = [sys.executable, "-c", PARENT, str(checkpoint("llama"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2 and all(map(is_running, pids))
        os.kill(pids[0], signal.SIGSTOP)  # it does not notice, and so does not tell
        parent.kill()
        parent.wait()
        assert eventually(lambda: not is_running(pids[1]), 5)
        os.kill(pids[0], signal.SIGCONT)
        assert eventually(lambda: not is_running(pids[0]), 5)


def test_folders_of_killed_engines_are_removed_at_the_next_start_and_no_others(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = [sys.executable, "-c", PARENT, str(checkpoint("llama"))]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as parent:
        assert len(parent.stdout.readline().split()) == 2
        [folder] = tmp_path.iterdir()
        ours = Path(ranks.make_folder())
        assert folder.exists()  # its engine runs
        parent.kill()
    assert parent.returncode == -signal.SIGKILL and list(folder.iterdir())
    start = ranks.start_of(os.getpid())
    kept = [f"minillm-ranks-{os.getpid()}-{start}-a", f"minillm-ranks-1-{ranks.start_of(1)}-b", "minillm-ranks-x", "c"]
    for name in (*kept, f"minillm-ranks-{os.getpid()}-{start + 1}-id-used-again"):
        (tmp_path / name).mkdir()
    new = Path(ranks.make_folder())
    assert {each.name for each in tmp_path.iterdir()} == {ours.name, new.name, *kept}


def test_a_server_with_ranks_finishes_its_requests_after_sigterm_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with ServedProcess("--tensor-parallel-size=2", "--num-blocks=260") as server:
        processes = server.process.children(recursive=True)
        assert len(processes) == 2 and "2 ranks, joined by gloo" in server.log
        assert len(list(tmp_path.glob("minillm-ranks-*"))) == 1
        with server.story(200) as stream:
            stream.recv(1, socket.MSG_PEEK)  # it has begun
            server.child.send_signal(signal.SIGTERM)
            assert Answered(stream).events[-1]["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0
    assert not any(process.is_running() for process in processes)
    assert "Traceback" not in server.log and "[layer 1, OpenAI server] ended" in server.lines[-1]
    assert not list(tmp_path.glob("minillm-ranks-*"))


def test_torchrun_starts_the_ranks_of_the_command_line(tmp_path):
    """As on several machines: rank 0 is the command, the others help it until it has done."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "minillm.cli.main", "generate", "Once upon a time", "--max-tokens=12"]
    run = subprocess.run(
        [*command, "--tensor-parallel-size=2", "--dtype=float64"], capture_output=True, text=True, timeout=120
    )
    model, tokenizer = minillm.load_model("storyteller", dtype=torch.float64)
    prompt_ids = minillm.encode(tokenizer, "Once upon a time")
    alone = minillm.generate_cached(model, prompt_ids, SamplingParams(max_tokens=12), tokenizer=tokenizer)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"Once upon a time{alone.text}\n"
    assert run.stderr.count("12 output tokens") == 1


def test_a_copy_of_a_whole_model_is_whole(checkpoint):
    """Its shard is a copy too: with `is WHOLE` for a question, the copy took itself for a part."""
    folder = checkpoint("llama")
    model = load_decoder(folder, read_config(folder), torch.float64, "cpu")
    token_ids = torch.arange(1, 8)
    ours, copied = (
        each.logits(each(token_ids, token_ids - 1, CausalAttention(each.config)))
        for each in (model, copy.deepcopy(model))
    )
    assert torch.equal(ours, copied)
