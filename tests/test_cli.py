"""The command line: it streams, measures, and answers a user's mistake with one line and exit code 2."""

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.cli import main as cli
from minillm.trace.events import Trace
from minillm.trace.files import save_trace

SUMMARY = r"(\d+) prompt tokens, (\d+) output tokens, TTFT [\d.]+ ms, mean ITL ([\d.]+ ms|-), [\d.]+ tokens/s\n"
PROMPT = "Once upon a time"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


# Generating ---------------------------------------------------------------------------------------


def test_generate_prints_the_text_and_what_it_measured(capsys):
    code, out, err = run(capsys, "generate", PROMPT, "--max-tokens", "8")
    measured = re.fullmatch(SUMMARY, err)
    assert code == 0
    assert out.startswith(PROMPT) and out.endswith("\n") and len(out) > len(PROMPT) + 8
    assert (int(measured[1]) > 0, measured[2]) == (True, "8")


def test_generate_prints_exactly_the_text_of_the_package(capsys):
    import minillm

    model, tokenizer = minillm.load_model("storyteller")
    params = minillm.SamplingParams(max_tokens=40)
    result = minillm.generate_cached(model, minillm.encode(tokenizer, PROMPT), params, tokenizer=tokenizer)
    assert run(capsys, "generate", PROMPT, "--max-tokens", "40")[1] == PROMPT + result.text + "\n"


def test_naive_tells_the_same_story(capsys):
    command = ["generate", PROMPT, "--max-tokens", "12"]
    assert run(capsys, *command)[1] == run(capsys, *command, "--naive")[1]


def test_a_single_token_has_no_gap_to_measure(capsys):
    assert re.fullmatch(SUMMARY, run(capsys, "generate", PROMPT, "--max-tokens", "1")[2])[3] == "-"


def test_a_reader_who_closes_the_pipe_gets_no_traceback():
    command = f"{sys.executable} -m minillm.cli.main generate '{PROMPT}' | head -c 20"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert PROMPT in done.stdout
    assert done.stderr == ""


def test_the_text_streams_token_by_token(monkeypatch, capsys):
    """The first piece is on stdout before the second token exists."""
    import minillm
    from minillm.ladder.generation import NewToken

    seen = []

    def fake(model, prompt_ids, params, *, tokenizer, on_token):
        for number, text in enumerate([" there", " was"]):
            on_token(NewToken(number, text, 1e9 + number))
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(minillm, "generate_cached", fake)
    assert cli.main(["generate", PROMPT]) == 0
    assert seen == [PROMPT + " there", " was"]


def test_every_option_arrives_and_without_any_nothing_is_asked(monkeypatch):
    import minillm

    seen = []
    monkeypatch.setattr(minillm, "generate_cached", lambda model, prompt, params, **more: seen.append(params))
    monkeypatch.setattr(cli, "summary", lambda *measured: "")
    options = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.5, "presence_penalty": -1.0,
        "frequency_penalty": 0.25, "seed": 4, "min_tokens": 2, "max_tokens": 9,
    }  # fmt: skip
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert cli.main(["generate", PROMPT]) == cli.main(["generate", PROMPT, *given, "--stop", "x"]) == 0
    assert seen == [minillm.SamplingParams(), minillm.SamplingParams(**options, stop="x")]
    assert seen[0].max_tokens is None  # as many as fit


def test_a_seed_repeats_a_sampled_text(capsys):
    command = ["generate", PROMPT, "--temperature", "1", "--top-p", "0.95", "--max-tokens", "30", "--seed"]
    assert run(capsys, *command, "7")[1] == run(capsys, *command, "7")[1]
    assert run(capsys, *command, "7")[1] != run(capsys, *command, "8")[1]


def test_a_stop_string_ends_the_text_before_it(capsys):
    whole = run(capsys, "generate", PROMPT, "--max-tokens", "40")[1]
    word = whole.removeprefix(PROMPT).split()[5]
    stopped = run(capsys, "generate", PROMPT, "--max-tokens", "40", "--stop", word)[1]
    assert stopped.rstrip("\n") == PROMPT + whole.removeprefix(PROMPT).split(word)[0]


def test_chat_answers_without_repeating_the_question(capsys):
    question = "What color is the sky?"
    code, out, _ = run(capsys, "generate", question, "--chat", "--max-tokens", "20")
    assert code == 0 and out.strip() and question not in out


# Mistakes -----------------------------------------------------------------------------------------

HUGE = str(10**30)
OPTIONS = {  # command -> option -> values that are refused; "" is the argument without an option
    "generate": {
        "": ["", "word " * 5000, "half \ud800"],
        "--max-tokens": ["0", "-1", HUGE],
        "--min-tokens": ["-1"],
        "--temperature": ["-1", "nan", "inf"],
        "--repetition-penalty": ["0", "nan", "-1"],
        "--presence-penalty": ["2.5", "nan"],
        "--frequency-penalty": ["-2.5", "inf"],
        "--top-k": ["-5"],
        "--top-p": ["1.5", "nan", "0"],
        "--min-p": ["nan", "-1", "2"],
        "--seed": [HUGE],
        "--stop": [""],
        "--device": ["mps:7", "cuda:99", "meta", "xpu", "nonsense", ""],
        "--tensor-parallel-size": ["0", "-1", HUGE, "3"],
        "--model": ["no-such-model", "", "a-folder", "an-empty-file", "a\nb", "missing/folder/of/names"],
    },
    "24x": {
        "--requests": ["0", "-1", HUGE],
        "--rows": ["0", HUGE],
        "--seed": [HUGE],
        "--load": ["", "x", "0", "-1", "nan", "1,"],
        "--json": ["missing/x.json", "a-folder"],
        "--svg": ["missing/x.svg", "a-folder"],
    },
    "learn": {"": ["77", "", "x"], "--force": ["77"], "--dir": ["an-empty-file", "an-empty-file/below", "a" * 300]},
    "simulate": {
        "--prompt-length": [
            "80~nan",
            "80~inf",
            "80~-1",
            "0~1",
            "nan~1",
            "0",
            "-5",
            "5-",
            "10-5",
            "x",
            "",
            "1~2~3",
            HUGE,
        ],
        "--output-length": ["0", "9-1", "80~x"],
        "--launch-ms": ["nan", "inf", "-1", "1e300"],
        "--arrivals poisson --rate": ["1e-308", "nan", "inf", "-1", "0", "1e-9"],
        "--arrivals bursts --rate": ["1e-308", "nan"],
        "--burst-size": ["0", "-1"],
        "--requests": ["0", "-1", HUGE],
        "--max-num-seqs": ["0", "-1", HUGE],
        "--max-num-batched-tokens": ["0", HUGE],
        "--seed": [HUGE],
        "--slo-ttft-ms": ["nan", "-1", "0"],
        "--slo-itl-ms": ["nan"],
        "--slo-e2e-ms": ["-inf"],
        "--model": ["x"],
        "--card": [""],
        "--file": ["a-folder", "missing", "an-empty-file", "latin-1", "nested", "digits", "half", "a\0b", "a" * 300],
        "--json": ["missing/x.json", "a-folder", "an-empty-file/x", "a\0b", "a" * 300],
        "--trace": ["missing/x.jsonl", "a-folder"],
    },
    "trace": {
        "": ["a-folder", "missing", "an-empty-file", "latin-1", "nested", "digits", "half"],
        "a-trace --requests": ["0", "-1"],
        "a-trace --svg": ["missing/x.svg", "a-folder"],
        "a-trace --png": ["missing/x.png", "a-folder"],
        "a-trace --chrome": ["missing/x.json", "a-folder"],
    },
    "bench batching": {
        "--requests": ["0", HUGE],
        "--max-num-seqs": ["0", "-1"],
        "--repeats": ["0", "-3"],
        "--json": ["missing/x.json", "a-folder"],
    },
    "bench engine": {
        "--requests": ["0", HUGE],
        "--repeats": ["0", "-3"],
        "--threads": ["0", "1,-2", "", "one", HUGE],
        "--vllm": ["missing", "a-folder", "an-empty-file", ""],
        "--json": ["missing/x.json", "a-folder"],
    },
    "bench ladder": {
        "--requests": ["0", HUGE],
        "--repeats": ["0", "-3"],
        "--budget": ["0", "-1", HUGE],
        "--json": ["missing/x.json", "a-folder"],
        "--svg": ["missing/x.svg", "a-folder"],
        "--show": ["missing", "a-folder", "an-empty-file", "latin-1", "digits"],
    },
    "bench simulator": {"--repeats": ["0", "-3"], "--json": ["missing/x.json", "a-folder"]},
    "bench gpu": {
        "--budget": ["nan", "inf", "-1", "0"],
        "--repeats": ["0", HUGE],
        "--json": ["missing/x.json", "a-folder"],
        "--show": ["a-folder", "missing", "an-empty-file", "latin-1", "nested", "half"],
        "--peer": ["x", ":", "no_such_module:make", "broken:make", "json:no_such"],
        "--only": ["", "x", "w1,"],
        "--dry-run --json": ["missing/x.json"],
        "--resume --json": ["missing.json"],
    },
    "storyteller train": {
        "--steps": ["0", "-1", HUGE],
        "--finish-steps": ["-1"],
        "--documents": ["0"],
        "--seed": [HUGE],
        "--device": ["mps:7", "nonsense", ""],
        "--threads": ["0", "-1", HUGE],
        "--log-every": ["0", "-1"],
        "--save-every": ["0"],
        "--out": ["an-empty-file", "an-empty-file/below", "a" * 300],
    },
    "storyteller eval": {
        "--cases": ["0", "-1"],
        "--threads": ["0"],
        "--checkpoint": ["missing", "a-folder", "an-empty-file", "a-recipe"],
        "--json": ["missing/x.json", "a-folder"],
        "--card": ["missing/x.md", "missing", "an-empty-file", "latin-1", "a-folder"],
    },
}
NEEDS_THE_MODEL = [("generate", ""), ("storyteller eval", "--checkpoint")]  # where something must be loaded to know
MISTAKES = [
    (command, option, value)
    for command, options in OPTIONS.items()
    for option, values in options.items()
    for value in values
]


@pytest.fixture
def given_files(tmp_path, monkeypatch):
    """What the mistakes above name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("a-folder").mkdir()
    Path("a-recipe").mkdir()
    Path("a-recipe/training.json").write_text('{"steps": 1}')
    Path("an-empty-file").touch()
    Path("latin-1").write_bytes("é".encode("latin-1"))
    Path("nested").write_text("[" * 100_000)
    Path("digits").write_text('{"num_prompt_tokens": ' + "1" * 5000 + ', "num_output_tokens": 1}')
    Path("half").write_text('{"num_prompt_tokens": 3')
    Path("broken.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    save_trace(Trace(), "a-trace")


@pytest.fixture
def nothing_computed(monkeypatch):
    """A mistake that can be found early is reported before anything is loaded or computed."""

    def computes(*_, **__):
        raise AssertionError("something was computed before the mistake was told")

    for name in (
        "minillm.load_model",
        "minillm.simulation.running.run",
        "minillm.cli.trace.beginning",
        "minillm.bench.batching.load",
        "minillm.bench.engine.measure_shape",
        "minillm.bench.simulator.load",
        "minillm.bench.gpu.command.measure",
        "minillm.storyteller.train.build_tokenizer",
        "minillm.storyteller.evaluate.Storyteller.load",
    ):
        monkeypatch.setattr(name, computes)


@pytest.mark.parametrize(("command", "option", "value"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, request, given_files, command, option, value):
    if not (
        (command, option) in NEEDS_THE_MODEL
        or command == "generate"
        and option in ("--model", "--device", "--max-tokens")
    ):
        request.getfixturevalue("nothing_computed")
    told = [PROMPT] if command == "generate" and option else []
    joined = [f"{option.split()[-1]}={value}"] if option else [value]
    code, out, err = run(capsys, *command.split(), *told, *option.split()[:-1], *joined)
    assert (code, out) == (cli.USER_ERROR, "")
    assert err.startswith("minillm: ") and err.count("\n") == 1


def test_a_spread_of_lengths_however_wide_is_simulated(capsys):
    code, out, _ = run(capsys, "simulate", "--requests=20", "--prompt-length=80~1000")
    assert code == 0 and "20 of 20 finished" in out and "nan" not in out


def test_a_copy_that_is_no_text_is_the_readers(capsys, tmp_path):
    run(capsys, "learn", "01", "--dir", str(tmp_path))
    copy = next(tmp_path.glob("01_*.ipynb"))
    for broken in (b"\xff\xfe", b"", b"{"):
        copy.write_bytes(broken)
        (tmp_path / ".manifest.json").write_bytes(broken)  # ours, and as easily broken
        code, out, _ = run(capsys, "learn", "01", "--dir", str(tmp_path))
        assert (code, out[:4], copy.read_bytes()) == (0, "kept", broken)


def test_a_copy_that_is_a_folder_is_a_mistake(capsys, tmp_path):
    run(capsys, "learn", "01", "--dir", str(tmp_path))
    copy = next(tmp_path.glob("01_*.ipynb"))
    copy.unlink()
    copy.mkdir()
    code, _, err = run(capsys, "learn", "01", "--dir", str(tmp_path))
    assert (code, err.count("\n")) == (cli.USER_ERROR, 1) and copy.name in err


def test_a_file_that_may_not_be_written_is_a_mistake(capsys, given_files, nothing_computed, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the user who runs the tests may have all permissions
    code, _, err = run(capsys, "simulate", "--json=an-empty-file")
    assert (code, err) == (
        cli.USER_ERROR,
        "minillm: --json 'an-empty-file' cannot be written: an-empty-file is not writable\n",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where every disk is full")
def test_a_full_disk_is_one_line(capsys):
    code, _, err = run(capsys, "simulate", "--requests=1", "--json=/dev/full")
    assert (code, err.count("\n")) == (cli.USER_ERROR, 1) and "No space left" in err


def in_ascii(monkeypatch) -> io.BytesIO:
    """What is printed from now on, to a terminal that knows ASCII only."""
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    return printed


def test_a_prompt_that_cannot_be_printed_is_a_mistake(monkeypatch, capsys, nothing_computed):
    in_ascii(monkeypatch)
    assert cli.main(["generate", "é"]) == cli.USER_ERROR
    told = capsys.readouterr().err
    assert (
        told.startswith("minillm: the prompt's character '\\xe9' cannot be printed in ascii") and told.count("\n") == 1
    )


def test_text_that_cannot_be_printed_ends_no_run(monkeypatch):
    """What the model says is not known before: it is printed as well as it can be."""
    import minillm
    from minillm.ladder.generation import NewToken

    def fake(model, prompt_ids, params, *, tokenizer, on_token):
        on_token(NewToken(1, " café", 1e9))

    printed = in_ascii(monkeypatch)
    monkeypatch.setattr(minillm, "generate_cached", fake)
    assert cli.main(["generate", PROMPT]) == 0
    assert printed.getvalue().decode() == PROMPT + " caf\\xe9\n"


@pytest.mark.parametrize("arguments", [[], ["tell"], ["generate"], ["generate", "a", "--max-tokens", "many"]])
def test_a_wrong_command_line_is_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2


def test_an_interrupt_ends_quietly(monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "learn", cli.COMMANDS["learn"]._replace(run=interrupted))
    assert cli.main(["learn"]) == cli.INTERRUPTED


def test_help_loads_no_torch():
    code = "import sys; from minillm.cli import main; main.build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


STORIES = {
    "generate": "from minillm.cli import main; main.main(['generate', 'Once', '--max-tokens', '1'])",
    "LLM": "from minillm import LLM, SamplingParams; LLM(verbose=False).generate('Once', SamplingParams(max_tokens=2))",
}


@pytest.mark.parametrize("story", STORIES)
def test_a_story_begins_without_what_takes_long_to_import(story):
    """Each takes between a third of a second and two, a story a tenth."""
    slow = {"torch._dynamo", "sympy", "transformers", "httpx2"}
    code = f"import sys; {STORIES[story]}; print({slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")


# The other commands -------------------------------------------------------------------------------


def test_learn_says_what_it_did_and_how_to_get_a_fresh_copy(capsys, tmp_path):
    target = ["--dir", str(tmp_path)]
    assert run(capsys, "learn", "01", *target)[1].startswith("new ")
    assert run(capsys, "learn", "01", *target)[1].startswith("unchanged ")
    next(tmp_path.glob("01_*.ipynb")).write_text("mine")
    assert "--force 01_" in run(capsys, "learn", "01", *target)[1]
    assert run(capsys, "learn", "01", "--force", "01", *target)[1].startswith("replaced ")


@pytest.mark.parametrize(("action", "module"), [("train", "train"), ("eval", "evaluate")])
def test_storyteller_hands_its_options_on(monkeypatch, action, module):
    given = []
    monkeypatch.setattr(f"minillm.storyteller.{module}.main", given.append)
    assert cli.main(["storyteller", action, "--seed", "3"]) == 0
    assert given == [["--seed", "3"]]
