"""What the routes share: the settings, the book, the ranks; and whether the service is leaving."""

import asyncio
from dataclasses import dataclass, field

from fastapi import Request

from engine.serve.book import Book
from engine.serve.errors import ApiError
from engine.serve.metrics import Metrics
from engine.serve.settings import Base, ServeSettings
from engine.serve.workers import Workers


@dataclass(frozen=True)
class Service:
    """One of each.

    Attributes:
        leaving: is set when no job is taken any more.
    """

    settings: ServeSettings
    key: str | None
    base: Base
    book: Book
    workers: Workers
    metrics: Metrics
    leaving: asyncio.Event = field(default_factory=asyncio.Event)

    def check_open(self) -> None:
        """Raises ApiError: no job is taken any more."""
        if self.leaving.is_set():
            raise ApiError(
                503, "the service is stopping", "stopping", headers={"Retry-After": "30"}
            )


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service
