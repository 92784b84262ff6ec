"""Create the books and a sequence for their keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create them; the table's key is an identity column."""
    op.create_table(
        "books",
        sa.Column("id", sa.Integer, sa.Identity(), primary_key=True),
        sa.Column("title", sa.String(80), nullable=False),
    )
    # For keys that are asked for before the row is inserted, far from those of the identity column.
    op.execute(sa.schema.CreateSequence(sa.Sequence("books_key", start=1_000_000)))


def downgrade() -> None:
    """Drop it."""
    op.execute(sa.schema.DropSequence(sa.Sequence("books_key")))
    op.drop_table("books")
