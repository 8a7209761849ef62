"""`minillm trace FILE --request ID`: eight steps, their layers, and times that are the trace's."""

import re

import pytest

from minillm.cli.main import main
from minillm.trace import RequestRecord, Trace, UnknownRequestError, find_request, journey_lines, save_trace
from minillm.trace.journey import stages_of
from minillm.viz import LayerPath
from test_llm_engine import PROMPT, TEN, make_engine
from tiny_models import random_token_ids


@pytest.fixture(scope="module")
def trace(checkpoint):
    engine = make_engine(checkpoint("llama"))
    for number in range(5):
        engine.add_request(f"req {number}", random_token_ids(14, seed=number), TEN)
    engine.add_request("again", PROMPT, TEN)
    while engine.has_unfinished_requests():
        engine.step()
    engine.add_request("again", PROMPT, TEN)
    engine.step()
    engine.abort_request("again")
    engine.shutdown()
    assert any(step.preempted for step in engine.trace.steps)
    return engine.trace


def test_eight_steps_in_order_of_time_with_their_layers(trace):
    for record in trace.requests:
        stages = stages_of(trace, record)
        assert [stage.number for stage in stages] == list(range(1, 9))
        assert [stage.layer for stage in stages] == [None, 1, 1, 1, 2, 2, 3, 1]
        times = [stage.seconds for stage in stages if stage.seconds is not None]
        assert times[0] == 0.0 and times[-1] == max(times)
        if trace.token_times(record.request_id):
            assert stages[7].seconds == pytest.approx(trace.ttft(record.request_id))
        assert stages[4].seconds <= stages[5].seconds <= stages[6].seconds <= stages[7].seconds


def test_what_is_told_is_what_happened(trace):
    text = "\n".join(journey_lines(trace, "req 0"))
    first, part = next(trace.parts("req 0"))
    assert f"step {first.step}, beside {len({each.request_id for each in first.scheduled}) - 1} other" in text
    assert f"in blocks {', '.join(map(str, part.block_ids))}" in text
    assert "then 9 more" in text and "did not end" not in text
    preempted = next(each.request_id for step in trace.steps for each in step.preempted)
    assert "it was preempted" in "\n".join(journey_lines(trace, preempted))


def test_an_id_that_was_used_again_means_its_last_life(trace):
    assert find_request(trace, "again").request_id == "again#2"
    assert "did not end with a result" in "\n".join(journey_lines(trace, "again"))


def test_an_unknown_id_and_a_request_that_never_ran(trace):
    with pytest.raises(UnknownRequestError, match="no request 'x' in this trace, which has req 0, .* and 2 more"):
        find_request(trace, "x")
    waits = Trace([RequestRecord("a", 0.0, 3)])
    assert "has not chosen it" in "\n".join(journey_lines(waits, "a"))


def test_the_command(trace, tmp_path, capsys):
    path = save_trace(trace, tmp_path / "run.jsonl")
    assert main(["trace", str(path), "--request", "req 1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ +5 +2 +Scheduler +[\d.]+ ms +chooses it", out, re.MULTILINE)
    assert main(["trace", str(path), "--request", "nobody"]) == 2
    assert "no request 'nobody'" in capsys.readouterr().err


def test_the_picture_says_which_steps_happen_once_and_which_for_every_token(trace):
    picture = LayerPath(trace, "req 0", title="One request")
    passes = {step.step for step, _ in trace.parts("req 0")}
    assert [picture.count(number) for number in range(1, 9)] == [1, 1, 1, 1, *[len(passes)] * 3, 10]
    rows = [line.split("|")[1].split() for line in picture.text().splitlines()[:4]]
    for column, stage in enumerate(stages_of(trace, find_request(trace, "req 0"))):
        assert [row[column] != "." for row in rows] == [stage.layer == layer for layer in (None, 1, 2, 3)]
    assert "began" not in picture.text() and "began after" in LayerPath(trace, "req 0", times=True).text()
    (axes,) = picture.figure().axes
    told = {text.get_text() for text in axes.texts}
    assert {"once", f"in each of {len(passes)} passes", "10 tokens", "Scheduler"} <= told
    assert sum((artist.get_gid() or "").startswith("step ") for artist in (*axes.patches, *axes.artists)) == 8
    assert picture.png() == LayerPath(trace, "req 0", title="One request").png()


def test_the_picture_of_a_request_that_never_ran_ends_at_the_scheduler():
    picture = LayerPath(Trace([RequestRecord("a", 0.0, 3)]), "a", times=True)
    assert len(picture.stages) == 5 and picture.text().splitlines()[-1].split() == ["5", "Scheduler", "2", "0"]
    assert picture.png()
    with pytest.raises(UnknownRequestError):
        LayerPath(Trace(), "a")
