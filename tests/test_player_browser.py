"""The player in headless Chromium: both themes, the keyboard alone, narrow and wide, long runs, names and contrast."""

from contextlib import contextmanager

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from minillm.cli import main as cli
from minillm.engine import BlockManager, Scheduler, SchedulerConfig
from minillm.player import save_html
from minillm.simulation import SimulatedExecutor, VirtualClock, fixed, make_requests, preset, run, uniform
from minillm.trace import RequestRecord, ScheduledTokens, StepEvent, Trace, save_trace
from minillm.viz import Timeline
from test_browser import CHROMIUM, CHROMIUM_OPTIONS
from test_player_replay import simulated
from test_viz_blocks import random_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
PLAYER = "document.querySelector('trace-player')"


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run with a pool that is too small, shared prefixes and several outputs for a prompt, as `--html` writes it."""
    folder = tmp_path_factory.mktemp("player")
    save_trace(random_run(0, n=3).trace, folder / "run.jsonl")
    assert cli.main(["trace", str(folder / "run.jsonl"), "--html", str(folder / "run.html")]) == 0
    return folder / "run.html"


@contextmanager
def opened(browser, path, *, width=1400, height=900, **options):
    """A page that shows the file; whatever its console says, or a request to elsewhere, is an error at the end."""
    page = browser.new_page(viewport={"width": width, "height": height}, **options)
    wrong = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    page.goto(path.as_uri())
    try:
        yield page
        assert wrong == []
    finally:
        page.close()


def position(page: Page) -> int:
    return page.evaluate(f"{PLAYER}.position")


def go(page: Page, step: int) -> None:
    page.evaluate(f"{PLAYER}.position = {step}")
    frames(page)


def frames(page: Page) -> None:
    """Until what was asked for has been drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


# Elements that a reader can reach, and those that only a name tells, without a name.
NAMELESS = """() => {
  const roles = ["button", "img", "slider", "group", "toolbar"].map((role) => `[role=${role}]`);
  const all = [...document.querySelectorAll(["button, select, input, textarea, [tabindex='0']", ...roles])];
  return all.filter((each) => each.checkVisibility()).filter((each) => {
    const by = each.getAttribute("aria-labelledby")?.split(" ").map((id) => document.getElementById(id)?.textContent);
    const names = [each.labels?.[0]?.textContent, each.getAttribute("aria-label"), each.textContent, by?.join("")];
    return !names.some((name) => name?.trim());
  }).map((each) => each.outerHTML.slice(0, 120));
}"""

# Text whose colour is too near to what is behind it: WCAG 2's contrast, below 4.5 to 1.
PALE = """() => {
  const read = (color) => {
    const pen = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const light = (rgb) => rgb.slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const color = read(getComputedStyle(each).backgroundColor);
      if (color[3] > 250) return color;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!text || !element.checkVisibility()) continue;
    if (element.matches("script, style, option, .only-read, .absent *")) continue;
    const [one, two] = [light(read(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => a - b);
    const contrast = (two + 0.05) / (one + 0.05);
    if (contrast < 4.5) found.push([contrast.toFixed(2), element.outerHTML.slice(0, 100)]);
  }
  return found;
}"""


def assert_in_order(page: Page) -> None:
    """Nothing sticks out, everything has a name, text can be read, and ids are there once."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(NAMELESS) == []
    assert page.evaluate(PALE) == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("width", [320, 700, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_can_be_read_in_both_themes_at_every_width(chromium, recorded, theme, width):
    with opened(chromium, recorded, width=width, color_scheme=theme) as page:
        steps = page.evaluate(f"{PLAYER}.run.steps.length")
        assert steps > 20
        for step in (0, steps // 2, steps):
            go(page, step)
            sentence = page.evaluate(f"{PLAYER}.run.sentence({step})")
            expect(page.locator(".sentence")).to_have_text(sentence)
            expect(page.get_by_role("status")).to_contain_text(sentence)
            assert_in_order(page)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, background[4:-1].split(","))) > 384) == (theme == "light")
        assert page.evaluate("[...document.querySelectorAll('canvas')].every((each) => each.clientWidth > 0)")


def test_the_keyboard_does_it_all(chromium, recorded):
    with opened(chromium, recorded, reduced_motion="reduce") as page:
        steps = page.evaluate(f"{PLAYER}.run.steps.length")
        for key, expected in [
            ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Shift+ArrowRight", 11), ("End", steps),
            ("ArrowRight", steps), ("Home", 0), ("ArrowLeft", 0),
        ]:  # fmt: skip
            page.locator(".row").first.focus()
            page.keyboard.press(key)
            assert position(page) == expected, key
        page.keyboard.press("Space")
        expect(page.locator(".where")).to_contain_text("step 3 of")
        expect(page.get_by_role("button", name="Pause")).to_be_visible()
        page.keyboard.press("Space")
        assert not page.evaluate(f"{PLAYER}.playing")
        assert page.evaluate(f"{PLAYER}.speed") <= 2  # nobody who wants no motion gets much of it


def test_tab_goes_through_requests_and_each_shows_its_blocks(chromium, recorded):
    with opened(chromium, recorded) as page:
        go(page, 8)
        plain = page.evaluate("document.querySelector('.pool canvas').toDataURL()")
        page.locator(".row").first.focus()
        names = []
        for _ in range(5):
            names.append(page.evaluate("document.activeElement.getAttribute('aria-label')"))
            page.keyboard.press("Tab")
        assert [name.split(" |")[0] for name in names] == page.evaluate(
            f"{PLAYER}.run.requests.slice(0, 5).map((each) => each.label)"
        )
        page.locator(".row", has_text="req 1").first.focus()
        frames(page)
        assert page.evaluate("document.querySelector('.pool canvas').toDataURL()") != plain
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowDown")
        expect(page.locator(".row[aria-pressed=true]")).to_have_count(1)
        page.keyboard.press("Escape")
        expect(page.locator(".row[aria-pressed=true]")).to_have_count(0)


def test_a_row_says_the_text_picture_of_its_timeline(chromium, recorded):
    trace = random_run(0, n=3).trace
    with opened(chromium, recorded) as page:
        go(page, 20)
        row = page.locator(".row").first
        name = row.get_attribute("data-id")
        letters = Timeline(trace, "steps").letters(name, 1.0, len(trace.steps))[:21].rstrip()
        assert f"req {name} |{letters}|" in row.get_attribute("aria-label")


def test_a_block_shows_who_shares_it_by_mouse_and_by_key(chromium, recorded):
    with opened(chromium, recorded) as page:
        go(page, 8)
        owners = page.evaluate(f"[...{PLAYER}.view.owners()].find(([, owners]) => owners.length > 1)")
        block, names = owners[0], [each["id"] for each in owners[1]]
        pool = page.locator(".pool canvas")
        pool.focus()
        for _ in range(block):
            page.keyboard.press("ArrowRight")
        frames(page)
        assert f"Block {block}: " in pool.get_attribute("aria-valuetext")
        assert f"shared by {len(names)}" in page.locator(".pool .figures").inner_text()
        marked = page.evaluate("[...document.querySelectorAll('.row.marked')].map((each) => each.dataset.id)")
        assert sorted(marked) == sorted(names)
        page.locator(".row").first.focus()
        pool.hover(position={"x": 3, "y": 3})
        expect(page.locator(".pool .figures")).to_contain_text("Block 0: null")


def test_the_same_as_text(chromium, recorded):
    with opened(chromium, recorded) as page:
        go(page, 15)
        page.get_by_text("The same as text").click()
        expect(page.locator("pre")).to_contain_text("step 16 of")
        assert "|" in page.locator("pre").inner_text()


def long_run() -> Trace:
    """1,000 requests and more than 10,000 steps on a paged pool."""
    clock = VirtualClock()
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256)
    scheduler = Scheduler(config, clock, block_manager=BlockManager(200, 16))
    requests = make_requests(1000, uniform(1, 40), fixed(85), arrivals="at once")
    return run(scheduler, SimulatedExecutor(preset("Llama-2-7B", "h200"), clock), requests, clock)


def test_a_long_run_does_not_hang_it(chromium, tmp_path):
    trace = long_run()
    assert len(trace.steps) > 10_000
    with opened(chromium, save_html(trace, tmp_path / "long.html")) as page:
        took = page.evaluate(
            f"""async () => {{
              const player = {PLAYER}, times = [];
              for (let index = 1; index <= 20; index++) {{
                player.position = (index * 7919) % player.run.steps.length;
                const begin = performance.now();
                await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
                times.push(performance.now() - begin);
              }}
              return times.sort((a, b) => a - b)[10];
            }}"""
        )
        assert took < 1000  # ms; about 60 on an idle machine, where two frames alone take 33
        assert 0 < page.locator(".row").count() < 60
        assert page.evaluate(f"{PLAYER}.view.snapshots.size") > 100
        page.locator(".row").last.focus()
        for _ in range(40):
            page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.matches('.row')")
        assert page.locator(".row").count() < 60


NAMES = ["</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "'\"&amp; ß 🦊"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_and_nothing_else(chromium, tmp_path, name):
    step = StepEvent(0, 0.0, 1.0, (ScheduledTokens(name, 0, 3, "prefill", 1),), (name,))
    path = save_html(Trace([RequestRecord(name, 0.0, 3)], [step]), tmp_path / "named.html", title=name)
    with opened(chromium, path) as page:
        expect(page.locator(".row .name")).to_have_text(f"…{name.encode('utf-16-le')[-14:].decode('utf-16-le')}")
        expect(page.locator(".row .name")).to_have_attribute("title", name)
        expect(page.locator("h1")).to_have_text(name)
        assert page.locator("img").count() == 0
        assert page.title() == name


def test_a_static_batch_shows_who_holds_a_place(chromium, tmp_path):
    trace = simulated("static")
    held = [len({part.request_id for part in step.scheduled if part.why == "padding"}) for step in trace.steps]
    path = save_html(trace, tmp_path / "static.html")
    with opened(chromium, path) as page:
        assert page.locator(".pool").is_hidden()  # there is no pool
        said = 0
        for step in range(len(held)):
            places = page.evaluate(f"[...{PLAYER}.run.occupants({step}).values()].map(([, state]) => state)")
            assert len(places) == len({part.request_id for part in trace.steps[step].scheduled})
            said += f"{places.count('padding')} places are held" in page.evaluate(f"{PLAYER}.run.sentence({step})")
        assert said > 1


def test_a_trace_from_elsewhere_says_why_it_cannot_be_played(chromium, tmp_path):
    path = save_html(simulated("static"), tmp_path / "run.html")
    path.write_text(path.read_text().replace('"version": 1', '"version": 7'))
    with opened(chromium, path) as page:
        expect(page.get_by_role("alert")).to_contain_text("version 7, this player reads 1")
