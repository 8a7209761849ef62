"""Replicas on Ray Serve: each is an actor with an engine of its own, here or on other machines. Needs
`pip install minillm[cluster]`; Ray is imported here alone.

    minillm serve --replicas 2                 this process speaks HTTP: `serve_replicas`
    serve run minillm.serving.cluster:app      Ray's proxies do, in front of the same FastAPI app: `app`

Both build a `ClusterEngine` over `RayReplica`s. `EngineRouter` is Ray's side: it sends each call to the replica that
the call names, and chooses by the same rule for calls that name none. Ray starts a new replica when one fails, and
lets those that it stops finish their requests.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, redirect_stdout
from contextvars import Context
from dataclasses import fields
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from ray.serve.schema import LoggingConfig
from torch import Tensor

from minillm.engine import EngineConfig, LLMEngine, OutputKind, Prompt, RequestOutput, make_router
from minillm.errors import ConfigError, WorkerDiedError, shown
from minillm.runtime import search_path
from minillm.sampling import SamplingParams
from minillm.serving import cluster_engine as outside
from minillm.serving.api_server import create_app
from minillm.serving.async_engine import AsyncEngine, DrainingError
from minillm.serving.cluster_engine import About, ClusterEngine
from minillm.serving.metrics import Metrics
from minillm.serving.options import KEY_VARIABLE, ClusterOptions, ServerOptions, name_of
from minillm.serving.server import Server, address, allow_many_connections, bound, log_to_stderr, say, share_the_lock
from minillm.trace import Trace

APPLICATION = "minillm"
CONTROL_CALLS = 64  # calls to a replica beside its requests: figures, settings, feeds of pages
HEALTH_SECONDS = 1.0  # from one look at a replica to the next
OBJECT_STORE_BYTES = 256 << 20  # of a Ray that this process starts; outputs are small
LOGGING = LoggingConfig(log_level="WARNING", enable_access_log=False)
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # Ray's 15 lets all else go before replicas
LOADING = ("dtype", "device", "revision")  # the other arguments of `LLMEngine`


# --- a replica -------------------------------------------------------------------------------------------------------


class Replica:
    """One engine, in an actor. `replica` in a call is whom it is for; `EngineRouter` has read it."""

    def __init__(self, model: str, options: ServerOptions, config: EngineConfig, loading: Mapping[str, Any]):
        name = name_of(model, options)
        llm_engine = LLMEngine(model, config=config, **loading)
        metrics = Metrics(options.metrics_prefix, name)
        self.engine = AsyncEngine(llm_engine, max_queue=options.max_queue, metrics=metrics, model_name=name)
        share_the_lock()

    async def about(self) -> About:
        """What it has in common with the others."""
        return About.of(self.engine)

    async def generate_together(
        self, requests: Sequence[tuple], output_kind: OutputKind, replica: str | None = None
    ) -> AsyncIterator[list[RequestOutput]]:
        """As `AsyncEngine.generate_together`. The caller has the prompts: no output brings them back."""
        async with aclosing(self.engine.generate_together(requests, output_kind)) as batches:
            async for outputs in batches:
                for output in outputs:
                    output.prompt, output.prompt_token_ids = None, []
                yield outputs

    async def follow(self, replica: str) -> AsyncIterator[list[dict]]:
        """As `AsyncEngine.follow`."""
        async with aclosing(self.engine.follow()) as feed:
            async for records in feed:
                yield records

    async def ask(self, method: str, *given: Any, replica: str, **named: Any) -> Any:
        """Call any other method of the engine."""
        return await getattr(self.engine, method)(*given, **named)

    async def check_health(self) -> None:
        """Asked by Ray: an error here, and it starts another replica in this one's place."""
        await self.engine.check_health()

    def __del__(self):
        if hasattr(self, "engine"):
            self.engine.shutdown()


class EngineRouter(RequestRouter):
    """Ray's router for replicas of an engine, in each process that calls them."""

    def initialize_state(self, router: str, block_size: int) -> None:
        """`router` and `block_size`: as of `make_router`, for calls that name no replica."""
        self._rule = make_router(router, block_size)
        # Not here: Ray pickles this module by value whenever a deployment is made or changed, and a router cannot be.
        outside.routers[self._deployment_id.app_name, self._deployment_id.name] = self

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one replica. A call for one that is no longer there gets DrainingError, and may be sent elsewhere."""
        pending_request.routing_context.should_backoff = True  # wait before a replica that was full is asked again
        by_name = {each.replica_id.unique_id: each for each in candidate_replicas}
        name = pending_request.kwargs.get("replica")
        if name is None:
            loads = {each: self.replica_queue_len_cache.get(by_name[each].replica_id) or 0 for each in by_name}
            is_text = pending_request.metadata.call_method == "generate_together"
            prompt = pending_request.args[0][0][1] if is_text else None
            known = prompt if isinstance(prompt, Mapping) else {}
            name = self._rule.choose(loads, known.get("prompt_token_ids", ()), known.get("cache_salt") or "")
        elif name not in by_name:
            if not pending_request.future.done():
                pending_request.future.set_exception(DrainingError(f"replica {name} takes nothing new"))
            return [candidate_replicas]  # whichever: the call has its answer
        return [[by_name[name]]]


# --- a replica from outside ------------------------------------------------------------------------------------------


class RayReplica:
    """A replica as a `ServedEngine`, for another process. WorkerDiedError when its process, or machine, is lost."""

    def __init__(self, handle: DeploymentHandle, name: str):
        self.name = name
        self._ask, self._stream = handle.options(method_name="ask"), handle.options(stream=True)

    async def generate_together(
        self, requests: Sequence[tuple[str, Prompt, SamplingParams | None, int]], output_kind: OutputKind = "delta"
    ) -> AsyncIterator[list[RequestOutput]]:
        """As `AsyncEngine.generate_together`."""
        prompts = {request_id: prompt for request_id, prompt, *_ in requests}
        call = by_itself(self._stream.generate_together.remote, requests, output_kind, replica=self.name)
        async with aclosing(self._read(call)) as batches:
            async for outputs in batches:
                for output in outputs:
                    prompt = prompts[output.request_id]
                    output.prompt, output.prompt_token_ids = prompt.get("prompt"), prompt["prompt_token_ids"]
                yield outputs

    async def follow(self) -> AsyncIterator[list[dict]]:
        """As `AsyncEngine.follow`."""
        async with aclosing(self._read(by_itself(self._stream.follow.remote, replica=self.name))) as feed:
            async for records in feed:
                yield records

    async def encode(self, prompt: Prompt) -> Tensor:
        """As `AsyncEngine.encode`."""
        return await self._call("encode", prompt)

    async def abort(self, request_id: str) -> bool:
        """As `AsyncEngine.abort`."""
        return await self._call("abort", request_id)

    async def control(self, **changes) -> dict:
        """As `AsyncEngine.control`."""
        return await self._call("control", **changes)

    async def trace(self) -> Trace:
        """As `AsyncEngine.trace`."""
        return await self._call("trace")

    async def exposition(self) -> tuple[bytes, str] | None:
        """As `AsyncEngine.exposition`."""
        return await self._call("exposition")

    async def _call(self, *given, **named) -> Any:
        try:
            return await by_itself(self._ask.remote, *given, replica=self.name, **named)
        except Exception as error:
            raise self._told(error) from None

    async def _read(self, call) -> AsyncIterator:
        """The items of a stream. Closing this ends it over there."""
        is_over = False
        try:
            async for item in call:
                yield item
            is_over = True
        except Exception as error:
            is_over = True
            raise self._told(error) from None
        finally:
            if not is_over:
                call.cancel()

    def _told(self, error: Exception) -> Exception:
        """What the engine raised over there; that it is lost; or Ray's own error."""
        if isinstance(error, RayTaskError):
            return error.cause
        if isinstance(error, RayActorError | DeploymentUnavailableError):
            return WorkerDiedError(f"replica {self.name} has ended, and this request with it; send it again")
        return error


def by_itself(call: Callable, *given: Any, **named: Any) -> Any:
    """Call a handle outside the request that is being answered.

    Ray gives all calls made for one HTTP request one number, and its router loops forever if two of them wait at once.
    """
    return Context().run(call, *given, **named)


def cluster_engine(handle: DeploymentHandle, about: About, router: str) -> ClusterEngine:
    """The engine behind a handle of `Replica`. The handle must have been used once."""
    known: dict[str, RayReplica] = {}
    routing = outside.routers[handle.app_name, handle.deployment_name]

    def replicas() -> dict[str, RayReplica]:
        names = [each.unique_id for each in list(routing.curr_replicas)]
        for gone in known.keys() - names:
            del known[gone]
        for name in names:
            known.setdefault(name, RayReplica(handle, name))
        return dict(known)

    return ClusterEngine(about, replicas, make_router(router, about.config.block_size))


# --- applications of Ray Serve ---------------------------------------------------------------------------------------


@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000, logging_config=LOGGING)
@serve.ingress()
class Ingress:
    """The server's app behind Ray's HTTP proxies."""

    async def __init__(self, replicas: DeploymentHandle, options: ServerOptions, router: str):
        about = await replicas.about.remote()
        self.fastapi = create_app(cluster_engine(replicas, about, router), options)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.fastapi


def replicas_of(
    model: str, options: ServerOptions, config: EngineConfig, cluster: ClusterOptions, **loading: Any
) -> serve.Application:
    """The replicas alone, as an application of Ray Serve."""
    most = cluster.max_replicas or cluster.replicas
    scaling: dict[str, Any] = {"num_replicas": cluster.replicas}
    if most > cluster.replicas:
        scaling = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=cluster.replicas,
                max_replicas=most,
                target_ongoing_requests=cluster.target_requests,  # all that was sent there: running and waiting
            )
        }
    return (
        serve.deployment(Replica)
        .options(
            **scaling,
            ray_actor_options=resources(config, cluster, loading.get("device") or "cpu"),
            max_ongoing_requests=config.max_num_seqs + options.max_queue + CONTROL_CALLS,
            request_router_config=RequestRouterConfig(
                request_router_class=f"{__name__}:EngineRouter",
                request_router_kwargs={"router": cluster.router, "block_size": config.block_size},
            ),
            graceful_shutdown_timeout_s=options.drain_timeout,
            graceful_shutdown_wait_loop_s=0.1,
            health_check_period_s=HEALTH_SECONDS,
            logging_config=LOGGING,
        )
        .bind(model, options, config, loading)
    )


def resources(config: EngineConfig, cluster: ClusterOptions, device: str) -> dict[str, float]:
    """What Ray keeps free for each replica."""
    gpus = cluster.gpus_per_replica
    if gpus is None:
        gpus = 0 if device == "cpu" else config.tensor_parallel_size
    return {"num_cpus": cluster.cpus_per_replica, "num_gpus": gpus}


def app(args: Mapping[str, Any]) -> serve.Application:
    """Replicas and ingress, for `serve run` and `serve build`. `args` are the options of `minillm serve` with _ for -,
    and `model`, `dtype`, `device`, `revision`. Raises ConfigError for one that is not known, or out of range.
    """
    args, kinds = {"replicas": 1, "model": "storyteller"} | dict(args), (ServerOptions, EngineConfig, ClusterOptions)
    if os.environ.get(KEY_VARIABLE):
        args.setdefault("api_key", os.environ[KEY_VARIABLE])
    known = [{field.name for field in fields(kind)} for kind in kinds]
    for name in args.keys() - set().union(*known, LOADING, {"model"}):
        raise ConfigError(f"args has {shown(name)}, which is no option of minillm serve; leave it out")
    options, config, cluster = (
        kind(**{name: args[name] for name in names & args.keys()}) for kind, names in zip(kinds, known, strict=True)
    )
    loading = {name: args[name] for name in LOADING if name in args}
    replicas = replicas_of(args["model"], options, config, cluster, **loading)
    return Ingress.bind(replicas, options, cluster.router)


# --- minillm serve --replicas ----------------------------------------------------------------------------------------


def serve_replicas(
    model: str, options: ServerOptions, config: EngineConfig, cluster: ClusterOptions, **loading: Any
) -> int:
    """As `minillm.serving.serve`, with several engines; Ray is started for as long as it runs, unless RAY_ADDRESS says
    where one is. Raises ConfigError if its machines have too few CPUs or GPUs.
    """
    began = time.perf_counter()
    log_to_stderr()
    allow_many_connections()
    with bound(options.host, options.port) as listener:
        start_ray(resources(config, cluster, loading.get("device") or "cpu"), cluster.replicas)
        try:
            say(1, "Ray Serve", f"starting {cluster.replicas} replicas, {cluster.router} routing")
            replicas = replicas_of(model, options, config, cluster, **loading)
            handle = serve.run(replicas, name=APPLICATION, route_prefix=None, logging_config=LOGGING)
            engine = cluster_engine(handle, handle.about.remote().result(), cluster.router)
            server = Server(create_app(engine, options), engine, options.drain_timeout)
            server.ready = f"ready on {address(listener)} after {{:.1f}} s, replicas {', '.join(engine.replicas())}"
            server.began = began
            server.run(sockets=[listener])
        finally:
            with redirect_stdout(None):  # Ray would say that calls to its controller have ended with it
                if "RAY_ADDRESS" in os.environ:
                    serve.delete(APPLICATION)
                else:
                    serve.shutdown()
                ray.shutdown()
    say(1, "OpenAI server", "ended")
    return 0


def start_ray(each: Mapping[str, float], replicas: int) -> None:
    """Connect to the Ray at RAY_ADDRESS, or start one. Raises ConfigError if it is too small."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "RAY_ADDRESS" in os.environ:
        where: dict[str, Any] = {"address": os.environ["RAY_ADDRESS"]}
    else:
        where = {"address": "local", "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        code = f"from minillm.runtime import end_family_with; end_family_with({os.getpid()})"
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(
            [sys.executable, "-P", "-c", code], env=os.environ | search_path(), start_new_session=True, **quiet
        )
    ray.init(**where, log_to_driver=False, logging_level="ERROR")
    there = ray.cluster_resources()
    for kind, name in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
        if replicas * each[name] > there.get(kind, 0):
            ray.shutdown()
            option = f"--{kind.lower()}s-per-replica"
            raise ConfigError(
                f"{replicas} replicas of {each[name]:g} {kind} need {replicas * each[name]:g}, and there are "
                f"{there.get(kind, 0):g}; give fewer --replicas, or {option} a fraction"
            )
    serve.start(proxy_location="Disabled", logging_config=LOGGING)
