"""Words that ranks leave for each other without meeting.

A collective waits for all ranks, up to its time-out. Where some may come an hour later, or not at
all, they write into a store of the job, and look into it when they care to.
"""

from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]

from engine.bands.mesh import Mesh, first_host


def open_store(mesh: Mesh, timeout_s: float) -> Store:
    """A store that the first rank serves for as long as it keeps it. Every rank makes the call.

    Args:
        timeout_s: how long it may take to answer, in seconds.
    """
    if mesh.size == 1:
        return HashStore()
    options: dict[str, Any] = {
        "wait_for_workers": False,
        "timeout": timedelta(seconds=timeout_s),
    }
    served = TCPStore("0.0.0.0", 0, is_master=True, **options) if mesh.rank == 0 else None
    port = mesh.gather_objects(served.port if served else 0)[0]
    return served or TCPStore(first_host(), port, is_master=False, **options)
