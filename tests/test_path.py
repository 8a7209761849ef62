"""What a reader opens to follow one token: the files that run in one `LLM.generate`, from the call to its outputs."""

import re
import sys
import threading
from pathlib import Path

import pytest
import torch

import minillm

PACKAGE = Path(minillm.__file__).parent
PROMPT = "Once upon a time, there was"  # 7 tokens: 12 more cross the end of a block of 16


def files_of_generate(**options) -> dict[str, int]:
    """File -> lines, of every file of the package in which a function runs while 12 tokens are generated."""
    llm = minillm.LLM("storyteller", num_blocks=8, max_model_len=32, verbose=False, **options)
    params, seen = minillm.SamplingParams(max_tokens=12), set()

    def profile(frame, event, argument):
        seen.add(frame.f_code.co_filename)

    sys.setprofile(profile)
    threading.setprofile(profile)
    try:
        llm.generate(PROMPT, params, use_tqdm=False)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    paths = {Path(each) for each in seen if each.startswith(str(PACKAGE))}
    return {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in sorted(paths)}


def told(name: str, files: dict[str, int]) -> str:
    """The path for people: `pytest -s` prints it."""
    lines = "\n".join(f"  {lines:5} {file}" for file, lines in files.items())
    return f"{name}: {len(files)} files, {sum(files.values()):,} lines\n{lines}"


def test_the_path_of_a_token_on_a_cpu():
    files = files_of_generate()
    print("\n" + told("LLM.generate on a CPU", files))
    assert "runtime/runner.py" in files and "engine/block_manager.py" in files
    assert len(files) <= 26 and sum(files.values()) <= 6_120
    readme = " ".join((PACKAGE.parent / "README.md").read_text(encoding="utf-8").split())
    found = re.search(r"is (\d+) files of ([\d,]+) lines, which a", readme)
    assert int(found[1]) == len(files) and abs(int(found[2].replace(",", "")) - sum(files.values())) < 100


def test_the_path_of_a_token_on_both():
    pytest.importorskip("triton")
    files = files_of_generate() | files_of_generate(attention_backend="triton", max_num_seqs=2)
    print("\n" + told("LLM.generate on a CPU and with Triton's kernels and graphs", files))
    assert "runtime/step_graph.py" in files or torch.cuda.is_available()
    assert len(files) <= 32 and sum(files.values()) <= 7_420


def test_the_tour_tells_the_files_of_the_path_and_how_long_they_are():
    tour = (PACKAGE / "README.md").read_text(encoding="utf-8")
    told = {file: int(lines) for file, lines in re.findall(r"^\| `([^`]+)` \| (\d+) \|", tour, re.MULTILINE)}
    real = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in told}
    assert {file: (told[file], real[file]) for file in told if abs(told[file] - real[file]) > 20} == {}
    small = {
        "costs/kv_bytes.py",
        "errors.py",
        "model/config.py",
        "model/linear.py",
        "sampling/params.py",
        "sampling/tensors.py",
    }
    assert files_of_generate().keys() - told.keys() == small  # what needs no explanation on the way
    sources = "\n".join((PACKAGE / file).read_text(encoding="utf-8") for file in real)
    questions = tour[tour.index("## Where is") :]
    for name in re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", questions):
        assert re.search(rf"(def|class) {name}\b|self\.{name}\b|^ +{name}:", sources, re.MULTILINE), name
