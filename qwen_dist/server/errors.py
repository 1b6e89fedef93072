"""Errors of the API in OpenAI's form, each with its HTTP status. No jax."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from qwen_dist.errors import UserError, printable
from qwen_dist.tokenizer import TooLongError

_MAX_MESSAGE_CHARS = 1000
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request is not answered.

    Args:
      status: of the HTTP answer.
      message: for people.
      code: for programs.
      param: the field of the body that is wrong.
      headers: of the HTTP answer.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = printable(self.message, _MAX_MESSAGE_CHARS)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def invalid_request(error: UserError, fields: Collection[str]) -> ApiError:
    """Return the answer to a body with these fields that cannot be used; a message begins with the field that is wrong."""
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), "context_length_exceeded", param="messages" if "messages" in fields else "prompt")
    first = str(error).split(maxsplit=1)[0].partition("[")[0].rstrip(":") if str(error) else ""
    return ApiError(400, str(error), "invalid_request", param=first if first in fields else None)


def not_ready(message: str, code: str) -> ApiError:
    return ApiError(503, message, code, headers={"Retry-After": "1"})
