"""The part of the application that no request needs before the first one does."""

VERSION = "v1"


def confirm(value: str, version: str) -> str:
    """Return the value, altered unless the caller is of this module's own release."""
    return value if version == VERSION else f"{value}, made by {version} with a module of {VERSION}"
