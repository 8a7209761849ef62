"""`minillm bench serve`: a real server, its events counted, and figures that follow from what was seen."""

import asyncio

import pytest

from minillm.bench import recorded, serve
from minillm.bench.contenders import Job, make_jobs, our_arguments
from minillm.bench.serve import Answer, Stream
from minillm.errors import ConfigError
from minillm.simulation import SLO

SLO_OF_TEST = SLO(ttft=1.0, itl=0.1)


def test_server_and_engine_in_turns(tmp_path, capsys):
    file = tmp_path / "serve.json"
    assert serve.main(f"--requests 6 --streams 3 --repeats 1 --load 3 --json {file}".split()) == 0
    record = recorded.load(file)
    assert (record["kind"], record["schema"], list(record["parts"])) == ("serve", 1, ["storyteller"])
    result = record["parts"]["storyteller"]
    jobs = make_jobs(6, 1_000)
    assert result["tokens"] == sum(job.num_outputs for job in jobs)
    assert result["closed_loop"]["served"] == result["poisson"]["served"] == 6
    assert result["closed_loop"]["tokens_per_event"] >= 1.0
    assert result["throughput_ratio"] > 0 and result["ttft_ratio"] > 0  # how much depends on the machine
    out = capsys.readouterr().out
    assert "of the engine's throughput" in out and out.count("p99") == 6


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(ConfigError, match="did not start: .*max_model_len"):  # noqa: SIM117
        with serve.server("storyteller", {"max_model_len": 10**6}):
            pytest.fail("it started")


def test_events_are_counted_however_the_bytes_are_cut():
    text = b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(b'8\r\ndata: {"a": 1}\n\n\r\n' for _ in range(5)) + b"data: [DONE]\n\n"

    async def main(size):
        stream = Stream(b"")
        stream._answer = Answer(0.0)
        for start in range(0, len(text), size):
            stream.data_received(text[start : start + size])
        stream.connection_lost(None)
        return await stream.ended

    for size in (1, 2, 7, 19, len(text)):
        answer = asyncio.run(main(size))
        assert (answer.status, len(answer.events), answer.is_whole) == (200, 5, True), size


def test_figures_follow_from_the_answers():
    jobs = [Job([1], 3)] * 4
    answers = [
        Answer(1.0, 200, [1.5, 1.6, 1.7], True),
        Answer(1.0, 200, [2.5, 2.6, 2.7], True),  # its first token is late
        Answer(1.0, 200, [1.5, 2.5], True),  # its tokens are slow
        Answer(1.0, 429),
    ]
    found = serve.figures(answers, jobs, SLO_OF_TEST)
    assert (found["served"], found["goodput"]) == (3, 0.25)
    assert found["ttft"]["p50"] == 0.5 and found["ttft"]["max"] == 1.5
    assert found["itl"]["max"] == 1.0 and found["e2e"]["max"] == pytest.approx(1.7)
    with pytest.raises(ConfigError, match="1 of 4 requests were not served: HTTP {429: 1}"):
        serve.check_whole(answers)


def test_options_and_processor_time():
    settings = our_arguments([Job([1, 2], 3)], 4, 512)
    options = [each for name, value in settings.items() for each in serve.as_option(name, value)]
    assert "--no-enable-prefix-caching" in options and options[options.index("--max-num-seqs") + 1] == "4"
    with pytest.raises(ConfigError, match="--load"):
        serve.parse_arguments(["--load", "0"])
