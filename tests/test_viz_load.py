"""Throughput and latency against load: the knee, the SLO, and colours that mean the same in both panels."""

import pytest

from minillm.simulation.reporting import report
from minillm.trace.events import RequestRecord, ScheduledTokens, StepEvent, Trace
from minillm.viz import Curves, LoadCurves, LoadPoint, PictureError, ThroughputLatency

LOADS = [1, 2, 4, 8]
SERVED = {"static": [0.9, 1.7, 2, 2.1], "continuous": [0.9, 1.8, 3.6, 5]}
TTFT = {"static p50": [0.1, 0.5, 2, 5], "static p99": [0.6, 2, 4, 9], "continuous p99": [0.1, 0.2, 0.4, 3]}


def test_the_knee_and_the_last_load_within_the_slo():
    picture = LoadCurves(LOADS, SERVED, TTFT, slo=0.5)
    assert picture.knees == {"static": 2, "continuous": 4}
    assert picture.within == {"static p99": None, "continuous p99": 4}
    assert picture.text().splitlines()[-4:] == [
        "static: knee at 2 requests per second",
        "continuous: knee at 4 requests per second",
        "static p99: last load within the SLO of 0.5 s: none",
        "continuous p99: last load within the SLO of 0.5 s: 4 requests per second",
    ]
    above, below = picture.figure().axes
    assert [line.get_xdata()[0] for line in above.lines[-2:]] == [2, 4]
    assert any(list(line.get_ydata()) == [0.5, 0.5] for line in below.lines)
    colors = {text.get_text(): text.get_color() for axes in (above, below) for text in axes.texts}
    assert colors["static"] == colors["static p99"] != colors["continuous"] == colors["continuous p99"]


def test_load_curves_from_reports():
    runs = {}
    for load in (1, 2):
        parts = (ScheduledTokens("a", 0, 3, "prefill", 1),)
        runs[load] = report(Trace([RequestRecord("a", 0.0, 3)], [StepEvent(0, 0.0, load / 8, parts, ("a",))]))
    picture = LoadCurves.of_reports({"continuous": runs}, slo=1)
    assert picture.pictures[1].series["continuous p99"] == [0.125, 0.25]
    assert picture.pictures[0].series["continuous"] == [8, 4]
    with pytest.raises(PictureError, match="same loads"):
        LoadCurves.of_reports({"continuous": runs, "static": {1: runs[1]}})


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LoadCurves([2, 1], SERVED, TTFT), "rise"),
        (lambda: LoadCurves(LOADS, SERVED, TTFT, judged=["p1"]), r"\['p1'\]"),
        (lambda: LoadCurves([1], SERVED, TTFT), "4 values for 1"),
        (lambda: Curves([1], {"a": [1]}, "x", "y", thick="b"), r"\['b'\]"),
    ],
)
def test_impossible_data_is_refused_with_the_reason(make, says):
    with pytest.raises(PictureError, match=says):
        make()


# --- latency against throughput --------------------------------------------------------------------------------------

OPEN = [LoadPoint("open", 1, 1, 0.5), LoadPoint("open", 4, 3.9, 2.0), LoadPoint("open", 8, 5, 1.0)]
CLOSED = [("closed", None, 3, 0.2), ("closed", None, 9, 3.0)]


def test_what_is_served_within_the_limit_leaves_saturated_points_out():
    picture = ThroughputLatency({"a": OPEN, "b": CLOSED}, limit=2.0, latency_label="p99 TTFT", title="two")
    assert [point.saturated for point in OPEN] == [False, False, True]
    assert picture.best == {"a": 3.9, "b": 3}
    lines = picture.text().splitlines()
    assert lines[4].split() == ["a", "open", "8", "5", "1", "saturated"]
    assert lines[5].split() == ["b", "closed", "–", "3", "0.200"]
    assert lines[7:] == ["a: within 2 s 3.90 requests per second", "b (closed loop): within 2 s 3 requests per second"]
    assert picture.alt().startswith("two: a, b. a: within 2 s")
    assert ThroughputLatency({"a": OPEN}, limit=0.1).summary() == "a: within 0.1 s none"
    assert ThroughputLatency({"a": OPEN}).alt() == "latency against requests served: a"


def test_saturated_points_are_hollow_and_closed_loops_dashed():
    (axes,) = ThroughputLatency({"a": OPEN, "b": CLOSED}, limit=2.0).figure().axes
    assert axes.get_yscale() == "log"
    lines = [(line.get_linestyle(), list(line.get_xdata()), line.get_markerfacecolor()) for line in axes.lines]
    assert lines[0][:2] == ("-", [1, 3.9, 5]) and lines[2][:2] == ("--", [3, 9])
    assert lines[1][1:] == ([5], "#FFFFFF") and lines[3][1] == []
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["a", "b (closed loop)", "saturated", "limit 2 s"]


@pytest.mark.parametrize(
    ("systems", "says"),
    [
        ({}, "at least one system"),
        ({"a": []}, "at least one point"),
        ({"a": [*OPEN, CLOSED[0]]}, "make two systems"),
        ({"a": [("half", 1, 1, 1)]}, "loop of 'a'"),
        ({"a": [("open", 1, 1, 0)]}, "latency of 'a'"),
    ],
)
def test_points_that_cannot_be_drawn_are_refused(systems, says):
    with pytest.raises(PictureError, match=says):
        ThroughputLatency(systems)
