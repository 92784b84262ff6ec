"""Shelf: a small lending shelf of books, and the example application of this repository."""

from pathlib import Path

from flask import Flask

from shelf import db, probes, views, web

__all__ = ["create_app", "release_id"]

DEVELOPMENT = "development"


def release_id(package: Path) -> str:
    """Return the release that the code in directory `package` belongs to.

    A deployed release lies in `…/releases/ID/app/shelf`, and is reached through a symbolic link that a later deploy
    moves on. The link is therefore resolved here, at import, and never again: a worker keeps telling which release
    it really runs.

    Args:
        package: directory of this package, links allowed.

    Returns:
        ID, or "development" for code that lies anywhere else.
    """
    app = package.resolve().parent
    return app.parent.name if app.name == "app" and app.parent.parent.name == "releases" else DEVELOPMENT


def create_app(database_url: str | None = None, release: str | None = None) -> Flask:
    """Build the application without touching the database.

    Args:
        database_url: SQLAlchemy URL; the environment's DATABASE_URL when None.
        release: release id to report; the environment's RELEASE, else the directory's name, when None.

    Raises:
        shelf.db.ConfigurationError: a setting is missing or unusable; the message names it and the cure.
    """
    release = release or db.setting("RELEASE") or release_id(Path(__file__).parent)
    engine = db.make_engine(database_url or db.database_url(), db.pool_size())
    app = Flask(__name__)
    # Three short text fields are all that anybody ever sends.
    app.config["MAX_CONTENT_LENGTH"] = 16 * 1024
    app.extensions["shelf_engine"] = engine
    web.protect(app)
    app.register_blueprint(views.blueprint(engine, release))
    app.register_blueprint(probes.blueprint(engine, release))
    return app
