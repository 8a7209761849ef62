"""The HTTP server's endpoints: OpenAI's API as vLLM answers it. One `Endpoints` serves one engine."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

import minillm
from minillm.engine import RequestOutput
from minillm.errors import MiniLLMError
from minillm.player import FILES, FOLDER
from minillm.serving import live
from minillm.serving.answers import Answer, ChatAnswers, CompletionAnswers, usage_of
from minillm.serving.bodies import check_kind_of_body, read_as
from minillm.serving.gate import Gate
from minillm.serving.http_errors import JSON, APIError, add_error_answers, documented, from_engine
from minillm.serving.options import ServerOptions
from minillm.serving.protocol import (
    MOST_OUTPUTS,
    ChatAnswer,
    ChatChunk,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    EmbeddingAnswer,
    EmbeddingRequest,
    ModelCard,
    ModelList,
    SamplingRequest,
    TokenizeAnswer,
    TokenizeChat,
    TokenizePrompt,
    Version,
)
from minillm.serving.requests import as_list, encoded, encoded_chat, in_thread, params_of, prompts_of
from minillm.serving.served_engine import ServedEngine
from minillm.serving.streams import ClientGone, EventStream, unless_gone

BODIES = (ChatRequest, CompletionRequest, EmbeddingRequest, TokenizePrompt, TokenizeChat, DetokenizeRequest)
PAGE_MAY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"
REFERENCE = "#/components/schemas/{model}"
ALWAYS = (401, 405)
POSTED = (400, 401, 404, 405, 408, 413)
GENERATING = (*POSTED, 429, 500, 503)


def create_app(engine: ServedEngine, options: ServerOptions | None = None) -> FastAPI:
    """The server's ASGI app. The caller keeps the engine and shuts it down."""
    options = ServerOptions() if options is None else options
    app = FastAPI(
        title="minillm",
        version=minillm.__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # /metrics and the trace say more
    )
    app.state.options = options
    add_error_answers(app)
    Endpoints(engine, options).add_to(app)
    if options.page:
        add_page(app, engine)
    app.openapi = lambda: _openapi(app, options)
    app.add_middleware(Gate, api_key=options.api_key)
    return app


def _openapi(app: FastAPI, options: ServerOptions) -> dict:
    """The description at /openapi.json. `read_as` reads the bodies, so FastAPI does not know them."""
    if app.openapi_schema is None:
        text = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, known = models_json_schema([(model, "validation") for model in BODIES], ref_template=REFERENCE)
        components = text.setdefault("components", {})
        chunk = TypeAdapter(ChatChunk).json_schema(ref_template=REFERENCE)
        schemas = components.setdefault("schemas", {})
        schemas |= known["$defs"] | chunk.pop("$defs") | {"ChatChunk": chunk}
        if options.api_key is not None:
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path in text["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own; here it is 400
                if options.api_key is not None and "401" in operation["responses"]:
                    operation["security"] = [{"key": []}]
        app.openapi_schema = text
    return app.openapi_schema


def add_page(app: FastAPI, engine: ServedEngine) -> None:
    """Add the page at / with its files, and what it fetches below /live. None of it is in the OpenAPI text."""
    headers = {"Content-Security-Policy": PAGE_MAY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    def add(path: str, name: str, kind: str) -> None:
        @app.get(path, include_in_schema=False)
        async def file() -> FileResponse:
            return FileResponse(FOLDER / name, media_type=kind, headers=headers)

    for name, kind in FILES.items():
        add("/" if name == "index.html" else f"/player/{name}", name, kind)
    app.include_router(live.router(engine), include_in_schema=False, dependencies=[Depends(check_kind_of_body)])


def json_body(*models: type) -> dict:
    """The OpenAPI text of a body that is one of these."""
    references = [{"$ref": REFERENCE.format(model=model.__name__)} for model in models]
    schema = references[0] if len(references) == 1 else {"anyOf": references}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def answers(model: type, *statuses: int, stream: str | None = None) -> dict:
    """The OpenAPI text of the answers; `stream` names the schema of the events, if it can be a stream."""
    found = {"model": model, "description": "The answer."}
    if stream is not None:
        kinds = [{"$ref": REFERENCE.format(model=name)} for name in (stream, "ErrorAnswer")]
        value = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
        data = {"anyOf": [{"const": "[DONE]"}, value]}
        found["content"] = {"text/event-stream": {"schema": {"type": "object", "properties": {"data": data}}}}
    return {200: found, **documented(*statuses)}


class DirectRoute(APIRoute):
    """A route whose function needs only the request: resolving dependencies costs 0.1 ms each time."""

    def get_route_handler(self) -> Callable[[Request], Coroutine]:
        """The function as it is."""
        return self.endpoint


class Endpoints:
    """What is served, and what the endpoints share."""

    def __init__(self, engine: ServedEngine, options: ServerOptions):
        self.engine, self.options = engine, options
        self.model_name = options.served_model_name or engine.model_name
        self.created = int(time.time())
        self._ids: set[str] = set()  # of the engine's requests in progress

    @property
    def most_tokens(self) -> int:
        """Prompt and output of one request."""
        return self.engine.config.max_model_len

    def add_to(self, app: FastAPI) -> None:
        """Give the app its routes."""

        def post(path: str, answer: type, statuses: tuple, *models: type, stream: str | None = None) -> Callable:
            def add(function: Callable) -> None:
                async def endpoint(http: Request) -> Response:
                    return await function(http, await read_as(http, *models))

                app.router.add_api_route(
                    path,
                    endpoint,
                    methods=["POST"],
                    name=function.__name__,
                    responses=answers(answer, *statuses, stream=stream),
                    openapi_extra=json_body(*models),
                    route_class_override=DirectRoute,
                )

            return add

        @post("/v1/completions", CompletionAnswer, GENERATING, CompletionRequest, stream="CompletionAnswer")
        async def completions(http: Request, body: CompletionRequest) -> Response:
            return await self.generate(http, body, CompletionAnswers)

        @post("/v1/chat/completions", ChatAnswer, GENERATING, ChatRequest, stream="ChatChunk")
        async def chat_completions(http: Request, body: ChatRequest) -> Response:
            return await self.generate(http, body, ChatAnswers)

        @post("/v1/embeddings", EmbeddingAnswer, (*POSTED, 429, 503), EmbeddingRequest)
        async def embeddings(http: Request, body: EmbeddingRequest) -> Response:
            self.check_model(body.model)
            return await self._unless_gone(http, self.embed(http, body))

        @post("/tokenize", TokenizeAnswer, POSTED, TokenizePrompt, TokenizeChat)
        async def tokenize(http: Request, body: TokenizePrompt | TokenizeChat) -> Response:
            self.check_model(body.model)
            return await self.tokenize(body)

        @post("/detokenize", DetokenizeAnswer, POSTED, DetokenizeRequest)
        async def detokenize(http: Request, body: DetokenizeRequest) -> Response:
            self.check_model(body.model)
            return await self.detokenize(body)

        @app.get("/v1/models", responses=answers(ModelList, *ALWAYS))
        async def models() -> Response:
            return JSON({"object": "list", "data": [self.card()]})

        @app.get("/v1/models/{model:path}", responses=answers(ModelCard, *ALWAYS, 404))
        async def model(model: str) -> Response:
            self.check_model(model)
            return JSON(self.card())

        healthy = {200: {"description": "The server can answer requests; the body is empty."}}

        @app.get("/health", responses={**healthy, **documented(405, 503)}, response_class=Response)
        async def health() -> Response:
            await self.engine.check_health()
            return Response()

        text = {200: {"description": "Prometheus' text format.", "content": {CONTENT_TYPE_LATEST: {}}}}

        @app.get("/metrics", responses={**text, **documented(404, 405, 503)}, response_class=Response)
        async def metrics() -> Response:
            found = await self.engine.exposition()
            if found is None:
                raise APIError(404, "this server keeps no metrics")
            return Response(found[0], media_type=found[1])

        @app.get("/version", responses=answers(Version, 405))
        async def version() -> Response:
            return JSON({"version": minillm.__version__})

        @app.get("/openapi.json", responses={200: {"description": "This."}, **documented(405)})
        async def openapi() -> Response:
            return JSON(app.openapi())

    # --- text ---

    async def generate(self, http: Request, request: SamplingRequest, kind: type[Answer]) -> Response:
        """A completion or a chat answer, as a whole or as a stream."""
        self.check_model(request.model)
        outputs = self._outputs(http, request, await self._checked(request))
        answer = kind(request, http.state.request_id, request.model or self.model_name, self.engine.tokenizer)
        if not request.stream:
            return await self._unless_gone(http, _whole(answer, outputs))
        return EventStream(answer, outputs)

    async def _checked(self, request: SamplingRequest) -> list[tuple[dict, object]]:
        """(prompt, parameters) of each of the engine's requests."""
        most = min(MOST_OUTPUTS, self.engine.max_queue + self.engine.config.max_num_seqs)
        num_prompts = 1 if isinstance(request, ChatRequest) else len(as_list(request.prompt))
        if num_prompts * request.num_outputs > most:
            raise APIError(400, f"n for each prompt makes more than {most} outputs; send several requests", "n")
        prompts = await prompts_of(request, self.engine.tokenizer, self.most_tokens)
        return [(prompt, params_of(request, len(prompt["prompt_token_ids"]), self.most_tokens)) for prompt in prompts]

    async def _outputs(
        self, http: Request, request: SamplingRequest, prepared: Sequence[tuple[dict, object]]
    ) -> AsyncIterator[list[tuple[int, RequestOutput]]]:
        """(place of the prompt, output) as they come; closing this ends the engine's requests."""
        request_ids = self._take_ids(http, len(prepared))
        places = {request_id: place for place, request_id in enumerate(request_ids)}
        requests = [(each, *what, request.priority or 0) for each, what in zip(request_ids, prepared, strict=True)]
        kind = "delta" if request.stream else "final_only"
        try:
            async with aclosing(self.engine.generate_together(requests, kind)) as batches:
                async for outputs in batches:
                    yield [(places[output.request_id], output) for output in outputs]
        except MiniLLMError as error:
            prompt_field = "messages" if isinstance(request, ChatRequest) else "prompt"
            raise from_engine(error, type(request).model_fields, prompt_field) from None
        finally:
            self._ids.difference_update(request_ids)

    def _take_ids(self, http: Request, count: int) -> list[str]:
        """The HTTP request's id is the engine's; with several prompts each has its number after it.

        Clients choose ids, and may choose one that is in use: then this request gets a different one.
        """
        given, number = http.state.request_id, 1
        while True:
            request_ids = [given] if count == 1 else [f"{given}-{place}" for place in range(count)]
            if self._ids.isdisjoint(request_ids):
                break
            number += 1
            given = f"{http.state.request_id}~{number}"
        http.state.request_id = given
        self._ids.update(request_ids)
        return request_ids

    async def _unless_gone(self, http: Request, work) -> Response:
        try:
            return await unless_gone(http.receive, work)
        except ClientGone:
            return Response()

    # --- the rest ---

    def check_model(self, name: str | None) -> None:
        """Raises APIError, 404, for a model that is not served."""
        if name and name != self.model_name:
            raise APIError(404, f"this server does not have that model; it has {self.model_name!r}", "model")

    def card(self) -> dict:
        """The model's entry in /v1/models."""
        return {
            "id": self.model_name,
            "object": "model",
            "created": self.created,
            "owned_by": "minillm",
            "root": self.engine.model_name,
            "parent": None,
            "max_model_len": self.most_tokens,
            "permission": [],
        }

    async def embed(self, http: Request, body: EmbeddingRequest) -> Response:
        """One vector for each text."""
        prompts = await encoded(body.input, self.engine.tokenizer, self.most_tokens, "input")
        data, num_tokens = [], 0
        for index, prompt in enumerate(prompts):
            try:
                vector = await self.engine.encode(prompt)
            except MiniLLMError as error:
                raise from_engine(error, prompt_field="input") from None
            numbers = vector.tolist()
            if body.encoding_format == "base64":
                numbers = base64.b64encode(np.asarray(numbers, "<f4").tobytes()).decode()
            data.append({"index": index, "object": "embedding", "embedding": numbers})
            num_tokens += len(prompt["prompt_token_ids"])
        head = {"id": f"embd-{http.state.request_id}", "object": "list", "created": int(time.time())}
        head |= {"model": body.model or self.model_name, "data": data, "usage": usage_of(num_tokens, 0, 0)}
        return await in_thread(sum(len(each["embedding"]) for each in data), JSON, head)

    async def tokenize(self, body: TokenizePrompt | TokenizeChat) -> Response:
        """Text or a chat -> token ids."""
        tokenizer = self._tokenizer()
        chat = (await encoded_chat(body, tokenizer))[1] if isinstance(body, TokenizeChat) else None

        def answer() -> Response:
            ids = tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens) if chat is None else chat
            texts = tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
            return JSON({"count": len(ids), "max_model_len": self.most_tokens, "tokens": ids, "token_strs": texts})

        return await asyncio.to_thread(answer)

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Token ids -> text, special tokens with their names."""
        tokenizer, most = self._tokenizer(), self.engine.model_config.vocab_size

        def answer() -> Response:
            wrong = next((place for place, token_id in enumerate(body.tokens) if token_id >= most), None)
            if wrong is not None:
                raise APIError(400, f"tokens[{wrong}] is outside the vocabulary of {most} ids", "tokens")
            return JSON({"prompt": tokenizer.decode(body.tokens)})

        return await asyncio.to_thread(answer)

    def _tokenizer(self):
        if self.engine.tokenizer is None:
            raise APIError(400, "this server has no tokenizer")
        return self.engine.tokenizer


async def _whole(answer: Answer, outputs: AsyncIterator[list[tuple[int, RequestOutput]]]) -> Response:
    last = {}
    async with aclosing(outputs):
        async for batch in outputs:
            last.update(batch)
    num_tokens = sum(len(part.token_ids) for output in last.values() for part in output.outputs)
    size = num_tokens * (1 + (answer.request.num_logprobs or 0))  # about how many numbers and texts the answer has
    return await in_thread(size, lambda: JSON(answer.whole(last)))
