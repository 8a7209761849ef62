"""The small operations against `model.py`, fused against not fused, and the forward pass made of them."""

from collections import Counter as Multiset
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.errors import KernelError
from minillm.kernels import ops
from minillm.kernels.dispatch import fused
from minillm.model.config import ModelConfig
from minillm.model.decoder import Decoder
from minillm.simulation.cost_model import KERNELS_A_LAYER
from operation_cases import (
    DEVICE,
    both_forwards,
    check_add_rms_norm,
    check_norm_rotate_store,
    check_silu_mul,
    integers,
    random,
)
from tiny_models import KINDS, LADDER_TOLERANCE, difference

pytest.importorskip("triton", reason="Triton is not installed; `make setup` does on Linux x86_64")

from minillm.kernels import triton_ops  # noqa: E402
from planted import compiled, with_bug

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


# --- add_rms_norm, silu_mul ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 100, 4096])
def test_add_rms_norm(size, dtype):
    for num_tokens in (0, 1, 5):
        check_add_rms_norm(ops, dtype, max(1, num_tokens), size)
        if num_tokens:
            check_add_rms_norm(triton_ops, dtype, num_tokens, size)
    nothing = torch.zeros(0, size, dtype=dtype, device=DEVICE)
    assert triton_ops.add_rms_norm(nothing, nothing.clone(), random(size, dtype=dtype), 1e-5).shape == (0, size)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # in numpy: exp(100)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 96, 1024, 1100])
def test_silu_mul(size, dtype):
    check_silu_mul(ops, dtype, 4, max(2, size))
    check_silu_mul(triton_ops, dtype, 4, max(2, size))
    assert triton_ops.silu_mul(torch.zeros(0, 2 * size, dtype=dtype, device=DEVICE)).shape == (0, size)


# --- norm_rotate_store ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (6, 3), (5, 1)])
@pytest.mark.parametrize("head_size", [16, 64, 128])
def test_norm_rotate_store(head_size, heads, dtype):
    for normed in (True, False):
        check_norm_rotate_store(ops, dtype, head_size, heads, normed)
        check_norm_rotate_store(triton_ops, dtype, head_size, heads, normed)


def test_in_float64_the_operations_are_the_model_s_bit_for_bit():
    residual, x, weight = (random(7, 64, dtype=torch.float64, seed=seed) for seed in (0, 1, 2))
    hidden = residual + x
    out = ops.add_rms_norm(x, residual, weight[0], 1e-5)
    assert torch.equal(residual, hidden) and torch.equal(out, F.rms_norm(hidden, (64,), weight[0], 1e-5))
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(ops.silu_mul(x), F.silu(gate) * up)


# --- the whole decoder ---


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_fused_forward_is_the_model_s(kind, load):
    plain, ours = both_forwards(load(kind, torch.float64).to(DEVICE), ops, "reference")
    assert difference(ours, plain) < LADDER_TOLERANCE


@pytest.mark.parametrize("kind", KINDS if GPU else ["mistral-window", "qwen3"])
@torch.inference_mode()
def test_the_fused_forward_in_triton_is_the_model_s(kind, load):
    plain, ours = both_forwards(load(kind).to(DEVICE), triton_ops, "triton")
    assert difference(ours, plain) < 1e-5


# --- how many kernels ---

VIEWS = [
    "view",
    "_unsafe_view",
    "flatten",
    "unflatten",
    "unsqueeze",
    "chunk",
    "split",
    "split_with_sizes",
    "transpose",
    "t",
    "slice",
    "detach",
]


class Counter(TorchDispatchMode):
    """Counts operations that compute: whatever is not a view."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class NoAttention:
    """Replaces attention, and computes nothing."""

    slots = None
    pools = ((None, None),) * 2

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q

    def attend(self, layer: int, q: Tensor) -> Tensor:
        return q


def one_kernel_each(count: Counter) -> SimpleNamespace:
    """In place of `triton_ops`: each operation counts as one kernel, and computes nothing."""

    def named(name: str, result):
        def operation(*arguments):
            count.names.append(name)
            return result(*arguments)

        return operation

    return SimpleNamespace(
        add_rms_norm=named("add_rms_norm", lambda x, *others: x),
        silu_mul=named("silu_mul", lambda gate_up: gate_up.chunk(2, dim=-1)[0]),
        norm_rotate_store=named(
            "norm_rotate_store", lambda qkv, heads, *others: qkv.unflatten(-1, (-1, 16))[:, :heads]
        ),
    )


@torch.inference_mode()
def kernels_of_a_layer(qk_norm: bool, is_fused: bool) -> int:
    """What a second layer adds, attention and (where they are kernels of their own) its stores left out."""
    counts = []
    for layers in (1, 2):
        model = Decoder(ModelConfig(50, 64, 96, layers, 4, 2, 16, 512, qk_norm=qk_norm))
        token_ids = torch.arange(5)
        with Counter() as count:
            bound = model.bound(fused(one_kernel_each(count))) if is_fused else None
            model(token_ids, token_ids, NoAttention(), bound)
        counts.append(Multiset(count.names))
    return (counts[1] - counts[0]).total()


def test_a_layer_of_20_kernels_is_9_when_fused():
    store, attend = 1, 1
    assert kernels_of_a_layer(qk_norm=True, is_fused=False) + store + attend == 20
    assert kernels_of_a_layer(qk_norm=False, is_fused=False) + store + attend == 18
    for qk_norm in (True, False):
        assert kernels_of_a_layer(qk_norm, is_fused=True) + attend == KERNELS_A_LAYER == 9


# --- compiled, with or without a GPU ---

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minillm.kernels import triton_ops

floats = ["x", "residual", "weight", "out", "qkv", "q_weight", "k_weight", "cosines", "sines", "q", "keys", "values"]
types = dict.fromkeys([*floats, "gate_up"], "*bf16")
types |= {"slots": "*i64", "eps": "fp32", "size": "i32"}
constants = dict(NUM_HEADS=16, NUM_KV_HEADS=8, HALF=64, HEADS=triton_ops.HEADS, NORMED=True)
for name, columns, warps in (("add_rms_norm", 4096, 8), ("norm_rotate_store", 0, 4), ("silu_mul", 1024, 4)):
    kernel = getattr(triton_ops, f"_{name}_kernel")
    constants["COLUMNS"] = columns
    own = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(kernel.arg_names)
               if argument not in own and argument != "eps"}
    source = ASTSource(kernel, signature, own, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    ptx = compiled.asm["ptx"]
    print(name, compiled.metadata.shared, "ld.global.v" in ptx, "st.local" in ptx)
"""


def test_the_kernels_compile_for_a_gpu_of_compute_capability_9():
    """Triton's compiler needs no GPU: neighbours are loaded together, nothing is spilled, little memory is shared."""
    rows = compiled(COMPILE)
    assert list(rows) == ["add_rms_norm", "norm_rotate_store", "silu_mul"]
    assert all(wide == "True" for _, wide, _ in rows.values())
    assert all(spills == "False" and int(shared) <= 1024 for shared, _, spills in rows.values())


# --- what is refused ---


def norm_rotate_store_of(**changes):
    keys = torch.zeros(3, 16, 2, 32, device=DEVICE)
    arguments = {
        "qkv": torch.zeros(1, 8 * 32, device=DEVICE),
        "num_heads": 4,
        "num_kv_heads": 2,
        "q_weight": None,
        "k_weight": None,
        "eps": 1e-5,
        "rotation": tuple(torch.zeros(2, 1, 1, 32, device=DEVICE)),
        "slots": integers(3),
        "keys": keys,
        "values": keys.clone(),
    }
    return triton_ops.norm_rotate_store(**(arguments | changes))


REFUSED = {
    "x is torch.float64.*take torch.float32, torch.float16": lambda: triton_ops.add_rms_norm(
        *(torch.zeros(1, 8, dtype=torch.float64, device=DEVICE) for _ in "xr"), torch.zeros(8, device=DEVICE), 1e-5
    ),
    r"residual.*\[1, 8\].*\[1, 9\]": lambda: triton_ops.add_rms_norm(random(1, 9), random(1, 8), random(9), 1e-5),
    r"weight.*\[8\].*\[9\]": lambda: triton_ops.add_rms_norm(random(1, 9), random(1, 9), random(8), 1e-5),
    "hidden size 20000.*up to 16384": lambda: triton_ops.add_rms_norm(
        random(1, 20000), random(1, 20000), random(20000), 1e-5
    ),
    "gate_up has 7 columns": lambda: triton_ops.silu_mul(random(1, 7)),
    "gate_up of shape": lambda: triton_ops.silu_mul(random(4, 6).T),
    "1 key heads for a pool of 2": lambda: norm_rotate_store_of(num_kv_heads=1, num_heads=6),
    "one of q_weight and k_weight is None": lambda: norm_rotate_store_of(q_weight=random(32)),
    r"k_weight.*\[16\].*\[32\]": lambda: norm_rotate_store_of(q_weight=random(32), k_weight=random(16)),
    "cosines.*float16": lambda: norm_rotate_store_of(rotation=tuple(torch.zeros(2, 1, 1, 32, device=DEVICE).half())),
    r"slots.*\[2\].*\[1\]": lambda: norm_rotate_store_of(slots=integers(1, 2)),
    r"qkv.*\[1, 256\].*\[1, 320\]": lambda: norm_rotate_store_of(num_heads=6),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_the_operations_do_not_take_is_refused_by_name(message):
    with pytest.raises(KernelError, match=message):
        REFUSED[message]()


# --- bugs planted in the source ---


def small_add_rms_norm(fused):
    check_add_rms_norm(fused, torch.float32)


def small_silu_mul(fused):
    check_silu_mul(fused, torch.float32)


def small_norm_rotate_store(fused):
    check_norm_rotate_store(fused, torch.float32)


def single_kv_head(fused):
    """3 heads in all: most of a program's tile is of none."""
    check_norm_rotate_store(fused, torch.float32, heads=(1, 1))


BUGS = {
    "residual is not updated": ("tl.store(residual + row + column, total, mask=real)", "pass", small_add_rms_norm),
    "norm without eps": ("/ size + eps)", "/ size)", small_add_rms_norm),
    "mean over the padded row": ("axis=0) / size + eps", "axis=0) / COLUMNS + eps", small_add_rms_norm),
    "norm of what was there": ("+ added\n", "+ 0.0 * added\n", small_add_rms_norm),
    "up is gate": ("source + size, mask", "source, mask", small_silu_mul),
    "silu without its sign": ("tl.exp(-gate)", "tl.exp(gate)", small_silu_mul),
    "head norm without eps": ("/ D + eps)", "/ D)", small_norm_rotate_store),
    "head norm of one half": ("+ tl.sum(second * second, axis=1)", "", small_norm_rotate_store),
    "head norm over all heads": (
        "(tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D + eps)[:, None]",
        "(tl.sum(first * first) + tl.sum(second * second)) / D + eps)",
        small_norm_rotate_store,
    ),
    "k is normalised as q": (
        "low_weight = tl.where(of_q, ",
        "low_weight = tl.where(head >= 0, ",
        small_norm_rotate_store,
    ),
    "one half's norm for both": (
        "tl.load(q_weight + HALF + column)",
        "tl.load(q_weight + column)",
        small_norm_rotate_store,
    ),
    "the last heads are left out": ("triton.cdiv(all_heads, HEADS)", "all_heads // HEADS", small_norm_rotate_store),
    "every program takes the first heads": (
        "head = tl.program_id(1) * HEADS + tl",
        "head = tl.program_id(1) * 0 + tl",
        small_norm_rotate_store,
    ),
    "heads that are not there are stored": ("stored = real & (slot", "stored = (head >= 0) & (slot", single_kv_head),
    "turned the wrong way": ("+ second * tl.load(sines", "- second * tl.load(sines", small_norm_rotate_store),
    "both halves by the first's table": ("angle += HALF", "angle += 0", small_norm_rotate_store),
    "key's head is counted from 0": (
        "keys + (slot * NUM_KV_HEADS + head - NUM_HEADS) * D",
        "keys + (slot * NUM_KV_HEADS + head) * D",
        small_norm_rotate_store,
    ),
    "value's head is counted from q": (
        "head - NUM_HEADS - NUM_KV_HEADS) * D",
        "head - NUM_HEADS) * D",
        small_norm_rotate_store,
    ),
    "padding is stored": ("stored = real & (slot >= 0)", "stored = real", small_norm_rotate_store),
    "keys are stored as values": (
        "mask=stored & of_v)\n    tl.store(target + HALF, high,",
        "mask=stored)\n    tl.store(target + HALF, high,",
        small_norm_rotate_store,
    ),
}


@pytest.mark.skipif(GPU, reason="planted bugs may write outside the pool; the interpreter shows them as well")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, tmp_path):
    right, wrong, check = BUGS[name]
    with pytest.raises(AssertionError):
        check(with_bug(triton_ops, right, wrong, tmp_path))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("check", dict.fromkeys(bug[-1] for bug in BUGS.values()))
def test_without_the_bug_the_same_check_passes(check):
    check(triton_ops)
