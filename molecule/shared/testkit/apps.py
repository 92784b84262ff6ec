"""What the tests know of an application on a host, read from uWSGI and the kernel and not from the role's variables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from testinfra.host import Host

READ_STATS = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
    "sys.stdout.buffer.write(b''.join(iter(lambda: s.recv(65536), b'')))"
)


@dataclass(frozen=True)
class Deployed:
    """One deployed application; `host` is testinfra's."""

    host: Host
    name: str

    @property
    def unit(self) -> str:
        """Return the name that everything of the application has on the host."""
        return f"uwsgi-{self.name}"

    def stats(self) -> dict[str, Any]:
        """Return uWSGI's statistics."""
        said = self.host.check_output("python3 -c %s /run/%s/stats.sock", READ_STATS, self.unit)
        result: dict[str, Any] = json.loads(said)
        return result

    def pids(self) -> set[int]:
        """Return the process ids of the workers, as uWSGI's statistics name them."""
        return {int(worker["pid"]) for worker in self.stats()["workers"]}

    def release(self) -> str:
        """Return the id of the current release."""
        return str(self.host.check_output("basename $(readlink /srv/%s/current)", self.unit))

    def as_account(self, command: str, account: str = "") -> Any:
        """Run a command as the application's account, or as another one, and return testinfra's result."""
        return self.host.run("runuser -u %s -- sh -c %s", account or self.unit, command)

    def show(self, unit: str, name: str) -> str:
        """Return one property of the application's service or socket unit, as systemd has loaded it."""
        return str(self.host.check_output("systemctl show --value -p %s %s.%s", name, self.unit, unit))
