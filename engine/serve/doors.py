"""Who may come in.

A program brings the key in a header, `Authorization: Bearer ...`. A browser brings a cookie, which
the login form gives for the key: not the key itself but a date and the key's signature under it, so
that nothing has to be remembered here and the key is in no browser's files. `SameSite=Strict` and
bodies that must be JSON keep other sites from asking in a visitor's name.

Without a key only this machine is let in, but any site that its browser visits may have a name that
leads to 127.0.0.1 (DNS rebinding). So then the host that is asked for must be this machine's.
"""

import hashlib
import hmac
import time
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from fastapi.responses import RedirectResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.serve.errors import ApiError

COOKIE = "linfusion_session"
SESSION_S = 7 * 24 * 3600
LARGEST_BODY = 1 << 20
OPEN = frozenset({"/healthz", "/healthz/live", "/login"})
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
_SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Doors:
    """Checks every request before anything else sees it, and sends headers that protect browsers.

    Args:
        key: without one everybody may come in who asks for one of `hosts`.
        hosts: the names of this machine; None for any.
    """

    def __init__(self, app: ASGIApp, key: str | None, hosts: frozenset[str] | None) -> None:
        self._app, self._key = app, key
        self._hosts = None if hosts is None else hosts | _LOCAL

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self._refusal(scope) or self._app
        await answer(scope, receive, send_safely)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _host_of(headers) not in self._hosts:
            said = "this service answers for this machine's own names only, such as localhost"
            return ApiError(421, said, "wrong_host").response()
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            said = f"the body is larger than {LARGEST_BODY} bytes"
            return ApiError(413, said, "too_large").response()
        if self._key is None or scope["path"] in OPEN or self._is_known(self._key, headers):
            return None
        if scope["path"] == "/" and scope["method"] == "GET":
            return RedirectResponse("/login", 303)
        return ApiError(
            401,
            "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
            "invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        ).response()

    def _is_known(self, key: str, headers: Headers) -> bool:
        kind, _, brought = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and is_key(brought.strip(), key):
            return True
        cookies: SimpleCookie = SimpleCookie()
        try:
            cookies.load(headers.get("cookie", ""))
        except CookieError:
            return False
        return COOKIE in cookies and _is_session(cookies[COOKIE].value, key)


def is_key(brought: str, key: str) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(brought.encode(), key.encode())


def session(key: str) -> str:
    """What the cookie of a browser says whose user knew the key."""
    until = str(int(time.time()) + SESSION_S)
    return f"{until}.{_signature(until, key)}"


def _is_session(value: str, key: str) -> bool:
    until, _, signature = value.partition(".")
    is_ours = hmac.compare_digest(signature.encode(), _signature(until, key).encode())
    return is_ours and until.isdigit() and int(until) > time.time()


def _signature(until: str, key: str) -> str:
    return hmac.new(key.encode(), f"session {until}".encode(), hashlib.sha256).hexdigest()


def _host_of(headers: Headers) -> str | None:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None
