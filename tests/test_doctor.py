"""`minillm doctor`: every check answers, a "no" says what to do, and only what the course needs makes it fail."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minillm.cli import doctor
from minillm.cli import main as cli
from minillm.errors import KernelError
from minillm.kernels import dispatch

CHECKS = {check.name: check for check in doctor.CHECKS}


def test_this_machine_can_run_the_course(capsys):
    """So does every machine on which the tests run."""
    assert cli.main(["doctor"]) == 0
    page = capsys.readouterr().out
    lines = [line for line in page.splitlines() if line.startswith(("yes", "no "))]
    assert [line[5:25].strip() for line in lines] == list(CHECKS) and page.endswith("The course runs here.\n")
    assert all(line.startswith("yes") for line in lines[: sum(check.needed for check in doctor.CHECKS)])
    assert len(page.splitlines()) <= 25 and max(map(len, page.splitlines())) <= 200
    assert f"yes  torch               {torch.__version__}" in page


@pytest.mark.parametrize(("needed", "code"), [(True, 1), (False, 0)])
def test_only_what_the_course_needs_makes_it_fail(monkeypatch, capsys, needed, code):
    def broken():
        raise doctor.Lacking("7 of 9", "find the other two")

    checks = doctor.Check("dwarfs", broken, needed), doctor.Check("snow", lambda: "white", True)
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert cli.main(["doctor"]) == code
    page = capsys.readouterr().out
    assert f"no   dwarfs              7 of 9\n{'':25}-> find the other two\nyes  snow                white\n" in page
    assert ("The course cannot run without: dwarfs." in page) == needed


def lacking(name: str) -> tuple[str, str]:
    """What a check that must fail has found, and what it advises."""
    is_there, text = doctor.answer(CHECKS[name])
    assert not is_there
    found, _, advice = text.partition("\n")
    return found, advice.strip().removeprefix("-> ")


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_PYTHON", (99, 1))
    assert "make setup PYTHON=" in lacking("Python")[1]


def test_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    found, advice = lacking("torch")
    assert "import of torch halted" in found and advice == "run `make setup` again"


def test_no_memory(monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_MEMORY", 2**60)
    assert "close something" in lacking("free memory")[1]


def test_a_font_without_our_signs(monkeypatch):
    monkeypatch.setattr(doctor, "SIGNS", "→\N{CJK UNIFIED IDEOGRAPH-4E00}")
    found, advice = lacking("fonts of figures")
    assert found.endswith("lacks \N{CJK UNIFIED IDEOGRAPH-4E00}") and "matplotlib" in advice


def test_no_model(monkeypatch):
    def missing(name):
        raise FileNotFoundError("no checkpoint")

    monkeypatch.setattr("minillm.model.load_model", missing, raising=False)
    assert lacking("shipped model") == ("no checkpoint", "run `make setup` again")


def test_no_compiler(monkeypatch):
    def none():
        raise KernelError("no C++ compiler; install one")

    monkeypatch.setattr("minillm.kernels.building.compiler", none)
    monkeypatch.setattr(dispatch, "_backend", lambda *arguments: "no C++ compiler; install one")
    assert lacking("C++ compiler") == ("no C++ compiler", "install one")
    assert lacking("kernels for the CPU") == ("attention_backend 'cpu': no C++ compiler", "install one")


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no chapter needs one" in lacking("CUDA device")[1]
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[triton]'" in lacking("Triton")[1]


def test_a_gpu(monkeypatch):
    """Its name, memory and driver; and Triton has to launch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(name="H200"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (3 * 2**30, 2**40))
    monkeypatch.setattr("minillm.bench.gpu.session.driver_version", lambda: "580.1")
    assert doctor.answer(CHECKS["CUDA device"])[1].startswith("H200 (3.0 GiB free); driver 580.1, CUDA ")
    pytest.importorskip("triton")
    asked = []
    monkeypatch.setattr(
        dispatch, "_backend", lambda name, shape, device: asked.append((name, shape[0])) or "no Python.h"
    )
    assert lacking("Triton")[0] == "attention_backend 'triton': no Python.h" and asked == [("triton", "cuda")]


def test_no_nvrtc(monkeypatch):
    def none(source, architecture):
        raise KernelError("libnvrtc.so.13 is not found; install nvidia-cuda-nvrtc")

    monkeypatch.setattr("minillm.kernels.cuda.compiled.compile_for_gpu", none)
    assert lacking("NVRTC") == ("libnvrtc.so.13 is not found", "install nvidia-cuda-nvrtc")


def test_the_figures_have_no_sign_that_is_not_looked_for():
    sources = [path.read_text(encoding="utf-8") for path in (Path(doctor.__file__).parents[1] / "viz").glob("*.py")]
    assert {sign for sign in "".join(sources) if ord(sign) > 126} == set(doctor.SIGNS)


def test_it_starts_without_torch():
    code = "import sys; sys.modules['torch'] = None; from minillm.cli.main import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "no   torch" in done.stdout and "cannot run without: torch" in done.stdout
