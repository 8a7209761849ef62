"""Chapter 12's checks pass right answers of any layout, refuse what readers typically get wrong, and say why."""

import numpy as np
import pytest
import torch
from torch.nn.functional import silu

from check_answers import message, passes
from minillm import checks
from minillm.checks.base import NotWrittenYet
from minillm.checks.chapter_12 import chosen

# part_of ------------------------------------------------------------------------------------------


def part_of(weight, rank, size, by):
    return weight.chunk(size, 1 if by == "columns" else 0)[rank]


def by_hand(weight, rank, size, by):
    rows, columns = weight.shape
    if by == "rows":
        return weight[rank * rows // size : (rank + 1) * rows // size].tolist()
    return weight[:, rank * columns // size : (rank + 1) * columns // size].numpy()


def by_index(weight, rank, size, by):
    dim = {"rows": 0, "columns": 1}[by]
    number = weight.shape[dim] // size
    return weight.index_select(dim, torch.arange(rank * number, rank * number + number))


@pytest.mark.parametrize("right", [part_of, by_hand, by_index])
def test_part_of_accepts(right, capsys):
    assert passes(checks.part_of, right, capsys)


def every_other(weight, rank, size, by):
    return weight[:, rank::size] if by == "columns" else weight[rank::size]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda w, r, n, by: part_of(w, r, n, "rows" if by == "columns" else "columns"), "cut the other way"),
        (lambda w, r, n, by: part_of(w, 0, n, by), "the part of rank 0, and rank 1 has another"),
        (every_other, "neighbouring columns"),
        (lambda w, r, n, by: w, "Each of 2 ranks has 1/2 of the columns"),
        (lambda w, r, n, by: part_of(w, r, n, by).T, "Each of 2 ranks|cut the other way|1/2"),
        (
            lambda w, r, n, by: part_of(w, r, n, by) if by == "columns" else every_other(w, r, n, by),
            "neighbouring rows",
        ),
        (lambda w, r, n, by: part_of(w, n - 1 - r, n, by), "neighbouring columns"),
        (lambda w, r, n, by: None, "got       None"),
    ],
)
def test_part_of_refuses(wrong, told):
    text = message(checks.part_of, wrong)
    assert any(each in text for each in told.split("|"))


# mlp_on_rank --------------------------------------------------------------------------------------


def mlp_on_rank(x, gate, up, down, add_up):
    return x + add_up((silu(x @ gate) * (x @ up)) @ down)


def in_place(x, gate, up, down, add_up):
    term = (silu(x @ gate) * (x @ up)) @ down
    add_up(term)
    term += x
    return term


def by_numpy(x, gate, up, down, add_up):
    wide = torch.sigmoid(x @ gate) * (x @ gate) * (x @ up)
    return (add_up(wide @ down) + x).numpy()


def as_lists(x, gate, up, down, add_up):
    return [[float(number) for number in row] for row in mlp_on_rank(x, gate, up, down, add_up)]


@pytest.mark.parametrize("right", [mlp_on_rank, in_place, by_numpy, as_lists])
def test_mlp_on_rank_accepts(right, capsys):
    assert passes(checks.mlp_on_rank, right, capsys)


def sums_gate_and_up(x, gate, up, down, add_up):
    return x + (silu(add_up(x @ gate)) * add_up(x @ up)) @ down


def sums_everything(x, gate, up, down, add_up):
    wide = add_up(silu(x @ gate) * (x @ up))
    return x + add_up(wide @ down)


def raises(x, gate, up, down, add_up):
    raise ValueError("no idea")


def one_rank_sums_less(x, gate, up, down, add_up):
    term = (silu(x @ gate) * (x @ up)) @ down
    return x + (add_up(term) if float(gate.sum()) > 0 else term)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda x, g, u, d, a: a(x + (silu(x @ g) * (x @ u)) @ d), "x is in the sum 2 times"),
        (lambda x, g, u, d, a: a((silu(x @ g) * (x @ u)) @ d), "x itself is missing"),
        (lambda x, g, u, d, a: x + (silu(x @ g) * (x @ u)) @ d, "one term of the sum only"),
        (sums_gate_and_up, "One sum is enough"),
        (sums_everything, "One sum is enough"),
        (lambda x, g, u, d, a: x + a((silu(x @ u) * (x @ g)) @ d), "one term of the sum over ranks"),
        (lambda x, g, u, d, a: x + a(((x @ g) * (x @ u)) @ d), "one term of the sum over ranks"),
        (lambda x, g, u, d, a: a((silu(x @ g) * (x @ u)) @ d)[0], "Return [T, hidden]|x itself"),
        (raises, "raised    ValueError: no idea"),
        (lambda x, g, u, d, a: None, "Your function returned nothing"),
    ],
)
def test_mlp_on_rank_refuses(wrong, told):
    text = message(checks.mlp_on_rank, wrong)
    assert any(each in text for each in told.split("|"))


def test_ranks_that_wait_for_each_other_in_vain_come_to_an_end():
    assert "✗ mlp_on_rank" in message(checks.mlp_on_rank, one_rank_sums_less)


# ring_seconds -------------------------------------------------------------------------------------


def ring_seconds(num_bytes, num_ranks, bandwidth, latency):
    return 2 * (num_ranks - 1) * (latency + num_bytes / num_ranks / bandwidth)


def round_by_round(num_bytes, num_ranks, bandwidth, latency):
    seconds = np.float64(0)
    for _ in range(num_ranks - 1):
        seconds += 2 * (latency + num_bytes / (num_ranks * bandwidth))
    return seconds


@pytest.mark.parametrize("right", [ring_seconds, round_by_round])
def test_ring_seconds_accepts(right, capsys):
    assert passes(checks.ring_seconds, right, capsys)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda b, n, w, s: ring_seconds(b, n, w, s) / 2, "This is half of it"),
        (lambda b, n, w, s: 2 * (n - 1) * (s + b / w), "one piece, not the whole vector"),
        (lambda b, n, w, s: 2 * (n - 1) * b / n / w, "still takes the latency"),
        (lambda b, n, w, s: s + 2 * (n - 1) * b / n / w, "still takes the latency"),
        (lambda b, n, w, s: 2 * n * (s + b / n / w), "six rounds of a quarter"),
        (lambda b, n, w, s: b / w + 2 * (n - 1) * s, "six rounds of a quarter"),
        (lambda b, n, w, s: [1, 2], "Return one number"),
        (lambda b, n, w, s: None, "got       None"),
    ],
)
def test_ring_seconds_refuses(wrong, told):
    assert told in message(checks.ring_seconds, wrong)


# fast_plan ----------------------------------------------------------------------------------------


def distances_of(num_ranks):
    return [2**number for number in reversed(range(num_ranks.bit_length() - 1))]


def fast_plan(num_ranks):
    ranks, distances = range(num_ranks), distances_of(num_ranks)
    halves = [[(r, r ^ d, [p for p in ranks if p // d == (r ^ d) // d]) for r in ranks] for d in distances]
    back = [[(r, r ^ d, [p for p in ranks if p // d == r // d]) for r in ranks] for d in reversed(distances)]
    return halves + back


def nearest_first(num_ranks):
    """The other way through the bits: a rank works on every second piece, then on every fourth."""
    ranks, distances = range(num_ranks), distances_of(num_ranks)[::-1]
    kept = [set(ranks) for _ in ranks]
    for distance in distances:
        sent = [{piece for piece in kept[r] if piece & distance != r & distance} for r in ranks]
        yield ((r, r ^ distance, sent[r]) for r in ranks)
        kept = [kept[r] - sent[r] for r in ranks]
    for distance in reversed(distances):
        yield [(np.int64(r), r ^ distance, np.array(sorted(kept[r]))) for r in ranks]
        kept = [kept[r] | kept[r ^ distance] for r in ranks]


@pytest.mark.parametrize("right", [fast_plan, nearest_first])
def test_fast_plan_accepts(right, capsys):
    assert passes(checks.fast_plan, right, capsys)


def ring(num_ranks):
    ranks = range(num_ranks)
    grow = [[(r, (r + 1) % num_ranks, [(r - s) % num_ranks]) for r in ranks] for s in range(num_ranks - 1)]
    return grow + [[(r, (r + 1) % num_ranks, [(r + 1 - s) % num_ranks]) for r in ranks] for s in range(num_ranks - 1)]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (ring, "a term travels one place per round"),
        (lambda n: [[(r, r ^ d, range(n)) for r in range(n)] for d in distances_of(n)], "too many pieces"),
        (lambda n: fast_plan(n)[: len(fast_plan(n)) // 2], "as a sum over 1 of 2 ranks"),
        (lambda n: fast_plan(n)[::-1] if n > 2 else fast_plan(n), "count a term twice|as a sum over"),
        (lambda n: [[(0, r, range(n)) for r in range(1, n)]], "is the sender of two messages|as a sum over"),
        (lambda n: [[(r, n, [0]) for r in range(n)]], "the ranks are 0 to 1"),
        (lambda n: [(0, 1, [0])], "no list of rounds"),
        (lambda n: [], "as a sum over 1 of 2 ranks"),
        (lambda n: None, "no list of rounds"),
    ],
)
def test_fast_plan_refuses(wrong, told):
    text = message(checks.fast_plan, wrong)
    assert any(each in text for each in told.split("|"))


# choose_replica -----------------------------------------------------------------------------------


def choose_replica(blocks, sent, loads, most_ahead):
    held = []
    for of_one in sent:
        count = 0
        while count < len(blocks) and blocks[count] in of_one:
            count += 1
        held.append(count)
    order = sorted(range(len(loads)), key=lambda replica: (-held[replica], loads[replica], replica))
    least = min(loads)
    if held[order[0]] and loads[order[0]] - least <= most_ahead:
        return np.int64(order[0])
    return loads.index(least)


def by_lengths(blocks, sent, loads, most_ahead):
    """From the longest beginning to the shortest."""
    for end in range(len(blocks), 0, -1):
        holders = [replica for replica, of_one in enumerate(sent) if of_one.issuperset(blocks[:end])]
        if holders:
            best = min(holders, key=loads.__getitem__)
            return best if loads[best] <= min(loads) + most_ahead else float(np.argmin(loads))
    return float(np.argmin(loads))


@pytest.mark.parametrize("right", [choose_replica, by_lengths, chosen])
def test_choose_replica_accepts(right, capsys):
    assert passes(checks.choose_replica, right, capsys)


def counts_all_blocks(blocks, sent, loads, most_ahead):
    held = [sum(block in of_one for block in blocks) for of_one in sent]
    best = min(range(len(loads)), key=lambda replica: (-held[replica], loads[replica]))
    return best if held[best] and loads[best] <= min(loads) + most_ahead else loads.index(min(loads))


def of_the_mean(blocks, sent, loads, most_ahead):
    best = chosen(blocks, sent, loads, 10**9)
    return best if loads[best] <= sum(loads) / len(loads) + most_ahead else loads.index(min(loads))


def first_of_several(blocks, sent, loads, most_ahead):
    held = [chosen(blocks, [of_one], [0], 0) == 0 and bool(blocks) and blocks[0] in of_one for of_one in sent]
    best = held.index(True) if True in held else loads.index(min(loads))
    return best if loads[best] <= min(loads) + most_ahead else loads.index(min(loads))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda b, s, n, m: n.index(min(n)), "Replica 1 was sent the block"),
        (counts_all_blocks, "up to the first that is missing"),
        (of_the_mean, "not with the mean"),
        (first_of_several, "has three blocks, replica 0 one"),
        (lambda b, s, n, m: chosen(b, s, n, 10**9), "20 requests are more than 8 ahead of 0"),
        (lambda b, s, n, m: chosen(b, s, n, m - 1), "8 ahead is not more than"),
        (lambda b, s, n, m: chosen(b, s, [0] * len(n), m), "more than 8 ahead"),
        (lambda b, s, n, m: len(n) - 1 - chosen(b, s[::-1], n[::-1], m), "the lower number"),
        (lambda b, s, n, m: s[chosen(b, s, n, m)], "Replica 1 was sent the block"),
        (lambda b, s, n, m: None, "got       None"),
    ],
)
def test_choose_replica_refuses(wrong, told):
    assert told in message(checks.choose_replica, wrong)


# stubs --------------------------------------------------------------------------------------------


def a_stub(*args):
    raise NotImplementedError("write a_stub")


@pytest.mark.parametrize(
    "check",
    [checks.part_of, checks.mlp_on_rank, checks.ring_seconds, checks.fast_plan, checks.choose_replica],
    ids=lambda check: check.__name__,
)
def test_what_is_not_written_yet_is_told_so(check):
    with pytest.raises(NotWrittenYet, match=rf"✗ {check.__name__}: not written yet"):
        check(a_stub)
