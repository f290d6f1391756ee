"""Two hosts in one: network namespaces with an address and a host name each, joined by a cable.

    with two_hosts() as (head, other):
        job = head.start([sys.executable, "-m", "launch", ...], folder / "head.log")
        head.cut()                  pulls the cable: nothing arrives any more, and nobody is told

What runs in them sees the files and the processors of this machine, and of its network nothing but
the cable and a loopback of its own. Their names are random, and they are gone at the end with all
that still runs in them.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_CABLE = "cable0"
_BECOME = 'hostname "$0" && exec "$@"'


class Refused(RuntimeError):
    """This machine's kernel or container does not let anybody make such hosts."""


def missing() -> str | None:
    """Why there can be no such hosts here, or None."""
    if absent := [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]:
        return f"needs Debian's package iproute2, without {', '.join(absent)} here"
    return None if os.geteuid() == 0 else "only root may make network namespaces"


@dataclass(frozen=True)
class Host:
    """One of the two.

    Attributes:
        name: what `hostname` says in it, and the namespace's own name; no resolver knows it.
        address: at which the other one reaches it.
    """

    name: str
    address: str

    def start(
        self, command: list[object], log: Path, environment: Mapping[str, str]
    ) -> "subprocess.Popen[bytes]":
        """`command` in this host, leading a process group of its own; it writes into `log`."""
        enter = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", _BECOME]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*enter, self.name, *map(str, command)],
                stdout=file,
                stderr=file,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def cut(self) -> None:
        """Pull the cable at this end."""
        _ip("-n", self.name, "link", "set", _CABLE, "down")

    def mend(self) -> None:
        """Plug it in again."""
        _ip("-n", self.name, "link", "set", _CABLE, "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Both up and joined. Raises Refused where the kernel does not allow it."""
    token = secrets.token_hex(4)
    first, second = (Host(f"{word}-{token}", f"10.77.0.{i}") for i, word in _WORDS)
    try:
        for host in (first, second):
            _ip("netns", "add", host.name)
        _ip("-n", first.name, "link", "add", _CABLE, "type", "veth",
            "peer", "name", _CABLE, "netns", second.name)  # fmt: skip
        for host in (first, second):
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", _CABLE)
            for link in ("lo", _CABLE):
                _ip("-n", host.name, "link", "set", link, "up")
        yield first, second
    finally:
        for host in (first, second):
            _clear(host)


_WORDS = ((1, "head"), (2, "other"))


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise Refused(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _clear(host: Host) -> None:
    """Kill what runs in it, and forget it; its end of the cable goes with it."""
    with contextlib.suppress(Refused):  # it was never made
        for pid in _ip("netns", "pids", host.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        _ip("netns", "delete", host.name)
