"""A host on which the role has never run is told so, and not answered with silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_host_without_the_program_is_told_how_to_get_it(tmp_path: Path) -> None:
    role = {"ansible.builtin.include_role": {"name": "uwsgi_sqlalchemy", "tasks_from": "rollback"}}
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [role]}
    playbook = tmp_path / "rollback.yml"
    playbook.write_text(json.dumps([play]))
    program = tmp_path / "absent"
    given = {
        "uwsgi_sqlalchemy_app": "shop",
        "__uwsgi_sqlalchemy_program": str(program),
        "ansible_become": False,
        "ansible_python_interpreter": sys.executable,
    }
    ansible = str(Path(sys.executable).parent / "ansible-playbook")
    command = [ansible, "-i", "localhost,", "-e", json.dumps(given), str(playbook)]
    environment = {**os.environ, "ANSIBLE_HOME": str(tmp_path), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    said = " ".join(done.stdout.split())
    assert f"{program} cannot be run on localhost" in said
    assert "run playbooks/site.yml first, which installs it." in said
