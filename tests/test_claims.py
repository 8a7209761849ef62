"""Numbers in the chapters' sentences, against the numbers that the package computes.

What a chapter prints is compared when it is executed; this is about the text around it. Cells are named by their ids.
"""

import re
from pathlib import Path

import nbformat
import pytest

from minillm import costs, kv_bytes_per_token, what_fits
from minillm.costs.activations import activation_bytes
from minillm.costs.shapes import A100_80GB, CARDS, LLAMA_2_7B, RTX_4090
from minillm.course import notebooks
from minillm.simulation import Published

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = {path.stem[:2]: nbformat.read(path, as_version=4) for path in notebooks.chapters([])}
CROSSING = costs.compute_bound_batch(RTX_4090)
FIT = what_fits(LLAMA_2_7B, A100_80GB.memory_bytes)
WEIGHTS = 2 * costs.matmul_parameters(LLAMA_2_7B)
READING = 1e3 * WEIGHTS / A100_80GB.bandwidth  # milliseconds
RESERVED = FIT.num_requests(4096)  # requests that reserve their whole context


def cell(chapter: str, cell_id: str):
    (found,) = [each for each in CHAPTERS[chapter].cells if each.id == cell_id]
    return found


def said(chapter: str, cell_id: str) -> str:
    """The text of a cell, on one line."""
    return " ".join(cell(chapter, cell_id).source.replace("\n> ", "\n").split())


def printed(chapter: str, cell_id: str) -> str:
    """What a cell printed when it was committed."""
    return "\n".join(map(notebooks.readable, cell(chapter, cell_id).outputs))


def test_memory_is_counted_as_it_is_sold():
    assert [f"{card.memory_bytes / 1e9:.1f}" for card in CARDS] == ["25.8", "85.9", "150.8"]


@pytest.mark.parametrize(
    ("chapter", "cell_id", "words"),
    [
        ("03", "explained", f"Up to {costs.compute_bound_batch(A100_80GB) - 1} tokens on an A100"),
        ("03", "rounded-read", f"of an A100 are 80 GiB, {A100_80GB.memory_bytes / 1e9:.1f} GB"),
        ("04", "fused-text", f"{activation_bytes(LLAMA_2_7B, 1, 8192, fused=True).total / 1e3:.0f} kB for each token"),
        ("04", "fused-text", f"in powers of ten, as below, {A100_80GB.memory_bytes / 1e9:.1f} GB"),
        ("04", "gpu-lesson", f"Below the crossing, {costs.compute_bound_batch(A100_80GB) - 1} tokens"),
        ("07", "budget", f"an A100 computes up to {costs.compute_bound_batch(A100_80GB) - 1} tokens of Llama-2-7B"),
        ("08", "factor", f"If each reserves 4,096 tokens, {RESERVED} run at once"),
        ("09", "roofline", f"reads {A100_80GB.bandwidth / 1e9:,.0f} GB per second"),
        ("09", "crossing-read", f"does {A100_80GB.flops / A100_80GB.bandwidth:.0f} FLOP in float16"),
        ("09", "crossing-read", f"Up to {costs.compute_bound_batch(A100_80GB) - 1} requests"),
        ("09", "varlen-more", f"With {A100_80GB.flops / A100_80GB.bandwidth:.0f} queries for each key"),
        (
            "12",
            "bytes-read",
            f"reads {WEIGHTS / 1e9:.1f} GB of weights, in {READING:.1f} ms",
        ),
        ("12", "hits-read", f"about {costs.what_fits(LLAMA_2_7B, A100_80GB.memory_bytes).num_tokens:,} tokens"),
        ("11", "budgets-read", f"takes {2 * costs.LLAMA_13B.num_parameters / 1e9:.0f} of 40 GB"),
    ],
)
def test_a_number_in_a_sentence_is_the_computed_one(chapter, cell_id, words):
    assert words in said(chapter, cell_id)


def test_the_roofline_of_a_card_has_one_crossing():
    """Chapter 1 looks for it, chapter 3 draws it, chapter 9 solves for it, and `costs` knows it."""
    assert f"up to {costs.compute_bound_batch(A100_80GB) - 1} tokens" in printed("01", "roofline-numbers")
    assert f"below {costs.compute_bound_batch(A100_80GB) - 1}: bandwidth-bound" in printed("03", "gpu-floor-figure")
    reading, at, below = (costs.step_seconds(LLAMA_2_7B, RTX_4090, n, n) for n in (1, CROSSING, CROSSING - 1))
    assert reading == below < at


def test_many_users_share_a_step():
    seconds = {
        size: costs.decode_seconds(LLAMA_2_7B, A100_80GB, context=500, batch_size=size) for size in (1, 16, 120, 240)
    }
    assert "less than a third longer" in said("05", "why-read") and 1.2 < seconds[16] / seconds[1] < 4 / 3
    assert f"{120 * seconds[1] / seconds[120]:.0f} times as many tokens per second" in said("05", "why")
    caches = 240 * 500 * kv_bytes_per_token(LLAMA_2_7B)
    assert f"those of 240 have {caches / 1e9:.0f} GB, nearly five times the weights" in said("05", "why-read")
    assert 4.5 < caches / WEIGHTS < 5 and FIT.num_tokens / 500 < 250 and "about as many as fit" in said("05", "why")


def test_the_last_of_100000_tokens_pay_for_attention():
    assert "here four times as much" in said("04", "why-chunks") and 3.5 < 100_000 / 24_705 < 4.5
    lasts = re.findall(r"the last +([\d,]+) tokens in one pass: +(\S+) s", printed("04", "pass-length"))
    assert [tokens for tokens, _ in lasts] == ["100,000", "4,096", "512"]
    assert "for a tenth of a second; without chunks, for more than ten" in said("04", "why-chunks")
    assert 0.08 < float(lasts[-1][1]) < 0.12 and float(lasts[0][1]) > 10


def test_chapter_10_offers_more_than_chapter_7_can_serve():
    loads = printed("07", "load-figure")
    assert re.search(r"^36 +36 +\S+ +30\.\d$", loads, re.MULTILINE)
    assert "serves at most 30 of our requests per second. Now 36 come" in said("10", "admission-text")
    assert re.search(r"^28 +\S+ +\S+ +\S+ +0\.8\d\d$", loads, re.MULTILINE)
    assert "At 28 requests per second the p99 of the TTFT is 0.8 s" in said("07", "goodput")
    assert "Five of six could have been in time" in said("10", "limit-text")
    assert 80 < int(re.search(r"are refused: (\d+) %", printed("10", "prediction-late"))[1]) < 100 * 5 / 6


def test_a_replayed_kernel_needs_a_gap_and_the_graph_one_launch():
    words = printed("09", "graphs-figure")
    kernels, alone, graph = re.search(r"(\d+) kernels, (\d+) µs of work: .*, as a graph (\d+) µs", words).groups()
    assert int(graph) - int(alone) - 10 == int(kernels) - 1  # a microsecond each, and the launch of the graph
    idle = float(re.search(r"one by one .* (\d+) µs  1\.\d+ ms", words)[1])
    assert "most of it waits for launches" in cell("09", "graphs-figure").source and idle > int(alone)


def test_at_51_requests_caches_take_as_long_as_weights():
    weights = 2 * costs.matmul_parameters(LLAMA_2_7B)
    below, at = (requests * 500 * kv_bytes_per_token(LLAMA_2_7B) / weights for requests in (50, 51))
    assert "At 51, reading the caches takes as long" in said("09", "roofline-read") and below < 1 <= at


def test_the_factors_of_24_are_the_same_in_all_chapters():
    bill = printed("08", "factor-table")
    time, memory = re.search(r"freedom in time (\S+)x · room in memory (\S+)x = \S+x", bill).groups()
    assert f"continuous batching is {float(time):.1f} times as fast as static batching" in said("08", "factor")
    assert "only about twice as fast" in said("08", "factor-read") and 1.8 < float(memory) < 2.2


def test_batches_that_only_wait_have_up_to_77_requests():
    steps = Published("13b", num_requests=100).trace(("waiting",)).steps
    most = max(len({part.request_id for part in step.scheduled}) for step in steps)
    assert f"batches of up to {most} requests" in said("11", "explain-known")


def test_the_parts_of_24_are_what_chapter_11_says():
    waiting = re.search(
        r"waiting +(\S+)x +host \S+, waiting (\S+), .* memory (\S+)", printed("11", "explain-known-run")
    )
    ratio, factor, memory = map(float, waiting.groups())
    text = said("11", "explain-known-read")
    assert ratio < 1.5 and "less than 1.5 times" in text and 3.5 < factor < 4 and "nearly 4" in text and memory < 1
    low, high = map(float, re.search(r"between (\S+) and (\S+), by the order", printed("11", "paging-alone")).groups())
    assert low < 2 < high and "far from all of it" in said("11", "published-read")
    assert 14 <= float(re.search(r"all six causes: (\S+)x", printed("11", "verdict"))[1]) <= 24
    share = int(re.search(r"(\d+)% of it in logarithms", printed("11", "verdict"))[1])
    assert share < 50 and "The larger part of the 24 is not PagedAttention" in said("11", "verdict-read")


def test_the_bound_of_chapter_12_and_the_bend_of_its_curve():
    bounded, free = (
        re.search(rf"{name} +(\d+)% +\S+ ms +(\d+) ms", printed("12", "bound")).groups()
        for name in ("at most 8 ahead", "no bound")
    )
    assert int(free[0]) > int(bounded[0]) and 4.5 < int(free[1]) / int(bounded[1]) < 5
    assert "the slowest 1 % wait nearly five times as long" in said("12", "bound-read")
    rows = re.findall(r"^(\d) +([\d.]+) +([\d.]+)$", printed("12", "scaling-picture"), re.MULTILINE)
    share = {int(number): (float(robin), float(yours)) for number, robin, yours in rows[: len(rows) // 2]}
    assert "The curve bends at three replicas" in said("12", "scaling-read") and share[3][1] > share[2][1] + 10
    assert max(yours for _, yours in share.values()) - share[3][1] < 1  # nothing more to hold
    assert "stays nearly flat" in said("12", "scaling-read") and all(30 < robin < 40 for robin, _ in share.values())


def test_the_readme_counts_the_lines():
    package = ROOT / "minillm"
    core = ("attention/attention", "attention/masks", "ladder/attend", "ladder/generation", "ladder/kv_cache")
    core += ("model/config", "model/decoder", "model/linear")
    lines = {name: sum(1 for _ in (package / f"{name}.py").open()) for name in core}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "is about 1,300 lines" in readme and abs(sum(lines.values()) - 1300) < 150


@pytest.mark.parametrize("chapter", [chapter for chapter in CHAPTERS if chapter.isdigit()])
def test_the_readme_gives_a_chapter_its_hours(chapter):
    """Within half an hour of what the chapter says of itself."""
    row = re.search(rf"^\| \[{int(chapter)} .* \| (\d)([¼½¾]?) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    hours = int(row[1]) + {"": 0, "¼": 0.25, "½": 0.5, "¾": 0.75}[row[2]]
    words = CHAPTERS[chapter].cells[0].source.replace("two hours", "120 minutes")
    said_hours = sum(map(int, re.findall(r"About (\d+) minutes|and (\d+) for the", words)[0][:1])) / 60
    said_hours += sum(map(int, re.findall(r"to read, and (\d+) for the", words))) / 60
    assert abs(hours - said_hours) <= 0.5


def test_the_readme_begins_with_the_question_of_the_course():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert lines[0] == "# Why can one engine be 24 times faster than another on the same card?"
    assert "(figures/batching.svg)" in lines[4] and "(figures/scoreboard.svg)" in lines[6]


def test_a_token_of_cache_is_what_chapter_9_says():
    assert "half a megabyte for each token" in said("09", "one-read")
    assert kv_bytes_per_token(LLAMA_2_7B) == pytest.approx(0.5e6, rel=0.05)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_what_a_cost_model_says_is_not_called_measured(chapter):
    """A cell that asks the roofline or the simulator, and prints a prediction, says that it computed or simulated."""
    models = re.compile(r"costs\.\w+_(seconds|flops)|kv_bytes_per_token|compare_batching|\bsimulate\(|\bRTX_4090\b")
    for each in notebooks.code_cells(CHAPTERS[chapter]):
        if models.search(each.source) and "checks.prediction(" in each.source:
            assert "found=" in each.source, each.id


@pytest.mark.parametrize(
    ("chapter", "cell_id", "pictures"),
    [("02", "influence-picture", 2), ("02", "window-reach-asserts", 1), ("06", "influence", 1), ("06", "mended", 2)],
)
def test_influence_is_drawn_as_influence(chapter, cell_id, pictures):
    """A measurement says which row changes with which token; a mask says which token may look at which."""
    assert printed(chapter, cell_id).count("replaced token →") == pictures
    assert printed(chapter, cell_id).count("looks at →") == (cell_id == "window-reach-asserts")  # the mask beside it
