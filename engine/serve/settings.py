"""The service's own settings: a pydantic model like the engine's, read by the same parser.

    python -m engine.serve --port 8000 --ranks 8 --engine-config configs/sdxl_4k.yaml
    python -m engine.serve --config service.yaml

What is painted with (the model, its ladder, memory) is not here but in the engine's own YAML file,
which `--engine-config` names. A job adds the prompt, the size, the seed and the like.

A key on a command line could be read by everyone who may list processes, so it is in a file.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field

from engine.config import Group, Real, Settings, UserError, Whole
from engine.parsing import Given, judge, parse, read_yaml

PROG = "python -m engine.serve"
_SHORTEST_KEY = 16
_OF_EACH_JOB = ("prompt", "seed", "output", "resume", "progress")


class ServeSettings(Group):
    """Serve pictures over HTTP: takes jobs, and keeps the ranks running that paint them."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: Whole = Field(
        default=8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one."
    )
    folder: Path = Field(
        default=Path("outputs/served"), description="Where pictures and the records of jobs are."
    )
    engine_config: Path | None = Field(
        default=None,
        description="The engine's settings for every picture: the model, the ladder. YAML, as for "
        "engine.generate.",
    )
    ranks: Annotated[Whole, Field(ge=1)] | None = Field(
        default=None, description="Ranks that paint; by default one a GPU."
    )
    queue_limit: Whole = Field(
        default=32, ge=1, description="Jobs that may wait; more are refused (429)."
    )
    retries: Whole = Field(
        default=2, ge=0, description="How often a job is tried again whose ranks have died."
    )
    restart_pause_s: Real = Field(
        default=1.0,
        ge=0,
        description="Seconds before ranks that have died are started again; doubles each time.",
    )
    silence_s: Real = Field(
        default=3600.0,
        gt=0,
        description="Seconds without a word from the ranks at work after which they are killed.",
    )
    stop_s: Real = Field(
        default=300.0,
        gt=0,
        description="Seconds that ranks get to finish their step when the service is to stop.",
    )
    api_key_file: Path | None = Field(
        default=None, description="A file with the key that every request must bring."
    )
    without_key: bool = Field(
        default=False, description="Listen on other than loopback although there is no API key."
    )
    largest_side_px: Whole = Field(
        default=16384, ge=8, description="Longest side that may be asked for."
    )
    largest_pixels: Whole = Field(
        default=2**28, ge=64, description="Most pixels that may be asked for."
    )
    most_steps: Whole = Field(
        default=200, ge=1, description="Most denoising steps that may be asked for."
    )
    worker: str = Field(default="engine.worker", description="The module that the ranks run.")

    def idle(self) -> dict[str, str]:
        if self.is_private or self.api_key_file is not None:
            return {"without_key": "a host that others can reach and no api_key_file"}
        return {}

    @classmethod
    def load(cls, argv: Sequence[str] | None = None) -> Self:
        """The settings of a command line. Raises UserError for every mistake."""
        settings = parse(cls, argv, prog=PROG)
        if not settings.is_private and settings.api_key_file is None and not settings.without_key:
            raise UserError(
                f"host: {settings.host} lets other machines in, and there is no API key; name an "
                "--api-key-file, or say --without-key if everyone may paint"
            )
        return settings

    @property
    def is_private(self) -> bool:
        """Whether only this machine can reach the service."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def read_key(self) -> str | None:
        """The API key. Raises UserError where the file has none."""
        if self.api_key_file is None:
            return None
        try:
            key = self.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = (getattr(error, "strerror", None) or "not UTF-8 text").lower()
            raise UserError(f"api_key_file: {self.api_key_file}: {reason}") from None
        if len(key) < _SHORTEST_KEY or not key.isascii() or not key.isprintable():
            raise UserError(
                f"api_key_file: {self.api_key_file} should have one line of {_SHORTEST_KEY} plain "
                "characters or more, such as `openssl rand -hex 32` prints"
            )
        return key


@dataclass(frozen=True)
class Base:
    """The engine's settings under every job.

    Attributes:
        path: the file, for the ranks.
        values: as the file has them.
        settings: what they come to.
    """

    path: Path | None
    values: dict[str, Any]
    settings: Settings

    @classmethod
    def read(cls, path: Path | None) -> Self:
        """Raises UserError: the file is none, or its settings are not the engine's."""
        if path is None:
            return cls(None, {}, Settings())
        try:
            values = read_yaml(path)
        except UserError as error:  # it knows the file by another flag
            raise UserError(str(error).replace("--config:", "--engine-config:")) from None
        settings = judge(Settings, values, Given({}, values, str(path), {}))
        if settings.plan:
            raise UserError(f"{path}: plan: the service paints; leave it out")
        return cls(path.absolute(), values, settings)

    @property
    def overruled(self) -> list[str]:
        """The settings in the file that every job has its own of."""
        return [name for name in _OF_EACH_JOB if name in self.values]

    def with_job(self, job: dict[str, Any]) -> Settings:
        """The engine's settings for a job. Raises UserError, as the engine would."""
        return judge(Settings, {**self.values, **job}, Given({}, {}, None, {}))
