"""Print how a picture was painted, as a file of settings.

    python -m engine.inspect lake.png
    python -m engine.inspect lake.dzi > lake.yaml; python -m engine.generate --config lake.yaml

A mistake is one sentence and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.config import UserError
from engine.provenance import as_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.inspect", description=__doc__.split("\n")[0]
    )
    parser.add_argument("file", type=Path, help="a picture that this engine has written")
    try:
        print(as_yaml(parser.parse_args(argv).file), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
