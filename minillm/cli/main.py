"""The command `minillm`: one `Command` per subcommand, which imports what it needs only when it runs.

Errors that the user can correct (`MiniLLMError`, and the system's errors on files) are one line on stderr and exit code
2.
"""

import argparse
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minillm import __version__
from minillm.cli import simulate
from minillm.cli.doctor import add_doctor_arguments, run_doctor
from minillm.cli.published import add_published_arguments, run_published
from minillm.cli.trace import add_trace_arguments, run_trace
from minillm.errors import ConfigError, MiniLLMError, PromptError, check_whole

USER_ERROR = 2
INTERRUPTED = 130
CLOSED_PIPE = 141
SMALL_MODEL = 50_000_000  # parameters; for smaller models, starting threads takes more time than they save


class Command(NamedTuple):
    """A subcommand: its line in `minillm --help`, its options, and the function to run, which returns the exit code."""

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    print_anything()
    try:
        return COMMANDS[arguments.command].run(arguments)
    except MiniLLMError as error:
        return refuse(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush at exit does not fail
        return CLOSED_PIPE
    except OSError as error:  # such as a full disk
        return refuse(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))


def refuse(reason: str) -> int:
    """Print in one line what the user can correct."""
    print(f"minillm: {' '.join(reason.split())}", file=sys.stderr)
    return USER_ERROR


def print_anything() -> None:
    """Print a character that stdout's encoding lacks as \\xe9, so that it does not fail the run."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm", description="LLM inference, step by step.")
    parser.add_argument("--version", action="version", version=f"minillm {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help, description=command.help).command = command
    return parser


class CommandParser(argparse.ArgumentParser):
    """The parser of a subcommand, which loads its options only when it is used."""

    command: Command | None = None

    def parse_known_args(self, args=None, namespace=None):
        if self.command is not None:
            add_arguments, self.command = self.command.add_arguments, None
            add_arguments(self)
        return super().parse_known_args(args, namespace)


# minillm generate ---------------------------------------------------------------------------------


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="the text to continue, or with --chat the message to answer")
    parser.add_argument("--model", default="storyteller", help="storyteller, a checkpoint folder or a hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--max-tokens", type=int, help="by default as many as fit the model's context")
    parser.add_argument(
        "--min-tokens", type=int, default=0, help="tokens before an eos or stop text can end the output"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0 is all")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this mass")
    parser.add_argument("--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: against repetition")
    parser.add_argument(
        "--presence-penalty", type=float, default=0.0, help="the same for output tokens only, from -2 to 2"
    )
    parser.add_argument("--frequency-penalty", type=float, default=0.0, help="the same, per occurrence")
    parser.add_argument("--seed", type=int, help="makes a sampled text repeatable")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
    parser.add_argument("--naive", action="store_true", help="compute everything again for each token (chapter 1)")
    dtypes = ["auto", "float64", "float32", "bfloat16", "float16", "half"]
    parser.add_argument("--dtype", choices=dtypes, help="by default float32, on a GPU auto: the checkpoint's own")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="processes that share the model")


def run_generate(arguments: argparse.Namespace) -> int:
    """Stream the text to stdout, then a line of measured times to stderr."""
    import torch

    import minillm

    if not arguments.chat:
        check_can_be_printed(arguments.prompt)
    num_ranks = check_whole("--tensor-parallel-size", arguments.tensor_parallel_size, 1)
    if num_ranks > 1 and arguments.naive:
        raise ConfigError(f"--tensor-parallel-size is {num_ranks}, with which only the engine computes; omit --naive")
    params = minillm.SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        presence_penalty=arguments.presence_penalty,
        frequency_penalty=arguments.frequency_penalty,
        repetition_penalty=arguments.repetition_penalty,
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )
    source = {"dtype": arguments.dtype, "device": arguments.device, "revision": arguments.revision}
    token_times = []

    def show(text: str, now: float) -> None:
        if not token_times and not arguments.chat:  # a story is read from its first word
            print(arguments.prompt, end="")
        token_times.append(now)
        print(text, end="", flush=True)

    if num_ranks > 1:
        with minillm.LLM(arguments.model, **source, tensor_parallel_size=num_ranks, verbose=False) as llm:
            prompt_ids = encode_prompt(llm.tokenizer, arguments.prompt, arguments.chat)
            start = time.perf_counter()
            for output in llm.stream(prompt_ids, params):
                show(output.outputs[0].text, time.perf_counter())
    else:
        model, tokenizer = minillm.load_model(arguments.model, **source)
        if model.config.num_parameters < SMALL_MODEL:
            torch.set_num_threads(1)
        prompt_ids = encode_prompt(tokenizer, arguments.prompt, arguments.chat)
        generate = minillm.generate_naive if arguments.naive else minillm.generate_cached
        start = time.perf_counter()
        told = {"tokenizer": tokenizer, "on_token": lambda token: show(token.text, token.time)}
        generate(model, prompt_ids, params, **told)
    print()
    print(summary(len(prompt_ids), start, token_times), file=sys.stderr)
    return 0


def check_can_be_printed(prompt: str) -> None:
    """Raises PromptError for a prompt that stdout's encoding cannot print."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        prompt.encode(encoding)
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt's character {prompt[error.start]!a} cannot be printed in {encoding}; set "
            "PYTHONIOENCODING=utf-8, or leave it out"
        ) from error


def encode_prompt(tokenizer, prompt: str, chat: bool) -> list[int]:
    """The ids of the prompt; with `chat`, as the user's first message in the model's chat template."""
    from minillm.model import encode, encode_chat

    if chat:
        return encode_chat(tokenizer, [{"role": "user", "content": prompt}])[1]
    return encode(tokenizer, prompt)


def summary(prompt_tokens: int, start: float, token_times: list[float]) -> str:
    """The line below a text. TTFT is the time from `start` to the first token, ITL from one token to the next."""
    ttft = token_times[0] - start
    gaps = [later - earlier for earlier, later in zip(token_times, token_times[1:], strict=False)]
    itl = f"{statistics.mean(gaps) * 1000:.1f} ms" if gaps else "-"
    speed = len(token_times) / (token_times[-1] - start)
    return (
        f"{prompt_tokens} prompt tokens, {len(token_times)} output tokens, "
        f"TTFT {ttft * 1000:.1f} ms, mean ITL {itl}, {speed:.1f} tokens/s"
    )


# minillm learn ------------------------------------------------------------------------------------


def add_learn_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="such as 03; all by default")
    parser.add_argument(
        "--force",
        action="append",
        default=[],
        metavar="CHAPTER",
        help="replace your changed copy of this chapter",
    )
    parser.add_argument("--dir", type=Path, default=Path("learn"), help="where the copies go (learn/)")


def run_learn(arguments: argparse.Namespace) -> int:
    """Write the reader's copies and print what was done with each."""
    from minillm.course import student

    for path, action in student.prepare(arguments.dir, arguments.chapters, arguments.force):
        advice = f" (you changed it; `minillm learn --force {path.stem}` replaces it)" if action == "kept" else ""
        print(f"{action:9} {path}{advice}")
    return 0


# minillm storyteller ------------------------------------------------------------------------------


def add_storyteller_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["train", "eval"])
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see `minillm storyteller train --help`")


def run_storyteller(arguments: argparse.Namespace) -> int:
    """Pass the options on to the training or the evaluation."""
    if arguments.action == "train":
        from minillm.storyteller import train as module
    else:
        from minillm.storyteller import evaluate as module
    return module.main(arguments.options) or 0


# minillm serve ------------------------------------------------------------------------------------


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    from minillm.cli import serve  # its options are those of the engine, which loads torch

    serve.add_arguments(parser)


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve a model until a signal ends it."""
    from minillm.cli import serve

    return serve.run(arguments)


# minillm bench ------------------------------------------------------------------------------------


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["batching", "engine", "gpu", "ladder", "replicas", "serve", "simulator"])
    parser.add_argument("options", nargs=argparse.REMAINDER, help="see `minillm bench batching --help`, and so on")


def run_bench(arguments: argparse.Namespace) -> int:
    """Pass the options on to the benchmark."""
    return importlib.import_module(f"minillm.bench.{arguments.what}").main(arguments.options)


COMMANDS = {
    "24x": Command(
        "Simulate vLLM's published factor over transformers, and its causes.",
        add_published_arguments,
        run_published,
    ),
    "bench": Command(
        "Measure batching, the engine beside transformers, the whole ladder, routers, a GPU, or the simulator.",
        add_bench_arguments,
        run_bench,
    ),
    "doctor": Command(
        "Print what this machine can run, and what to do about the rest.", add_doctor_arguments, run_doctor
    ),
    "generate": Command("Continue a text with the storyteller or another model.", add_generate_arguments, run_generate),
    "learn": Command("Prepare your copies of the chapters.", add_learn_arguments, run_learn),
    "serve": Command("Serve a model on this machine, with OpenAI's API.", add_serve_arguments, run_serve),
    "simulate": Command(
        "Simulate a batching policy on a card, without having it.", simulate.add_arguments, simulate.run
    ),
    "storyteller": Command("Train or evaluate the storyteller.", add_storyteller_arguments, run_storyteller),
    "trace": Command("Draw the trace of a run.", add_trace_arguments, run_trace),
}

if __name__ == "__main__":
    sys.exit(main())
