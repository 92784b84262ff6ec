"""The releases of an application on its host: the program that switches them, and what the kernel says of them."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from testkit.apps import Deployed

PROGRAM = "/usr/local/sbin/uwsgi-sqlalchemy"


@dataclass(frozen=True)
class Ran:
    """What a command on a host did; `seconds` is how long it took, ssh included."""

    code: int
    output: str
    errors: str
    seconds: float

    @property
    def answer(self) -> dict[str, Any]:
        """Return the JSON object that the program answered; raises ValueError if there is none."""
        found: dict[str, Any] = json.loads(self.output)
        return found

    @property
    def said(self) -> str:
        """Return what the program told a person: its message, or its closing line."""
        try:
            answer = self.answer
        except ValueError:
            return (self.output + self.errors).strip()
        return str(answer.get("message", answer.get("line", "")))


def command(app: Deployed, text: str, *arguments: str) -> Ran:
    """Run a shell command on an application's host as root; `%s` in it stands for the arguments, quoted."""
    began = time.monotonic()
    done = app.host.run(text, *arguments)
    return Ran(int(done.rc), str(done.stdout), str(done.stderr), time.monotonic() - began)


def program(app: Deployed, verb: str, *arguments: str) -> Ran:
    """Run a command of the on-host program for an application, with its answer in JSON."""
    words = [PROGRAM, verb, app.name, "--json", *arguments]
    return command(app, " ".join(["%s"] * len(words)), *words)


@dataclass(frozen=True)
class State:
    """How an application is on its host."""

    current: str  # id of the current release
    workers: dict[int, str]  # by process id, the release that it works in
    journal: dict[str, Any]  # the last entry
    entries: int  # how many entries the journal has


# The kernel's own view, in one command.
LOOK = """
import glob, json, os, re, sys
unit = sys.argv[1]
def read(path):
    try:
        return open(path, encoding="utf-8").read()
    except OSError:
        return ""
workers = {}
for path in glob.glob("/proc/[0-9]*/cgroup"):
    folder = os.path.dirname(path)
    try:
        place = os.readlink(folder + "/cwd")
    except OSError:
        continue
    inside = re.match("/srv/" + unit + "/releases/([^/]+)/app", place)
    if inside and "/" + unit + ".service" in read(path):
        workers[int(os.path.basename(folder))] = inside[1]
lines = read("/srv/" + unit + "/journal.jsonl").splitlines()
try:
    current = os.path.basename(os.readlink("/srv/" + unit + "/current"))
except OSError:
    current = ""
print(json.dumps({"current": current, "workers": workers, "entries": len(lines), "last": lines[-1] if lines else "{}"}))
"""


def look(app: Deployed) -> State:
    """Return how an application is, asked of the kernel and of its journal."""
    said = json.loads(app.host.check_output("python3 -c %s %s", LOOK, app.unit))
    workers = {int(pid): release for pid, release in said["workers"].items()}
    return State(said["current"], workers, json.loads(said["last"]), said["entries"])


VERSIONS = """
import glob, json, re, sys
print(json.dumps({re.search('^VERSION = "(.+)"$', open(path).read(), re.M)[1]: path.split("/")[4]
                  for path in glob.glob("/srv/" + sys.argv[1] + "/releases/*/app/wsgi.py")}))
"""


def versions(app: Deployed) -> dict[str, str]:
    """Return the ids of an application's releases by the VERSION that their wsgi.py names."""
    found: dict[str, str] = json.loads(app.host.check_output("python3 -c %s %s", VERSIONS, app.unit))
    return found


def activate(app: Deployed, version: str, *options: str) -> Ran:
    """Activate the release of a version."""
    return program(app, "activate", versions(app)[version], *options)
