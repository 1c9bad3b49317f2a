"""The shapes of requests and answers."""

import unicodedata
import uuid
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from app.db.tables import Image, Run, Upload, UploadFile
from app.letters import controls
from app.services import runs
from app.services.collections import CollectionView
from app.services.results import ClusterView, Member

T = TypeVar("T")
State = Literal["queued", "running", "succeeded", "failed", "cancelled"]


def is_shown(letter: str) -> bool:
    """Whether a letter may be in a name of one line; PostgreSQL's text, besides, holds no NUL."""
    return not controls(letter) and unicodedata.category(letter) not in ("Zl", "Zp")


def _visible(name: str) -> str:
    marks = [letter for letter in name if not letter.isspace() and unicodedata.category(letter) != "Cf"]
    if not marks or not all(map(is_shown, name)):
        raise PydanticCustomError("name", "must have a visible character, and none that controls how text is shown")
    return name


Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), AfterValidator(_visible)]


class PageOf(BaseModel, Generic[T]):
    items: list[T]
    next: str | None = Field(description="Cursor of the next page; null on the last.")


class NewCollection(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name = Field(examples=["Holiday 2026"])


class CollectionOut(BaseModel):
    id: uuid.UUID
    name: str
    images: int
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, view: CollectionView) -> "CollectionOut":
        base = f"/v1/collections/{view.id}"
        links = {
            "self": base,
            "images": f"{base}/images",
            "uploads": f"{base}/uploads",
            "runs": f"{base}/runs",
        }
        return cls(id=view.id, name=view.name, images=view.images, created_at=view.created_at, links=links)


class Problem(BaseModel):
    code: str = Field(examples=["too-few-images"])
    detail: str


class Counts(BaseModel):
    received: int
    accepted: int
    duplicate: int
    rejected: int
    ignored: int = Field(description="Entries such as `__MACOSX` or `.DS_Store`, which are nobody's pictures.")


class UploadOut(BaseModel):
    id: uuid.UUID
    collection_id: uuid.UUID
    state: State
    progress: float
    bytes: int
    counts: Counts
    problem: Problem | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: dict[str, str]

    @classmethod
    def of(cls, row: Upload) -> "UploadOut":
        base = f"/v1/uploads/{row.id}"
        return cls(
            id=row.id,
            collection_id=row.collection_id,
            state=cast("State", row.state),
            progress=row.progress,
            bytes=row.bytes,
            counts=Counts(
                received=row.received,
                accepted=row.accepted,
                duplicate=row.duplicate,
                rejected=row.rejected,
                ignored=row.ignored,
            ),
            problem=Problem(**row.problem) if row.problem else None,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            links={
                "self": base,
                "files": f"{base}/files",
                "files_csv": f"{base}/files.csv",
                "collection": f"/v1/collections/{row.collection_id}",
            },
        )


class LedgerRow(BaseModel):
    position: int
    filename: str
    bytes: int
    outcome: Literal["accepted", "duplicate", "rejected"]
    image_id: uuid.UUID | None = Field(description="The image itself, or the one that a duplicate repeats.")
    reason_code: str | None
    reason: str | None

    @classmethod
    def of(cls, row: UploadFile) -> "LedgerRow":
        return cls.model_validate(row, from_attributes=True)


class ImageOut(BaseModel):
    id: uuid.UUID
    filename: str
    sha256: str
    format: str
    width: int
    height: int
    bytes: int
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, row: Image) -> "ImageOut":
        base = f"/v1/images/{row.id}"
        return cls(
            id=row.id,
            filename=row.filename,
            sha256=row.sha256,
            format=row.format,
            width=row.width,
            height=row.height,
            bytes=row.bytes,
            created_at=row.created_at,
            links={"thumbnail": f"{base}/thumbnail", "original": f"{base}/original"},
        )


class RunOut(BaseModel):
    id: uuid.UUID
    collection_id: uuid.UUID
    upload_id: uuid.UUID | None = Field(description="The upload that a one-shot run waits for.")
    state: State
    stage: str | None = Field(examples=["training"])
    progress: float = Field(description="0 to 1 over the whole run.")
    eta_s: float | None = Field(description="Expected seconds to go.")
    attempt: int
    clusters: int | None = Field(
        description="How many groups: as asked; where `auto` was asked, as found, and null until then."
    )
    parameters: dict[str, Any] = Field(description="As asked, with what was left open resolved once the run starts.")
    metrics: dict[str, Any] | None
    provenance: dict[str, Any] | None = Field(description="Versions, the device that trained, the backbone's digest.")
    problem: Problem | None
    cancel_requested: bool
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    links: dict[str, str]

    @classmethod
    def of(cls, row: Run) -> "RunOut":
        base = f"/v1/runs/{row.id}"
        links = {
            "self": base,
            "events": f"{base}/events",
            "collection": f"/v1/collections/{row.collection_id}",
        }
        if row.upload_id:
            links["upload"] = f"/v1/uploads/{row.upload_id}"
        if row.state in ("queued", "running"):
            links["cancel"] = f"{base}/cancel"
        if row.state == "succeeded":
            for name in ("clusters", "report"):
                links[name] = f"{base}/{name}"
            links["labels_json"], links["labels_csv"] = f"{base}/labels.json", f"{base}/labels.csv"
            if (row.metrics or {}).get("tree"):
                links["levels_csv"] = f"{base}/levels.csv"
        return cls(
            id=row.id,
            collection_id=row.collection_id,
            upload_id=row.upload_id,
            state=cast("State", row.state),
            stage=row.stage,
            progress=row.progress,
            eta_s=row.eta_s,
            attempt=row.attempt,
            clusters=runs.clusters_of(row),
            parameters=row.parameters,
            metrics=row.metrics,
            provenance=row.provenance,
            problem=Problem(**row.problem) if row.problem else None,
            cancel_requested=row.cancel_requested_at is not None,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            links=links,
        )


class RepresentativeOut(BaseModel):
    image_id: uuid.UUID
    thumbnail: str


class ClusterOut(BaseModel):
    cluster: int
    name: str
    size: int
    confidence: float | None = Field(description="Mean confidence of the members.")
    cohesion: float | None = Field(description="Mean cosine similarity of the members to the centre.")
    representatives: list[RepresentativeOut]
    links: dict[str, str]

    @classmethod
    def of(cls, run_id: uuid.UUID, view: ClusterView) -> "ClusterOut":
        base = f"/v1/runs/{run_id}/clusters/{view.cluster}"
        return cls(
            cluster=view.cluster,
            name=view.name,
            size=view.size,
            confidence=view.confidence,
            cohesion=view.cohesion,
            representatives=[
                RepresentativeOut(image_id=image_id, thumbnail=f"/v1/images/{image_id}/thumbnail")
                for image_id in view.representatives
            ],
            links={"self": base, "images": f"{base}/images"},
        )


class MemberOut(BaseModel):
    image_id: uuid.UUID
    filename: str
    rank: int = Field(description="0 is the most typical image of the cluster.")
    confidence: float
    runner_up: int
    margin: float
    consensus: bool
    thumbnail: str

    @classmethod
    def of(cls, member: Member) -> "MemberOut":
        return cls.model_validate({**vars(member), "thumbnail": f"/v1/images/{member.image_id}/thumbnail"})


class ReportOut(BaseModel):
    run_id: uuid.UUID
    clusters: int = Field(description="How many groups there are; empty ones count.")
    parameters: dict[str, Any]
    provenance: dict[str, Any] | None
    metrics: dict[str, Any] = Field(
        description="The evidence: `auto`, the number of clusters found and the sweep it came from; `restarts`, "
        "how far the independent starts that answer agree, and how many had started; `baseline`, k-means on the same "
        "features; `frozen`, what a head found before the backbone learned it; `tree`, the merge "
        "tree with its levels; `calibration`; `warnings`; `quality`, where true labels are known. What a run has not "
        "is missing or null."
    )
    sizes: list[int] = Field(description="Images in each cluster, by its number.")
