"""What this machine's package clients are set up with: mirrors, certificate authorities, proxies, indexes.

Read at run time, so that nothing of one machine is written into the repository.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

LOCAL_AUTHORITIES = Path("/usr/local/share/ca-certificates")
SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")


class AptSource(NamedTuple):
    """One Debian repository of the machine: address, suite without the code name ('-updates'), archive key."""

    uri: str
    variant: str
    signed_by: str


def output(*command: str) -> str:
    """Run a command and return its standard output; raises CalledProcessError when it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def apt_sources() -> list[AptSource]:
    """Return the Debian repositories apt knows here, in its order, asked of apt itself (apt-get indextargets)."""
    fields = "$(ORIGIN)|$(COMPONENT)|$(REPO_URI)|$(CODENAME)|$(SIGNED_BY)"
    listing = output("apt-get", "indextargets", "--format", fields, "Created-By: Packages")
    found: dict[AptSource, None] = {}
    for line in listing.splitlines():
        origin, component, uri, codename, signed_by = line.split("|")
        if (origin, component) != ("Debian", "main"):
            continue
        _, dash, variant = codename.partition("-")
        key = signed_by if signed_by.startswith("/") else ""
        found[AptSource(uri, dash + variant, key)] = None
    return list(found)


def apt_network_settings() -> list[str]:
    """Return the machine's apt settings for http and https (proxies, certificates), one apt.conf line each."""
    lines = output("apt-config", "dump").splitlines()
    return [line for line in lines if line.startswith(("Acquire::http::", "Acquire::https::")) and '""' not in line]


def pip_settings() -> dict[str, str]:
    """Return pip's settings that decide where packages come from; files and PIP_* variables taken together.

    Local directories (file: addresses, find-links) are left out: another machine cannot read them.
    """
    wanted = ("index-url", "extra-index-url", "trusted-host", "proxy", "cert", "timeout", "default-timeout")
    settings: dict[str, str] = {}
    listing = output(sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list")
    # pip lists files before the environment, which wins.
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if section in ("global", "install", ":env:") and key in wanted:
            settings["timeout" if key == "default-timeout" else key] = str(ast.literal_eval(value))
    for key in ("index-url", "extra-index-url"):
        remote = [url for url in settings.pop(key, "").split() if not url.startswith("file:")]
        if remote:
            settings[key] = " ".join(remote)
    return settings


def pip_conf(settings: Mapping[str, str], **own: str) -> str:
    """Return a pip.conf with the settings given."""
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in {**settings, **own}.items())


def uv_toml(settings: Mapping[str, str]) -> str:
    """Return a uv.toml that means the same as pip's settings; certificates are the system's in either case."""
    lines = ["system-certs = true"]
    if hosts := settings.get("trusted-host", "").split():
        quoted = ", ".join(f'"{host}"' for host in hosts)
        lines.append(f"allow-insecure-host = [{quoted}]")
    if "proxy" in settings:
        lines += [f'{scheme}-proxy = "{settings["proxy"]}"' for scheme in ("http", "https")]
    lines += [f'[[index]]\nurl = "{url}"' for url in settings.get("extra-index-url", "").split()]
    if "index-url" in settings:
        lines.append(f'[[index]]\nurl = "{settings["index-url"]}"\ndefault = true')
    return "\n".join(lines) + "\n"


def proxies() -> dict[str, str]:
    """Return the proxy variables of this machine's environment."""
    return {name: os.environ[name] for name in PROXY_VARIABLES if os.environ.get(name)}


def certificate_authorities(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the machine's own certificate authorities, PEM by file name.

    Those installed for the system, and those of a bundle that pip (its settings) or OpenSSL is told to use instead.
    """
    found = {path.name: path.read_text() for path in sorted(LOCAL_AUTHORITIES.rglob("*.crt"))}
    named = (settings.get("cert"), os.environ.get("SSL_CERT_FILE"))
    bundles = {Path(name).resolve() for name in named if name} - {SYSTEM_BUNDLE.resolve()}
    end = "-----END CERTIFICATE-----\n"
    for bundle in sorted(bundles):
        pieces = bundle.read_text().split(end)[:-1]
        found |= {f"{bundle.stem}-{number}.crt": piece + end for number, piece in enumerate(pieces)}
    return found
