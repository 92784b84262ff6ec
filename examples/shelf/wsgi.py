"""What uWSGI imports: `module = wsgi:application`. Importing it opens no connection, starts no thread."""

from shelf import create_app

application = create_app()
