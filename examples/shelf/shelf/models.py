"""What is stored: books, and who has them.

Portable to SQLite, PostgreSQL, MariaDB and Oracle: every string has a length, the key is an identity column, no name
is a reserved word, and no identifier is longer than the 30 bytes of Oracle 12.1.
"""

from datetime import UTC, datetime

from sqlalchemy import CheckConstraint, DateTime, Dialect, Identity, MetaData, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

# Characters that each text may have; the columns and the forms agree on them.
LONGEST = {"title": 160, "author": 100, "borrower": 80}


class UtcDateTime(TypeDecorator[datetime]):
    """Moments with a time zone in Python, whole seconds of UTC in the database.

    Neither zones nor fractions of a second survive in all four databases: Oracle's DATE has no fraction, and MariaDB's
    DATETIME has neither.
    """

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the aware `value` as naive UTC."""
        return value and value.astimezone(UTC).replace(microsecond=0, tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the naive UTC `value` with its zone."""
        return value and value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can drop it by the same name in every database."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
        }
    )


class Book(Base):
    """A book, on the shelf or lent out."""

    __tablename__ = "book"
    __table_args__ = (
        CheckConstraint(
            "(borrower IS NULL AND lent_at IS NULL) OR (borrower IS NOT NULL AND lent_at IS NOT NULL)", name="loan"
        ),
        {"mysql_charset": "utf8mb4"},
    )

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    title: Mapped[str] = mapped_column(String(LONGEST["title"]))
    author: Mapped[str] = mapped_column(String(LONGEST["author"]))
    borrower: Mapped[str | None] = mapped_column(String(LONGEST["borrower"]))
    lent_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
