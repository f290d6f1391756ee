"""Mistakes and failures in OpenAI's shape, so that its clients raise what they know.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

`message` is one sentence, as on the command line: what is wrong and what would work.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel

from engine.parsing import sentence


class ApiError(Exception):
    """What a request is answered with that cannot be honoured.

    Args:
        status: the HTTP status.
        code: one word for programs.
        param: the field of the request that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.headers = param, headers

    def response(self) -> JSONResponse:
        """The whole answer."""
        body = {
            "message": self.message,
            "type": _type_of(self.status),
            "param": self.param,
            "code": self.code,
        }
        return JSONResponse({"error": body}, self.status, self.headers)


def _type_of(status: int) -> str:
    """OpenAI's word for a status."""
    if status >= 500:
        return "server_error"
    return {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error"
    )


def not_found() -> ApiError:
    """The same words whatever is missing: nobody learns from them what there is."""
    return ApiError(404, "there is no such thing here", "not_found")


def invalid(model: type[BaseModel] | None, errors: Sequence[Any]) -> ApiError:
    """The first of pydantic's errors about a request's body or its query."""
    first = dict(errors[0])
    where, *keys = first["loc"]
    if where == "path":
        return not_found()
    if first["type"] in ("json_invalid", "model_attributes_type", "missing") and not keys[:1]:
        return ApiError(400, "the body must be an object in JSON", "invalid_json")
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", "invalid_json")
    first["loc"] = tuple(keys)
    param = ".".join(map(str, keys)) or None
    said = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    if model is not None and first["type"] != "missing":
        said = sentence(model, first)  # type: ignore[arg-type]
    return ApiError(400, f"{param}: {said}" if param else said, "invalid_value", param)
