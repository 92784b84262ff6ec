"""Argument specification, defaults and README of the role say the same, and the role uses what they describe."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import docs
import pytest
import yaml
from templating import ROLE, plain

OPTIONS = docs.load_options()
# The texts in which the role uses its variables. What is in files/ belongs to other programs and sees none of them.
TEXTS = {
    path: path.read_text() for part in ("tasks", "templates", "vars") for path in sorted((ROLE / part).rglob("*.*"))
}
NAME = re.compile(r"(?<!\w)(_*)uwsgi_sqlalchemy_[a-z]\w*")


def required(options: dict[str, Any]) -> set[str]:
    return {name for name, option in options.items() if option.get("required")}


def disagreements(role: Path) -> list[str]:
    """Return what a role's argument specification, its defaults and its README say differently."""
    options = docs.load_options(role)
    text, readme = (role / "defaults" / "main.yml").read_text(), (role / "README.md").read_text()
    defaults = yaml.safe_load(text)
    specified = {name: option.get("default") for name, option in options.items() if name not in required(options)}
    found = [f"{name} is in one only" for name in sorted(specified.keys() ^ defaults.keys())]
    # JSON tells true from 1, and "1" from 1.
    both = specified.keys() & defaults.keys()
    found += [f"{name} differs" for name in sorted(both) if json.dumps(specified[name]) != json.dumps(defaults[name])]
    if not found and docs.commented_defaults(text, options) != text:
        found.append("the comments of the defaults")
    if not found and docs.with_tables(readme, docs.tables(text, options)) != readme:
        found.append("the tables of the README")
    return found


def test_specification_defaults_and_readme_agree() -> None:
    assert disagreements(ROLE) == []
    assert required(OPTIONS) == {"uwsgi_sqlalchemy_app", "uwsgi_sqlalchemy_source"}


PLANTED = {
    "a key that is not specified": (
        *("defaults/main.yml", r"\Z", "uwsgi_sqlalchemy_workers: 4\n"),
        "uwsgi_sqlalchemy_workers is in one only",
    ),
    "a key without a default": (
        *("defaults/main.yml", r"^uwsgi_sqlalchemy_processes:.*\n", ""),
        "uwsgi_sqlalchemy_processes is in one only",
    ),
    "a required key with a default": (
        *("defaults/main.yml", r"\Z", "uwsgi_sqlalchemy_app: shop\n"),
        "uwsgi_sqlalchemy_app is in one only",
    ),
    "another value": (
        *("defaults/main.yml", r"^(uwsgi_sqlalchemy_processes:) 4", r"\1 5"),
        "uwsgi_sqlalchemy_processes differs",
    ),
    "a value of another type": (
        *("defaults/main.yml", r"^(uwsgi_sqlalchemy_processes:) 4", r'\1 "4"'),
        "uwsgi_sqlalchemy_processes differs",
    ),
    "another specified value": (
        *("meta/argument_specs.yml", r"(uwsgi_sqlalchemy_nginx:\n +type: bool\n +default:) true", r"\1 1"),
        "uwsgi_sqlalchemy_nginx differs",
    ),
    "another comment": (
        *("defaults/main.yml", r"^# Number of worker processes\.", "# Number of processes."),
        "the comments of the defaults",
    ),
    "a missing comment": (
        *("defaults/main.yml", r"^# Number of worker processes\..*\n", ""),
        "the comments of the defaults",
    ),
    "another description": (
        *("meta/argument_specs.yml", "Number of worker processes", "Count of worker processes"),
        "the comments of the defaults",
    ),
    "another value in the README": (
        *("README.md", r"(`uwsgi_sqlalchemy_processes` \| int \|) `4`", r"\1 `5`"),
        "the tables of the README",
    ),
    "a missing row": (
        *("README.md", r"^\| `uwsgi_sqlalchemy_processes` .*\n", ""),
        "the tables of the README",
    ),
    "a row too many": (
        *("README.md", r"^(\| `uwsgi_sqlalchemy_)processes(.*\n)", r"\1processes\2\1workers\2"),
        "the tables of the README",
    ),
    "another type": (
        *("meta/argument_specs.yml", r"(uwsgi_sqlalchemy_processes:\n +type:) int", r"\1 float"),
        "the tables of the README",
    ),
}


def changed_copy(folder: Path, name: str, pattern: str, replacement: str) -> Path:
    """Copy what describes the role's interface and change one file of the copy."""
    role = folder / "roles" / ROLE.name
    for part in ("defaults/main.yml", "meta/argument_specs.yml", "README.md"):
        (role / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROLE / part, role / part)
    text, count = re.subn(pattern, replacement, (role / name).read_text(), count=1, flags=re.M)
    assert count == 1, f"{name} has nothing to change"
    (role / name).write_text(text)
    return role


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_found(name: str, tmp_path: Path) -> None:
    file, pattern, replacement, found = PLANTED[name]
    assert disagreements(changed_copy(tmp_path, file, pattern, replacement)) == [found]


@pytest.fixture
def stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A role whose README is out of date, in the place where tools/docs.py looks for the role."""
    role = changed_copy(tmp_path, "README.md", "`10m`", "`20m`")
    load = docs.load_options
    monkeypatch.setattr(docs, "ROLE", role)
    monkeypatch.setattr(docs, "load_options", lambda: load(role))
    return role


def test_the_generator_says_what_is_out_of_date_and_changes_nothing(
    stale: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert docs.main(["--check"]) == 1
    assert capsys.readouterr().out == "roles/uwsgi_sqlalchemy/README.md is out of date: run `make docs`\n"
    assert "`20m`" in (stale / "README.md").read_text()


def test_the_generator_brings_it_up_to_date(stale: Path) -> None:
    assert docs.main([]) == 0
    assert docs.main(["--check"]) == 0
    assert (stale / "README.md").read_text() == (ROLE / "README.md").read_text()


def test_the_generator_names_a_default_that_is_not_specified(stale: Path) -> None:
    defaults = stale / "defaults" / "main.yml"
    defaults.write_text(defaults.read_text() + "uwsgi_sqlalchemy_workers: 4\n")
    with pytest.raises(SystemExit, match=r"uwsgi_sqlalchemy_workers, which meta/argument_specs.yml does not describe"):
        docs.main([])


def test_the_generator_finds_this_role_up_to_date() -> None:
    assert docs.main(["--check"]) == 0


def test_defaults_are_of_their_specified_type_and_among_the_choices() -> None:
    kinds = {"bool": bool, "dict": dict, "int": int, "list": list, "path": str, "str": str}
    for name, option in OPTIONS.items():
        default = option.get("default", kinds[option["type"]]())
        assert type(default) is kinds[option["type"]], name
        assert default in option.get("choices", [default]), name
        if isinstance(default, list):
            assert {type(item) for item in default} <= {kinds[option["elements"]]}, name


def test_the_database_url_is_of_a_type_whose_errors_do_not_print_it() -> None:
    # On a wrong type or choice an argument specification prints the value, with no_log as well; every value is a text.
    option = OPTIONS["uwsgi_sqlalchemy_database_url"]
    assert option["type"] == "str" and "choices" not in option


# --- what the role uses ------------------------------------------------------------------------------------------


def used(text: str, prefix: str = "") -> set[str]:
    """Return the role's variables in a text whose names begin with so many underscores."""
    return {match[0] for match in NAME.finditer(text) if match[1] == prefix}


def code(path: Path) -> str:
    """Return a file of the role without what only people read: comments, and the messages of the preflight."""
    text = re.sub(r"\{#.*?#\}", "", TEXTS[path], flags=re.S)
    text = re.sub(r"^\s*#.*$", "", text, flags=re.M)
    text = re.sub(r"^( *)fail_msg:.*\n(?:\1 +.*\n)*", "", text, flags=re.M)
    return re.sub(r"^( *)otherwise:.*\n(?:\1 +.*\n)*", "", text, flags=re.M)


def made(path: Path) -> set[str]:
    """Return the variables that a file of the role makes, anywhere in it."""
    if path.suffix != ".yml":
        return set()
    if path.parent.name == "vars":
        return set(plain(f"vars/{path.name}"))

    def names(part: Any) -> set[str]:
        if isinstance(part, list):
            return set().union(*map(names, part))
        if not isinstance(part, dict):
            return set()
        own = set(part.get("vars", {})) | ({part["register"]} if "register" in part else set())
        return own.union(*map(names, part.values()))

    return names(plain(f"tasks/{path.name}"))


def test_every_variable_does_something() -> None:
    assert OPTIONS.keys() - set().union(*(used(code(path)) for path in TEXTS)) == set()


def test_no_variable_is_used_that_is_not_of_the_interface() -> None:
    known = OPTIONS.keys() | {path.stem for path in (ROLE / "files").iterdir()}
    assert {path: unknown for path in TEXTS if (unknown := used(TEXTS[path]) - known)} == {}


def test_the_names_that_the_role_makes_are_marked_as_internal() -> None:
    names = set().union(*map(made, TEXTS))
    assert {name for name in names if not name.startswith("__uwsgi_sqlalchemy_")} == set()
    assert len(names) > 20, "the search finds no names"


def test_every_internal_name_in_use_is_made_somewhere() -> None:
    # One that nothing makes is an undefined variable on some host, some day.
    assert set().union(*(used(text, "__") for text in TEXTS.values())) - set().union(*map(made, TEXTS)) == set()
    assert [path for path, text in TEXTS.items() if used(text, "_")] == []
