"""A progress bar where a person looks at it, and silence everywhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(describe: str, total: int, *, enabled: bool) -> Iterator[Callable[[], object]]:
    """Yields `advance`, to be called once after each of `total` steps.

        with progress_bar("painting", steps, enabled=mesh.rank == 0) as advance:
            ...
            advance()

    The bar goes to stderr, and only if that is a terminal: in a log file it would be a heap of
    carriage returns.
    """
    # disable=None is tqdm's word for "unless stderr is a terminal".
    with tqdm(total=total, desc=describe, disable=None if enabled else True) as bar:
        yield bar.update
