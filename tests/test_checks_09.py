"""Chapter 9's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import math
import os
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

import minillm
from check_answers import message, passes
from minillm import checks, costs
from minillm.checks.base import NotWrittenYet
from minillm.checks.chapter_09 import reads_of
from minillm.course.student import without_solutions

# decode_step_seconds -------------------------------------------------------------------------------------


def parts(shape, card, contexts):
    """Reading the weights, arithmetic, reading the caches: seconds."""
    weights = costs.matmul_parameters(shape)
    caches = sum(contexts) * minillm.kv_bytes_per_token(shape) / card.bandwidth
    return 2 * weights / card.bandwidth, 2 * weights * len(contexts) / card.flops, caches


def step(shape, card, contexts):
    reading, arithmetic, caches = parts(shape, card, contexts)
    return max(reading, arithmetic) + caches


def step_one_by_one(shape, card, contexts):
    seconds = torch.tensor(parts(shape, card, contexts)[:2], dtype=torch.float64).max()
    for context in contexts:
        seconds += context * minillm.kv_bytes_per_token(shape) / card.bandwidth
    return seconds


@pytest.mark.parametrize("right", [step, step_one_by_one])
def test_decode_step_seconds_accepts(right, capsys):
    assert passes(checks.decode_step_seconds, right, capsys)


def per_query_head(shape, card, contexts):
    group = shape.num_attention_heads // shape.num_key_value_heads
    return max(parts(shape, card, contexts)[:2]) + group * parts(shape, card, contexts)[2]


def sum_from_eight_on(*args):
    reading, arithmetic, caches = parts(*args)
    return reading + caches + (arithmetic if len(args[2]) > 8 else 0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda *args: 2 * parts(*args)[0], "2 bytes each"),
        (lambda *args: max(parts(*args)[:2]), "The cache is read besides"),
        (lambda *args: max(parts(*args)), "The cache is read besides"),
        (lambda *args: parts(*args)[0] * len(args[2]) + parts(*args)[2], "Weights are read once"),
        (lambda shape, card, contexts: step(shape, card, contexts[:1] * len(contexts)), "add them up"),
        (per_query_head, "kv_bytes_per_token knows"),
        (lambda *args: parts(*args)[0] + parts(*args)[2], "take longer than reading"),
        (sum_from_eight_on, "take longer than reading"),
        (lambda *args: 1000 * step(*args), "10^3 times as much: give seconds"),
        (lambda *args: step(*args) / 1e12, "10^-12 times as much: give seconds"),
        (lambda *args: max(parts(*args)[0] + parts(*args)[2], parts(*args)[1]), "behind the max, not in it"),
        (lambda *args: -step(*args), "2 bytes each"),
        (lambda *args: None, "does it end with `return`"),
    ],
    ids=[
        "twice",
        "no caches",
        "largest",
        "each",
        "first",
        "queries",
        "no FLOP",
        "sum",
        "milliseconds",
        "TB",
        "in the max",
        "negative",
        "nothing",
    ],
)
def test_decode_step_seconds_refuses(wrong, told):
    assert told in message(checks.decode_step_seconds, wrong)


def test_decode_step_seconds_names_shape_and_card():
    assert "decode_step_seconds(LLAMA_2_7B, H200, [0])" in message(checks.decode_step_seconds, lambda *args: 1.0)


def test_decode_step_seconds_prints_many_equal_contexts_in_short():
    def all_but_the_longest(shape, card, contexts):
        return step(shape, card, contexts) if len(contexts) < 512 else 1.0

    assert "decode_step_seconds(LLAMA_2_7B, H200, [0] * 512)" in message(
        checks.decode_step_seconds, all_but_the_longest
    )


# slot_of ------------------------------------------------------------------------------------------


def slot(table, position, block_size):
    return table[position // block_size] * block_size + position % block_size


def slot_in_a_list_of_all(table, position, block_size):
    return torch.tensor([block * block_size + place for block in table for place in range(block_size)])[position]


@pytest.mark.parametrize("right", [slot, slot_in_a_list_of_all])
def test_slot_of_accepts(right, capsys):
    assert passes(checks.slot_of, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda table, position, block_size: position, "the table has not been asked"),
        (lambda table, position, block_size: table[position // block_size], "That is the block"),
        (lambda table, position, block_size: table[position // block_size] * block_size, "add the place"),
        (lambda table, position, block_size: table[position // 4] * 4 + position % 4, "Use `block_size`"),
        (lambda table, position, size: table[position % size] * size + position // size, "raised    IndexError"),
        (lambda *args: slot(*args) + 1, "place 0 of the first block"),
        (lambda *args: None, "does it end with `return`"),
    ],
    ids=["position", "block", "begin", "always 4", "exchanged", "one more", "nothing"],
)
def test_slot_of_refuses(wrong, told):
    assert told in message(checks.slot_of, wrong)


# paged_decode -------------------------------------------------------------------------------------


def decoded(q, keys, values, table, length, scale=None, of=lambda head, group, num: head // group, end=0):
    """Attention by rows of the pool; the options are what readers get wrong."""
    block_size, num_kv_heads = keys.shape[1:3]
    slots = [slot(table, t, block_size) for t in range(length + end)]
    k, v = (pool.flatten(0, 1)[slots] for pool in (keys, values))
    heads = [of(head, len(q) // num_kv_heads, num_kv_heads) for head in range(len(q))]
    scores = (q[None] * k[:, heads]).sum(-1) * (scale or q.shape[1] ** -0.5)  # [n, Hq]
    return (scores.softmax(0)[..., None] * v[:, heads]).sum(0)


def decoded_as_lists(q, keys, values, table, length):
    return decoded(q.double(), keys.double(), values.double(), table, length).tolist()


def decoded_online(q, keys, values, table, length):
    best, total, acc = torch.full((len(q),), -torch.inf), torch.zeros(len(q)), torch.zeros_like(q)
    for t in range(length):
        place = table[t // keys.shape[1]], t % keys.shape[1]
        k, v = (pool[place].repeat_interleave(len(q) // keys.shape[2], dim=0) for pool in (keys, values))
        score = (q * k).sum(-1) / q.shape[1] ** 0.5
        new = torch.maximum(best, score)
        total, acc = (x * (best - new).exp().view(-1, *[1] * (x.dim() - 1)) for x in (total, acc))
        total, acc, best = total + (score - new).exp(), acc + (score - new).exp()[:, None] * v, new
    return acc / total[:, None]


@pytest.mark.parametrize("right", [decoded, decoded_as_lists, decoded_online])
def test_paged_decode_accepts(right, capsys):
    assert passes(checks.paged_decode, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda q, k, v, table, n: decoded(q, k, v, table, n, scale=1.0), "not divided by √D"),
        (lambda q, k, v, table, n: decoded(q, k, v, sorted(table), n), "NaN"),
        (lambda q, k, v, table, n: decoded(q, k, v, table, len(table) * 4), "NaN"),
        (lambda q, k, v, table, n: decoded(q, k, v, range(8), n), "NaN"),
        (lambda q, k, v, table, n: decoded(q, k, v, table, n, end=-1 if n > 1 else 0), "Blocks 1 and 2"),
        (lambda q, k, v, table, n: decoded(q, k, v, table, n, of=lambda h, g, num: h % num), "head // group"),
        (lambda q, k, v, table, n: decoded(q, k, v, table, n, of=lambda h, g, num: 0), "reads key head h // 2"),
        (lambda q, k, v, table, n: decoded(q, k, k, table, n), "its value"),
        (lambda q, k, v, table, n: decoded(q, k, v, table, n)[0], "the shape of `q`"),
        (lambda *args: None, "does it end with `return`"),
    ],
    ids=[
        "scale",
        "sorted",
        "whole blocks",
        "no table",
        "not itself",
        "modulo",
        "head 0",
        "keys",
        "one head",
        "nothing",
    ],
)
def test_paged_decode_refuses(wrong, told):
    assert told in message(checks.paged_decode, wrong)


# merge_softmax ------------------------------------------------------------------------------------


def merged(one, other, base=None, total_too=True, acc_too=True):
    best = torch.maximum(one[0], other[0])
    base = torch.where(best == -torch.inf, 0.0, best) if base is None else base(best)
    weights = [(part[0] - base).exp() for part in (one, other)]
    total = sum(part[1] * (weight if total_too else 1) for part, weight in zip((one, other), weights, strict=True))
    acc = sum(part[2] * (weight if acc_too else 1) for part, weight in zip((one, other), weights, strict=True))
    return best, total, acc


def merged_in_numbers(one, other):
    parts = [(float(best), float(total), acc.tolist()) for best, total, acc in (one, other) if total > 0]
    best = max((part[0] for part in parts), default=-math.inf)
    weights = [math.exp(part[0] - best) for part in parts]
    total = sum(weight * part[1] for weight, part in zip(weights, parts, strict=True))
    acc = [sum(w * part[2][d] for w, part in zip(weights, parts, strict=True)) for d in range(3)]
    return [best, total, acc]


@pytest.mark.parametrize("right", [merged, merged_in_numbers])
def test_merge_softmax_accepts(right, capsys):
    assert passes(checks.merge_softmax, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda one, other: merged(one, other, base=lambda best: one[0]), "The other part has the larger score"),
        (lambda one, other: merged(one, other, base=lambda best: best), "NaN"),
        (lambda one, other: merged(one, other, base=lambda best: 0.0), "same largest score"),
        (lambda one, other: merged(one, other, total_too=False), "The other part has the larger score"),
        (lambda one, other: merged(one, other, acc_too=False), "The other part has the larger score"),
        (lambda one, other: one, "same largest score"),
        (lambda one, other: merged(one, other)[2], "got       "),
        (lambda one, other: (0, *merged(one, other)[1:]), "same largest score"),
        (lambda *args: None, "does it end with `return`"),
    ],
    ids=[
        "first's base",
        "no base for nothing",
        "no base",
        "total",
        "acc",
        "first only",
        "acc alone",
        "best",
        "nothing",
    ],
)
def test_merge_softmax_refuses(wrong, told):
    assert told in message(checks.merge_softmax, wrong)


# key_number ---------------------------------------------------------------------------------------


def in_order(load, thread, head, num_heads):
    vector = 32 * load + thread
    return (vector // 8 * num_heads + head) * 64 + vector % 8 * 8


def pairs_of_threads(load, thread, head, num_heads):
    """Two neighbours share a sector; the pairs of a load are spread over all keys."""
    key, sector = thread // 2, load
    return np.int64((key * num_heads + head) * 64 + sector * 16 + thread % 2 * 8)


def backwards(load, thread, head, num_heads):
    return torch.tensor(pairs_of_threads(3 - load, 31 - thread, head, num_heads))


def pairs_far_apart(load, thread, head, num_heads):
    """Threads t and t + 16 share a key, and begin at different sectors of it."""
    key, sector = thread % 16, (load + thread) % 4
    return (key * num_heads + head) * 64 + sector * 16 + thread // 16 * 8


@pytest.mark.parametrize("right", [pairs_of_threads, backwards, pairs_far_apart])
def test_key_number_accepts(right, capsys):
    assert passes(checks.key_number, right, capsys)


def half_a_key_each(load, thread, head, num_heads):
    return (thread // 2 * num_heads + head) * 64 + thread % 2 * 32 + load * 8


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (half_a_key_each, "128 sectors fetched: [32, 32, 32, 32]"),
        (in_order, "128 partial sums, with 64 sectors"),
        (lambda load, thread, head, num_heads: head * 64 + pairs_of_threads(load, thread, 0, 1), "belongs to head 1"),
        (lambda load, thread, head, num_heads: pairs_of_threads(load, thread, 0, num_heads), "belongs to head 0"),
        (lambda load, thread, head, num_heads: in_order(load, 0, head, num_heads), "read by nobody"),
        (lambda load, thread, head, num_heads: in_order(0, thread, head, num_heads), "768 numbers read by nobody"),
        (lambda *args: in_order(*args) // 8, "must begin at a multiple"),
        (lambda *args: 2 * in_order(*args), "Is it in bytes?"),
        (lambda *args: in_order(*args) / 16, "Give a whole number"),
        (lambda *args: True, "got       True"),
        (lambda *args: None, "does it end with `return`"),
    ],
    ids=[
        "half a key",
        "in order",
        "one head",
        "head 0",
        "one thread",
        "one load",
        "vectors",
        "bytes",
        "float",
        "bool",
        "nothing",
    ],
)
def test_key_number_refuses(wrong, told):
    assert told in message(checks.key_number, wrong)


@pytest.mark.parametrize(
    ("mapping", "sectors", "sums"),
    [(in_order, 64, 128), (pairs_of_threads, 64, 32), (pairs_far_apart, 64, 32), (half_a_key_each, 128, 32)],
)
def test_sectors_are_counted_once_a_load_and_partial_sums_once_a_thread_and_key(mapping, sectors, sums):
    reads = reads_of(mapping, head=1, num_heads=2)
    assert (reads.num_sectors, reads.num_partial_sums) == (sectors, sums)


def test_key_reads_draws_a_wasteful_way_and_what_the_reader_wrote():
    wasteful, yours = checks.key_reads(in_order).pictures
    assert (wasteful.bytes_moved, yours.bytes_moved) == (1024, 512)
    assert (
        checks.key_reads(half_a_key_each).pictures[1].text() == wasteful.text()
    )  # it gives no part of the answer away


def not_written(*args):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "title"),
    [(None, None), (not_written, "yours: not written yet"), (lambda *args: None, "yours: TypeError")],
    ids=["none", "stub", "nothing"],
)
def test_key_reads_draws_that_alone_where_there_is_nothing_else(function, title):
    drawn = checks.key_reads(function)
    assert len(drawn.pictures) == 1 and drawn.title == title


# my_decode --------------------------------------------------------------------------------------

CHAPTER = Path(__file__).parents[1] / "notebooks" / "09_paged_attention_on_cuda.ipynb"
HEADER = "import triton\nimport triton.language as tl\n\njit = triton.jit\n\n\n"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="a wrong kernel may read outside the pool")


@pytest.fixture(scope="module")
def source():
    """The exercise's cell as it is committed, with its solution."""
    cells = nbformat.read(CHAPTER, as_version=4).cells
    return next(cell.source for cell in cells if cell.id == "decode-loop")


def kernel_from(source, folder):
    """`my_decode` of a file with this source: Triton reads a kernel's source, so it must lie somewhere."""
    path = folder / "cell.py"
    path.write_text(HEADER + source)
    spec = spec_from_file_location("cell", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.my_decode


@needs_triton
@pytest.mark.parametrize(
    "right",
    ["tl.max(scores, axis=1)", "tl.max(tl.max(scores, axis=1), axis=0)"],
    ids=["the chapter's own", "one best score for the group"],
)
def test_my_decode_accepts(right, source, tmp_path, capsys):
    source = source.replace("tl.max(scores, axis=1)", right)
    assert passes(checks.my_decode, kernel_from(source, tmp_path), capsys)


WRONG_LOOPS = {
    "unseen keys count": ('tl.where(seen[None, :], scores, float("-inf"))', "scores + 0.0", "ends inside the tile"),
    "unseen keys score 0": ('scores, float("-inf"))', "scores, 0.0)", "ends inside the tile"),
    "no rescaling": ("rescale = tl.exp(best - new_best)", "rescale = total * 0.0 + 1.0", "exp(best - new best)"),
    "total not rescaled": ("total = total * rescale", "total = total", "exp(best - new best)"),
    "acc not rescaled": ("acc = acc * rescale[:, None]", "acc = acc", "exp(best - new best)"),
    "rescaled the wrong way": ("tl.exp(best - new_best)", "tl.exp(new_best - best)", "not exp(new best - best)"),
    "best of this tile only": (
        "tl.maximum(best, tl.max(scores, axis=1))",
        "tl.max(scores, axis=1)",
        "The new best is the larger of two",
    ),
    "nothing subtracted": ("tl.exp(scores - new_best[:, None])", "tl.exp(scores)", "exp(best - new best)"),
    "best not kept": ("        best = new_best\n", "", "The next tile needs the new best"),
    "scaled twice": (
        "tl.sum(queries[:, None, :] * k[None, :, :], axis=2)",
        "tl.sum(queries[:, None, :] * k[None, :, :], axis=2) * scale",
        "divided by √D already",
    ),
    "matrix product": ("tl.sum(queries[:, None, :] * k[None, :, :], axis=2)", "queries @ k.T", "A kernel has no `@`"),
    "maximum over unseen keys too": (
        """        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
""",
        """        new_best = tl.maximum(best, tl.max(scores, axis=1))
        scores = tl.where(seen[None, :], scores, float("-inf"))
""",
        "of the keys that are seen",
    ),
    "sum over the wrong axis": ("tl.sum(weights, axis=1)", "tl.sum(weights, axis=0)", "raised"),
    "keys instead of values": ("weights[:, :, None] * v[None", "weights[:, :, None] * k[None", "One full tile"),
}


@needs_triton
@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", WRONG_LOOPS)
def test_my_decode_refuses(name, source, tmp_path):
    right, wrong, told = WRONG_LOOPS[name]
    assert source.count(right) == 1
    assert told in message(checks.my_decode, kernel_from(source.replace(right, wrong), tmp_path))


@needs_triton
@needs_interpreter
def test_my_decode_names_the_first_place_that_differs(source, tmp_path):
    wrong = source.replace("tl.store(out + own, acc", "tl.store(out + own, (column[None, :] == 3) * 5 + acc")
    told = message(checks.my_decode, kernel_from(wrong, tmp_path))
    assert "for request 0, query head 0, number 3 of 16" in told and "there; 4 of 64 numbers are wrong" in told
    got, expected = (float(line.split()[1]) for line in told.splitlines()[2:4])
    assert got - expected == pytest.approx(5, abs=1e-3)


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

floats = dict.fromkeys(["q", "keys", "values", "out"], "*fp32")
types = floats | {"tables": "*i64", "lengths": "*i64", "table_width": "i32", "scale": "fp32"}
signature = {name: types.get(name, "constexpr") for name in my_decode.arg_names}
sizes = {"NUM_KV_HEADS": 2, "GROUP": 2, "D": 32, "BLOCK_SIZE": 4, "KEYS": 4}
source = ASTSource(my_decode, signature, sizes, {})
print(".entry" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
"""


@needs_triton
def test_the_chapters_own_loop_compiles_for_a_gpu(source, tmp_path):
    """Triton's compiler needs no GPU, but a process in which the interpreter is off."""
    path = tmp_path / "cell.py"
    path.write_text(HEADER + source + COMPILE)
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=120)
    assert run.stdout == "True\n", run.stderr


@needs_triton
def test_my_decode_waits_for_a_stub(source, tmp_path):
    stub = without_solutions(source)
    assert "raise NotImplementedError" in stub and "raise NotImplementedError" not in source
    with pytest.raises(NotWrittenYet):
        checks.my_decode(kernel_from(stub, tmp_path))


@needs_triton
@needs_interpreter
def test_my_decode_asks_for_a_restart_where_triton_was_imported_too_early(source, tmp_path):
    """In a process of its own: what is imported once stays as it is."""
    path = tmp_path / "cell.py"
    late = "import os\nimport triton\nos.environ['TRITON_INTERPRET'] = '1'\n"
    path.write_text(f"{late}{HEADER}{source}\nfrom minillm import checks\nchecks.my_decode(my_decode)\n")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(CHAPTER.parents[1])
    run = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=120)
    assert "CheckFailed: ✗ my_decode: Triton was imported before" in run.stderr and "Restart the kernel" in run.stderr


def test_my_decode_says_that_without_triton_nothing_was_checked(capsys):
    checks.my_decode(lambda q, keys: None)
    assert "nothing was checked" in capsys.readouterr().out
