"""The page of a live server in headless Chromium: one engine, watched, steered, and compared in its two ways."""

import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from minillm.engine import EngineConfig, LLMEngine
from test_browser import CHROMIUM, CHROMIUM_OPTIONS
from test_player_browser import assert_in_order

uvicorn = pytest.importorskip("uvicorn")
serving = pytest.importorskip("minillm.serving")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
LIVE = "document.getElementById('live')"
LONG_MS = 120_000  # a burst may take that long on a busy machine
KEY = "a key of this test"


@contextmanager
def served(api_key: str | None = None):
    """The address of a server in a thread of this process."""
    from minillm.serving.api_server import create_app

    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=128, max_model_len=512, num_blocks=257)
    engine = serving.AsyncEngine(LLMEngine("storyteller", config=config), model_name="storyteller")
    app = create_app(engine, serving.ServerOptions(api_key=api_key))
    options = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
    server = uvicorn.Server(options)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.05)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        engine.shutdown()


@pytest.fixture(scope="module")
def running():
    with served() as address:
        yield address


@pytest.fixture
def server(running):
    """The address of a server whose engine is set as it was started, whatever the test before has done."""
    changes = {"paused": False, "batching": "continuous", "max_num_seqs": 8, "max_num_batched_tokens": 128}
    body, headers = json.dumps(changes).encode(), {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{running}/live/control", body, headers)) as answer:
        assert json.load(answer).items() >= changes.items()
    return running


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, address: str, *, width=1400, height=1000, refused: int | None = None, **options):
    """The page, connected; what its console says is an error at the end, but for answers of the status `refused`."""
    page = browser.new_page(viewport={"width": width, "height": height}, **options)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(address) else wrong.append(request.url))
    page.goto(address)
    try:
        if refused != 401:
            expect(page.locator("#connection")).to_have_text(re.compile("connected|paused"), timeout=LONG_MS)
        yield page
        expected = [text for text in wrong if f"status of {refused}" in text]
        assert (wrong, bool(expected)) == (expected, refused is not None)
    finally:
        page.close()


def asked(page: Page, expression: str):
    return page.evaluate(f"{LIVE}.{expression}")


def until(page: Page, expression: str) -> None:
    """Until it is true of the live player; the page's own policy forbids playwright to wait in the page."""
    deadline = time.monotonic() + LONG_MS / 1000
    while not asked(page, expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def idle(page: Page) -> None:
    """Until every request that the page knows of has ended, and it says so; what is drawn may be of a moment before."""
    until(page, "run.open === 0")
    done = re.compile(r"^(\d+ requests? finished|Nothing has run yet)\.$")
    expect(page.locator("#live .sentence")).to_have_text(done, timeout=LONG_MS)


@pytest.mark.parametrize("width", [320, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_burst_is_watched_in_both_themes_at_every_width(chromium, server, theme, width):
    with opened(chromium, server, width=width, color_scheme=theme) as page:
        before = asked(page, "run.totals.at(-1)?.finished ?? 0")
        page.get_by_role("button", name="8 stories").click()
        expect(page.locator("#live .figures").last).to_contain_text(f"So far: {before + 8}", timeout=LONG_MS)
        idle(page)
        assert_in_order(page)
        assert asked(page, "run.totals.at(-1).outputs") > 8
        assert asked(page, "view.numBlocks") == 257
        expect(page.locator("#throughput-value")).to_have_text(re.compile(r"\d+ tokens/s"))
        expect(page.locator("#ttft-value")).to_have_text(re.compile(r"[\d.]+ ms"))
        page.locator("#theme").click()
        page.wait_for_timeout(300)
        assert_in_order(page)


def test_what_a_request_says_is_drawn_as_it_comes_and_is_only_text(chromium, server):
    with opened(chromium, server) as page:
        page.locator("#prompt").fill("<img src=x onerror=alert(1)> Once upon a time")
        page.locator("#most").fill("12")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#reply")).to_have_text(re.compile(r"<img src=x onerror=alert\(1\)> Once upon a time.+"))
        assert page.locator("img").count() == 0
        typed = "<img src=x onerror=alert(1)> Once upon a time"
        answered = f"document.getElementById('reply').innerText.replace({json.dumps(typed)}, '').trim()"
        for _ in range(2):  # again when it has ended: the feed may be behind the answer, and the answer behind the feed
            until(page, f"run.requests.at(-1).text(Infinity).trim() === {answered}")
            idle(page)
        page.get_by_label("chat").check()
        page.locator("#prompt").fill("Hello")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#reply")).to_have_text(re.compile(r"\w"), timeout=LONG_MS)


def test_what_the_server_refuses_is_said(chromium, server):
    with opened(chromium, server, refused=429) as page:
        page.route("**/v1/completions", lambda route: route.fulfill(
            status=429, json={"error": {"message": "the queue is full: <b>256</b> wait"}}))  # fmt: skip
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#reply")).to_have_text("the queue is full: <b>256</b> wait")
        page.unroute("**/v1/completions")
        assert page.locator("#reply b").count() == 0


def test_the_keyboard_pauses_the_engine_and_makes_single_steps(chromium, server):
    with opened(chromium, server) as page:
        idle(page)
        page.locator("#pause").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#connection")).to_have_text("paused")
        expect(page.locator("#pause")).to_have_text("Go on")
        page.locator("[data-burst='8']").focus()
        page.keyboard.press("Enter")
        steps = asked(page, "run.steps.length")
        expect(page.locator("#step")).to_be_enabled()
        for count in (1, 2, 3):
            page.locator("#step").focus()
            page.keyboard.press("Enter")
            expect(page.locator("#live .where")).to_contain_text(f"step {steps + count} of", timeout=LONG_MS)
        assert asked(page, "run.steps.length") == steps + 3
        page.locator("#pause").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#connection")).to_have_text("connected")
        idle(page)


def test_sliders_and_switch_change_the_engine_and_follow_it(chromium, server):
    with opened(chromium, server) as page, opened(chromium, server) as other:
        page.locator("#seqs").focus()
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(other.locator("#seqs-value")).to_have_text("3")
        page.get_by_role("radio", name="static").check()
        expect(other.get_by_role("radio", name="static")).to_be_checked()
        page.get_by_role("button", name="8 stories").click()
        until(page, "run.totals.at(-1)?.limit === 3")  # a step number would not do: the page forgets old steps
        idle(page)
        totals = asked(page, "run.totals.filter((each) => each.limit === 3)")
        assert max(each["working"] for each in totals) == 3
        assert max(each["held"] for each in totals) > 0
        page.get_by_role("radio", name="continuous").check()
        page.locator("#seqs").focus()
        page.keyboard.press("End")
        expect(other.locator("#seqs-value")).to_have_text("8")
        idle(other)


def assert_said_as_in_the_feed(page: Page, server: str, ids: dict[str, list[str]]) -> None:
    """The headline's steps and seconds, and what is gained, are those of the trace that the server has kept."""
    with urllib.request.urlopen(f"{server}/live/trace") as answer:
        records = [json.loads(line) for line in answer]
    arrivals = {each["request"]["request_id"]: each["request"]["arrival_time"] for each in records if "request" in each}
    took = []
    for mine in map(set, (ids["static"], ids["continuous"])):
        ends = [each["step"]["end_time"] for each in records if "step" in each
                and mine & {part["request_id"] for part in each["step"]["scheduled"]}]  # fmt: skip
        took.append((len(ends), max(ends) - min(arrivals[name] for name in mine)))
    (slow, longer), (quick, shorter) = took
    said = f"static batches {slow:,} steps, {longer:.2f} s; continuous batching {quick:,} steps, {shorter:.2f} s"
    expect(page.locator("#verdict")).to_contain_text(said)
    if longer / shorter > 1.05:
        expect(page.locator("#verdict")).to_contain_text(f"{longer / shorter:.1f} times as fast")
    why = page.locator("#why").text_content()
    assert not why or f"{slow / quick:.1f} times as many steps" in why
    expect(page.locator("#clock-text")).to_contain_text(f"of {max(longer, shorter):.2f} s")


# The axis of a lane, in px from the lane's left edge: its ticks, now, and where its rows and their past end.
AXIS = """(lane) => {
  const left = lane.getBoundingClientRect().x, x = (line) => line.getBoundingClientRect()[
    line.matches(".last") ? "right" : "left"] - left;
  const end = (least) => Math.max(...[...lane.querySelectorAll(".row .line")].map((canvas) => {
    const { width, height } = canvas, copy = Object.assign(document.createElement("canvas"), { width, height });
    const pen = copy.getContext("2d", { willReadFrequently: true });
    pen.drawImage(canvas, 0, 0);
    const { data } = pen.getImageData(0, 0, width, height);
    let last = -1;
    for (let at = 3; at < data.length; at += 4) if (data[at] > least) last = Math.max(last, ((at - 3) / 4) % width);
    return canvas.getBoundingClientRect().x - left + ((last + 1) * canvas.clientWidth) / width;
  }));
  return {
    ticks: [...lane.querySelectorAll(".tick")].map((tick) => [parseFloat(tick.textContent), x(tick)]),
    now: x(lane.querySelector(".axis .now")) + 1, end: end(0), past: end(200), seconds: lane.run.elapsed(Infinity),
  };
}"""


def assert_on_one_axis(page: Page) -> None:
    """Both runs stand on the same seconds: the same px each, `now` at the same x, and a run ends at its own second."""
    length = page.locator("#clock-time").evaluate("(clock) => Number(clock.max)")
    for share in (0.0, 0.3, 0.7, 1.0):
        page.locator("#clock-time").evaluate(
            "(clock, at) => { clock.value = at; clock.dispatchEvent(new Event('input')); }", share * length
        )
        page.wait_for_timeout(300)
        one, two = (page.locator(f"#{name}-lane").evaluate(AXIS) for name in ("static", "continuous"))
        assert one["ticks"] == two["ticks"] and len(one["ticks"]) >= 3
        assert abs(one["now"] - two["now"]) < 0.5
        (_, zero), (last, far) = one["ticks"][0], one["ticks"][-1]
        for lane in (one, two):
            place = lambda seconds: zero + seconds * (far - zero) / last  # noqa: B023, E731
            assert all(abs(place(seconds) - x) < 1.5 for seconds, x in lane["ticks"])
            assert abs(place(share * length) - lane["now"]) < 2
            assert abs(place(lane["seconds"]) - lane["end"]) < 2
            assert not share or abs(min(lane["now"], lane["end"]) - lane["past"]) < 3  # what is to come is pale
    assert max(one["seconds"], two["seconds"]) == pytest.approx(length)


def test_the_engine_says_when_one_looks_at_the_past(chromium, server):
    with opened(chromium, server) as page:
        page.get_by_role("button", name="8 stories").click()
        until(page, "run.steps.length > 3")
        idle(page)
        jump = page.get_by_role("button", name="Jump to now")
        expect(jump).to_be_hidden()
        page.get_by_role("button", name="First step").click()
        expect(page.locator("#live .where")).to_contain_text("in the past")
        name = page.locator("#live .name").first
        expect(name).to_have_text(f"story {name.get_attribute('title').rpartition('-')[2]}")
        jump.click()
        expect(jump).to_be_hidden()
        expect(page.locator("#live .where")).not_to_contain_text("in the past")


def test_both_ways_of_batching_are_measured_on_the_same_burst(chromium, server):
    with opened(chromium, server, reduced_motion="reduce") as page:
        page.locator("#both-places").select_option("4")
        page.get_by_role("button", name="Run both").click()
        expect(page.locator("#verdict")).to_contain_text("The same 32 stories: static", timeout=2 * LONG_MS)
        lanes = {}
        for name in ("static", "continuous"):
            run = f"document.getElementById('{name}-lane').run"
            lanes[name] = page.evaluate(
                f"({{steps: {run}.steps.length, texts: {run}.requests.map((each) => each.text(Infinity)),"
                f" ids: {run}.requests.map((each) => each.id), letters: {run}.requests.map((each) => each.letter),"
                f" live: {run}.requests.map((each) => {LIVE}.run.byId.get(each.id).letter),"
                f" held: {run}.totals.filter((each) => each.held).length, last: {run}.totals.at(-1)}})"
            )
        one, two = lanes["static"], lanes["continuous"]
        assert one["texts"] == two["texts"] and len(one["texts"]) == 32  # the same stories, word for word
        assert one["last"]["finished"] == two["last"]["finished"] == 32
        assert one["steps"] > 1.2 * two["steps"]
        assert one["held"] > two["held"] == 0
        assert one["letters"] == two["letters"] == one["live"] == two["live"]  # a story has the same one everywhere
        assert_said_as_in_the_feed(page, server, {name: lane["ids"] for name, lane in lanes.items()})
        for name, lane in lanes.items():
            share = round(100 * lane["last"]["worked"] / (4 * lane["steps"]))
            expect(page.locator(f"#{name}-result")).to_contain_text(f"{share} % worked")
            expect(page.locator(f"#{name}-result")).to_contain_text(f"{lane['last']['outputs']:,} tokens")
        expect(page.locator("#clock-play")).to_have_text("Play")  # nothing moves for those who want it so
        expect(page.locator("#seqs-value")).to_have_text("8")  # as it was before
        page.locator("#clock-time").focus()
        page.keyboard.press("Home")
        expect(page.locator("#static-lane .sentence")).to_contain_text("4 of 4 places work")
        assert_in_order(page)
        assert_on_one_axis(page)


def test_a_server_with_a_key_is_asked_with_it(chromium):
    with served(KEY) as address, opened(chromium, address, refused=401) as page:
        expect(page.get_by_role("dialog")).to_be_visible()
        page.get_by_label("API key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("refused")
        page.get_by_label("API key").fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#connection")).to_have_text("connected")
        page.get_by_role("button", name="8 stories").click()
        until(page, "run.steps.length > 0")
        idle(page)
        assert page.evaluate("Object.keys(localStorage).concat(document.cookie)").count(KEY) == 0


def test_a_request_whose_reader_has_gone_is_not_waited_for(chromium, server):
    with opened(chromium, server) as page, opened(chromium, server) as other:
        idle(page)
        before = asked(page, "run.requests.length")
        page.locator("#pause").click()
        other.locator("[data-burst='8']").click()
        until(page, "run.open == 8")  # they wait, and have taken part in no step
        assert asked(page, "run.requests.length") == before + 8
        other.goto("about:blank")
        until(page, "run.open == 0")
        page.locator("#pause").click()
        idle(page)
    with opened(chromium, server) as page:
        idle(page)
        assert asked(page, "run.open") == 0


def test_it_connects_again_and_shows_what_was_kept(chromium, server):
    with opened(chromium, server) as page:
        idle(page)
        steps = asked(page, "run.steps.length")
        assert steps > 0
        page.reload()
        expect(page.locator("#connection")).to_have_text("connected")
        until(page, "run.steps.length > 0")
        assert asked(page, "run.steps.length") <= steps
        assert asked(page, "run.totals.at(-1).finished") > 0


def test_the_screenshots_of_the_readme_are_made_by_one_command(tmp_path):
    command = [sys.executable, "-m", "minillm.player.screenshots", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr
    shots = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replicas = {"page_replicas.png"} if find_spec("ray") else set()
    assert shots.keys() == {"page_compare.png", "page_engine.png", "player_run.png"} | replicas
    assert min(map(len, shots.values())) > 40_000  # bytes: an empty page has a few thousand
