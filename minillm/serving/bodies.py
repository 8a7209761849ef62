"""The bodies of requests: read with a limit, parsed strictly, checked; unknown fields are named in the log."""

import asyncio
import logging
from functools import cache

import pydantic_core
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from minillm.errors import shown
from minillm.serving.http_errors import JSON, APIError, from_validation

log = logging.getLogger("minillm.serving")

QUICK = 32 * 1024  # bytes that are parsed at once; more would hold up the event loop, and are parsed in a thread
DISCARDED = 2.0  # seconds for which more of a refused body is read, so that its sender gets to read the answer


class TooLarge(APIError):
    """413; the client is still sending, and would never read the answer if the connection were closed at once."""

    def __init__(self, most: int):
        super().__init__(
            413, f"the body has more than {most} bytes; send a smaller one", headers={"Connection": "close"}
        )

    def response(self) -> JSON:
        return DiscardingJSON(self.answer, self.status_code, self.headers)


class DiscardingJSON(JSON):
    """An answer that is sent before its request has arrived; the rest is discarded for a while."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(DISCARDED):
                while (await receive()).get("more_body"):
                    pass
        except TimeoutError:
            pass
        await send({"type": "http.response.body"})


async def read_body(request: Request, most: int, timeout: float) -> bytes:
    """The body, of at most `most` bytes. Raises APIError: 413 as soon as it is too long, 408 if it takes too long."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > most:
        raise TooLarge(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise TooLarge(most)
                parts.append(part)
    except TimeoutError:
        raise APIError(
            408, f"the body did not arrive within {timeout:g} seconds", headers={"Connection": "close"}
        ) from None
    except ClientDisconnect:
        raise APIError(400, "the body ended before it was complete") from None
    return b"".join(parts)


def parse_body(data: bytes, models: tuple[type[BaseModel], ...]) -> BaseModel:
    """The first of `models` whose required fields are there, checked. Raises APIError, 400."""
    try:
        value = pydantic_core.from_json(data, allow_inf_nan=False)  # also refuses broken UTF-8, and endless nesting
    except ValueError:
        raise APIError(400, "the body is not valid JSON in UTF-8, or is nested too deeply") from None
    given = value.keys() if isinstance(value, dict) else set()
    model = next((each for each in models if _required(each) <= given), models[0])
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error, model) from None


@cache
def _required(model: type[BaseModel]) -> frozenset[str]:
    return frozenset({name for name, field in model.model_fields.items() if field.is_required()})


async def check_kind_of_body(request: Request) -> None:
    """Raises APIError, 400, for a body not declared as JSON: a page of another site cannot send one that is."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != "application/json" and not kind.endswith("+json"):
        raise APIError(400, "the body must be JSON, sent with the header Content-Type: application/json")


async def read_as(request: Request, *models: type[BaseModel]) -> BaseModel:
    """The checked body, see `parse_body`; logs unknown fields."""
    options = request.app.state.options
    await check_kind_of_body(request)
    data = await read_body(request, options.max_body_mib * 2**20, options.body_timeout)
    if len(data) <= QUICK:
        body = parse_body(data, models)
    else:
        body = await asyncio.to_thread(parse_body, data, models)
    if body.model_extra:
        names = ", ".join(shown(name) for name in list(body.model_extra)[:10])
        log.warning("%s: fields that this server does not know are ignored: %s", request.state.request_id, names)
    return body
