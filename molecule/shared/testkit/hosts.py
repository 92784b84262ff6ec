"""The scenario's hosts, as Molecule knows them while it verifies."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
BOOT_SECONDS = 120


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


def power_cut(name: str) -> None:
    """Kill everything on a host at once, start it again and wait until it has booted; its address stays.

    Raises CalledProcessError when podman fails, and TimeoutError when the host does not come back.
    """
    group, address_before = os.environ["MOLECULE_SCENARIO_NAME"], address(name)
    label = f"--filter=label=uwsgi-sqlalchemy.checkout={ROOT}"

    def podman(*arguments: str) -> str:
        done = subprocess.run([ROOT / "tools" / "podman", *arguments], check=True, capture_output=True, text=True)
        return done.stdout

    names = podman("ps", "--format", "{{.Names}}", label, f"--filter=label=group={group}").split()
    container = next(found for found in names if found.startswith(f"{group}-{name}-"))
    podman("kill", "--signal=KILL", container)
    podman("wait", container)
    # The connection that is kept leads to the host before.
    ssh = ("ssh", "-F", str(ssh_config()))
    subprocess.run([*ssh, "-O", "exit", name], check=False, capture_output=True)
    podman("start", container)
    if address_before not in podman("exec", container, "ip", "-brief", "address").replace("/", " ").split():
        podman("exec", container, "ip", "address", "add", f"{address_before}/24", "dev", "eth0")
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        asked = [*ssh, "-o", "ConnectTimeout=2", name, "sudo systemctl is-system-running --wait"]
        answer = subprocess.run(asked, check=False, capture_output=True, text=True, timeout=BOOT_SECONDS)
        if answer.stdout.strip() in {"running", "degraded"}:
            return
        time.sleep(0.3)
    raise TimeoutError(f"{name} did not start again within {BOOT_SECONDS} s")
