"""Which backend is picked, what each refuses and in which words, and what FlashAttention is asked through torch."""

import inspect
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from minillm.errors import KernelError
from minillm.kernels import cpu, dispatch, reference
from minillm.kernels.checks import Limits
from minillm.model.config import ModelConfig
from minillm.model.decoder import Decoder
from minillm.runtime.plan import RunnerOptions
from minillm.runtime.worker import Worker
from paged_cases import DEVICE, check_decode, check_nan_stays_with_those_who_see_it, check_prefill, check_store, paged

pytest.importorskip("triton", reason="Triton is not installed; `make setup` does on Linux x86_64")

from minillm.kernels import flash, triton_kernels  # noqa: E402

MODEL = ModelConfig(50, 512, 96, 2, 8, 4, 64, 512)
MISSING = flash.LIMITS.missing  # what this torch lacks, if anything
ON_A_GPU = Limits(
    "the Triton kernels", "use the reference", ("cuda",), (torch.bfloat16,), (64, 128), (16, 256), range(1, 17)
)


@pytest.fixture
def a_gpu(monkeypatch):
    """As if the kernels had been compiled for a GPU, with a torch that has varlen_attn's block tables."""
    monkeypatch.setattr(triton_kernels, "LIMITS", ON_A_GPU)
    monkeypatch.setattr(flash, "LIMITS", Limits("flash", "use triton", ("cuda",), (torch.bfloat16,), (64,), (256,)))


def picked(wanted: str, model=MODEL, dtype=torch.bfloat16, device="cuda", block_size=256) -> dispatch.Backend:
    return dispatch.choose(wanted, model, dtype, device, block_size)


# --- auto ---


def test_a_cpu_gets_kernels_in_c_plus_plus_and_else_the_reference(monkeypatch):
    backend = picked("auto", dtype=torch.float32, device="cpu", block_size=7)
    assert backend.name == "cpu" and backend.kernels.decode is cpu.decode
    assert backend.why.startswith("cpu: the fastest that works here")  # and perhaps that its compiler has no threads
    monkeypatch.setattr(cpu, "unusable", lambda *shape: "no C++ compiler")
    backend = picked("auto", dtype=torch.float32, device="cpu", block_size=7)
    assert backend.name == "reference" and backend.kernels.decode is reference.decode
    assert backend.why == "reference: the fastest that works here; not cpu (no C++ compiler)"
    assert "not cpu (torch.float16" in picked("auto", dtype=torch.float16, device="cpu").why


def test_a_gpu_gets_triton_and_then_what_takes_the_shape(a_gpu, monkeypatch):
    assert picked("auto").name == "triton"
    assert picked("auto").why == "triton: the fastest that works here"
    monkeypatch.setattr(triton_kernels, "LIMITS", Limits("Triton's", "x", ("cuda",), (torch.float16,)))
    second = picked("auto")
    assert second.name == "flash"
    expected = "flash: the fastest that works here; not triton (torch.bfloat16: Triton's take torch.float16; x)"
    assert second.why == expected
    last = picked("auto", block_size=24, dtype=torch.float64)
    assert last.name == "reference" and last.why.count("; not ") == 3 and "\n" not in last.why


def test_what_cannot_be_imported_is_passed_over_and_refused_by_name(a_gpu, monkeypatch):
    monkeypatch.setitem(dispatch._MODULES, "triton", "no_such_module")
    assert "not triton (it cannot be imported here" in picked("auto").why
    with pytest.raises(KernelError, match="'triton': it cannot be imported here.*no_such_module"):
        picked("triton")


def test_a_gpu_on_which_triton_cannot_launch_is_found_out_when_the_backend_is_picked(a_gpu, monkeypatch):
    """Once a device, by one small launch; in the interpreter by none."""
    tried = []

    def probe(device):
        tried.append(device)
        if device.index:
            raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")
        return 7

    monkeypatch.setattr(triton_kernels, "_probe", probe)
    triton_kernels._failure.cache_clear()
    monkeypatch.setattr(triton_kernels, "INTERPRETED", True)
    assert picked("triton", device="cuda:1").name == "triton" and tried == []
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    assert picked("triton", device="cuda:0").name == picked("auto", device="cuda:0").name == "triton"
    with pytest.raises(KernelError, match=r"RuntimeError: Failed to find C compiler.\); it needs .*Python.h.* gcc"):
        picked("triton", device="cuda:1")
    assert "not triton (a first small launch" in picked("auto", device="cuda:1").why
    assert tried == [torch.device("cuda:0"), torch.device("cuda:1")]
    monkeypatch.setattr(triton_kernels, "_probe", lambda device: 0)
    with pytest.raises(KernelError, match="wrote 0 instead of 7"):
        picked("triton", device="cuda:2")
    triton_kernels._failure.cache_clear()


def test_the_probe_writes_what_it_should(monkeypatch):
    if triton_kernels.INTERPRETED:
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
    assert triton_kernels._probe(torch.device(DEVICE)) == 7


def test_a_backend_that_is_asked_for_is_taken_or_refused(a_gpu):
    assert picked("flash").why == "flash: asked for"
    for name in ("triton", "flash", "reference"):
        backend = picked(name)
        assert backend.name == name and backend.limits.refusal("cuda", torch.bfloat16, 64, 256, 2) is None


REFUSED = {
    "attention_backend 'fast' is not one of auto, reference, cpu, cuda, triton, flash": ("fast", {}),
    "attention_backend 'triton': cpu: the Triton kernels take cuda; use the reference": ("triton", {"device": "cpu"}),
    "torch.float64: the Triton kernels take torch.bfloat16": ("triton", {"dtype": torch.float64}),
    "block_size 24: the Triton kernels take 16, 256": ("triton", {"block_size": 24}),
    "head size 80: the Triton kernels take 64, 128": ("triton", {"model": ModelConfig(9, 80, 9, 1, 1, 1, 80, 9)}),
    "17 query heads per key head: the Triton kernels take 1 to 16": (
        "triton",
        {"model": ModelConfig(9, 80, 9, 1, 17, 1, 64, 9)},
    ),
    "block_size 16: flash take 256; use triton": ("flash", {"block_size": 16}),
    "meta: the kernels in torch take cpu, cuda": ("reference", {"device": "meta"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_a_backend_does_not_take_is_refused_by_name(message, a_gpu):
    wanted, changes = REFUSED[message]
    with pytest.raises(KernelError) as error:
        picked(wanted, **changes)
    assert message in str(error.value)


def test_limits_by_steps_say_the_steps():
    limits = Limits("these", "stop", ("cpu",), (torch.float32,), block_sizes=range(256, 1025, 256))
    assert limits.refusal("cpu", torch.float32, 64, 768, 1) is None
    refusal = limits.refusal("cpu", torch.float32, 64, 300, 1)
    assert refusal == "block_size 300: these take 256 to 1024 in steps of 256; stop"


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "flash", "cuda"])
def test_all_backends_have_one_signature(name):
    module = pytest.importorskip(f"minillm.kernels.{dispatch._MODULES.get(name, name)}")
    for function in ("store_kv", "decode", "prefill"):
        ours = inspect.signature(getattr(module, function)).parameters
        common = inspect.signature(getattr(reference, function)).parameters
        assert [*common] == [key for key in ours if key in common]
        for key, parameter in common.items():
            assert (ours[key].kind, ours[key].default) == (parameter.kind, parameter.default)
        others = [parameter for key, parameter in ours.items() if key not in common]
        assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in others)


# --- the reference's own refusals ---


def reference_decode(**changes):
    keys = torch.zeros(3, 16, 2, 8)
    arguments = {
        "q": torch.zeros(1, 4, 8),
        "keys": keys,
        "values": keys.clone(),
        "tables": torch.tensor([[1]]),
        "lengths": torch.tensor([3]),
    }
    return reference.decode(**(arguments | changes))


UNFIT = {
    "3 query heads over 2 key heads: pass whole": {"q": torch.zeros(1, 3, 8)},
    "q of shape": {"q": torch.zeros(1, 4, 9)},
    "q is torch.float64": {"q": torch.zeros(1, 4, 8, dtype=torch.float64)},
    "pools of keys": {"values": torch.zeros(3, 16, 1, 8)},
    "keys are torch.float32, values torch.float16": {"values": torch.zeros(3, 16, 2, 8).half()},
    "tables of shape": {"tables": torch.tensor([1])},
    "lengths: torch.float32": {"lengths": torch.ones(1)},
    "window 0": {"window": 0},
    "out: ": {"out": torch.zeros(2, 4, 8)},
}


@pytest.mark.parametrize("message", UNFIT)
def test_arguments_that_do_not_fit_each_other_are_refused(message):
    with pytest.raises(KernelError, match=message):
        reference_decode(**UNFIT[message])


# --- beside float64 ---


def without_splits(module) -> SimpleNamespace:
    """What the shared checks call, of a backend that does not let its splits be chosen."""
    return SimpleNamespace(
        store_kv=module.store_kv,
        prefill=module.prefill,
        decode=lambda *arguments, num_splits=None, **named: module.decode(*arguments, **named),
    )


REFERENCE, FLASH = without_splits(reference), without_splits(flash)


@pytest.mark.parametrize("window", [None, 1, 16, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("group", "block_size"), [(1, 16), (3, 32), (8, 256), (2, 7)])
def test_the_reference(group, block_size, dtype, window):
    lengths = [0, 1, block_size - 1, block_size, block_size + 1, block_size + 5]
    case = paged(lengths, dtype, head_size=16, block_size=block_size)
    check_decode(REFERENCE, case, group, window)
    check_prefill(REFERENCE, case, [0, 1, 5, min(block_size, 19), 1, 12], group, window)


@pytest.mark.parametrize("what", ["keys", "values"])
def test_nan_stays_with_those_who_see_it(what):
    check_nan_stays_with_those_who_see_it(REFERENCE, what)


def test_the_reference_stores_by_slot():
    check_store(REFERENCE, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("group", "head_size"), [(1, 64), (2, 128), (8, 64)])
def test_flash(group, head_size, dtype):
    case = paged([0, 1, 255, 256, 257, 700], dtype, head_size=head_size, block_size=256)
    for window in (None, 20, 300):
        check_decode(FLASH, case, group, window)
        check_prefill(FLASH, case, [3, 1, 5, 100, 1, 300], group, window)
    check_store(FLASH, dtype, block_size=256)


# --- what flash asks of torch ---


def varlen_attn_of_the_reference(calls: list):
    """Stands for torch's: asserts what it must be given, and computes with the reference."""

    def varlen_attn(q, keys, values, starts, key_starts, max_q, max_k, **named):
        calls.append(named["window_size"])
        assert set(named) == {"window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}
        if MISSING is None:
            assert set(named) <= set(inspect.signature(flash.varlen_attn_of_torch).parameters)
        tables, lengths = named["block_table"], named["seqused_k"]
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (starts, key_starts, tables, lengths))
        assert len(starts) == len(key_starts) == len(tables) + 1 == len(lengths) + 1
        assert max_q == starts.diff().max() and max_k == tables.shape[1] * keys.shape[1]
        assert named["num_splits"] == 1
        assert named["enable_gqa"] == (q.shape[1] != keys.shape[2])
        left, right = named["window_size"]
        if max_q > 1:
            assert right == 0
        window = None if left < 0 else left + 1
        return reference.prefill(q, keys, values, tables, starts, lengths, max_q, window)

    return varlen_attn


@pytest.fixture
def flash_calls(monkeypatch) -> list:
    """The window of each call; pages of 16, on the CPU."""
    calls = []
    monkeypatch.setattr(flash, "varlen_attn_of_torch", flash.varlen_attn, raising=False)
    monkeypatch.setattr(flash, "varlen_attn", varlen_attn_of_the_reference(calls))
    monkeypatch.setattr(flash, "LIMITS", reference.LIMITS)
    return calls


def case(num_rows: int, heads: int = 4) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    pool = torch.randn(2, 9, 16, 2, 16)
    return torch.randn(num_rows, heads, 16), *pool, torch.tensor([[3, 1, 8], [2, 7, 0], [0, 0, 0]])


@pytest.mark.parametrize("heads", [2, 4])
def test_flash_decode_is_asked_without_a_window_and_with_one(flash_calls, heads):
    q, keys, values, tables = case(3, heads)
    lengths = torch.tensor([40, 17, 0])
    for window in (None, 5):
        out = torch.full_like(q, math.nan)
        assert flash.decode(q, keys, values, tables, lengths, window, out=out) is out
        torch.testing.assert_close(out, reference.decode(q, keys, values, tables, lengths, window))
    assert flash_calls == [(-1, -1), (4, 0)]


def test_flash_prefill_is_causal(flash_calls):
    q, keys, values, tables = case(12)
    starts, lengths = torch.tensor([0, 9, 10, 12]), torch.tensor([40, 17, 0])
    for window in (None, 5):
        arguments = q, keys, values, tables, starts, lengths, 9, window
        out = torch.full_like(q, math.nan)
        assert flash.prefill(*arguments, out=out) is out
        torch.testing.assert_close(out, reference.prefill(*arguments))
    assert flash_calls == [(-1, 0), (4, 0)]


def test_flash_is_not_called_for_nothing(flash_calls):
    q, keys, values, tables = case(0)
    none = torch.zeros(0, dtype=torch.int32)
    assert flash.decode(q, keys, values, tables[:0], none).shape == (0, 4, 16)
    assert flash.prefill(q, keys, values, tables[:0], torch.zeros(1, dtype=torch.int32), none, 0).shape == (0, 4, 16)
    assert flash_calls == []


def test_flash_says_what_it_misses():
    assert flash.missing("2.13.0+cpu") is None and flash.missing("3.0.1") is None
    assert "torch 2.11.0+cu130: varlen_attn takes block_table" in flash.missing("2.11.0+cu130")
    assert flash.missing("2.12.1").endswith("from torch 2.13 on")
    absent = Limits("flash", "use triton", ("cuda",), (torch.bfloat16,), missing="torch 2.11")
    assert absent.refusal("cuda", torch.bfloat16, 64, 256, 1) == "torch 2.11; use triton"


@pytest.mark.skipif(MISSING is not None, reason="this torch has no block tables in varlen_attn")
def test_flash_is_refused_for_pages_that_are_not_256():
    with pytest.raises(KernelError, match="block_size 16: torch's FlashAttention kernels take 256"):
        picked("flash", block_size=16)
    q, keys, values, tables = case(3)
    with pytest.raises(KernelError, match='cpu: .*take cuda; use attention_backend "triton"'):
        flash.decode(q, keys, values, tables, torch.tensor([1, 1, 1]))


def test_a_worker_leaves_out_the_look_at_arguments_only_when_a_step_has_been_tried():
    worker = Worker(Decoder(MODEL).requires_grad_(False), RunnerOptions("cpu", max_num_seqs=2, max_model_len=32))
    for profiled in (False, True):
        if profiled:
            worker.profile()
        worker.init_cache(num_blocks=4)
        backend = worker.runner.backend
        assert backend.unchecked is not worker.backend.kernels
        assert (backend.kernels is backend.unchecked) == profiled
