"""The repository is an installable collection, built, installed and used here without any network."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parents[1]
GALAXY = yaml.safe_load((TOP / "galaxy.yml").read_text())
NAME = f"{GALAXY['namespace']}.{GALAXY['name']}"
# All that a collection holds of the repository. Whatever else comes to its top has to be named in build_ignore.
BELONGS = {"CHANGELOG.md", "FILES.json", "LICENSE", "MANIFEST.json", "README.md", "docs", "meta", "playbooks", "roles"}

# The last inclusion has a wrong name as well, so that the role would go no further if it let the misspelt key pass.
PLAYBOOK = f"""\
- hosts: localhost
  connection: local
  gather_facts: false
  vars:
    ansible_python_interpreter: "{{{{ ansible_playbook_python }}}}"
    uwsgi_sqlalchemy_source: {{package: shop==1.0}}
  tasks:
    - ansible.builtin.include_role: {{name: {NAME}.uwsgi_sqlalchemy, tasks_from: preflight}}
      vars: {{uwsgi_sqlalchemy_app: shop}}
    - ansible.builtin.debug: {{msg: a good name is accepted}}
    - block:
        - ansible.builtin.include_role: {{name: {NAME}.uwsgi_sqlalchemy, tasks_from: preflight}}
          vars: {{uwsgi_sqlalchemy_app: My_Shop}}
      rescue:
        - ansible.builtin.include_role: {{name: {NAME}.uwsgi_sqlalchemy}}
          vars: {{uwsgi_sqlalchemy_app: My_Shop, uwsgi_sqlalchemy_source: {{pakcage: shop==1.0}}}}
"""


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program of Ansible with no settings but these, and nothing but `folder` for its collections and roles."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
        "ANSIBLE_CONFIG": str(folder / "ansible.cfg"),
        "ANSIBLE_HOME": str(folder / "home"),
        "ANSIBLE_COLLECTIONS_PATH": str(folder / "installed"),
        "ANSIBLE_ROLES_PATH": str(folder / "none"),
        "ANSIBLE_INJECT_FACT_VARS": "false",
        "ANSIBLE_PIPELINING": "true",
        "ANSIBLE_NOCOLOR": "true",
        "ANSIBLE_LOCALHOST_WARNING": "false",
    }
    (folder / "ansible.cfg").write_text("")
    program = str(Path(sys.executable).with_name(command[0]))
    return subprocess.run(
        [program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    built = run(folder, "ansible-galaxy", "collection", "build", str(TOP), "--output-path", str(folder))
    assert built.returncode == 0, built.stderr
    return folder / f"{GALAXY['namespace']}-{GALAXY['name']}-{GALAXY['version']}.tar.gz"


@pytest.fixture(scope="module")
def members(archive: Path) -> Iterator[dict[str, tarfile.TarInfo]]:
    with tarfile.open(archive) as opened:
        yield {member.name: member for member in opened if member.isfile() or member.issym()}


def test_the_archive_holds_what_belongs_to_a_collection_and_nothing_else(members: dict[str, tarfile.TarInfo]) -> None:
    assert {name.split("/")[0] for name in members} <= BELONGS
    assert not [name for name in members if "__pycache__" in name or "/." in name]
    assert sum(member.size for member in members.values()) < 1_000_000


def test_the_archive_holds_the_whole_role(members: dict[str, tarfile.TarInfo]) -> None:
    role = TOP / "roles/uwsgi_sqlalchemy"
    files = {path.relative_to(TOP).as_posix() for path in role.rglob("*") if path.is_file()}
    wanted = {name for name in files if "__pycache__" not in name and "/." not in name}
    assert wanted == {name for name in members if name.startswith("roles/")}
    assert "roles/uwsgi_sqlalchemy/templates/etc/uwsgi-APP/uwsgi.ini.j2" in wanted


def test_what_the_metadata_names_is_there(members: dict[str, tarfile.TarInfo]) -> None:
    assert {GALAXY["readme"], "LICENSE", "CHANGELOG.md", "meta/runtime.yml"} <= members.keys()
    assert f"## [{GALAXY['version']}]" in (TOP / "CHANGELOG.md").read_text()
    assert yaml.safe_load((TOP / "meta/runtime.yml").read_text()) == {"requires_ansible": ">=2.19.0"}
    assert GALAXY["dependencies"] == {}


def test_the_installed_role_runs_by_its_full_name_and_refuses_what_is_wrong(archive: Path, tmp_path: Path) -> None:
    place = str(tmp_path / "installed")
    installed = run(
        tmp_path, "ansible-galaxy", "collection", "install", "--offline", str(archive), "--collections-path", place
    )
    assert installed.returncode == 0, installed.stderr
    (tmp_path / "play.yml").write_text(PLAYBOOK)
    played = run(tmp_path, "ansible-playbook", "--check", "--inventory", "localhost,", "play.yml")
    assert played.returncode == 2, played.stdout + played.stderr
    accepted, _, refused = played.stdout.partition("a good name is accepted")
    assert "FAILED" not in accepted and "Refuse what cannot work" in accepted
    assert "uwsgi_sqlalchemy_app is 'My_Shop': use 1 to 26 lower case letters, digits and hyphens" in refused
    assert "pakcage. Supported parameters include: archive, directory" in refused
    assert "changed=0" in refused and "rescued=1" in refused
