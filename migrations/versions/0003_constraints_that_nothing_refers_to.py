"""constraints that nothing refers to

Two unique constraints beside primary keys of the same rows: an index more to write for every image and every run.
"""

from collections.abc import Sequence

from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

_UNUSED = {"images": ["collection_id", "id"], "runs": ["id", "collection_id"]}


def upgrade() -> None:
    for table, columns in _UNUSED.items():
        op.drop_constraint(f"uq_{table}_{'_'.join(columns)}", table, type_="unique")


def downgrade() -> None:
    for table, columns in _UNUSED.items():
        op.create_unique_constraint(op.f(f"uq_{table}_{'_'.join(columns)}"), table, columns)
