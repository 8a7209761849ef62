"""`minillm serve`: every field of the server's and the engine's options is an option, and arrives as it was given."""

import re
import signal
import subprocess
import sys
from dataclasses import fields

import httpx
import pytest

import minillm.serving
from minillm.cli import main as cli
from minillm.cli import serve
from minillm.engine import EngineConfig
from minillm.serving import ClusterOptions, ServerOptions

OTHER = {  # a value beside the default, for fields of which one cannot be made up
    "host": "0.0.0.0",
    "api_key": "key-1",
    "served_model_name": "tale",
    "metrics_prefix": "vllm",
    "scheduling_policy": "sjf",
    "attention_backend": "reference",
    "preemption_mode": "swap",
    "worker": "inline",
    "watermark": 0.5,
    "gpu_memory_utilization": 0.5,
    "num_blocks": 5000,
    "max_model_len": 300,
    "num_host_blocks": 7,
    "max_num_batched_tokens": 4000,
}
EVERY = [(options, field) for options in (ServerOptions, EngineConfig) for field in fields(options)]
OF_CLUSTER = [(ClusterOptions, field) for field in fields(ClusterOptions)]


@pytest.fixture
def served(monkeypatch):
    """What `minillm serve` was about to serve, by calls."""
    calls = []
    monkeypatch.setattr(
        minillm.serving, "serve", lambda *given, **named: calls.append((given, named)) or 0, raising=False
    )
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    return calls


def test_without_options_all_but_the_worker_is_as_the_dataclasses_have_it(served):
    assert cli.main(["serve"]) == 0
    assert served == [
        (
            ("storyteller", ServerOptions(), EngineConfig(worker="process")),
            {"dtype": None, "device": "cpu", "revision": None},
        )
    ]


@pytest.mark.parametrize(("options", "field"), EVERY, ids=lambda each: getattr(each, "name", ""))
def test_every_field_is_an_option(options, field, served):
    default = serve.DEFAULTS.get(field.name, field.default)
    value = OTHER.get(field.name, not default if isinstance(default, bool) else default)
    if value is None or (value == default and field.name not in OTHER):
        value = True if serve.kind_of(field) is bool else (default or 0) + 1
    name = field.name.replace("_", "-")
    given = [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    assert cli.main(["serve", "org/model", *given]) == 0
    ((model, *found), _) = served[0]
    assert model == "org/model" and found[options is EngineConfig] == options(
        **(serve.DEFAULTS if options is EngineConfig else {}) | {field.name: value}
    )
    assert value != default


def test_with_replicas_each_engine_computes_in_the_process_it_has(served, monkeypatch):
    calls = []

    def fake(*given, **named):
        return calls.append(given) or 0

    monkeypatch.setitem(vars(minillm.serving), "serve_replicas", fake)
    others = ["--max-replicas=5", "--target-requests=3.5", "--router=round-robin", "--cpus-per-replica=0.5"]
    assert cli.main(["serve", "--replicas=2", *others, "--gpus-per-replica=0.25", "--num-blocks=90", "--port=1"]) == 0
    cluster = ClusterOptions(2, 5, 3.5, "round-robin", 0.5, 0.25)
    assert calls == [("storyteller", ServerOptions(port=1), EngineConfig(num_blocks=90), cluster)] and served == []


@pytest.mark.parametrize(("options", "field"), [*EVERY, *OF_CLUSTER], ids=lambda each: getattr(each, "name", ""))
def test_every_field_has_a_word_of_help(options, field, capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    _, _, behind = text.partition(f"--{field.name.replace('_', '-')}")
    comment, found, _ = behind.partition(f"(default: {serve.DEFAULTS.get(field.name, field.default)})")
    assert found and len(comment.split()) > 3


def test_the_key_may_come_from_the_environment_and_the_option_goes_first(served, monkeypatch):
    monkeypatch.setenv(serve.KEY_VARIABLE, "from outside")
    assert cli.main(["serve"]) == cli.main(["serve", "--api-key", "mine"]) == 0
    assert [given[1].api_key for given, _ in served] == ["from outside", "mine"]


@pytest.mark.parametrize(
    "wrong",
    ["--port=70000", "--port=x", "--max-num-seqs=0", "--max-num-seqs=1e3", "--worker=elsewhere", "--api-key=",
     "--replicas=-1", "--replicas=x", "--router=mine", "--max-replicas=2", "--replicas=3 --max-replicas=2",
     "--replicas=1 --target-requests=0", "--replicas=1 --cpus-per-replica=-1", "--replicas=1 --gpus-per-replica=nan",
     "--watermark=1", "--watermark=nan", "--metrics-prefix=a b", "--max-num-seqs=1000 --max-num-batched-tokens=5"],
)  # fmt: skip
def test_a_wrong_option_is_one_line_and_exit_code_2(wrong, served, capsys):
    try:
        code = cli.main(["serve", *wrong.split(" --", 1)[0:1], *(f"--{each}" for each in wrong.split(" --")[1:])])
    except SystemExit as refused:
        code = refused.code
    error = capsys.readouterr().err
    assert code == 2 and served == [] and error.strip().splitlines()[-1].startswith("minillm")


def test_it_serves_the_page_the_story_and_ends_on_a_signal():
    command = [sys.executable, "-m", "minillm.cli.main", "serve", "--port=0", "--num-blocks=300", "--api-key=key-1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            log = []
            while not (found := re.search(r"ready on (http://127.0.0.1:\d+)", log[-1] if log else "")):
                log.append(server.stderr.readline())
                assert log[-1], "".join(log)
            url, key = found[1], {"Authorization": "Bearer key-1"}
            assert "<trace-player" in httpx.get(url).text and httpx.get(f"{url}/v1/models").status_code == 401
            body = {"prompt": "Once upon a time", "max_tokens": 4}
            assert httpx.post(f"{url}/v1/completions", json=body, headers=key).json()["usage"]["completion_tokens"] == 4
            assert "minillm:generation_tokens_total" in httpx.get(f"{url}/metrics").text
        finally:
            server.send_signal(signal.SIGTERM)
            rest = server.communicate(timeout=60)[1]
        assert server.returncode == 0 and "ended" in rest and "key-1" not in "".join(log) + rest


def test_without_the_extra_it_says_what_to_install():
    code = """
import sys
for name in ("fastapi", "uvicorn", "pydantic", "prometheus_client", "starlette"):
    sys.modules[name] = None
import minillm.serving
from minillm.errors import ConfigError
try:
    minillm.serving.create_app
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "minillm[serve]" in done.stdout, done.stderr


def test_without_ray_it_says_what_to_install():
    code = """
import sys
sys.modules["ray"] = None
from minillm.cli.main import main
sys.exit(main(["serve", "--replicas=2"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "minillm[cluster]" in done.stderr
