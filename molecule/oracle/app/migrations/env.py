"""Alembic's environment: connects as the service does, but to the protocol double by python-oracledb's thin mode.

The double does not understand what Oracle's client sends for the long statements that look for Alembic's table.
"""

import os

from alembic import context
from sqlalchemy import create_engine, make_url

url = make_url(os.environ["DATABASE_URL"])
thick = os.environ.get("ORA_PYTHON_DRIVER_TYPE") == "thick"
if os.environ.get("PROTOCOL_DOUBLE") == "yes":
    url, thick = url.set(drivername="oracle+oracledb"), False
options = {"thick_mode": thick} if url.get_driver_name() == "oracledb" else {}

with create_engine(url, **options).connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
