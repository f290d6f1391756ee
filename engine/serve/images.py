"""/v1/images: pictures that take long. Asked for, asked after, fetched, cancelled.

    POST   /v1/images                 202 and the job
    GET    /v1/images                 the newest jobs; `after` an id, older ones
    GET    /v1/images/ID              the job
    GET    /v1/images/ID/events       what happens to it, as server-sent events
    GET    /v1/images/ID/preview      the picture in the making, or a small one of what is finished
    GET    /v1/images/ID/content      the file, or a range of it
    GET    /v1/images/ID/view/        the Deep Zoom page
    DELETE /v1/images/ID              cancels it; removes it with all files if it has ended

A path is made of the job's own id and of a tile's numbers, never of what a request says.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from engine.serve.asked import LongRequest
from engine.serve.errors import ApiError, not_found
from engine.serve.jobs import ID_PATTERN, Files, Job, is_inside
from engine.serve.service import Service, service_of

router = APIRouter(prefix="/v1/images")
_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
_KEEP = {"Cache-Control": "private, max-age=86400"}  # what never changes under its name
_ASK_AGAIN = {"Cache-Control": "private, no-cache"}
_SMALL_LEVEL = 9  # of a Deep Zoom pyramid: 2^9 = 512 px, the last one that is a single tile
_VIEW_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

JobId = Annotated[str, InPath(pattern=ID_PATTERN)]
Here = Annotated[Service, Depends(service_of)]


async def job_of(job_id: JobId, service: Here) -> Job:
    """The job that a path names."""
    return service.book.get(job_id)


Asked = Annotated[Job, Depends(job_of)]


@router.post("", status_code=202)
async def ask(asked: LongRequest, service: Here) -> dict[str, Any]:
    """A new job."""
    service.check_open()
    pictures = asked.pictures(service.base, service.settings)
    jobs = await service.book.add(pictures, service.base.settings.model)
    return jobs[0].shown()


@router.get("")
async def listed(
    service: Here,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    after: Annotated[str | None, Query(pattern=ID_PATTERN)] = None,
) -> dict[str, Any]:
    """The newest first."""
    jobs, has_more = service.book.page(limit, after)
    return {
        "object": "list",
        "data": [job.shown() for job in jobs],
        "first_id": jobs[0].id if jobs else None,
        "last_id": jobs[-1].id if jobs else None,
        "has_more": has_more,
    }


@router.get("/{job_id}")
async def shown(job: Asked) -> dict[str, Any]:
    """How it stands."""
    return job.shown()


@router.delete("/{job_id}")
async def delete(job: Asked, service: Here, response: Response) -> dict[str, Any]:
    """Cancel it; one in progress ends behind its step. Remove it if it has ended."""
    if job.ended:
        await service.book.remove(job)
        return {"id": job.id, "object": "image.job.deleted", "deleted": True}
    service.book.cancel(job)
    response.status_code = 200 if job.ended else 202
    return job.shown()


@router.get("/{job_id}/events", response_class=EventSourceResponse)
async def events(job: Asked) -> AsyncIterator[ServerSentEvent]:
    """`status` and `progress`, and at last `end`: what is so at once, then what happens."""
    with job.listening() as heard:
        while (event := await heard.get()) is not None:
            name, data = event
            yield ServerSentEvent(event=name, data=data)


@router.api_route("/{job_id}/content", methods=["GET", "HEAD"], name="content")
async def content(job: Asked, service: Here, request: Request) -> Response:
    """The picture."""
    _require_complete(job)
    path = service.book.files(job).picture
    return await _file(service, path, request, _ASK_AGAIN, file_name=path.name)


@router.api_route("/{job_id}/preview", methods=["GET", "HEAD"])
async def preview(job: Asked, service: Here, request: Request) -> Response:
    """A small picture; 204 while there is none yet."""
    path = await asyncio.to_thread(_small, service.book.files(job), job.status == "completed")
    if path is None and not job.ended:
        return Response(status_code=204, headers=_ASK_AGAIN)
    if path is None:
        raise not_found()
    return await _file(service, path, request, _ASK_AGAIN)


@router.get("/{job_id}/view")
async def to_view(job: Asked) -> Response:
    """The page names its tiles relative to itself, so it has to be in a folder."""
    return RedirectResponse("view/", 308)


@router.get("/{job_id}/view/")
async def view(job: Asked, service: Here, request: Request) -> Response:
    """The Deep Zoom page."""
    _require_complete(job)
    headers = {**_ASK_AGAIN, "Content-Security-Policy": _VIEW_POLICY}
    path = service.book.files(job).page
    return await _file(service, path, request, headers, media_type="text/html; charset=utf-8")


@router.get("/{job_id}/view/{name}")
async def descriptor(job: Asked, name: str, service: Here, request: Request) -> Response:
    """The .dzi, for other viewers."""
    _require_complete(job)
    path = service.book.files(job).descriptor
    if name != path.name:
        raise not_found()
    return await _file(service, path, request, _ASK_AGAIN, media_type="application/xml")


@router.get("/{job_id}/view/{folder}/{level}/{name}")
async def tile(
    job: Asked, folder: str, level: str, name: str, service: Here, request: Request
) -> Response:
    """A tile of the Deep Zoom view."""
    _require_complete(job)
    files = service.book.files(job)
    path = files.tile(level, name)
    if folder != files.tiles.name or path is None:
        raise not_found()
    return await _file(service, path, request, _KEEP)


def _require_complete(job: Job) -> None:
    if job.status != "completed":
        said = f"{job.id} is {job.status.replace('_', ' ')}; there is no picture"
        raise ApiError(409, said, "not_completed")


def _small(files: Files, is_complete: bool) -> Path | None:
    """What the list of jobs shows; the whole picture could be a gigabyte."""
    levels = range(_SMALL_LEVEL, -1, -1) if is_complete else ()
    for level in levels:
        for suffix in ("jpg", "png"):
            path = files.tile(str(level), f"0_0.{suffix}")
            if path is not None and path.is_file():
                return path
    return files.preview if files.preview.is_file() else None


async def _file(
    service: Service,
    path: Path,
    request: Request,
    headers: dict[str, str],
    media_type: str | None = None,
    file_name: str | None = None,
) -> Response:
    """The file, a range of it, or the word that it has not changed.

    Raises:
        ApiError: there is none inside of the service's folder.
    """
    stat = await asyncio.to_thread(_stat_inside, path, service.book.folder)
    if stat is None:
        raise not_found()
    answer = FileResponse(
        path,
        headers=headers,
        media_type=media_type or _TYPES.get(path.suffix),
        stat_result=stat,
        filename=file_name,
        content_disposition_type="inline",
    )
    if request.headers.get("if-none-match") == answer.headers["etag"]:
        return Response(status_code=304, headers={"etag": answer.headers["etag"], **headers})
    return answer


def _stat_inside(path: Path, folder: Path) -> os.stat_result | None:
    return path.stat() if is_inside(path, folder) else None
