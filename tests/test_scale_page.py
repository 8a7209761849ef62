"""The section "10, 1,000 and 100,000 GPUs" of the server's README: its numbers, computed and simulated again."""

import contextlib
import io
import json
import re
import shlex
import tracemalloc
from pathlib import Path

import pytest

import minillm
from minillm.cli.main import main
from minillm.costs import H200, LLAMA_3_8B, decode_seconds, what_fits
from minillm.engine import PrefixAware

README = (Path(minillm.__file__).parent / "serving" / "README.md").read_text(encoding="utf-8")
PAGE = re.search(r"^## 10, 1,000 and 100,000 GPUs\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]
PROSE = " ".join(re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL).split())


def block(language: str) -> str:
    """The only block of code in this language."""
    [found] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return found


def test_the_lines_print_what_the_page_says_they_do():
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block("python"), {})
    assert printed.getvalue() == block("text")


SENTENCES = {  # with {} for a number -> what is printed, with (...) for it
    "33.7 ms instead of {}. Chunks": r"step: (\S+) ms, with 512",
    "times as long, {} ms instead": r"with 2048 .* (\S+) ms",
    "Chunks of 512 tokens bound that to {} ms": r"with 512 .* (\S+) ms",
    "Its {} MB take": r"cache: (\S+) MB",
    "MB take {} ms at 50 GB/s": r"50 GB/s: (\S+) ms",
    "At 1.25 GB/s they take {} ms": r"1.25 GB/s: (\S+) ms",
    "keeps {} of 10 GPUs busy with prefill": r"^10: (\S+) prefill",
    "Of 1,000 GPUs, {} are lost": r"^1,000: .* (\S+) lost",
    "A GPU's pool holds {} tokens": r"pool: (\S+) tokens",
    "overwritten in {} s": r"overwritten in (\S+) s",
    "more than {} GB/s per GPU": r"moved at (\S+) GB/s$",
    "the table has {} GB": r"^1,000: .* table (\S+) GB",
}


@pytest.mark.parametrize("words", SENTENCES)
def test_a_sentence_repeats_what_is_printed(words):
    [found] = re.findall(SENTENCES[words], block("text"), re.MULTILINE)
    assert words.format(found) in PROSE


def test_what_is_rounded_or_derived_in_a_sentence():
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(block("python"), names)
    prefill, decode = names["prefill"], names["decode"]
    assert f"makes it {33.7 / 6.9:.1f} times as long" in PROSE
    assert f"the {1e3 * prefill:.0f} ms of computing them again" in PROSE
    lost = 1 - 5 / (10 * prefill / (prefill + 256 * decode / 64))
    assert f"Whole GPUs lose {lost:.1%}" in PROSE and "a fifth of all prefill" in PROSE
    assert f"With 100,000 it has {383 * 1e5 * names['pool'] / 16 / 1e12:.1f} TB" in PROSE
    hours = [54 * 24 * 16_384 / 419 / gpus for gpus in (10, 1_000, 100_000)]
    assert f"in {hours[0] / 24:.0f} days, 1,000 one in {hours[1]:.0f} hours, and 100,000 one in 30 minutes" in PROSE
    assert round(hours[0] / 24 / 30) == 7 and round(hours[1] / 24) == 2 and round(60 * hours[2]) == 30


def test_ten_requests_per_second_keep_a_gpu_busy_and_not_too_busy():
    """The setting is possible: decode steps of 64 requests are about what such a load makes."""
    output, batch, rate = 256, 64, 10
    tokens_per_second = rate * output
    assert tokens_per_second * decode_seconds(LLAMA_3_8B, H200, 2048 + output // 2, batch) / batch + rate * 0.030 < 1
    assert batch * (2048 + output) < what_fits(LLAMA_3_8B, H200.memory_bytes).num_tokens


@pytest.mark.parametrize("replicas", ["10", "64"])
def test_the_simulator_finds_the_shares_of_the_table(replicas, tmp_path, capsys):
    row = re.search(rf"\| {replicas}, (\d+) \| (\S+)% \| (\S+) \| (\S+)% \| (\S+) \|", PAGE).groups()
    words = shlex.split(block("sh").replace("\\\n", " "))[1:]
    found = []
    for router in ("round-robin", "prefix-aware"):
        changes = {"--replicas": replicas, "--rate": row[0], "--router": router}
        command = [changes.get(before, word) for before, word in zip([None, *words], words, strict=False)]
        assert main([*command, "--json", str(tmp_path / "found.json")]) == 0
        report = json.loads((tmp_path / "found.json").read_text())["report"]
        found += [f"{100 * report['hit_share']:.1f}", f"{1e3 * report['ttft']['mean']:.1f}"]
    capsys.readouterr()
    assert found == list(row[1:])


def test_an_entry_of_a_routers_table_takes_as_many_bytes_as_is_said():
    router = PrefixAware()
    prompts = [range(10_000 * i, 10_000 * i + 4096) for i in range(40)]
    tracemalloc.start()
    for prompt in prompts:
        router.choose({"a": 0}, prompt)
    router._hash_block.cache_clear()  # bounded, whatever the number of replicas
    taken = tracemalloc.get_traced_memory()[0] / (40 * 256)
    tracemalloc.stop()
    assert "0.4 kB per block" in PROSE and "383 * gpus" in PAGE and taken == pytest.approx(383, rel=0.15)
