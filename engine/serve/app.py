"""The application: its doors, its pages, and how the service itself is.

`/healthz` tells whether jobs are taken (503 while the ranks are not ready), `/healthz/live` whether
the server is there at all: a farm that restarted it for the former would only add to the trouble.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import engine
from engine.serve import generations, images
from engine.serve.asked import GenerationRequest, LongRequest
from engine.serve.doors import COOKIE, LARGEST_BODY, SESSION_S, Doors, is_key, session
from engine.serve.errors import ApiError, invalid, not_found
from engine.serve.images import Here
from engine.serve.service import Service

router = APIRouter()


def create_app(service: Service) -> ASGIApp:
    """The routes of `service`, behind its doors."""
    app = FastAPI(
        title="linfusion-engine",
        version=engine.__version__,
        docs_url=None,  # these load scripts from elsewhere; /openapi.json is there
        redoc_url=None,
        redirect_slashes=False,
        max_body_size=LARGEST_BODY,  # also of those that do not say how long they are
        telemetry={"tracing": False, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.state.service = service
    for routes in (router, generations.router, images.router):
        app.include_router(routes)
    app.add_exception_handler(ApiError, _say)
    app.add_exception_handler(HTTPException, _say_http)
    app.add_exception_handler(RequestValidationError, _say_invalid)
    app.add_exception_handler(Exception, _say_bug)
    has_names = service.key is None and service.settings.is_private
    hosts = frozenset({service.settings.host}) if has_names else None
    return Doors(app, service.key, hosts)  # around all of it: nothing answers before they do


@router.get("/healthz")
async def healthz(service: Here) -> Response:
    """Whether jobs are taken."""
    return JSONResponse(_health(service), 200 if _health(service)["ready"] else 503)


@router.get("/healthz/live")
async def live(service: Here) -> dict[str, bool]:
    """Whether the server answers."""
    return _health(service)


@router.get("/metrics")
async def metrics(service: Here) -> Response:
    """For Prometheus."""
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models")
async def models(service: Here) -> dict[str, Any]:
    """The one that is served."""
    model = {"id": service.base.settings.model, "object": "model", "created": 0}
    return {"object": "list", "data": [{**model, "owned_by": "linfusion-engine"}]}


@router.get("/")
async def page(service: Here) -> Response:
    """For people."""
    text, policy = _read_page("page.html")
    if service.key is not None:
        text = text.replace('data-key="none"', 'data-key="asked"')
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


@router.get("/login")
async def login_form() -> Response:
    """For people, where a key is asked for."""
    text, policy = _read_page("login.html")
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


@router.post("/login")
async def login(request: Request, service: Here) -> Response:
    """A cookie for the key."""
    form = parse_qs((await request.body()).decode(errors="replace"))
    if service.key is None or not is_key(form.get("key", [""])[0].strip(), service.key):
        return RedirectResponse("/login#wrong", 303)
    answer = RedirectResponse("/", 303)
    is_secure = request.url.scheme == "https"
    answer.set_cookie(
        COOKIE, session(service.key), SESSION_S, httponly=True, samesite="strict", secure=is_secure
    )
    return answer


@router.post("/logout")
async def logout() -> Response:
    """Forget the cookie."""
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


def _health(service: Service) -> dict[str, bool]:
    return {"live": True, "ready": service.workers.ready and not service.leaving.is_set()}


@cache
def _read_page(name: str) -> tuple[str, str]:
    """(the page, the policy under which its own script runs and no other)."""
    text = files("engine.serve").joinpath(name).read_text(encoding="utf-8")
    digests = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    ]
    scripts = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
        "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy


# --- what goes wrong ------------------------------------------------------------------------------


def _say(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _say_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return not_found().response()
    said = str(error.detail).lower()
    return ApiError(error.status_code, said, "http_error", headers=error.headers).response()


def _say_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    is_short = request.url.path.endswith("/generations")
    models = {"POST": GenerationRequest if is_short else LongRequest}
    model = models.get(request.method)
    return invalid(model, error.errors()).response()


def _say_bug(request: Request, error: Exception) -> Response:
    """The log has the traceback; it is nobody else's business."""
    return ApiError(500, "a mistake of the service itself; its log has more", "bug").response()
