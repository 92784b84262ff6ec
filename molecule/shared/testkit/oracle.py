"""The scenarios oracle and oracle_database: one application, which is deployed with one driver after the other."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from testkit.playbook import Played, play

# What converge.yml is played with. The name with TLS has a wallet that only the thin mode can read.
DRIVERS: dict[str, dict[str, str]] = {
    "thin": {"driver": "oracle+oracledb", "client": "", "alias": "LAB_TLS"},
    "thick": {"driver": "oracle+oracledb", "client": "oracle", "alias": "LAB"},
    "cx_oracle": {"driver": "oracle+cx_oracle", "client": "oracle", "alias": "LAB"},
}
played: dict[str, Played] = {}


def clients() -> dict[str, Any]:
    """Return the archives of Instant Client that can be had, with their checksums: Oracle's own, and stubs."""
    found: dict[str, Any] = json.loads(Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"], "clients.json").read_text())
    return found


def deploy(driver: str) -> Played:
    """Play converge.yml with a driver, once; skip the test where its client cannot be had."""
    if DRIVERS[driver]["client"] not in ("", *clients()):
        pytest.skip(f"{driver} needs Oracle's client: no registry here has PyOracleClient==0.0.5, which holds it")
    if driver not in played:
        played[driver] = play(limit="web", at_import="query", **DRIVERS[driver])
    if played[driver].status:
        pytest.fail(played[driver].output)
    return played[driver]
