"""Sampling in one pass: torch and Triton draw the same tokens, they fall as the softmax says, and greedy is argmax."""

import math

import pytest
import torch
from torch import Tensor

from minillm.errors import KernelError
from minillm.sampling import sampler as plain

pytest.importorskip("triton", reason="Triton is not installed; `make setup` does on Linux x86_64")

from minillm.kernels import triton_sampling  # noqa: E402
from operation_cases import (  # noqa: E402
    check_first_of_equals,
    check_not_finite,
    check_rows_alone,
    check_same_tokens,
    check_the_last_token,
    integers,
    random,
    sampling_case,
)
from planted import compiled, with_bug

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]


# --- tokens ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_ids", [1, 199, 2047, 2048, 2049, 4500])
def test_fused_sampling_draws_the_same_tokens(num_ids, dtype):
    check_same_tokens(triton_sampling, num_ids, dtype, num_rows=12)


def test_few_rows_are_cut_into_parts_and_many_are_not():
    assert triton_sampling.sample_parts(256, 151_936, 132) == (4, 19)
    assert triton_sampling.sample_parts(1, 151_936, 132) == (38, 2)
    assert triton_sampling.sample_parts(4096, 151_936, 132) == (1, 75)
    assert triton_sampling.sample_parts(1, 199, 132) == (1, 1)
    for num_rows in (1, 3, 64, 256):
        parts, tiles = triton_sampling.sample_parts(num_rows, 100_000, 132)
        assert (parts - 1) * tiles < math.ceil(100_000 / 2048) <= parts * tiles  # no part is empty, none is missing


@pytest.mark.parametrize("sampler", [plain, triton_sampling])
def test_greedy_rows_are_argmax_and_of_equal_logits_the_first(sampler):
    check_first_of_equals(sampler)


@pytest.mark.parametrize("sampler", [plain, triton_sampling])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 1300, 2499])
def test_rows_that_are_not_finite_are_minus_one_and_alone(sampler, temperature, place):
    check_not_finite(sampler, temperature, place)


@pytest.mark.parametrize("sampler", [plain, triton_sampling])
def test_a_row_s_token_depends_on_nothing_but_its_own(sampler):
    check_rows_alone(sampler)


# --- the noise ---


def test_philox_gives_the_published_numbers():
    """Known answers of Philox4x32-10 from Random123 (Salmon et al. 2011), where counter word 1 is 0 or all are."""
    zeros = plain.philox(integers(0), integers(0)[:, None], integers(0)[:, None])
    assert [int(word) for word in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def draws_of(sampler, logits: Tensor, temperature: float, seeds: Tensor, draws: Tensor) -> Tensor:
    rows = max(len(seeds), len(draws))
    temperatures = torch.full((rows,), temperature, device=DEVICE)
    return sampler.sample_rows(logits.repeat(rows, 1), temperatures, seeds.expand(rows), draws.expand(rows))


def chi_square(ids: Tensor, probabilities: Tensor) -> float:
    """Sum of (found - expected)^2 / expected, as a number of its standard deviations above its mean."""
    counts = torch.bincount(ids.cpu(), minlength=len(probabilities)).double()
    expected = probabilities.double().cpu() * len(ids)
    assert expected.min() > 5
    freedom = len(probabilities) - 1
    return ((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom)).item()


def check_distribution(sampler, num_draws: int) -> None:
    """17 tokens, of whose noise each of the four words makes some."""
    possible = torch.arange(17, device=DEVICE) * 120
    logits = torch.full((2048,), -math.inf, device=DEVICE).index_copy_(0, possible, random(17))
    many, one, temperature = torch.arange(num_draws, device=DEVICE), integers(5), 0.9
    probabilities = (logits[possible] / temperature).softmax(-1)
    for seeds, draws in ((many, one), (one, many), (one, many + 2**32)):
        ids = draws_of(sampler, logits, temperature, seeds, draws)
        assert ids.remainder(120).eq(0).all()
        assert abs(chi_square(ids // 120, probabilities)) < 4


def test_tokens_fall_as_the_softmax_says_over_seeds_and_over_draws():
    check_distribution(plain, num_draws=1500)


def check_noise(sampler) -> None:
    """Gumbel: mean 0.5772, variance pi^2 / 6; of 4 words of one count, of neighbours, of rows, no two go together."""
    noise = sampler.gumbel_noise(torch.arange(20), torch.zeros(20, dtype=torch.int64), 8192).double()
    assert abs(noise.mean() - 0.5772157) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.02
    quarters = noise.unflatten(1, (-1, 4, plain.NOISE_STRIDE)).transpose(0, 2).flatten(1)  # one for each of 4 words
    rows = torch.cat([quarters[0][None], quarters[1:], quarters[0].roll(1)[None]])
    assert (torch.corrcoef(rows) - torch.eye(5)).abs().max() < 0.03
    assert (torch.corrcoef(noise) - torch.eye(20)).abs().max() < 0.06
    assert len(noise.flatten().unique()) > 0.98 * noise.numel()


def test_the_noise_of_all_tokens_is_alike_and_independent():
    check_noise(plain)


def test_the_largest_and_the_smallest_of_all_bits_make_finite_noise():
    bits = iter([0, 0xFFFFFFFF, 1, 0x80000000])
    words = torch.stack([torch.full((1, plain.NOISE_STRIDE), next(bits)) for _ in range(4)])
    original, plain.philox = plain.philox, lambda *arguments: words
    try:
        noise = plain.gumbel_noise(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 2048)
    finally:
        plain.philox = original
    assert noise.isfinite().all() and noise.max() > 22 and noise.min() > -3


# --- compiled, with or without a GPU ---

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from minillm.kernels import triton_sampling

types = {"logits": "*bf16", "temperatures": "*fp32", "seeds": "*i64", "draws": "*i64", "token_ids": "*i64"}
types |= {"best": "*i32", "scores": "*fp32", "num_ids": "i32", "tiles_a_part": "i32", "num_parts": "i32"}
types |= {"row_stride": "i32", "num_read": "i32"}
constants = dict(STRIDE=triton_sampling.NOISE_STRIDE, ROUNDS=10, GREEDY=1e-5, COMPILED=True, PARTS=4)
for name, warps in (("sample", 4), ("pick", 1)):
    kernel = getattr(triton_sampling, f"_{name}_kernel")
    own = {argument: constants[argument] for argument in kernel.arg_names if argument in constants}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    aligned = {(kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
               for argument in ("logits", "row_stride", "num_read") if argument in kernel.arg_names}
    source = ASTSource(kernel, signature, own, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=warps))
    ptx = compiled.asm["ptx"]
    print(name, compiled.metadata.shared, "ld.global.v" in ptx, "st.local" in ptx)
    assert name == "pick" or 0 < ptx.count("div.") + ptx.count("ex2") < 3 < ptx.count("lg2.approx")  # not a token
print("specialised", *[f"{kernel.__name__}.{each.name}" for kernel in (
    triton_sampling._sample_kernel, triton_sampling._pick_kernel) for each in kernel.params
    if each.is_constexpr or not (each.do_not_specialize or each.do_not_specialize_on_alignment)])
"""


def test_the_kernels_compile_for_a_gpu_of_compute_capability_9():
    """Triton's compiler needs no GPU: neighbours are loaded together, nothing is spilled, little memory is shared."""
    rows = compiled(COMPILE)
    specialised = set(rows.pop("specialised"))
    assert list(rows) == ["sample", "pick"] and rows["sample"][1] == "True"
    assert all(spills == "False" and int(shared) <= 4096 for shared, _, spills in rows.values())
    # What follows from the number of rows: a step of another size must not wait for the compiler.
    assert {"_sample_kernel.row_stride", "_sample_kernel.num_read"} <= specialised
    assert not {f"_sample_kernel.{name}" for name in ("num_ids", "tiles_a_part")} & specialised
    assert "_pick_kernel.num_parts" not in specialised
    assert [name for name in specialised if "PARTS" in name] == ["_pick_kernel.PARTS"]  # powers of two


# --- what is refused ---


def sample_of(**changes):
    logits, temperatures, seeds, draws = sampling_case(2, 50)
    arguments = {"logits": logits, "temperatures": temperatures, "seeds": seeds, "draws": draws}
    return triton_sampling.sample_rows(**(arguments | changes))


REFUSED = {
    "temperatures: torch.float64": lambda: sample_of(temperatures=torch.zeros(2, dtype=torch.float64, device=DEVICE)),
    "seeds: torch.int32": lambda: sample_of(seeds=integers(1, 2).int()),
    r"draws.*\[1\].*\[2\]": lambda: sample_of(draws=integers(1)),
    "logits of shape.*contiguous matrix": lambda: sample_of(logits=random(50, 2).T),
    "logits of 0 ids": lambda: sample_of(logits=torch.zeros(2, 0, device=DEVICE)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_sampling_does_not_take_is_refused_by_name(message):
    with pytest.raises(KernelError, match=message):
        REFUSED[message]()


# --- bugs planted in the source ---


def rows_apart(fused):
    """Rows of a wider matrix, with NaN behind them; of the last row's, memory may end with its ids."""
    logits, *numbers = sampling_case(6, 999)
    wide = torch.full((6, 1024), math.nan, device=DEVICE)
    wide[:, :999] = logits
    ends = torch.cat([wide.flatten()[: 5 * 1024 + 999]]).as_strided((6, 999), (1024, 1))
    assert (fused.readable(wide[:, :999]), fused.readable(logits), fused.readable(ends)) == (1008, 999, 999)
    for each in (wide[:, :999], ends):
        assert fused.sample_rows(each, *numbers).tolist() == plain.sample_rows(logits, *numbers).tolist()


def rare_noise(fused):
    """Two tokens, the first with noise near the end of the series: its logit makes up for the rest, all but 5e-5."""
    seeds = torch.arange(4000, device=DEVICE)
    noise = plain.gumbel_noise(seeds, seeds, 2)
    rows = ((noise[:, 0] > 3.3) & (noise[:, 0] < 4)).nonzero().flatten()[:80]
    first_wins = rows % 2 == 0
    logits = torch.zeros(len(rows), 2, device=DEVICE)
    logits[:, 0] = noise[rows, 1] - noise[rows, 0] + torch.where(first_wins, 5e-5, -5e-5)
    ids = fused.sample_rows(logits, torch.ones(len(rows), device=DEVICE), rows, rows)
    assert len(rows) == 80 and ids.tolist() == (~first_wins).long().tolist()


def minus_one(fused):
    check_not_finite(fused, 1.0, 1300)


BUGS = {
    "rows share their noise": ("seed = tl.load(seeds + row)", "seed = tl.load(seeds)", check_same_tokens),
    "draws share their noise": ("draw = tl.load(draws + row)", "draw = tl.load(draws)", check_same_tokens),
    "half of the draw's number": ("zero + low, zero + high", "zero + low, zero", check_same_tokens),
    "tiles share their noise": ("(tile * STRIDE + lane).to", "lane.to", check_same_tokens),
    "one word for two quarters": ("_gumbel(n2, COMPILED)", "_gumbel(n1, COMPILED)", check_same_tokens),
    "noise is scaled too": ("logit * factor + noise", "(logit + noise) * factor", check_same_tokens),
    "noise in other units than scores": ("factor = 1.4426950408889634 /", "factor = 1.0 /", check_same_tokens),
    "the series in other units": ("series * 1.4426950408889634", "series", rare_noise),
    "a series that is too short": ("(0.33333334 + u * 0.25)", "0.0", rare_noise),
    "rows lie side by side": ("logits += row * row_stride", "logits += row * num_ids", rows_apart),
    "what is behind the ids is taken": (
        "tl.where(own < num_ids, logit, float",
        "tl.where(own >= 0, logit, float",
        rows_apart,
    ),
    "ids are counted by what is read": ("mask=own < num_read", "mask=own < num_ids - 1", check_the_last_token),
    "7 rounds": ("ROUNDS=PHILOX_ROUNDS", "ROUNDS=7", check_same_tokens),
    "the last tile is left out": ("tl.cdiv(num_ids, 4 * STRIDE))", "num_ids // (4 * STRIDE))", check_the_last_token),
    "parts lie over each other": ("first_tile = part * tiles_a_part", "first_tile = 0 * part", check_the_last_token),
    "NaN is passed over": ("(new > score) | (new != new)", "new > score", minus_one),
    "infinity is a score": ('logit < float("inf"), logit', 'logit <= float("inf"), logit', minus_one),
    "NaN of one part is passed over": ("tl.where(broken, -1, chosen)", "chosen", minus_one),
    "of equals the last": ("(new > score) |", "(new >= score) |", check_first_of_equals),
}


@pytest.mark.skipif(GPU, reason="the interpreter shows planted bugs as well")
@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found(name, tmp_path):
    right, wrong, check = BUGS[name]
    with pytest.raises(AssertionError):
        check(with_bug(triton_sampling, right, wrong, tmp_path))


@pytest.mark.parametrize("check", dict.fromkeys(bug[-1] for bug in BUGS.values()))
def test_without_the_bug_the_same_check_passes(check):
    check(triton_sampling)


def test_a_bug_planted_in_the_noise_is_found(tmp_path):
    for right, wrong in (
        (".neg_().log_().neg_()", ".neg_().neg_()"),
        ("others & LOW_HALF), dim=1)", "multiplied), dim=1)"),
    ):
        broken = with_bug(plain, right, wrong, tmp_path)
        with pytest.raises(AssertionError):
            check_distribution(broken, num_draws=1500)
            check_noise(broken)
