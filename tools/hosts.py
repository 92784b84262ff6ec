"""Test hosts: Debian systems with systemd and sshd in containers, built from Debian's own archive.

    hosts.py up GROUP     create the hosts of a group; their platforms (JSON, as in molecule.yml) on standard input
    hosts.py down GROUP   remove them
    hosts.py clean        remove every host this checkout has made
    hosts.py images       build the images that are missing

Hosts of a group share a network and reach each other by name. `ssh -F .run/GROUP/ssh_config NAME` logs in.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / ".run"
RECIPE = ROOT / "molecule" / "shared" / "image"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uwsgi-sqlalchemy"
# Two checkouts on one machine must not meet in podman's names.
CHECKOUT = hashlib.sha256(str(ROOT).encode()).hexdigest()[:6]
LABEL = "uwsgi-sqlalchemy.checkout"
SUITES = ("bookworm", "trixie")
# Debian 12 has no uv and Debian 13 gets it, so that both of the role's installers are tested.
SUITES_WITH_UV = ("trixie",)
BOOT_SECONDS = 60


class HostError(Exception):
    """A test host or its image could not be made; the message says why."""


@dataclass(frozen=True)
class Host:
    """One test host of a group."""

    group: str
    name: str
    suite: str
    tmpfs: tuple[str, ...] = ()

    @property
    def container(self) -> str:
        """Return the name podman knows the host by."""
        return f"{self.group}-{self.name}-{CHECKOUT}"

    @property
    def archives(self) -> Path:
        """Return the folder that is the host's /var/cache/apt/archives."""
        return CACHE / "hosts" / self.container


def say(text: str) -> None:
    """Tell the person who waits what is being done."""
    print(f"hosts: {text}", file=sys.stderr, flush=True)


def podman(*arguments: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run podman as root; raises HostError with podman's own words when it fails and check is set."""
    command = [str(ROOT / "tools" / "podman"), *arguments]
    result = subprocess.run(command, check=False, capture_output=True, text=True, **options)
    if check and result.returncode:
        raise HostError(f"podman {shlex.join(arguments)} failed: {result.stderr.strip()}")
    return result


def as_root(*command: str) -> list[str]:
    """Return a command that runs as root."""
    return [*command] if os.geteuid() == 0 else ["sudo", "--", *command]


def copy_archives(source: Path, target: Path) -> None:
    """Hard-link the .deb files of one folder into another, as root: apt in the hosts wrote them."""
    script = 'mkdir -p "$1" "$2" && find "$1" -maxdepth 1 -name "*.deb" -exec cp --link --no-clobber -t "$2" {} +'
    subprocess.run(as_root("sh", "-c", script, "sh", str(source), str(target)), check=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process of this user at a time do the named thing."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# --- images ---------------------------------------------------------------------------------------------------------


def image_files(suite: str) -> dict[str, bytes]:
    """Return what is laid over the bare system, content by path: the recipe's files and the machine's settings.

    With TEST_HOSTS_MACHINE_SETTINGS=0 the machine's certificate authorities, proxies and pip settings stay out.
    """
    base = RECIPE / "files"
    files = {str(path.relative_to(base)): path.read_bytes() for path in sorted(base.rglob("*")) if path.is_file()}
    settings: dict[str, str] = {}
    if os.environ.get("TEST_HOSTS_MACHINE_SETTINGS", "1") != "0":
        settings = machine.pip_settings()
        authorities = machine.certificate_authorities(settings)
        settings["cert"] = str(machine.SYSTEM_BUNDLE)
        files |= {f"usr/local/share/ca-certificates/{name}": pem.encode() for name, pem in authorities.items()}
        files["etc/environment"] = "".join(f'{name}="{value}"\n' for name, value in machine.proxies().items()).encode()
        apt = "".join(f"{line}\n" for line in machine.apt_network_settings())
        files["etc/apt/apt.conf.d/80machine"] = apt.encode()
    files["etc/pip.conf"] = machine.pip_conf(settings, **{"cache-dir": "/var/cache/wheels/pip"}).encode()
    uv = 'cache-dir = "/var/cache/wheels/uv"\nlink-mode = "copy"\n' + machine.uv_toml(settings)
    files["etc/uv/uv.toml"] = uv.encode()
    if suite in SUITES_WITH_UV:
        files["usr/local/bin/uv"] = (Path(sys.executable).parent / "uv").read_bytes()
    return files


def archive_lines(suite: str) -> list[str]:
    """Return sources.list lines for a suite from the machine's own mirrors; raises HostError when it has none."""
    sources = machine.apt_sources()
    if not sources:
        subprocess.run(as_root("apt-get", "update", "-qq"), check=True)
        sources = machine.apt_sources()
    if not any(source.variant == "" for source in sources):
        raise HostError("apt on this machine knows no Debian archive; the test hosts are built from it")
    return [
        f"deb {f'[signed-by={source.signed_by}] ' if source.signed_by else ''}{source.uri} {suite}{source.variant} main"
        for source in sources
    ]


def image_tag(files: dict[str, bytes], lines: Sequence[str], suite: str) -> str:
    """Return the image's name: the same recipe and settings give the same name."""
    digest = hashlib.sha256()
    for part in (suite, *lines, (RECIPE / "packages").read_text(), (RECIPE / "customize").read_text()):
        digest.update(part.encode() + b"\0")
    for path, content in sorted(files.items()):
        digest.update(path.encode() + b"\0" + content + b"\0")
    return f"localhost/uwsgi-sqlalchemy-{suite}:{digest.hexdigest()[:12]}"


def image(suite: str) -> str:
    """Return the name of the suite's image, building it first where it is missing."""
    files, lines = image_files(suite), archive_lines(suite)
    tag = image_tag(files, lines, suite)
    with locked(f"image-{suite}"):
        if podman("image", "exists", tag, check=False).returncode:
            build(suite, tag, files, lines)
    return tag


def build(suite: str, tag: str, files: dict[str, bytes], lines: Sequence[str]) -> None:
    """Build a suite's image with mmdebstrap, give it to podman, and drop the one it replaces."""
    say(f"building the {suite} image from Debian's archive (a minute or two, once)")
    started = time.monotonic()
    packages = ",".join((RECIPE / "packages").read_text().split())
    archives = CACHE / suite / "image-archives"
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder)
        for path, content in files.items():
            (overlay / path).parent.mkdir(parents=True, exist_ok=True)
            (overlay / path).write_bytes(content)
            (overlay / path).chmod(0o755 if "/bin/" in f"/{path}" else 0o644)
        for directory in (overlay, *overlay.rglob("*/")):
            directory.chmod(0o755)
        deb = 'mkdir -p {0} "$1/var/cache/apt/archives"; find {1} -name "*.deb" -exec cp -n -t {2} {{}} +'
        cache, inside = shlex.quote(str(archives)), '"$1/var/cache/apt/archives"'
        command = as_root(
            "mmdebstrap",
            "--quiet",
            "--variant=apt",
            f"--include={packages}",
            # The package lists stay, for a quick first `apt update`; the archives are kept outside for the next build.
            "--skip=cleanup/apt/lists,essential/unlink",
            *(f"--aptopt={line}" for line in files.get("etc/apt/apt.conf.d/80machine", b"").decode().splitlines()),
            f"--setup-hook={deb.format(cache, cache, inside)}",
            f"--customize-hook={deb.format(cache, inside, cache)}",
            f'--customize-hook={shlex.quote(str(RECIPE / "customize"))} "$1" {shlex.quote(folder)}',
            suite,
            "-",  # the archive, to standard output
            "-",  # the sources, from standard input
        )
        changes = ('CMD ["/lib/systemd/systemd"]', "STOPSIGNAL SIGRTMIN+3")
        options = [word for change in changes for word in ("--change", change)]
        with tempfile.TemporaryFile("w+") as sources, tempfile.TemporaryFile("w+") as words:
            sources.write("".join(f"{line}\n" for line in lines))
            sources.seek(0)
            with subprocess.Popen(command, stdin=sources, stdout=subprocess.PIPE, stderr=words) as mmdebstrap:
                imported = podman("import", "--quiet", *options, "-", check=False, stdin=mmdebstrap.stdout)
            words.seek(0)
            if mmdebstrap.returncode:
                raise HostError(f"mmdebstrap could not build {suite}:\n{words.read()[-3000:]}")
        if imported.returncode:
            raise HostError(f"podman import failed: {imported.stderr.strip()}")
    repository = tag.rpartition(":")[0]
    superseded = podman("images", "--quiet", "--no-trunc", "--filter", f"reference={repository}").stdout.split()
    podman("tag", imported.stdout.split()[-1], tag)
    if superseded:
        # One that a host still runs on stays.
        podman("rmi", *superseded, check=False)
    say(f"built {suite} in {time.monotonic() - started:.0f} s")


# --- hosts ----------------------------------------------------------------------------------------------------------


def key() -> Path:
    """Return the private key that opens this checkout's hosts, made on first use."""
    path = RUN / "ssh" / "id_ed25519"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test hosts", "-f", str(path)], check=True)
    return path


def limit(kind: int, most: int) -> str:
    """Return a container's limit that does not exceed this machine's, which a container may only lower."""
    hard = resource.getrlimit(kind)[1]
    return str(most if hard == resource.RLIM_INFINITY else min(hard, most))


def start(host: Host, tag: str) -> None:
    """Start one host and let this checkout's key in, unless it runs already."""
    state = podman("container", "inspect", "--format", "{{.State.Running}} {{.ImageName}}", host.container, check=False)
    if state.stdout.split() == ["true", tag]:
        return
    remove(host.container)
    copy_archives(CACHE / host.suite / "archives", host.archives)
    wheels = CACHE / host.suite / "wheels"
    subprocess.run(as_root("mkdir", "-p", str(wheels)), check=True)
    podman(
        "run",
        "--detach",
        f"--name={host.container}",
        f"--hostname={host.name}",
        f"--network={network(host.group)}:alias={host.name}",
        f"--label={LABEL}={ROOT}",
        f"--label=group={host.group}",
        f"--label=suite={host.suite}",
        "--privileged",
        "--systemd=always",
        # podman's own /run is open to everybody; a real one is not.
        "--tmpfs=/run:mode=0755",
        # cgroup v2 beside v1 has no pids controller, and without it podman's default limit is an error.
        "--pids-limit=0",
        f"--ulimit=nofile={limit(resource.RLIMIT_NOFILE, 65536)}",
        f"--ulimit=nproc={limit(resource.RLIMIT_NPROC, 32768)}",
        f"--volume={host.archives}:/var/cache/apt/archives",
        f"--volume={wheels}:/var/cache/wheels",
        *(f"--tmpfs={mount}" for mount in host.tmpfs),
        tag,
    )
    authorize = "install -d -o ansible -g ansible -m 700 ~ansible/.ssh && cat > ~ansible/.ssh/authorized_keys"
    public = key().with_suffix(".pub").read_text()
    podman("exec", "--interactive", host.container, "sh", "-c", authorize, input=public)


def network(group: str) -> str:
    """Return the name of a group's network."""
    return f"{group}-{CHECKOUT}"


def address(host: Host) -> str:
    """Return the host's address on its group's network."""
    return podman(
        "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", host.container
    ).stdout.strip()


def ssh_config(group: str, addresses: dict[str, str]) -> Path:
    """Write the group's ssh_config and return its path."""
    # A socket's path has room for 108 characters: a checkout deep down in a tree would not fit.
    sockets = CACHE / "ssh"
    sockets.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Throw-away hosts on a network inside this machine: their keys are new each time and their names repeat.
    common = (
        "Host *\n  User ansible\n"
        f"  IdentityFile {key()}\n"
        "  IdentitiesOnly yes\n  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n"
        # One connection for all commands. Addresses are used again: one that outlives its host must notice.
        f"  ControlMaster auto\n  ControlPersist 60\n  ControlPath {sockets}/{CHECKOUT}-%h\n  ServerAliveInterval 5\n"
    )
    path = RUN / group / "ssh_config"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"Host {name}\n  HostName {ip}\n" for name, ip in addresses.items()) + common)
    return path


def wait(host: Host, config: Path) -> None:
    """Wait until systemd has started everything and ssh and sudo work; raises HostError with what failed."""
    question = ["ssh", "-F", str(config), "-o", "ConnectTimeout=2", host.name]
    deadline = time.monotonic() + BOOT_SECONDS
    while True:
        command = [*question, "sudo systemctl is-system-running --wait"]
        answer = subprocess.run(
            command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=BOOT_SECONDS
        )
        if answer.stdout.strip() == "running":
            return
        if answer.stdout.strip() == "degraded" or time.monotonic() > deadline:
            shell = "systemctl --failed --no-legend; journalctl --boot --priority warning --no-pager | tail -20"
            journal = podman("exec", host.container, "sh", "-c", shell, check=False)
            raise HostError(f"{host.name} did not start: {answer.stdout}{answer.stderr}{journal.stdout}")
        time.sleep(0.3)


def up(group: str, hosts: Sequence[Host]) -> list[dict[str, object]]:
    """Create a group's hosts and return how to reach them, in the form of Molecule's instance configuration."""
    with ThreadPoolExecutor() as pool:
        suites = sorted({host.suite for host in hosts})
        tags = dict(zip(suites, pool.map(image, suites), strict=True))
        if podman("network", "exists", network(group), check=False).returncode:
            podman("network", "create", f"--label={LABEL}={ROOT}", network(group))
        list(pool.map(lambda host: start(host, tags[host.suite]), hosts))
        addresses = dict(zip((host.name for host in hosts), pool.map(address, hosts), strict=True))
        config = ssh_config(group, addresses)
        list(pool.map(lambda host: wait(host, config), hosts))
    return [
        {"instance": name, "address": ip, "user": "ansible", "port": 22, "identity_file": str(key())}
        for name, ip in addresses.items()
    ]


def remove(container: str) -> None:
    """Remove one host, if it exists, and keep the Debian archives that it fetched."""
    suite = podman("inspect", "--format", '{{index .Config.Labels "suite"}}', container, check=False)
    podman("rm", "--force", "--time=0", "--ignore", container)
    archives = CACHE / "hosts" / container
    if archives.exists():
        if suite.returncode == 0:
            copy_archives(archives, CACHE / suite.stdout.strip() / "archives")
        subprocess.run(as_root("rm", "-rf", str(archives)), check=True)


def down(group: str | None) -> None:
    """Remove the hosts of one group, or all that this checkout has made."""
    filters = [f"--filter=label={LABEL}={ROOT}", *([f"--filter=label=group={group}"] if group else [])]
    containers = podman("ps", "--all", "--format", "{{.Names}}", *filters).stdout.split()
    with ThreadPoolExecutor() as pool:
        list(pool.map(remove, containers))
    networks = podman("network", "ls", "--quiet", f"--filter=label={LABEL}={ROOT}").stdout.split()
    mine = [name for name in networks if group is None or name == network(group)]
    if mine:
        podman("network", "rm", "--force", *mine)
    for config in RUN.glob(f"{group or '*'}/ssh_config"):
        shutil.rmtree(config.parent)


def main() -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up").add_argument("group")
    commands.add_parser("down").add_argument("group")
    commands.add_parser("clean")
    commands.add_parser("images")
    arguments = parser.parse_args()
    try:
        match arguments.command:
            case "up":
                platforms = json.load(sys.stdin)
                hosts = [
                    Host(arguments.group, item["name"], item["suite"], tuple(item.get("tmpfs", ())))
                    for item in platforms
                ]
                json.dump(up(arguments.group, hosts), sys.stdout, indent=2)
            case "down":
                down(arguments.group)
            case "clean":
                down(None)
            case "images":
                with ThreadPoolExecutor() as pool:
                    list(pool.map(image, SUITES))
    except HostError as error:
        print(f"hosts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
