"""The role's variables and templates as a play sees them: evaluated by Ansible's own Templar, each when it is used.

`render` does what the task `ansible.builtin.template` does to a file of the role, `evaluate` what a task does to an
expression in its arguments. Both hold for ansible-core 2.19 and later, where only text that is marked as trusted is a
template (Ansible 2.19 porting guide, "Template trust model").
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader  # type: ignore[import-untyped]
from ansible.plugins.loader import init_plugin_loader  # type: ignore[import-untyped]
from ansible.template import Templar, trust_as_template  # type: ignore[import-untyped]
from jinja2 import Environment

ROLE = Path(__file__).resolve().parents[1] / "roles" / "uwsgi_sqlalchemy"
OPTION_PREFIX = "uwsgi_sqlalchemy_"
TEMPLATES = ROLE / "templates" / "etc"
# What the interface requires, and what earlier tasks of a play have registered when the templates are written.
GIVEN: dict[str, Any] = {
    "inventory_hostname": "web1",
    "ansible_play_hosts_all": ["web1", "web2"],
    "ansible_managed": "Ansible managed",
    "ansible_playbook_python": "/usr/bin/python3",
    "role_path": str(ROLE),
    "uwsgi_sqlalchemy_app": "shop",
    "uwsgi_sqlalchemy_source": {"directory": "/src/shop"},
    "__uwsgi_sqlalchemy_packed": {"stdout": "0" * 64},
    "__uwsgi_sqlalchemy_host": {"stdout": '{"python": "cpython-311 /usr/bin/python3", "uv": ""}'},
}

init_plugin_loader()  # once in a process: filters and tests are found by it

_compile = Environment.compile
_compiled: dict[object, Any] = {}


def compile_once(self: Environment, source: Any, *arguments: Any, **named: Any) -> Any:
    """Compile a template as Jinja2 does, but each text once: Ansible spends most of its time compiling them again."""
    if not isinstance(source, str) or arguments or named:
        return _compile(self, source, *arguments, **named)
    key = (type(self), source, self.trim_blocks, self.lstrip_blocks, self.newline_sequence)
    return _compiled[key] if key in _compiled else _compiled.setdefault(key, _compile(self, source))


TEMPLAR = Templar(loader=DataLoader())  # one, so that it looks each filter up once
Environment.compile = compile_once  # type: ignore[method-assign]


@cache
def load(name: str) -> Any:
    """Return the content of a YAML file of the role, its texts being templates as in a play."""
    return DataLoader().load_from_file(str(ROLE / name), trusted_as_template=True)


def plain(name: str) -> Any:
    """Return the content of a YAML file of the role as it stands there."""
    return yaml.safe_load((ROLE / name).read_text(encoding="utf-8"))


def variables(**given: Any) -> dict[str, Any]:
    """Return the variables of a play on a Debian host: defaults, the role's own, and those given, in Ansible's order.

    Names of the interface are given without their prefix: `processes=2` is uwsgi_sqlalchemy_processes. Their values are
    final: what looks like a template in them is none. `debian` is the version of the host's system.
    """
    debian = given.pop("debian", 12)
    interface = load("defaults/main.yml")
    named = {f"{OPTION_PREFIX}{name}" if not name.startswith("__") else name: given[name] for name in given}
    if unknown := {name for name in named if not name.startswith("__")} - interface.keys() - GIVEN.keys():
        raise ValueError(f"the role has no variable {', '.join(unknown)}")
    facts = {"ansible_facts": {"distribution": "Debian", "distribution_major_version": str(debian)}}
    own = {**load("vars/main.yml"), **load(f"vars/Debian-{debian}.yml")}
    return {**interface, **GIVEN, **facts, **own, **named}


def render(template: str, **given: Any) -> str:
    """Return what a template of the role, named by its path in templates/etc, makes of the variables."""
    source = trust_as_template((TEMPLATES / f"{template}.j2").read_text(encoding="utf-8"))
    TEMPLAR.available_variables = variables(**given)
    # The settings of ansible.builtin.template, whose defaults are not those of Jinja2.
    overrides = {"trim_blocks": True, "lstrip_blocks": False, "newline_sequence": "\n"}
    text = TEMPLAR.template(source, escape_backslashes=False, overrides=overrides)
    return "" if text is None else str(text)  # as the task does: a template without output comes to None


def evaluate(expression: str, values: dict[str, Any]) -> Any:
    """Return what an expression, a text with {{ }}, comes to in a task that sees these variables."""
    TEMPLAR.available_variables = values
    return TEMPLAR.template(trust_as_template(expression))
