"""What a client is told when a request fails: a status, and JSON in the shape of the API that it called."""

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from graftlm.errors import GraftError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""Status -> the type of the error. OpenAI and Anthropic share most of these words; Anthropic documents them all."""

MESSAGES = "/v1/messages"
"""Paths that begin so speak Anthropic's protocol."""


class ApiError(Exception):
    """A request that is refused or that failed. `code` names the condition, `param` the field of the request."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self, path: str) -> dict[str, Any]:
        """The JSON of the answer for a request to this path."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        if path.startswith(MESSAGES):
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, path: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body(path), self.status, {**self.headers, **(headers or {})})


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """The error for a field that cannot be what it is."""
    return ApiError(400, message, code=code, param=param)


def object_of(value: Any, field: str) -> Mapping[str, Any]:
    """An object within a request that may be left out: then it is empty. ApiError (400) for any other value."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise invalid(f"{field} must be an object, this is {value!r:.60}", field)
    return value


def from_graft(error: GraftError, param: str | None = None) -> ApiError:
    """An error of the library in rendering a request: what the client sent, or the chat template of the model."""
    return ApiError(400, str(error), code=error.code, param=param)


def internal() -> ApiError:
    """Of a failure of ours: the log of the server has it, the client is not shown its insides."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
