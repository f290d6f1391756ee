"""One ultra-resolution picture on any number of GPUs.

    engine.load(name)        a Stable Diffusion pipeline with LinFusion's linear attention
    engine.linearize(pipe)   linear attention for a pipeline that is there already
    engine.distribute(pipe)  share it out over the ranks; `engine.collect(pipe)` undoes it

`python -m engine.generate --help` is the command line, `engine.pipeline.Engine` what is behind it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.linfusion import linearize as linearize
    from engine.loading import load as load
    from engine.parallel import collect as collect
    from engine.parallel import distribute as distribute
    from engine.pipeline import Engine as Engine

__version__ = "0.1.0"

# Looked up when first asked for: torch and diffusers take seconds to import, the settings do not.
_PUBLIC = {
    "Engine": "engine.pipeline",
    "collect": "engine.parallel",
    "distribute": "engine.parallel",
    "linearize": "engine.linfusion",
    "load": "engine.loading",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
