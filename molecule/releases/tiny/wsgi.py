"""The smallest application that the tests' client can ask; variants.py makes a release of it that fills a disk."""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

VERSION = "tiny-1"
RELEASE = Path(__file__).resolve().parents[1].name


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Answer with the last part of the path, whatever it is."""
    start_response("200 OK", [("Content-Type", "application/json")])
    return [
        json.dumps({"value": environ["PATH_INFO"].rpartition("/")[2], "pid": os.getpid(), "release": RELEASE}).encode()
    ]
