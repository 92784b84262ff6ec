"""A table of books."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table."""
    op.create_table(
        "book",
        sa.Column("id", sa.Integer(), sa.Identity(), nullable=False),
        sa.Column("title", sa.String(160), nullable=False),
        sa.Column("author", sa.String(100), nullable=False),
        sa.Column("borrower", sa.String(80), nullable=True),
        sa.Column("lent_at", sa.DateTime(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_book")),
        sa.CheckConstraint(
            "(borrower IS NULL AND lent_at IS NULL) OR (borrower IS NOT NULL AND lent_at IS NOT NULL)",
            name=op.f("ck_book_loan"),
        ),
        mysql_charset="utf8mb4",
    )


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("book")
