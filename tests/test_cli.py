"""The command line: it streams, measures, and answers a user's mistake with one line and exit code 2."""

import re
import subprocess
import sys

import pytest

from minillm import cli

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
    command = f"{sys.executable} -m minillm.cli generate '{PROMPT}' | head -c 20"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert PROMPT in done.stdout
    assert done.stderr == ""


def test_the_text_streams_token_by_token(monkeypatch, capsys):
    """The first piece is on stdout before the second token exists."""
    import minillm
    from minillm.generation import NewToken

    seen = []

    def fake(model, prompt_ids, params, *, tokenizer, on_token):
        for number, text in enumerate([" there", " was"]):
            on_token(NewToken(number, text, 1e9 + number))
            seen.append(capsys.readouterr().out)

    monkeypatch.setattr(minillm, "generate_cached", fake)
    assert cli.main(["generate", PROMPT]) == 0
    assert seen == [PROMPT + " there", " was"]


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

MISTAKES = {
    "empty prompt": ["generate", ""],
    "max_tokens": ["generate", PROMPT, "--max-tokens", "0"],
    "temperature": ["generate", PROMPT, "--temperature", "-1"],
    "top_p": ["generate", PROMPT, "--top-p", "1.5"],
    "model": ["generate", PROMPT, "--model", "no-such-model"],
    "context": ["generate", "word " * 5000],
    "chapter": ["learn", "77"],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *MISTAKES[mistake])
    assert code == cli.USER_ERROR
    assert err.startswith("minillm: ") and err.count("\n") == 1
    assert out == ""


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
    code = "import sys; from minillm import cli; cli.build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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
