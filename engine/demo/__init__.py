"""The demo model: a tiny text-to-image model of landscapes, trained by `engine.demo.train`.

Nothing heavy is imported here, so that asking where the weights are costs nothing.
"""

from pathlib import Path

WEIGHTS: Path = Path(__file__).parent / "weights"
"""A StableDiffusionPipeline folder, with the LinFusion modules in its `linfusion` subfolder."""
