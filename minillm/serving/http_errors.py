"""The answers to errors: in OpenAI's shape, and without a word of the request's body.

Messages of pydantic and Python quote their input; messages here are made only of places and limits.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic_core
from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from minillm.errors import MiniLLMError, PromptError, WorkerDiedError
from minillm.serving.async_engine import DrainingError, QueueFullError, StepFailedError
from minillm.serving.protocol import ErrorAnswer

log = logging.getLogger("minillm.serving")

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "PayloadTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
MEANINGS = {
    400: "The request cannot be served as it is; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "There is no such model or path.",
    405: "The path has other methods.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the server takes.",
    429: "The queue is full; try again after Retry-After seconds.",
    500: "The model failed on this request.",
    503: "The engine has ended, or takes no new requests because the server is about to end.",
}
REASONS = {  # instead of pydantic's
    "none_required": "is not implemented by this server; leave it out",
    "json_invalid": "is not valid JSON",
    "missing": "is missing",
    "model_type": "should be an object",
}


class APIError(HTTPException):
    """An answer with an error in it."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(status, message, dict(headers or {}))
        self.param = param

    @property
    def answer(self) -> ErrorAnswer:
        """Its body."""
        kind = TYPES.get(self.status_code, "BadRequestError" if self.status_code < 500 else "InternalServerError")
        return {
            "error": {"message": self.detail, "type": kind, "param": self.param, "code": self.status_code},
        }

    def response(self) -> Response:
        """The whole answer."""
        return JSON(self.answer, self.status_code, self.headers)


class JSON(Response):
    """A value as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return pydantic_core.to_json(content)


def documented(*statuses: int) -> dict[int, dict]:
    """What the OpenAPI text says of these errors."""
    return {status: {"model": ErrorAnswer, "description": MEANINGS[status]} for status in statuses}


def from_validation(error: ValidationError, model: type) -> APIError:
    """400 for a wrong body: names the first wrong field, and everything that would make it valid."""
    found = error.errors(include_url=False, include_input=False)
    place = found[0]["loc"][:1]
    reasons = {}  # in order, each once
    for each in found:
        if each["loc"][:1] == place:
            reasons[_reason(each)] = None
    param = str(place[0]) if place and place[0] in model.model_fields else found[0].get("ctx", {}).get("param")
    subject = _subject(found[0]["loc"], param)
    return APIError(400, f"{subject} {'; or: '.join(list(reasons)[:5])}", param)


def _reason(error: Mapping) -> str:
    if error["type"] == "contradiction":
        return error["ctx"]["reason"]
    text = REASONS.get(error["type"], error["msg"])
    return re.sub("^(Input|String|List|Dictionary) should", "should", text)


def _subject(place: Sequence[str | int], param: str | None) -> str:
    """The field, and its place in a list; other keys of the body are the client's own words."""
    if param is None:
        return "the body"
    index = next((each for each in place[1:] if isinstance(each, int)), None)
    return param if index is None else f"{param}[{index}]"


def from_engine(error: Exception, fields: Sequence[str] = (), prompt_field: str | None = None) -> APIError | None:
    """The answer to an error of the engine; None for an error that is a fault of this program.

    `fields` of the request: the first that the message names is its `param`. `prompt_field` is where the prompts are.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, QueueFullError):
        return APIError(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, DrainingError | WorkerDiedError):
        return APIError(503, str(error))
    if isinstance(error, StepFailedError):
        return APIError(500, str(error))
    if isinstance(error, MiniLLMError):
        named = (word for word in re.findall(r"\w+", str(error)) if word in fields)
        return APIError(400, str(error), prompt_field if isinstance(error, PromptError) else next(named, None))
    return None


def add_error_answers(app: FastAPI) -> None:
    """Give every error that leaves this app the same shape."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, APIError):  # the router's own: no such path, no such method
            error = APIError(error.status_code, str(error.detail), headers=error.headers)
        return error.response()

    @app.exception_handler(MiniLLMError)
    @app.exception_handler(WorkerDiedError)
    @app.exception_handler(DrainingError)
    @app.exception_handler(StepFailedError)
    async def refused_by_engine(request: Request, error: Exception) -> Response:
        return from_engine(error).response()

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return APIError(500, "the server failed on this request; its log says why").response()
