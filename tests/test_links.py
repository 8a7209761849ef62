"""Several cards: what they send each other, how long that takes, and the pictures of it."""

import math
from itertools import pairwise

import pytest

from minillm.costs import (
    A100_80GB,
    ETHERNET_100G,
    LINKS,
    LLAMA_2_7B,
    LLAMA_2_70B,
    LLAMA_3_8B,
    NVLINK_3,
    PCIE_4,
    Link,
    all_reduce_bytes,
    all_reduce_seconds,
    decode_seconds,
    follow_plan,
    is_complete,
    kv_bytes_per_token,
    plan_seconds,
    ring_plan,
    step_seconds,
    tensor_parallel_pays_up_to,
    tensor_parallel_seconds,
)
from minillm.errors import ConfigError
from minillm.viz import AllReduceRounds, LinkRoofline, PictureError, Routes

SLOW, FREE = Link("slow", 1e9, 1e-3), Link("free", 1e30, 0.0)


def butterfly(num_ranks):
    distances = [2**number for number in reversed(range(num_ranks.bit_length() - 1))]
    ranks = range(num_ranks)
    halves = [[(r, r ^ d, [p for p in ranks if p // d == (r ^ d) // d]) for r in ranks] for d in distances]
    back = [[(r, r ^ d, [p for p in ranks if p // d == r // d]) for r in ranks] for d in reversed(distances)]
    return halves + back


# bytes and seconds --------------------------------------------------------------------------------


def test_two_vectors_per_layer_and_token_are_summed():
    assert all_reduce_bytes(LLAMA_2_7B) == 2 * 32 * 4096 * 2 == kv_bytes_per_token(LLAMA_2_7B, 2)
    assert all_reduce_bytes(LLAMA_3_8B, 10, 4) == 2 * 32 * 4096 * 10 * 4
    assert all_reduce_bytes(LLAMA_3_8B) == 4 * kv_bytes_per_token(LLAMA_3_8B, 2)  # its cache has a quarter of the heads


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("link", [*LINKS, SLOW], ids=lambda link: link.name)
def test_the_formula_of_the_ring_is_the_time_of_its_plan(num_ranks, link):
    plan = ring_plan(num_ranks)
    assert len(plan) == 2 * (num_ranks - 1)
    assert is_complete(follow_plan(plan, num_ranks)[-1])
    assert plan_seconds(plan, num_ranks, 8192, link) == pytest.approx(all_reduce_seconds(8192, num_ranks, link))


def test_one_rank_is_a_card_alone_and_more_ranks_share_its_work():
    arguments = LLAMA_2_7B, A100_80GB
    alone = tensor_parallel_seconds(*arguments, SLOW, 1, 8, 8, 4096, 4096)
    assert alone == step_seconds(*arguments, 8, 8, 4096, 4096)
    for num_ranks in (2, 4, 8):
        shared = tensor_parallel_seconds(*arguments, FREE, num_ranks, 8, 8, 4096, 4096)
        assert shared == pytest.approx(alone / num_ranks)
        sums = 64 * all_reduce_seconds(8 * 4096 * 2, num_ranks, SLOW)
        assert tensor_parallel_seconds(*arguments, SLOW, num_ranks, 8, 8, 4096, 4096) == pytest.approx(shared + sums)


def test_key_value_heads_that_ranks_hold_twice_are_read_twice():
    config = LLAMA_2_70B  # 8 of them
    keys = [tensor_parallel_seconds(config, A100_80GB, FREE, ranks, 1, 0, 10**6, 0) for ranks in (8, 16)]
    nothing = [tensor_parallel_seconds(config, A100_80GB, FREE, ranks, 1, 0, 0, 0) for ranks in (8, 16)]
    assert keys[1] - nothing[1] == pytest.approx(keys[0] - nothing[0])


def test_up_to_where_one_model_pays():
    for link, around in ((NVLINK_3, 260), (PCIE_4, 154), (ETHERNET_100G, 0)):
        most = tensor_parallel_pays_up_to(LLAMA_2_7B, A100_80GB, link, 512)
        assert most == around
        for batch in (most, most + 2):
            together = tensor_parallel_seconds(LLAMA_2_7B, A100_80GB, link, 2, batch, batch, *2 * [batch * 512])
            apart = decode_seconds(LLAMA_2_7B, A100_80GB, 512, max(1, batch // 2))
            assert not batch or (together < apart) == (batch <= most)
    assert tensor_parallel_pays_up_to(LLAMA_2_7B, A100_80GB, FREE, 512, most=64) == 64


@pytest.mark.parametrize(("bandwidth", "latency"), [(0, 1e-6), (-1.0, 0.0), (1e9, -1e-6)])
def test_a_link_that_cannot_be_is_refused(bandwidth, latency):
    with pytest.raises(ConfigError, match="link 'x' needs a bandwidth above 0"):
        Link("x", bandwidth, latency)


def test_a_model_that_cannot_be_cut_is_refused():
    with pytest.raises(ConfigError, match="tensor_parallel_size is 3, which does not divide"):
        tensor_parallel_seconds(LLAMA_2_7B, A100_80GB, NVLINK_3, 3, 1, 1)


# plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16])
def test_a_butterfly_is_an_all_reduce_of_fewer_rounds(num_ranks):
    plan = butterfly(num_ranks)
    assert is_complete(follow_plan(plan, num_ranks)[-1])
    assert len(plan) == 2 * int(math.log2(num_ranks))
    sent = [sum(len(pieces) for each in plan for sender, _, pieces in each if sender == rank) for rank in range(2)]
    assert sent == [2 * (num_ranks - 1)] * 2  # pieces, as in the ring
    assert plan_seconds(plan, num_ranks, 8192, SLOW) <= plan_seconds(ring_plan(num_ranks), num_ranks, 8192, SLOW)


def test_sums_grow_and_are_never_counted_twice():
    states = follow_plan(ring_plan(4), 4)
    assert len(states) == 7 and not is_complete(states[5])
    for before, after in pairwise(states):
        assert all(
            old <= new for olds, news in zip(before, after, strict=True) for old, new in zip(olds, news, strict=True)
        )


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ([[(0, 1, [0])], [(0, 1, [0])]], "round 2: rank 1 has piece 0 as a sum over ranks .0, 1., and rank 0 sends"),
        ([[(0, 2, [0])]], "round 1: receiver 2; the ranks are 0 to 1"),
        ([[(0, 1, [2])]], "piece 2; the pieces are 0 to 1"),
        ([[(0, 1, [0]), (0, 1, [1])]], "rank 0 is the sender of two messages"),
        ([[(1, 1, [0])]], "rank 1 sends to itself"),
    ],
)
def test_a_plan_that_is_none_is_refused(plan, told):
    with pytest.raises(ConfigError, match=told):
        follow_plan(plan, 2)
    with pytest.raises(PictureError, match=told):
        AllReduceRounds(plan, 2)


# pictures -----------------------------------------------------------------------------------------


def test_the_roofline_says_up_to_where_one_model_is_faster():
    picture = LinkRoofline(LLAMA_2_7B, A100_80GB, 512, title="Two cards")
    assert "over NVLink: up to 260 requests; over PCIe 4: up to 154 requests; over Ethernet: never" in picture.text()
    assert picture.alt() == f"Two cards: {picture.summary()}"
    apart, nvlink = picture.series["a replica each"], picture.series["one model, NVLink"]
    assert [one > other for one, other in zip(apart, nvlink, strict=True)] == [True] * 8 + [False]
    dots = [line for line in picture.figure().axes[0].lines if line.get_marker() == "o"]
    assert sorted(float(line.get_xdata()[0]) for line in dots) == [154, 260]  # nothing else has marks: it is computed
    short = LinkRoofline(LLAMA_2_7B, A100_80GB, 512, batches=[2, 4])
    assert "over NVLink: at all these sizes" in short.alt()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_cards": 1}, "1 cards"),
        ({"batches": [1, 2]}, "batches .1, 2."),
        ({"batches": []}, "batches .."),
        ({"batches": [2, 3]}, "share evenly"),
        ({"links": []}, "give at least one"),
        ({"links": [SLOW, SLOW]}, "each a name of its own"),
    ],
)
def test_a_roofline_that_cannot_be_drawn_is_refused(options, told):
    with pytest.raises(PictureError, match=told):
        LinkRoofline(LLAMA_2_7B, A100_80GB, 512, **options)


def test_rounds_are_drawn_with_what_came_in():
    picture = AllReduceRounds(ring_plan(2), 2, title="two")
    assert picture.text().splitlines()[2:] == [
        "rank 0    1 1      1 2      2 2",
        "rank 1    1 1      2 1      2 2",
    ]
    assert picture.alt() == "two: after 2 rounds 4 of 4 pieces are whole sums"
    cells = picture.figure().axes[0].patches
    assert len(cells) == 3 * 4 and sum(cell.get_linewidth() > 1 for cell in cells) == 4  # two in each round
    with pytest.raises(PictureError, match="no round"):
        AllReduceRounds([], 2)


def test_routes_show_where_a_beginning_is_new():
    picture = Routes([(0, "A"), (1, "A"), (0, "A"), (0, "B")], 3, title="three")
    assert picture.text().splitlines() == [
        "replica 0 |AaB|  2 beginnings computed",
        "replica 1 |A|    1 beginning computed",
        "replica 2 ||     0 beginnings computed",
    ]
    assert picture.alt() == (
        "three: 4 requests with 2 beginnings on 3 replicas; these hold 2, 1, 0 of them, so 3 times a beginning was "
        "computed"
    )
    assert sum(cell.get_linewidth() > 1 for cell in picture.figure().axes[0].patches) == 3
    with pytest.raises(PictureError, match="replica 3; there are 3"):
        Routes([(3, "A")], 3)
    with pytest.raises(PictureError, match="at least one request"):
        Routes([], 3)


@pytest.mark.parametrize("make", [
    lambda: LinkRoofline(LLAMA_2_7B, A100_80GB, 512), lambda: AllReduceRounds(ring_plan(3), 3),
    lambda: Routes([(0, "A")], 1),
])  # fmt: skip
def test_pictures_are_the_same_bytes_twice_and_have_words(make):
    assert make().png() == make().png() and make().svg() == make().svg()
    assert make().alt() and "\n" not in make().alt()
