"""POST /v1/images/generations: OpenAI's shape, answered when every picture is painted.

Who waits holds a connection, and is asked after: when it is gone, so is the reason to paint, and
its jobs are cancelled.
"""

import asyncio
import base64
import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request

from engine.serve.asked import GenerationRequest
from engine.serve.errors import ApiError
from engine.serve.jobs import Job
from engine.serve.service import Service, service_of

router = APIRouter()


@router.post("/v1/images/generations")
async def generate(
    request: Request,
    asked: GenerationRequest,
    service: Annotated[Service, Depends(service_of)],
) -> dict[str, Any]:
    """Pictures with consecutive seeds, as links or in base64."""
    service.check_open()
    pictures = asked.pictures(service.base, service.settings)
    jobs = await service.book.add(pictures, service.base.settings.model)
    try:
        await _wait(request, service, jobs)
    finally:
        if not service.leaving.is_set():
            for job in jobs:
                service.book.cancel(job)  # those that have not ended
    inline = asked.response_format == "b64_json"
    return {
        "created": int(time.time()),
        "data": [await _shown(request, service, job, inline) for job in jobs],
        "size": jobs[0].size,
        "output_format": asked.output_format,
    }


async def _wait(request: Request, service: Service, jobs: list[Job]) -> None:
    """Until all are complete.

    Raises:
        ApiError: one is not, and will not be; or nobody waits any more.
    """
    painting = asyncio.create_task(_all_complete(jobs))
    gone = asyncio.create_task(_is_gone(request))
    leaving = asyncio.create_task(service.leaving.wait())
    try:
        await asyncio.wait({painting, gone, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if painting.done():
            return painting.result()
        if leaving.done():
            names = ", ".join(job.id for job in jobs)
            said = f"the service is stopping; it paints {names} when it is back"
            raise ApiError(503, said, "stopping", headers={"Retry-After": "30"})
        raise ApiError(499, "the client has gone", "client_gone")
    finally:
        for task in (painting, gone, leaving):
            task.cancel()


async def _all_complete(jobs: list[Job]) -> None:
    """Raises ApiError as soon as one has failed."""
    for job in jobs:
        with job.listening() as events:
            while not job.ended:
                if await events.get() is None:
                    await asyncio.Event().wait()  # the service is leaving, and will say so
        if job.status == "cancelled":
            raise ApiError(409, f"{job.id} was cancelled", "cancelled")
        if job.error is not None:
            status = 400 if job.error.code == "mistake" else 500
            raise ApiError(status, job.error.message, job.error.code)


async def _is_gone(request: Request) -> None:
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _shown(request: Request, service: Service, job: Job, inline: bool) -> dict[str, Any]:
    shown: dict[str, Any] = {"id": job.id, "seed": job.picture.seed}
    if not inline:
        return {"url": str(request.url_for("content", job_id=job.id)), **shown}
    path = service.book.files(job).picture
    try:
        content = await asyncio.to_thread(path.read_bytes)
    except OSError:
        raise ApiError(500, f"the file of {job.id} is gone", "file_gone") from None
    return {"b64_json": (await asyncio.to_thread(base64.b64encode, content)).decode(), **shown}
