"""Mutation testing: how many small slips in a module do its own tests notice? cosmic-ray makes the mutants.

`make mutants` tries 200 of all modules below, `make mutants MUTANTS="--count 20 --seed 3 scheduler queue"` 20 of two.
Each is compiled into a fork of this process, which has imported torch already. No file is changed, so a process that a
test starts by itself runs without the mutant.
"""

import argparse
import contextlib
import difflib
import gc
import importlib.machinery
import itertools
import os
import random
import re
import signal
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROW = re.compile(r"^\| ([^|]*`[^|]*\.py`) \|[^|]*\| ([^|]*) \|$", re.MULTILINE)
# Which tests belong to which module, the quickest first: a mutant that these kill never meets the others.
LISTED = {
    module: re.findall("`(.*?)`", tests)
    for modules, tests in ROW.findall((ROOT / "CONTRIBUTING.md").read_text())  # "Where things are"
    for module in re.findall("`(.*?)`", modules)
}
TRIED = (
    "model/text sampling/sampler sampling/params checks/base engine/request engine/outputs engine/queue "
    "engine/recorder engine/scheduler engine/block_manager runtime/runner runtime/batch simulation/reporting"
)
TESTS = {f"{module}.py": [f"{test}.py" for test in LISTED[f"{module}.py"]] for module in TRIED.split()}
# `is` for `==` holds for small integers, `|` mostly stands in types, and the last two need a name.
LEFT_OUT = re.compile(r"(Eq|NotEq|Lt|LtE|Gt|GtE)_Is(Not)?$|_BitOr_|Variable(Replacer|Inserter)$")
SOURCES = {module: (ROOT / "minillm" / module).read_text() for module in TESTS}
# Tests with a planted bug judge other tests: they find their own bug, whatever the mutant is.
OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-k", "not planted_bug"]
OPTIONS += ["-p", "_hypothesis_pytestplugin", "--hypothesis-profile", "mutants"]  # of the plugins, this one alone


def random_mutants(modules: list[str], seed: int):
    """Yield (module, mutated source): places in random order, all equally likely, and one random change at each."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    operators = [get_operator(name)() for name in operator_names() if not LEFT_OUT.search(name)]
    changes = defaultdict(list)  # (module, place in it) -> [(operator, number of the occurrence)]
    for module in modules:
        nodes = list(ast_nodes(get_ast(SOURCES[module])))
        for operator in operators:
            for occurrence, place in enumerate(at for node in nodes for at in operator.mutation_positions(node)):
                changes[module, place].append((operator, occurrence))

    choose = random.Random(seed)
    for module, place in choose.sample(list(changes), len(changes)):
        mutant = mutate_code(SOURCES[module], *choose.choice(changes[module, place]))
        if mutant.count("strict=True") < SOURCES[module].count("strict=True"):
            continue  # an assertion, which no right code makes fail
        with contextlib.suppress(SyntaxError):  # a bare * among parameters is no product
            compile(mutant, module, "exec")
            yield module, mutant


def import_instead(module: str, code: str) -> None:
    """From now on, importing this module of minillm runs `code`."""
    path, get_code = str(ROOT / "minillm" / module), importlib.machinery.SourceFileLoader.get_code
    importlib.machinery.SourceFileLoader.get_code = lambda loader, name: (
        compile(code, path, "exec") if loader.path == path else get_code(loader, name)
    )


class Hourglass:
    """A pytest plugin: a test that computes for ten seconds, or waits for two minutes, is killed with its process."""

    @staticmethod
    def pytest_runtest_logstart() -> None:
        signal.setitimer(signal.ITIMER_PROF, 10)  # of CPU time, so that a busy machine fails no mutant
        signal.alarm(120)


def verdict(module: str, code: str, quiet: bool = True) -> tuple[str, float]:
    """What the module's tests say of this source (`killed`, `timeout` or `survived`), and their seconds of CPU."""
    import pytest

    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
        Hourglass.pytest_runtest_logstart()
        import_instead(module, code)
        os._exit(pytest.main(OPTIONS + [str(ROOT / "tests" / test) for test in TESTS[module]], [Hourglass]))
    _, status, usage = os.wait4(pid, 0)
    with contextlib.suppress(ProcessLookupError):  # what the tests have started, where they ended badly
        os.killpg(pid, signal.SIGKILL)
    late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF)
    return "timeout" if late else "killed" if status else "survived", usage.ru_utime + usage.ru_stime


def warm_up() -> None:
    """Import what takes seconds, and nothing of minillm. Found examples are not made smaller: one is enough here."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    import torch

    if not torch.cuda.is_available():  # as in conftest.py, before transformers imports Triton
        os.environ["TRITON_INTERPRET"] = "1"
    import transformers.models.llama.modeling_llama
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401
    from hypothesis import Phase, settings

    torch.set_num_threads(1)
    phases = [Phase.explicit, Phase.generate]
    settings.register_profile("mutants", derandomize=True, deadline=None, max_examples=40, phases=phases)
    gc.freeze()  # what is shared with the forks is not looked through in each of them


def main() -> None:
    parser = argparse.ArgumentParser(prog="make mutants", description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"default: {', '.join(TESTS)}")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    modules = {Path(module).stem: module for module in TESTS}
    for name in arguments.modules:
        if name not in modules:
            parser.error(f"{name!r} is no module that is tried; there are: {', '.join(modules)}")
    modules = [modules[name] for name in arguments.modules or modules]
    warm_up()

    for module in modules:
        print(module, flush=True)
        told, _ = verdict(module, SOURCES[module], quiet=False)
        assert told == "survived", f"{module}: its tests fail without a mutant ({told})"

    verdicts = Counter()
    for module, mutant in itertools.islice(random_mutants(modules, arguments.seed), arguments.count):
        told, seconds = verdict(module, mutant)
        verdicts[told] += 1
        before, after = SOURCES[module].splitlines(), mutant.splitlines()
        _, _, line, *changes = difflib.unified_diff(before, after, lineterm="", n=0)
        place = f"minillm/{module}:{re.search('[0-9]+', line)[0]}"
        print(f"{verdicts.total():3} {told:8} {seconds:5.1f} s  {place}", flush=True)
        if told == "survived":
            print(*changes, sep="\n", flush=True)

    caught = verdicts.total() - verdicts["survived"]
    print(f"seed {arguments.seed}: {caught} of {verdicts.total()} caught, {caught / verdicts.total():.1%}", verdicts)


if __name__ == "__main__":
    main()
