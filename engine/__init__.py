"""One ultra-resolution picture on any number of GPUs; `engine.generate` is the way in."""

__version__ = "0.1.0"
