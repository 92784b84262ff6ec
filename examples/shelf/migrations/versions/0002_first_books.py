"""A few books to begin with, so that nobody meets an empty shelf."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

book = sa.table("book", sa.column("title", sa.String(160)), sa.column("author", sa.String(100)))

BOOKS = (
    ("The Left Hand of Darkness", "Ursula K. Le Guin"),
    ("Die Vermessung der Welt", "Daniel Kehlmann"),
    ("Invisible Cities", "Italo Calvino"),
    ("Solaris", "Stanisław Lem"),
    ("A Field Guide to Getting Lost", "Rebecca Solnit"),
    ("Cien años de soledad", "Gabriel García Márquez"),
    ("The Summer Book", "Tove Jansson"),
)


def upgrade() -> None:
    """Put them on the shelf."""
    op.bulk_insert(book, [{"title": title, "author": author} for title, author in BOOKS])


def downgrade() -> None:
    """Take them off again."""
    for title, author in BOOKS:
        op.execute(book.delete().where(book.c.title == title, book.c.author == author))
