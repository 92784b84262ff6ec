"""Alembic's entry: run the migrations against DATABASE_URL, or print their SQL (`alembic upgrade head --sql`)."""

import logging

from alembic import context
from alembic.util import CommandError
from shelf import db
from shelf.models import Base

logging.basicConfig(format="%(name)s: %(message)s")
logging.getLogger("alembic.runtime.migration").setLevel(logging.INFO)

try:
    engine = db.make_engine(db.database_url(), connections=1)
except db.ConfigurationError as error:
    raise CommandError(str(error)) from None

if context.is_offline_mode():
    context.configure(dialect_name=engine.dialect.name, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with engine.connect() as connection:
        context.configure(connection=connection, target_metadata=Base.metadata)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()
