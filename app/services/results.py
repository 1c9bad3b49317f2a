"""What a finished run found: clusters, representatives, assignments. Written once, read in streams."""

import json
import uuid
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.copy import csv_blocks, insert_rows, json_blocks
from app.db.tables import Assignment, Cluster, Image, Representative
from app.errors import NotFound
from app.services import pages, tabular

# Names of clusters are looked up in one value: joined, they led to plans twice as slow under row-level security.
LABELS = """
    SELECT a.image_id, i.filename, a.cluster,
           (SELECT jsonb_object_agg(cluster, name) FROM clusters WHERE run_id = %(run_id)s)
               ->> a.cluster::text AS cluster_name,
           a.confidence, a.runner_up, a.margin, a.consensus
    FROM assignments a
    JOIN images i ON i.id = a.image_id
    WHERE a.run_id = %(run_id)s
    ORDER BY a.position
"""
_LABELS_CSV = f"""
    SELECT image_id, {tabular.safe_sql("filename")} AS filename, cluster,
           {tabular.safe_sql("cluster_name")} AS cluster_name, confidence, runner_up, margin,
           CASE WHEN consensus THEN 'true' ELSE 'false' END AS consensus
    FROM ({LABELS}) labels
"""  # noqa: S608 - of this file's own texts


@dataclass(frozen=True, kw_only=True)
class ClusterRow:
    cluster: int
    name: str
    size: int
    confidence: float | None
    cohesion: float | None
    representatives: list[uuid.UUID]


@dataclass(frozen=True, kw_only=True)
class AssignmentRow:
    position: int
    image_id: uuid.UUID
    cluster: int
    rank: int
    confidence: float
    runner_up: int
    margin: float
    consensus: bool


@dataclass(frozen=True, kw_only=True)
class ClusterView:
    cluster: int
    name: str
    size: int
    confidence: float | None
    cohesion: float | None
    representatives: list[uuid.UUID] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Member:
    image_id: uuid.UUID
    filename: str
    rank: int
    confidence: float
    runner_up: int
    margin: float
    consensus: bool


def store(
    session: Session, run_id: uuid.UUID, clusters: Sequence[ClusterRow], assignments: Iterable[AssignmentRow]
) -> None:
    """Bulk-insert the results. The caller ends the run in the same transaction, fenced by its attempt."""
    session.add_all(
        Cluster(
            run_id=run_id,
            cluster=row.cluster,
            name=row.name,
            size=row.size,
            confidence=row.confidence,
            cohesion=row.cohesion,
        )
        for row in clusters
    )
    session.flush()
    session.add_all(
        Representative(run_id=run_id, cluster=row.cluster, rank=rank, image_id=image_id)
        for row in clusters
        for rank, image_id in enumerate(row.representatives)
    )
    session.flush()
    insert_rows(
        session,
        "COPY assignments (run_id, position, image_id, cluster, rank, confidence, runner_up, margin, consensus)"
        " FROM STDIN",
        (
            (run_id, a.position, a.image_id, a.cluster, a.rank, a.confidence, a.runner_up, a.margin, a.consensus)
            for a in assignments
        ),
    )


def clusters(session: Session, run_id: uuid.UUID, limit: int, cursor: str | None) -> pages.Page[ClusterView]:
    """Largest first, which is the order of their numbers."""
    query = select(Cluster).where(Cluster.run_id == run_id).order_by(Cluster.cluster).limit(limit + 1)
    after = pages.decode(cursor, pages.int32)
    if after is not None:
        query = query.where(Cluster.cluster > after[0])
    found = pages.page(session.scalars(query).all(), limit, lambda row: (row.cluster,))
    return pages.Page(_views(session, run_id, found.items), found.next)


def cluster(session: Session, run_id: uuid.UUID, number: int) -> ClusterView:
    row = session.get(Cluster, (run_id, number))
    if row is None:
        raise NotFound(f"Run {run_id} has no cluster {number}.", code="cluster-not-found")
    return _views(session, run_id, [row])[0]


def members(session: Session, run_id: uuid.UUID, number: int, limit: int, cursor: str | None) -> pages.Page[Member]:
    """The images of a cluster, most typical first."""
    cluster(session, run_id, number)
    query = (
        select(Assignment, Image.filename)
        .join(Image, Image.id == Assignment.image_id)
        .where(Assignment.run_id == run_id, Assignment.cluster == number)
        .order_by(Assignment.rank)
        .limit(limit + 1)
    )
    after = pages.decode(cursor, pages.int32)
    if after is not None:
        query = query.where(Assignment.rank > after[0])
    rows = [
        Member(
            image_id=a.image_id,
            filename=filename,
            rank=a.rank,
            confidence=a.confidence,
            runner_up=a.runner_up,
            margin=a.margin,
            consensus=a.consensus,
        )
        for a, filename in session.execute(query)
    ]
    return pages.page(rows, limit, lambda row: (row.rank,))


def labels_csv(session: Session, run_id: uuid.UUID) -> Generator[bytes]:
    """Every image's label in the order of the collection, at constant memory. Names are safe for spreadsheets."""
    return csv_blocks(session, _LABELS_CSV, {"run_id": run_id})


def labels_json(session: Session, run_id: uuid.UUID) -> Generator[bytes]:
    """`{"run_id": …, "items": […]}`, an item a line, at constant memory."""
    yield f'{{"run_id": {json.dumps(str(run_id))}, "items": ['.encode()
    separator = b"\n"
    for block in json_blocks(session, LABELS, {"run_id": run_id}):
        yield separator + block.removesuffix(b"\n").replace(b"\n", b",\n")
        separator = b",\n"
    yield b"\n]}\n"


def _views(session: Session, run_id: uuid.UUID, rows: Sequence[Cluster]) -> list[ClusterView]:
    views = [
        ClusterView(
            cluster=row.cluster,
            name=row.name,
            size=row.size,
            confidence=row.confidence,
            cohesion=row.cohesion,
        )
        for row in rows
    ]
    by_number = {view.cluster: view for view in views}
    chosen = session.execute(
        select(Representative.cluster, Representative.image_id)
        .where(Representative.run_id == run_id, Representative.cluster.in_(by_number))
        .order_by(Representative.cluster, Representative.rank)
    )
    for number, image_id in chosen:
        by_number[number].representatives.append(image_id)
    return views


def sizes(session: Session, run_id: uuid.UUID) -> list[int]:
    return list(session.scalars(select(Cluster.size).where(Cluster.run_id == run_id).order_by(Cluster.cluster)))


def names(session: Session, run_id: uuid.UUID, numbers: Iterable[int]) -> dict[int, str]:
    """The names of those clusters that the run has."""
    rows = session.execute(
        select(Cluster.cluster, Cluster.name).where(Cluster.run_id == run_id, Cluster.cluster.in_(list(numbers)))
    )
    return dict(rows.all())


def faces(session: Session, run_id: uuid.UUID, numbers: Iterable[int]) -> dict[int, uuid.UUID]:
    """The most typical image of each of those clusters that is not empty."""
    rows = session.execute(
        select(Representative.cluster, Representative.image_id).where(
            Representative.run_id == run_id, Representative.cluster.in_(list(numbers)), Representative.rank == 0
        )
    )
    return dict(rows.all())
