"""Chapter 1 as a reader meets it: opened in JupyterLab, all cells run, a stepper moved, no error seen."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Locator, Page, expect, sync_playwright

from minillm.course import notebooks

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--no-first-run"]
START_S, RUN_S = 60, 240
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # else only the cells in view are drawn
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def cleared_copy(chapter: Path, folder: Path) -> nbformat.NotebookNode:
    """Write the chapter without its outputs into `folder`."""
    notebook = nbformat.read(chapter, as_version=4)
    for cell in notebooks.code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    folder.mkdir()
    nbformat.write(notebook, folder / chapter.name)
    return notebook


@contextmanager
def jupyterlab(folder: Path, scratch: Path):
    """A JupyterLab on `folder` that keeps all its own files in `scratch`; yields its address and token."""
    write_settings(scratch / "settings")
    port, token = free_port(), secrets.token_hex(16)
    options = {"ServerApp.root_dir": folder, "ServerApp.port": port, "ServerApp.port_retries": 0}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--IdentityProvider.token={token}"]
    command += [f"--{name}={value}" for name, value in options.items()]
    with (scratch / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment(scratch), stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/api/status?token={token}")
        yield address, token
    finally:
        server.terminate()
        server.wait(timeout=30)


def environment(scratch: Path) -> dict[str, str]:
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    return inherited | notebooks.QUIET_ENVIRONMENT | {name: str(scratch / path) for name, path in folders.items()}


def write_settings(folder: Path) -> None:
    for name, values in SETTINGS.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url: str, ready: Callable[[list | dict], bool] = lambda answer: True) -> None:
    """Ask the server until it answers and the answer is `ready`."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
            if ready(json.load(reply)):
                return
        time.sleep(0.2)
    pytest.fail(f"JupyterLab was not ready within {START_S} s")


def one_idle_kernel(kernels: list[dict]) -> bool:
    """Whether the page is connected to a kernel that waits for work; before that, Run is ignored."""
    return [(kernel["connections"], kernel["execution_state"]) for kernel in kernels] == [(1, "idle")]


@contextmanager
def browser_page():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(START_S * 1000)
        yield page
        browser.close()


def run_all_cells(page: Page, num_cells: int) -> None:
    """Choose Run > Run All Cells and wait until each code cell has its number and the kernel is idle."""
    expect(page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    numbers = [f"[{count}]:" for count in range(1, num_cells + 1)]
    expect(page.locator(".jp-CodeCell .jp-InputPrompt")).to_have_text(numbers, timeout=RUN_S * 1000)
    expect(page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]')).to_be_visible()


def shown(output: Locator) -> list[str]:
    """What the HTML and image widgets of an output show now."""
    pictures = output.locator("img.widget-image, .widget-html-content")
    return pictures.evaluate_all("found => found.map(view => view.src || view.innerHTML)")


def move_stepper(page: Page, output: Locator) -> None:
    """Push the slider one step to the right; the view beside it must change."""
    before = shown(output)
    assert before, "a slider without an HTML or image widget beside it"
    output.locator(".noUi-handle").first.press("ArrowRight")
    deadline = time.monotonic() + START_S
    while shown(output) == before:
        assert time.monotonic() < deadline, "the stepper moved and its view stayed the same"
        page.wait_for_timeout(100)


@pytest.mark.parametrize("chapter", notebooks.chapters([])[:1], ids=lambda path: path.stem)
def test_the_first_chapter_runs_in_jupyterlab(chapter, tmp_path):
    notebook = cleared_copy(chapter, tmp_path / "chapters")
    cells = notebooks.code_cells(notebook)
    raising = [cell for cell in cells if notebooks.RAISES in notebooks.tags(cell)]
    with jupyterlab(tmp_path / "chapters", tmp_path) as (address, token), browser_page() as page:
        page.goto(f"{address}/lab/tree/{chapter.name}?token={token}")
        expect(page.locator(".jp-Notebook .jp-CodeCell")).to_have_count(len(cells), timeout=START_S * 1000)
        wait_for(f"{address}/api/kernels?token={token}", one_idle_kernel)
        run_all_cells(page, len(cells))
        expect(page.locator('[data-mime-type="application/vnd.jupyter.error"]')).to_have_count(len(raising))
        expect(page.locator('[data-mime-type="application/vnd.jupyter.stderr"]')).to_have_count(0)
        steppers = page.locator(".jp-OutputArea-output").filter(has=page.locator(".widget-play"))
        steppers.first.wait_for()
        for number in range(steppers.count()):
            move_stepper(page, steppers.nth(number))
