"""`minillm bench replicas`: its requests, what it reads from a server, and the table in the README. With Ray:
`test_cluster`.
"""

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import minillm
from minillm.bench import recorded, replicas
from minillm.errors import ConfigError

METRICS = b"""# TYPE minillm:prefix_cache_queries_total counter
minillm:prefix_cache_queries_total{engine="0",model_name="storyteller",replica="a"} 100.0
minillm:prefix_cache_queries_total{engine="0",model_name="storyteller",replica="b"} 60.0
minillm:prefix_cache_hits_total{engine="0",model_name="storyteller",replica="a"} 32.0
minillm:prefix_cache_hits_total{engine="0",model_name="storyteller",replica="b"} 0.0
minillm:prompt_tokens_total{engine="0",model_name="storyteller",replica="a"} 7.0
"""


def test_the_requests_of_a_turn_share_their_system_prompts_and_nothing_else():
    arguments = replicas.parse_arguments(["--system-prompts=3", "--each=5", "--prefix=32", "--question=8"])
    jobs = replicas.make_jobs(0, arguments)
    assert Counter(Counter(tuple(job.prompt[:32]) for job in jobs).values()) == {5: 3}
    assert len({tuple(job.prompt[32:]) for job in jobs}) == 15 and {len(job.prompt) for job in jobs} == {40}
    assert jobs == replicas.make_jobs(0, arguments) != replicas.make_jobs(1, arguments)
    heads = [job.prompt[:32] for job in jobs]
    assert any(heads[i : i + 5] != [heads[i]] * 5 for i in range(0, 15, 5))  # not one after the other


def test_counts_are_sums_over_the_replicas():
    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(METRICS)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Metrics) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert replicas.counts(f"http://127.0.0.1:{server.server_port}") == {"queries": 160, "hits": 32}
        server.shutdown()


def test_the_table_has_medians():
    def turn(hits: float, p50: float) -> dict:
        return {router: {"hits": hits, "ttft": {"p50": p50, "p99": 2 * p50}} for router in replicas.ROUTERS}

    text = replicas.table(2, [turn(0.1, 0.010), turn(0.9, 0.050), turn(0.4, 0.020)])
    assert text.count("40.0%") == text.count("20.0 ms") == text.count("40.0 ms") == 3 == text.count("\n")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--replicas 0", "--replicas is 0"),
        ("--replicas 2 65", "--replicas is 65"),
        ("--turns 0", "--turns is 0"),
        ("--rate 0", "--rate is 0"),
    ],
)
def test_wrong_options_are_told(options, told):
    with pytest.raises(ConfigError, match=told):
        replicas.main(options.split())


def test_the_readme_quotes_the_recorded_run():
    run = recorded.latest("replicas")
    text = (Path(minillm.__file__).parent / "bench/README.md").read_text(encoding="utf-8")
    assert run["date"] in text
    for number, part in run["parts"].items():
        for router in replicas.ROUTERS:
            found = replicas.summary(part["turns"], router)
            assert (
                f"| {number} | {router} | {found['hits']:.1%} | {found['p50']:.1f} ms | {found['p99']:.1f} ms |" in text
            )
