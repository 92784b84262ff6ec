"""Build a server, deploy the example application to it with playbooks/site.yml, and fetch a page through Nginx."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from urllib.error import URLError
from urllib.request import urlopen

import hosts
import machine

HOST = hosts.Host("demo", "demo", "trixie")
SECONDS = 10
CURRENT = "/srv/uwsgi-shelf/current"


def fetch(url: str) -> str:
    """Return the title of the page at a URL; raises URLError (no answer, or an error status) and TimeoutError."""
    with urlopen(url, timeout=SECONDS) as answer:  # noqa: S310 (http, to our own host)
        page = answer.read().decode()
    title = re.search(r"<title>(.*?)</title>", page, re.DOTALL)
    return " ".join(title[1].split()) if title else f"{len(page)} characters without a title"


def main() -> int:
    """Run the demo and return the exit status."""
    print("demo: 1. a server (Debian 13 in a container; the first time, its image is built)", flush=True)
    try:
        (reached,) = hosts.up(HOST.group, [HOST])
    except hosts.HostError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1

    print("demo: 2. ansible-playbook -i inventory/demo playbooks/site.yml", flush=True)
    environment = {
        **os.environ,
        "PATH": f"{hosts.ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "ANSIBLE_HOME": str(hosts.RUN / "ansible"),
    }
    command = ("ansible-playbook", "-i", "inventory/demo", "playbooks/site.yml")
    if status := subprocess.run(command, cwd=hosts.ROOT, env=environment, check=False).returncode:
        print("demo: the playbook failed; the server stays for a look, `make clean` removes it", file=sys.stderr)
        return status

    url = f"http://{reached['address']}/"
    print(f"demo: 3. a page through Nginx: {url}", flush=True)
    try:
        title = fetch(url)
    except (URLError, TimeoutError) as error:
        print(f"demo: {url} does not answer as it should: {error}", file=sys.stderr)
        return 1
    login = ("ssh", "-F", f"{hosts.RUN}/demo/ssh_config", HOST.name)
    release = machine.output(*login, "sudo", "readlink", CURRENT).strip().rpartition("/")[2]
    print(
        f"\n  page      {url}  ({title})\n"
        f"  release   {release}\n"
        f"  log in    ssh -F .run/demo/ssh_config {HOST.name}\n"
        "  remove    make clean\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
