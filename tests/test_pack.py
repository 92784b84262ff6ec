"""A source is named by its content and by nothing else, and its archive is whole and the same everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pack
import pytest
from templating import ROLE


def tree(top: Path, names: list[str] | None = None) -> Path:
    """Make a source; `names` are its files in the order of their making."""
    for name in names or ["wsgi.py", "shop/__init__.py", "shop/views.py", "bin/run"]:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_text(f"content of {name}\n")
    if (top / "bin/run").exists():
        (top / "bin/run").chmod(0o755)
    (top / "link").symlink_to("wsgi.py")
    return top


def members(archive: Path) -> list[str]:
    with tarfile.open(archive) as opened:
        return opened.getnames()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tree(tmp_path / "source")


def put(name: str, top: Path) -> None:
    (top / name).parent.mkdir(parents=True, exist_ok=True)
    (top / name).write_text("x")


def relink(target: str, top: Path) -> None:
    (top / "link").unlink()
    (top / "link").symlink_to(target)


def unlink_and_write(top: Path) -> None:
    (top / "link").unlink()
    (top / "link").write_text("wsgi.py")


SAME: dict[str, Callable[[Path], object]] = {
    "times": lambda top: os.utime(top / "wsgi.py", (1, 1)),
    "permissions besides execution": lambda top: (top / "wsgi.py").chmod(0o600),
    "an empty folder": lambda top: (top / "empty").mkdir(),
    "a special file": lambda top: os.mkfifo(top / "pipe"),
    **{name: partial(put, f"{name}/x") for name in (".git", ".venv", "venv", "node_modules", ".mypy_cache", ".tox")},
    **{name: partial(put, name) for name in (".env", ".coverage", ".DS_Store", "shop/.env", "shop/views.pyc")},
    **{name: partial(put, name) for name in ("shop/.svn/x", "shop/__pycache__/views.pyc", "shop/.views.py.swp")},
}

OTHER: dict[str, Callable[[Path], object]] = {
    "content": lambda top: (top / "wsgi.py").write_text("x"),
    "a name": lambda top: (top / "wsgi.py").rename(top / "wsgj.py"),
    "the folder of a file": lambda top: (top / "wsgi.py").rename(top / "shop/wsgi.py"),
    "a file more": lambda top: (top / "environment").write_text(""),
    "a file less": lambda top: (top / "shop/views.py").unlink(),
    "execution": lambda top: (top / "wsgi.py").chmod(0o755),
    "no execution": lambda top: (top / "bin/run").chmod(0o644),
    "the target of a link": partial(relink, "shop/views.py"),
    "a file instead of a link": unlink_and_write,
    "a link to a folder": lambda top: (top / "linked").symlink_to("shop"),
    "content moved from file to file": lambda top: [
        (top / "wsgi.py").write_text("content of wsgi.py\ncontent"),
        (top / "shop/views.py").write_text(" of shop/views.py\n"),
    ],
}


@pytest.mark.parametrize("what", SAME)
def test_the_digest_is_the_same_with_other(source: Path, what: str) -> None:
    before = pack.pack(source, [])
    SAME[what](source)
    assert pack.pack(source, []) == before


@pytest.mark.parametrize("what", OTHER)
def test_the_digest_is_another_with_other(source: Path, what: str) -> None:
    before = pack.pack(source, [])
    OTHER[what](source)
    assert pack.pack(source, []) != before


def test_the_digest_is_that_of_the_content_in_every_place_and_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tree(tmp_path / "one", ["a", "b/c", "b-c", "d"])
    two = tree(tmp_path / "two" / "deeper", ["d", "b-c", "b/c", "a"])
    before = pack.pack(one, [])
    assert pack.pack(two, []) == before
    walk = os.walk

    def backwards(top: Path) -> object:
        for folder, folders, files in walk(top):
            folders.sort(reverse=True)
            yield folder, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", backwards)
    assert pack.pack(one, []) == before


def test_the_archive_belongs_to_nobody_in_particular(source: Path, tmp_path: Path) -> None:
    # Only root can give files away; whoever runs this, the names and numbers in the archive are nobody's.
    if os.geteuid() == 0:
        os.chown(source / "wsgi.py", 1234, 1234)
    pack.pack(source, [], tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as opened:
        seen = {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in opened}
        modes = {m.name: m.mode for m in opened if m.isfile()}
    assert seen == {(0, 0, "", "", 0)}
    assert modes == {"bin/run": 0o755, "shop/__init__.py": 0o644, "shop/views.py": 0o644, "wsgi.py": 0o644}


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["*.py"], ["bin/run", "link"]),
        (["shop"], ["bin/run", "link", "wsgi.py"]),
        (["shop/views.py", "bin"], ["link", "shop/__init__.py", "wsgi.py"]),
        (["views.py", "link"], ["bin/run", "shop/__init__.py", "wsgi.py"]),
        (["nothing-of-it"], ["bin/run", "link", "shop/__init__.py", "shop/views.py", "wsgi.py"]),
    ],
)
def test_what_is_excluded_counts_for_neither_archive_nor_digest(
    source: Path, tmp_path: Path, patterns: list[str], left: list[str]
) -> None:
    digest = pack.pack(source, patterns, tmp_path / "a.tar.gz")
    assert sorted(members(tmp_path / "a.tar.gz")) == left
    assert (digest == pack.pack(source, [])) == (len(left) == 5)


def test_the_archive_is_the_same_in_every_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = pack.pack(source, [], tmp_path / "one" / "a.tar.gz")
    os.utime(source / "wsgi.py", (1, 1))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert pack.pack(source, [], tmp_path / "two.tar.gz") == digest
    assert (tmp_path / "one" / "a.tar.gz").read_bytes() == (tmp_path / "two.tar.gz").read_bytes()
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a.tar.gz"]


def test_an_interrupted_run_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pack.pack(source, [], tmp_path / "one" / "a.tar.gz")
    assert list((tmp_path / "one").iterdir()) == []


def test_a_pattern_that_looks_like_an_option_is_a_pattern(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack.main(["--", str(source), "--help"]) == 0
    assert capsys.readouterr().out.strip() == pack.pack(source, ["--help"])


def test_the_archive_unpacks_to_what_was_packed(source: Path, tmp_path: Path) -> None:
    digest = pack.pack(source, [], tmp_path / "a.tar.gz")
    with tarfile.open(tmp_path / "a.tar.gz") as opened:
        opened.extractall(tmp_path / "again", filter="data")
    assert pack.pack(tmp_path / "again", []) == digest
    assert (tmp_path / "again" / "link").readlink() == Path("wsgi.py")
    assert (tmp_path / "again" / "shop/views.py").read_text() == "content of shop/views.py\n"


def test_a_pack_that_is_cut_short_leaves_nothing_under_the_archives_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache" / "a.tar.gz"
    add = tarfile.TarFile.addfile
    count = 0

    def full(archive: tarfile.TarFile, *arguments: object) -> None:
        nonlocal count
        count += 1
        assert not place.exists()
        if count == 3:
            raise OSError(28, "No space left on device")
        add(archive, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(OSError, match="No space left"):
        pack.pack(source, [], place)
    assert not place.exists() and count == 3
    monkeypatch.undo()
    pack.pack(source, [], place)
    assert len(members(place)) == 5


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the program as the role does."""
    command = [sys.executable, str(ROLE / "files" / "pack.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_program_prints_the_digest_and_writes_the_archive(source: Path, tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    done = run("--to", archive, source, "shop", "*.py")
    assert (done.returncode, done.stdout) == (0, pack.pack(source, ["shop", "*.py"]) + "\n")
    assert sorted(members(archive)) == ["bin/run", "link"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _place: None, "{} is not a directory"),
        (lambda place: place.write_text("x"), "{} is not a directory"),
        (lambda place: place.mkdir(), "{} holds no files"),
        (lambda place: tree(place / ".git", ["config"]), "{} holds no files"),
    ],
    ids=["nothing there", "a file", "empty", "nothing but what is left out"],
)
def test_a_directory_without_an_application_is_refused(
    tmp_path: Path, make: Callable[[Path], object], message: str
) -> None:
    make(tmp_path / "source")
    done = run("--to", tmp_path / "a.tar.gz", tmp_path / "source")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message.format(tmp_path / "source") + "\n")
    assert not (tmp_path / "a.tar.gz").exists()
