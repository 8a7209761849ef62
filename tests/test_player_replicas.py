"""The page of a server with several replicas, in headless Chromium: one lane for each engine, as many as there are."""

import asyncio
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from playwright.sync_api import Locator, Page, expect

from minillm import serving
from minillm.engine import EngineConfig, LLMEngine, RoundRobin
from served import served
from test_browser import CHROMIUM
from test_player_browser import assert_in_order
from test_player_page import LONG_MS, asked, chromium, idle, opened, until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
__all__ = ["chromium"]  # a fixture
BLOCKS = 97
STORY = "Once upon a time there was a little fox who lived in a forest by the river, and every day it went to look"


class Cluster(serving.ClusterEngine):
    """Engines of this process behind a router that takes them in turn; they can be started and ended."""

    def __init__(self, names: tuple[str, ...]):
        self.engines, self.is_cut = {}, False
        for name in names:
            self.start(name)
        about = serving.About.of(self.engines[names[0]])
        super().__init__(about, lambda: dict(self.engines), RoundRobin())

    def start(self, name: str) -> None:
        config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=128, max_model_len=256, num_blocks=BLOCKS)
        engine = LLMEngine("storyteller", config=config)
        self.engines[name] = serving.AsyncEngine(engine, metrics=serving.Metrics())

    def stop(self, name: str) -> None:
        self.engines.pop(name).shutdown()

    async def follow(self):
        async for records in super().follow():
            if self.is_cut:
                self.is_cut = False
                return
            yield records

    def set(self, name: str, **changes) -> None:
        with ThreadPoolExecutor(1) as pool:  # this thread's loop is playwright's
            pool.submit(asyncio.run, self.engines[name].control(**changes)).result()


@contextmanager
def running(*names: str):
    """Engines of these names, and the address of their server."""
    cluster = Cluster(names)
    try:
        with served(serving.create_app(cluster)) as address:
            yield cluster, address
    finally:
        for name in list(cluster.engines):
            cluster.stop(name)


def lane(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=re.compile(f"^{name}:"))


def counts_of(engine) -> dict[str, str]:
    """What a lane has to say, from the engine itself."""
    use, counters = engine._engine.scheduler.block_manager.usage, engine.metrics.counters
    asked_for, found = counters["prefix_cache_queries"], counters["prefix_cache_hits"]
    return {
        "places": f"{engine.num_running} of {engine.config.max_num_seqs}",
        "queue": str(engine.num_waiting),
        "blocks": f"{use.used} of {BLOCKS - 1} used, {use.cached} cached",
        "hits": f"{round(100 * found / asked_for)} %" if asked_for else "–",
    }


def assert_agrees(page: Page, cluster: Cluster) -> dict[str, dict[str, str]]:
    """Every lane says what its engine counts; returns that."""
    found = {name: counts_of(engine) for name, engine in cluster.engines.items()}
    for name, counts in found.items():
        for kind, text in counts.items():
            expect(lane(page, name).locator(f".{kind} b")).to_have_text(text, timeout=LONG_MS)
    return found


def wait_for(page: Page, is_so: Callable[[], bool]) -> None:
    for _ in range(LONG_MS // 50):
        if is_so():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it never came to be so")


def send(page: Page, prompt: str) -> None:
    """A request of this prompt, read to its end."""
    page.locator("#prompt").fill(prompt)
    with page.expect_response("**/v1/completions") as answer:
        page.get_by_role("button", name="Send").click()
    answer.value.finished()


def test_each_lane_says_what_its_engine_counts(chromium):
    with running("one", "two") as (cluster, address), opened(chromium, address) as page:
        expect(page.locator(".replica")).to_have_count(2)
        expect(page.locator("#replicas [role=status]")).to_have_text("2 replicas running.")
        assert_agrees(page, cluster)
        for _ in range(4):  # the second time in each, its beginning is in the cache
            send(page, STORY)
        wait_for(page, lambda: all(not engine.num_running for engine in cluster.engines.values()))
        found = assert_agrees(page, cluster)
        assert all(0 < int(counts["hits"].removesuffix(" %")) < 100 for counts in found.values())
        for name in cluster.engines:
            cluster.set(name, paused=True)
            page.get_by_role("button", name="8 stories").click()
        wait_for(page, lambda: all(engine.num_waiting == 8 for engine in cluster.engines.values()))
        cluster.set("one", step=3)
        wait_for(page, lambda: cluster.engines["one"].num_running == 4)
        page.wait_for_timeout(500)
        found = assert_agrees(page, cluster)
        assert (found["one"]["places"], found["one"]["queue"]) == ("4 of 4", "4")
        assert (found["two"]["places"], found["two"]["queue"]) == ("0 of 4", "8")
        assert "4 of 4 places work, queue 4" in lane(page, "one").get_attribute("aria-label")
        assert_in_order(page)
        for name in cluster.engines:
            cluster.set(name, paused=False)
        wait_for(page, lambda: all(not engine.num_running for engine in cluster.engines.values()))
        assert_agrees(page, cluster)


def test_the_pressed_lane_is_the_one_in_the_big_view(chromium):
    with running("one", "two") as (cluster, address), opened(chromium, address) as page:
        expect(page.locator(".replica .who > b")).to_have_text(["one", "two"])
        lane(page, "one").click()
        expect(lane(page, "one")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#live-title")).to_have_text("The engine of one")
        expect(page.locator("#compare")).to_be_hidden()
        page.get_by_role("button", name="8 stories").click()
        expect(page.locator("#live .sentence")).to_have_text("8 requests finished.", timeout=LONG_MS)
        rate = page.locator("#ttft-value").text_content()
        lane(page, "two").focus()
        page.keyboard.press("Enter")
        expect(lane(page, "two")).to_have_attribute("aria-pressed", "true")
        expect(lane(page, "one")).to_have_attribute("aria-pressed", "false")
        expect(page.locator("#live-title")).to_have_text("The engine of two")
        expect(page.locator("#live .sentence")).to_have_text("Nothing has run yet.")
        expect(page.locator("#ttft-value")).to_have_text("–")
        page.get_by_role("button", name="8 stories").click()
        until(page, "run.totals.at(-1)?.finished === 8")
        idle(page)
        lane(page, "one").click()
        expect(page.locator("#ttft-value")).to_have_text(rate)
        assert asked(page, "run.totals.at(-1).finished") == 8
        assert asked(page, "position") == asked(page, "run.steps.length")
        page.get_by_role("button", name="Pause").click()  # the settings are those of all
        for name in cluster.engines:
            expect(lane(page, name).locator(".state")).to_have_text("paused")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_replica_that_goes_says_so_and_a_new_one_appears(chromium, theme):
    with running("one", "two") as (cluster, address), opened(chromium, address, color_scheme=theme) as page:
        lane(page, "one").click()
        send(page, STORY)
        cluster.stop("two")
        expect(lane(page, "two").locator(".state")).to_have_text("gone", timeout=LONG_MS)
        expect(lane(page, "two")).to_have_class(re.compile("missing"))
        expect(lane(page, "two")).to_have_attribute("aria-label", re.compile("gone, last state: 0 of 4 places work"))
        expect(page.locator("#replicas [role=status]")).to_have_text("1 replica running; two gone.")
        cluster.start("three")
        expect(lane(page, "three")).to_be_visible(timeout=LONG_MS)
        expect(page.locator("#replicas [role=status]")).to_have_text("2 replicas running; two gone.")
        assert_agrees(page, cluster)
        cluster.stop("one")  # the one in the big view, which keeps its last state
        expect(lane(page, "one").locator(".state")).to_have_text("gone", timeout=LONG_MS)
        assert asked(page, "run.totals.at(-1).finished") == 1
        page.wait_for_timeout(300)
        assert_in_order(page)


@pytest.fixture(scope="module")
def eight():
    with running(*(f"replica-{number}" for number in range(8))) as (_, address):
        yield address


@pytest.mark.parametrize("width", [320, 400, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_eight_lanes_fit_at_every_width(chromium, eight, theme, width):
    with opened(chromium, eight, width=width, color_scheme=theme) as page:
        expect(page.locator(".replica")).to_have_count(8, timeout=LONG_MS)
        for _ in range(8):
            send(page, STORY)
        page.wait_for_timeout(400)
        assert_in_order(page)
        outside = """() => [...document.querySelectorAll(".replica *")].filter((each) => {
          const box = each.getBoundingClientRect(), lane = each.closest(".replica").getBoundingClientRect();
          return !box.width || box.left < lane.left || box.right > lane.right + 0.5 || box.bottom > lane.bottom + 0.5
            || each.scrollWidth > each.clientWidth + 1 && each.clientWidth;
        }).map((each) => each.outerHTML)"""
        assert page.evaluate(outside) == []
        sizes = page.evaluate("[...document.querySelectorAll('.replica span, .replica b')].map("
                              "(each) => parseFloat(getComputedStyle(each).fontSize))")  # fmt: skip
        assert min(sizes) >= 13  # px


def test_lanes_without_a_connection_say_so_and_come_back(chromium):
    with running("one", "two") as (cluster, address), opened(chromium, address, refused=503) as page:
        expect(page.locator("#replicas [role=status]")).to_have_text("2 replicas running.")
        page.route("**/live/events", lambda route: route.fulfill(status=503))
        cluster.is_cut = True
        with page.expect_response("**/live/events"):
            send(page, STORY)  # whose records end the feed
        expect(lane(page, "one").locator(".state")).to_have_text("not connected", timeout=LONG_MS)
        expect(page.locator("#replicas [role=status]")).to_have_text(
            "0 replicas running; one not connected, two not connected."
        )
        cluster.stop("two")
        page.unroute("**/live/events")
        expect(lane(page, "one").locator(".state")).to_have_text("idle", timeout=LONG_MS)
        expect(page.locator("#replicas [role=status]")).to_have_text("1 replica running; two not connected.")
