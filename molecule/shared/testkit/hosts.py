"""The scenario's hosts, as Molecule knows them while it verifies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]


def _molecule(variable: str) -> Any:
    """Return the YAML file that a variable of Molecule's names; raises KeyError outside of `molecule verify`."""
    return yaml.safe_load(Path(os.environ[variable]).read_text())


def names(group: str | None = None) -> list[str]:
    """Return the names of the scenario's hosts, of one inventory group where one is given."""
    platforms = _molecule("MOLECULE_FILE")["platforms"]
    return [platform["name"] for platform in platforms if group is None or group in platform.get("groups", ())]


def urls(group: str | None = None) -> list[str]:
    """Return testinfra's addresses of the hosts.

    `testinfra_hosts = hosts.urls("web")` at the top of a test module runs it on one group alone.
    """
    return [f"ssh://{name}" for name in names(group)]


def address(name: str) -> str:
    """Return a host's IP address, for requests that come from outside of it; raises KeyError for an unknown name."""
    return {item["instance"]: str(item["address"]) for item in _molecule("MOLECULE_INSTANCE_CONFIG")}[name]


def ssh_config() -> Path:
    """Return the ssh_config that tools/hosts.py wrote for the scenario."""
    return ROOT / ".run" / os.environ["MOLECULE_SCENARIO_NAME"] / "ssh_config"
