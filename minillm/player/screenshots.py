"""Pictures of the player and the page for the README: `python -m minillm.player.screenshots [FOLDER]`.

Starts `minillm serve` on a free port and lets the page compare both batching policies. Writes a PNG of that, one of the
engine and one of the recorded run; where Ray is installed (`minillm[cluster]`), also one of two replicas. Needs
playwright (`minillm[test]`), Chromium, and `minillm[serve]`.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from minillm.errors import ConfigError
from minillm.player.files import save_html
from minillm.trace import load_trace

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-dev-shm-usage", "--no-first-run"]
WAIT_MS = 180_000  # for a burst, on a busy machine
ENGINE = ["--max-num-seqs", "16", "--max-num-batched-tokens", "256", "--max-model-len", "512", "--num-blocks", "129"]
SHOWN = 0.45  # share of a run that has passed when it is drawn
BEGINNING = "Once upon a time there was a little fox who lived in a forest by the river, and every day she"
COMPARED = 0.7  # the same for both runs on one clock, as a share of the shorter one


def main(folder: Path = Path("figures")) -> None:
    """Write the pictures into `folder`. Raises ConfigError without a browser, RuntimeError if no server starts."""
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, BROWSERS)), None)
    if chromium is None:
        raise ConfigError(f"none of {', '.join(BROWSERS)} is on this machine; install one")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright, served() as address:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        shoot_page(browser, address, folder)
        run = Path(scratch) / "run.jsonl"
        run.write_bytes(browser.new_context().request.get(f"{address}/live/trace").body())
        shoot_run(browser, save_html(load_trace(run), run.with_suffix(".html"), title="32 stories"), folder)
        if find_spec("ray") is None:
            print("page_replicas.png is left as it is: replicas need pip install 'minillm[cluster]'")
        else:
            with served("--replicas", "2") as address:
                shoot_replicas(browser, address, folder)
        browser.close()


@contextmanager
def served(*options: str):
    """The address of a server in a child process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "minillm.cli.main", "serve", f"--port={port}", *ENGINE, *options])
    try:
        deadline = time.monotonic() + WAIT_MS / 1000
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError("minillm serve did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def shoot_page(browser, address: str, folder: Path) -> None:
    """Both batching policies, during their replay; then the engine in its second run."""
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light", reduced_motion="reduce")
    page.goto(address)
    page.locator("#both").click()
    page.locator("#clock").wait_for(timeout=WAIT_MS)
    page.locator("#clock-time").evaluate(
        """(clock, share) => {
          const runs = [...document.querySelectorAll("trace-player[compact]")].map((lane) => lane.run);
          clock.value = share * Math.min(...runs.map((run) => run.elapsed(run.steps.length)));
          clock.dispatchEvent(new Event("input"));
        }""",
        COMPARED,
    )
    settle(page)
    page.locator("#compare").screenshot(path=folder / "page_compare.png")
    live = page.locator("#live")
    live.evaluate("(player, share) => { player.position = share * player.run.steps.length; }", 1 - SHOWN / 2)
    settle(page)
    page.locator(".card", has=live).screenshot(path=folder / "page_engine.png")
    page.close()


def shoot_replicas(browser, address: str, folder: Path) -> None:
    """Two replicas in the middle of a burst each, after prompts that begin alike."""
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light", reduced_motion="reduce")
    page.goto(address)
    lanes = page.locator(".replica")
    lanes.nth(1).wait_for(timeout=WAIT_MS)
    for end in ("went to the", "looked for a", "sang to her"):
        page.locator("#prompt").fill(f"{BEGINNING} {end}")
        with page.expect_response("**/v1/completions") as answer:
            page.get_by_role("button", name="Send").click()
        answer.value.finished()
    for _ in range(2):
        page.get_by_role("button", name="32 stories").click()
    for index in range(2):
        lanes.nth(index).locator(".state", has_text="running").wait_for(timeout=WAIT_MS)
    settle(page)
    page.locator("#pause").click()
    settle(page)
    page.mouse.move(0, 0)
    settle(page)
    page.locator("#replicas").screenshot(path=folder / "page_replicas.png")
    page.close()


def shoot_run(browser, path: Path, folder: Path) -> None:
    """The file of `minillm trace --html` for the same run, with one request's blocks marked."""
    page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page.goto(path.as_uri())
    page.locator("trace-player").evaluate(
        "(player, share) => { player.position = share * player.run.steps.length; }", SHOWN / 2
    )
    settle(page)
    page.locator(".row").nth(4).hover()
    settle(page)
    page.screenshot(path=folder / "player_run.png", full_page=True)
    page.close()


def settle(page) -> None:
    """Wait until everything has been drawn."""
    page.wait_for_timeout(500)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
