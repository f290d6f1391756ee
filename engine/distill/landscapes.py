"""The demo's landscapes as a source: drawn when asked for, in the shapes of its model's training.

As many of each shape as in the demo's own training (`engine.demo.data`), scaled to the number that
is wanted. A picture depends on its shape and number alone, so any rank may draw it.
"""

from collections.abc import Iterator
from dataclasses import replace

from PIL import Image

from engine.demo.data import BUCKETS, Bucket, draw_picture
from engine.demo.unet import CLOSE_UP_NOISE
from engine.distill.sources import UNIT, Sample, Unit


class Landscapes:
    """About `pictures` of them.

    Numbers begin where those of the demo model's own training end: the teacher has not seen them.
    """

    def __init__(self, pictures: int) -> None:
        whole = sum(bucket.count for bucket in BUCKETS)
        self._buckets = [
            replace(bucket, count=max(1, round(bucket.count * pictures / whole)))
            for bucket in BUCKETS
        ]
        self._seen = {bucket.name: bucket.count for bucket in BUCKETS}

    def units(self) -> list[Unit]:
        return [
            Unit(f"{bucket.name}_{start:06d}", [bucket.name, start, bucket.count])
            for bucket in self._buckets
            for start in range(0, bucket.count, UNIT)
        ]

    def read(self, unit: Unit) -> Iterator[Sample]:
        name, start, count = unit.facts
        bucket = next(bucket for bucket in self._buckets if bucket.name == name)
        for number in range(start, min(start + UNIT, count)):
            yield self._draw(bucket, self._seen[name] + number)

    def _draw(self, bucket: Bucket, number: int) -> Sample:
        pixels, captions = draw_picture(bucket, number)
        below = CLOSE_UP_NOISE / 1000 if bucket.close_up else 1.0
        return Sample(f"{bucket.name}/{number}", Image.fromarray(pixels), captions, below)
