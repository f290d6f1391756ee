"""Start the service, and stop it well.

Exit codes: 0 after SIGTERM or SIGINT (what was painted is in the queue again, and goes on from its
checkpoint), 2 for a mistake in the settings, the engine's included, 3 for a failure.

A second signal does not wait for the ranks' step any more.
"""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Iterator, Sequence

import uvicorn

from engine.config import UserError
from engine.exits import DONE, FAILED, MISTAKEN
from engine.serve.app import create_app
from engine.serve.book import Book, lock
from engine.serve.metrics import Metrics
from engine.serve.service import Service
from engine.serve.settings import Base, ServeSettings
from engine.serve.workers import Workers

logger = logging.getLogger("engine.serve")
_LOCK_PATIENCE_S = 10.0
_LAST_ANSWERS_S = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("engine").setLevel(logging.INFO)
    try:
        settings = ServeSettings.load(argv)
        key, base = settings.read_key(), Base.read(settings.engine_config)
        door = _listen(settings.host, settings.port)
        held = lock(settings.folder, _LOCK_PATIENCE_S)
        return asyncio.run(_serve(settings, key, base, door, held))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKEN


def _listen(host: str, port: int) -> socket.socket:
    """Before anything is started, so that a port which is taken is a mistake like others."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"port: cannot listen on {host}:{port} ({reason})") from None


class _Server(uvicorn.Server):
    """Leaves signals to us: the ranks come first, and answers have to be given while they stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    settings: ServeSettings, key: str | None, base: Base, door: socket.socket, held: int
) -> int:
    metrics = Metrics()
    book = Book(settings.folder, settings.queue_limit, settings.retries, metrics)
    book.read()
    workers = Workers(settings, base, book, metrics, keep_open=(held,))
    service = Service(settings, key, base, book, workers, metrics)
    server = _Server(
        uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            forwarded_allow_ips="127.0.0.1",  # a proxy here may say that it was asked by https
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
        )
    )
    _say_hello(settings, base, door)
    _note_signals(service)
    answering = asyncio.create_task(server.serve(sockets=[door]))
    try:
        return await _until_the_end(service, answering)
    finally:
        book.hang_up()
        await book.flush()
        server.should_exit = True
        await answering


async def _until_the_end(service: Service, answering: "asyncio.Task[None]") -> int:
    """The exit code, once the ranks are gone for good."""
    painting = asyncio.create_task(service.workers.run())
    leaving = asyncio.create_task(service.leaving.wait())
    await asyncio.wait({painting, leaving, answering}, return_when=asyncio.FIRST_COMPLETED)
    service.leaving.set()
    service.workers.stop()
    done, _ = await asyncio.wait({painting}, timeout=service.settings.stop_s)
    if not done:
        logger.warning("the ranks do not stop: killed")
        service.workers.kill()
    try:
        mistake = await painting
    except Exception:  # ours, not the ranks': whoever started us may start us again
        logger.exception("error: a mistake of the service itself")
        return FAILED
    if mistake is not None:
        raise UserError(mistake)
    return FAILED if answering.done() else DONE


def _note_signals(service: Service) -> None:
    def leave() -> None:
        if service.leaving.is_set():
            service.workers.kill()
        service.leaving.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, leave)


def _say_hello(settings: ServeSettings, base: Base, door: socket.socket) -> None:
    host, port = door.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if base.overruled:
        names = ", ".join(base.overruled)
        logger.info("%s: every job has its own %s", base.path, names)
    logger.info("listening on http://%s:%d, pictures in %s", shown, port, settings.folder)


if __name__ == "__main__":
    sys.exit(main())
