"""What the role refuses before anything changes on a host: each rule by a wrong input, and its exact message.

The rules are those of the task in tasks/preflight.yml, evaluated by Ansible's own Templar.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest
from templating import OPTION_PREFIX, evaluate, load, plain, variables

RULES = next(task for task in load("tasks/preflight.yml") if "__uwsgi_sqlalchemy_rules" in task.get("vars", {}))
SHA256 = hashlib.sha256(b"content").hexdigest()
OTHER = "0" * 64
REFUSED = plain("vars/main.yml")["__uwsgi_sqlalchemy_refused_options"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where ansible-playbook was called: a folder with an application and an archive."""
    (tmp_path / "shop").mkdir()
    for name in (
        "shop.tar.gz",
        "basic-linux.x64-19.3.0.0.0dbru.zip",
        "instantclient_12_2.zip",
        "cwallet.sso",
        "keys.jks",
    ):
        (tmp_path / name).write_bytes(b"content")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def looked_for(source: dict[str, Any]) -> dict[str, Any]:
    """Return what the task before the rules registers of a source: a stat on the controller, or that it was skipped."""
    path = Path(source.get("directory", source.get("archive", "")))
    if not {"directory", "archive"} & source.keys() or str(source.get("archive")).startswith("http"):
        return {"changed": False, "skipped": True}
    return stat(path)


def stat(path: Path) -> dict[str, Any]:
    """Return what ansible.builtin.stat registers of a path on the controller."""
    if not path.exists():
        return {"stat": {"exists": False}}
    sum_of = {"checksum": hashlib.sha256(path.read_bytes()).hexdigest()} if path.is_file() else {}
    return {"stat": {"exists": True, "isdir": path.is_dir(), "isreg": path.is_file(), **sum_of}}


def values(**given: Any) -> dict[str, Any]:
    """Return the variables that the rules see; `facts` are the host's."""
    given = {"source": {"directory": "shop"}, **given}
    facts = {"distribution": "Debian", "distribution_major_version": "13", **given.pop("facts", {})}
    client = given.get("oracle_client", {}).get("archive", "https://")
    wallet = given.get("oracle_net", {}).get("wallet", [])
    registered: Any = {
        "__uwsgi_sqlalchemy_client_stat": {"changed": False, "skipped": True}
        if "://" in client
        else stat(Path(client)),
        "__uwsgi_sqlalchemy_wallet_stat": {"results": [{"item": file, **stat(Path(file))} for file in wallet]},
        "__uwsgi_sqlalchemy_local_stat": looked_for(given["source"]),
        "__uwsgi_sqlalchemy_somaxconn": {"content": b64encode(b"4096\n").decode()},
    }
    seen = {**variables(**given, **registered), "ansible_facts": facts, **RULES["vars"]}
    # What is particular to the platform is read only when the platform is known to be one of the role's.
    return {name: seen[name] for name in seen.keys() - plain("vars/Debian-12.yml").keys()}


def problems(**given: Any) -> list[str]:
    """Return what the role says of its variables."""
    return str(evaluate(RULES["ansible.builtin.assert"]["fail_msg"], values(**given))).splitlines()


THIN, THICK, CX = (
    "oracle+oracledb://u:p@",
    "oracle+oracledb://u:p@db/?service_name=x",
    "oracle+cx_oracle://u:p@db:1521/X",
)
BASIC = {"archive": "https://example.org/instantclient-basic-linux.x64-19.3.0.0.0dbru.zip", "sha256": OTHER}
NAMES = """\
# a comment = none
SHOP.example.org, shop_ro =
  (DESCRIPTION =
    (ADDRESS = (PROTOCOL = TCP)(HOST = db)(PORT = 1521))
(CONNECT_DATA = (SERVICE_NAME = shop)))
other=(DESCRIPTION=(ADDRESS=(PROTOCOL=TCP)(HOST=db)(PORT=1521)))
"""

GOOD: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "Debian 12": {"facts": {"distribution_major_version": "12"}},
    "the longest name": {"app": "a" * 26},
    "a name with hyphens and digits": {"app": "shop-2-a"},
    "what a directory leaves out": {"source": {"directory": "shop", "exclude": ["docs"]}},
    "an archive": {"source": {"archive": "shop.tar.gz"}},
    "an archive with its checksum": {"source": {"archive": "shop.tar.gz", "sha256": SHA256, "strip_components": 1}},
    "a URL with its checksum": {"source": {"archive": "https://example.org/a.zip", "sha256": OTHER}},
    "a repository": {"source": {"git": "https://example.org/shop.git", "version": "v1", "exclude": ["docs"]}},
    "a package": {"source": {"package": "shop==1.0"}},
    "a package with extras": {"source": {"package": "shop.web[oracle,mysql] == 1.0.post1+local"}},
    "a module in packages": {"module": "shop.web.wsgi:app"},
    "a factory": {"module": "shop:create_app()"},
    "a folder of the source": {"pythonpath": "src/a..b", "requirements": "requirements/prod.txt"},
    "static folders": {"static": {"/static": "shop/static", "/a/b-1.0": "./c/"}},
    "another interpreter with pyuwsgi": {"python": "/usr/bin/python3.12", "uwsgi": "pyuwsgi"},
    "environment": {
        "environment": {"A": "x\ty\nz", "_B1": 1, "C": True, "D": "", "E": 0.5},
        "database_url": "sqlite://",
    },
    "the URL in the environment": {"environment": {"DATABASE_URL": "x"}},
    "a dialect with underscores": {"database_url": "ibm_db_sa+pyodbc400://db/x"},
    "the least numbers": {
        **dict.fromkeys(["processes", "threads", "harakiri", "listen_queue", "buffer_size", "health_timeout"], 1),
        **dict.fromkeys(["max_requests", "max_worker_lifetime", "reload_on_rss", "post_buffering"], 0),
        "keep_releases": 2,
    },
    "numbers as texts": {"processes": "4", "keep_releases": "2", "listen_queue": "4096", "max_worker_lifetime": "61"},
    "the largest numbers": {"listen_queue": 4096, "buffer_size": 65535},
    "options": {"uwsgi_options": [{"route": "a b"}, {"route": "c"}, {"log-slow": 2000, "thunder-lock": True}]},
    "as many connections as needed": {
        "processes": 8,
        "threads": 2,
        "pool_size": 2,
        "database_connections": 36,
    },
    "a mule in lazy mode": {"uwsgi_options": [{"mule": True}]},
    "lines": {"nginx_options": ["gzip on;"], "service_options": ["MemoryMax=2G"]},
    "writable paths": {"writable_paths": ["/srv/media", "-/srv/perhaps", "+/x"]},
    "Oracle thin": {"database_url": THICK},
    "Oracle thick": {"database_url": THICK, "oracle_client": BASIC},
    "cx_Oracle": {"database_url": CX, "oracle_client": BASIC},
    "cx_Oracle with an old client": {"database_url": CX, "oracle_client": {"archive": "instantclient_12_2.zip"}},
    "a client whose name does not tell": {
        "database_url": THICK,
        "oracle_client": {"archive": "https://example.org/instantclient-basic-linuxx64.zip", "sha256": OTHER},
    },
    "a client on the controller": {
        "database_url": THICK,
        "oracle_client": {"archive": "basic-linux.x64-19.3.0.0.0dbru.zip", "sha256": SHA256, "remove": False},
    },
    "no client any more": {"database_url": THICK, "oracle_client": {"remove": True}},
    "thin beside a client": {
        "database_url": THICK,
        "oracle_client": BASIC,
        "environment": {"ORA_PYTHON_DRIVER_TYPE": "thin"},
    },
    **{
        f"the name {name}": {"database_url": THIN + name, "oracle_net": {"tnsnames": NAMES}}
        for name in ("shop.example.org", "SHOP", "shop_ro", "other", "OTHER/", "other?stmtcachesize=0")
    },
    **{
        f"no name but {place}": {"database_url": THIN + place}
        for place in ("db:1521", "db/SID", "db/?service_name=x", "db?a=b&service_name=x", "[::1]:1521/x")
    },
    "a name from elsewhere": {"database_url": THIN + "prod", "environment": {"TNS_ADMIN": "/etc/oracle"}},
    "a name from a directory": {
        "database_url": THIN + "prod",
        "oracle_net": {"sqlnet": "NAMES.DIRECTORY_PATH = (LDAP)"},
    },
    "included names": {"database_url": THIN + "prod", "oracle_net": {"tnsnames": "IFILE = /etc/oracle/more.ora"}},
    "a wallet": {"database_url": THICK, "oracle_net": {"wallet": ["cwallet.sso"]}},
    "encryption in thick mode": {
        "database_url": THICK,
        "oracle_client": BASIC,
        "oracle_net": {"sqlnet": "SQLNET.ENCRYPTION_CLIENT = REQUIRED"},
    },
    "encryption where it can be had": {
        "database_url": THICK,
        "oracle_net": {"sqlnet": "SQLNET.ENCRYPTION_CLIENT = REQUESTED\n# SQLNET.ENCRYPTION_CLIENT = REQUIRED"},
    },
    "an at sign in a path": {"database_url": "sqlite:////var/lib/a@b/c@d.sqlite"},
    "an encoded password": {"database_url": "oracle+oracledb://u:p%40ss/@db:1521/x?a=b@c"},
    "a variable of uWSGI": {"database_url": CX, "oracle_client": BASIC, "uwsgi_options": [{"env": "LANG=C"}]},
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.usefixtures("place")
def test_good_input_is_accepted(name: str) -> None:
    assert problems(**GOOD[name]) == []


@pytest.mark.parametrize(("given", "holds"), [({}, True), ({"processes": 0}, False)])
@pytest.mark.usefixtures("place")
def test_the_play_stops_when_there_is_a_problem(given: dict[str, Any], holds: bool) -> None:
    assert evaluate("{{ " + RULES["ansible.builtin.assert"]["that"] + " }}", values(**given)) is holds


BROKEN: dict[str, dict[str, Any]] = {
    "uwsgi_options": {"uwsgi_options": [{"log-slow": 1}, {"route": "a\nuid = root"}]},
    "pythonpath": {"pythonpath": "src\nuid = root"},
    "client_max_body_size": {"client_max_body_size": "1m;\n"},
    "writable_paths": {"writable_paths": ["/a", "/x\ny"]},
}
BROKEN |= {
    name: {name: ["a", "x\ny"]}
    for name in ("server_names", "listen", "nginx_options", "address_families", "system_calls", "service_options")
}

# The message ends in its cure. `…` stands for the name of the variable.
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another system": (
        {"facts": {"distribution": "Ubuntu", "distribution_major_version": "24"}},
        "web1 runs Ubuntu 24; the role knows Debian 12 and Debian 13.",
    ),
    "a newer Debian": (
        {"facts": {"distribution_major_version": "14"}},
        "web1 runs Debian 14; the role knows Debian 12 and Debian 13.",
    ),
    **{
        f"the app's name {name!r}": (
            {"app": name},
            f"…app is '{name}': use 1 to 26 lower case letters, digits and hyphens, beginning with a letter "
            "(and neither core nor emperor, which are Debian's).",
        )
        for name in ("", "Shop", "1shop", "my_shop", "shop.x", "a" * 27, "core", "emperor", "../shop", "-a")
    },
    "no source": (
        {"source": {}},
        "…source has no source: give exactly one of directory, archive, git and package.",
    ),
    "two sources": (
        {"source": {"directory": "shop", "package": "shop==1"}},
        "…source has directory and package: give exactly one of directory, archive, git and package.",
    ),
    "a version of a directory": (
        {"source": {"directory": "shop", "version": "v1"}},
        "…source has version, which directory does not use: sha256 and strip_components belong to archive, version "
        "to git, exclude to directory and git. Remove it.",
    ),
    "a checksum of a package": (
        {"source": {"package": "shop==1", "sha256": OTHER, "exclude": ["docs"]}},
        "…source has exclude and sha256, which package does not use: sha256 and strip_components belong to archive, "
        "version to git, exclude to directory and git. Remove it.",
    ),
    "a zip whose folders are to go": (
        {"source": {"archive": "https://shop.example/shop.zip", "sha256": SHA256, "strip_components": 1}},
        "…source.strip_components works with tar archives, and https://shop.example/shop.zip is a zip. Remove it, and "
        "name the folder inside in uwsgi_sqlalchemy_pythonpath.",
    ),
    "more threads than connections": (
        {"threads": 8, "pool_size": 5},
        "…threads is 8 and …pool_size 5: a worker serves as many requests at once as it has threads, and some of them "
        "would wait for a connection until they time out. Raise pool_size or max_overflow of the application's engine, "
        "or lower …threads.",
    ),
    "more workers than the database has connections": (
        {"processes": 8, "threads": 2, "database_connections": 35},
        "8 processes x 2 threads x 2 hosts, and 2 on each for a release that is tried out and its migration, are 36 "
        "database connections, but …database_connections is 35. Lower …processes or …threads, or let the database "
        "take more.",
    ),
    "a mule without the guard": (
        {"fork_mode": "prefork", "uwsgi_options": [{"mule": True}, {"log-slow": 1}, {"spooler": "/x"}]},
        "…uwsgi_options sets mule and spooler, and uWSGI forks what that starts without the guard that …fork_mode "
        "prefork needs. Remove it, or set …fork_mode to lazy.",
    ),
    "a directory that is not there": (
        {"source": {"directory": "shpo"}},
        "…source names shpo, which does not exist on the controller. Relative paths start where ansible-playbook was "
        "called.",
    ),
    "an archive that is not there": (
        {"source": {"archive": "shpo.tar.gz", "sha256": OTHER}},
        "…source names shpo.tar.gz, which does not exist on the controller. Relative paths start where "
        "ansible-playbook was called.",
    ),
    "a file as a directory": (
        {"source": {"directory": "shop.tar.gz"}},
        "…source.directory is shop.tar.gz, which is a file. Give the folder that holds the application, or name an "
        "archive as …source.archive.",
    ),
    "a folder as an archive": (
        {"source": {"archive": "shop"}},
        "…source.archive is shop, which is a folder. Give it as …source.directory.",
    ),
    "a URL without its checksum": (
        {"source": {"archive": "https://example.org/shop.tar.gz"}},
        "…source.archive is a URL; give …source.sha256 too, so that the download can be checked.",
    ),
    **{
        f"the checksum {name}": (
            {"source": {"archive": "https://example.org/shop.tar.gz", "sha256": sha256}},
            "…source.sha256 is not 64 lower case hexadecimal digits, as sha256sum prints them.",
        )
        for name, sha256 in {
            "too short": "0" * 63,
            "in capitals": "A" * 64,
            "with a line break": "0" * 64 + "\n",
        }.items()
    },
    "another checksum": (
        {"source": {"archive": "shop.tar.gz", "sha256": OTHER}},
        f"…source.sha256 is {OTHER}, but shop.tar.gz has {SHA256}. Correct the one or the other.",
    ),
    "a repository without a version": (
        {"source": {"git": "https://example.org/shop.git"}},
        "…source.git needs …source.version, a tag, branch or commit.",
    ),
    **{
        f"the package {package!r}": (
            {"source": {"package": package}},
            f"…source.package is '{package}': name an exact version (name==1.2.3), so that the same release means the "
            "same code.",
        )
        for package in ("shop", "shop>=1", "shop==1.*", "shop==1,<2", "shop @ https://example.org/a.whl", "-r a==1", "")
    },
    **{
        f"the module {module!r}": (
            {"module": module},
            f"…module is '{module}'; write it as module:callable, for example wsgi:application.",
        )
        for module in (
            "",
            "wsgi",
            "wsgi:",
            ":app",
            "wsgi.py:app:x",
            "shop/wsgi:app",
            "shop..a:app",
            "shop.:app",
            "a:b.c",
            "a b:c",
        )
    },
    **{
        f"outside the source with {name}": (
            {name: value},
            "…pythonpath, …requirements and the folders of …static lie inside the source: give them relative to its "
            "top, without '..'.",
        )
        for name, value in {"pythonpath": "/srv", "requirements": "a/../../b.txt", "static": {"/a": ".."}}.items()
    },
    **{
        f"the static files {static}": (
            {"static": static},
            f"…static is {static}: begin a prefix with a slash and end it without one, and give it a folder below the "
            "top of the source, as in /static with myapp/static.",
        )
        for static in (
            {"static": "a"},
            {"/": "a"},
            {"/a/": "b"},
            {"/a b": "c"},
            {"/a": ""},
            {"/a": "."},
            {"/a": "b; c"},
        )
    },
    "another interpreter with Debian's uWSGI": (
        {"python": "/usr/bin/python3.12"},
        "…python is /usr/bin/python3.12, but Debian's uWSGI embeds /usr/bin/python3. Set …uwsgi to pyuwsgi to use "
        "another interpreter.",
    ),
    "names of no environment variables": (
        {"environment": {"A-B": "1", "C": "2", "2D": "3"}},
        "…environment has A-B and 2D: use letters, digits and underscores for the names of environment variables.",
    ),
    "values of no environment variables": (
        {"environment": {"A": None, "B": ["secret"], "C": "x", "D": "secret\r\nvalue"}},
        "…environment has a value of A and B and D that is no text or number, or has control characters (a carriage "
        "return?), for which systemd would leave it out. Give a text without them.",
    ),
    "two database URLs": (
        {"environment": {"DATABASE_URL": "sqlite://"}, "database_url": "sqlite://"},
        "DATABASE_URL is given twice; remove it from …environment or leave …database_url empty.",
    ),
    **{
        f"the database URL {url!r}": (
            {"database_url": url},
            "…database_url is not a SQLAlchemy URL such as postgresql+psycopg://user:password@host/name.",
        )
        for url in ("db.example.org/shop", "user:secret@db/shop", " sqlite://", "jdbc:oracle:thin:@db")
    },
    **{
        f"{number} for {name}": ({name: number}, f"…{name} is {number}; it must be {least} or more.")
        for least, names in {
            0: ["max_requests", "reload_on_rss", "post_buffering"],
            1: ["processes", "threads", "harakiri", "listen_queue", "buffer_size", "health_timeout"],
            2: ["keep_releases"],
        }.items()
        for name in names
        for number in [least - 1]
    },
    "a number as a text": ({"processes": "0"}, "…processes is 0; it must be 1 or more."),
    "two small numbers": (
        {"processes": 0, "keep_releases": 0},
        "…processes is 0; it must be 1 or more. …keep_releases is 0; it must be 2 or more.",
    ),
    "no number": ({"processes": "many"}, "…processes is many; it must be 1 or more."),
    "a queue above the host's limit": (
        {"listen_queue": 4097},
        "…listen_queue is 4097, but web1 lets at most 4096 connections wait. Lower it, or raise net.core.somaxconn "
        "there.",
    ),
    "a buffer above the protocol's limit": (
        {"buffer_size": 65536},
        "…buffer_size is 65536; the uwsgi protocol carries at most 65535 bytes of headers.",
    ),
    "a short life": (
        {"max_worker_lifetime": 60},
        "…max_worker_lifetime is 60; it must exceed uWSGI's min-worker-lifetime, 60 seconds, or be 0.",
    ),
    "a health path that is none": (
        {"health_path": "healthz"},
        "…health_path is 'healthz'; it is a path and begins with a slash.",
    ),
    "relative writable paths": (
        {"writable_paths": ["/a", "media", "./x"]},
        "…writable_paths has media and ./x; give absolute paths.",
    ),
    "an option of the role's own": (
        {"uwsgi_options": [{"log-slow": 1}, {"lazy-apps": True}, {"lazy-apps": False}]},
        "…uwsgi_options sets what the role keeps to itself: lazy-apps (use …fork_mode, which brings what "
        "keeps workers from sharing database connections). Remove it.",
    ),
    "every option of the role's own": (
        {"uwsgi_options": [dict.fromkeys(REFUSED, True)]},
        "…uwsgi_options sets what the role keeps to itself: "
        + "; ".join(f"{name} ({reason})" for name, reason in REFUSED.items())
        + ". Remove it.",
    ),
    "options without a value of their own": (
        {"uwsgi_options": [{"route": ["a", "b"]}, {"log-x-forwarded-for": None}, {"a": {"b": "c"}}, {"d": "e"}]},
        "…uwsgi_options has no single value for route and log-x-forwarded-for and a: give a text, a number or true, "
        "and an option that is repeated as several items.",
    ),
    **{
        f"a password with an at sign in {url}": (
            {"database_url": url},
            "The database's URL has two '@' before its host: percent-encode the user name and the password. In a "
            "playbook the filter urlencode does that.",
        )
        for url in ("postgresql+psycopg://u:p@ss@db/x", "oracle+oracledb://u:a/b@c@db:1521/x")
    },
    "oracle without its driver": (
        {"database_url": "oracle://u:p@db:1521/x"},
        "The database's URL begins with oracle://, which is cx_Oracle in SQLAlchemy 2.0 and python-oracledb in 2.1. "
        "Name the driver: oracle+oracledb:// or oracle+cx_oracle://.",
    ),
    **{
        f"the Oracle client {client}": (
            {"oracle_client": client},
            "…oracle_client is to have either archive, Oracle's zip of Instant Client Basic or Basic Light, or remove: "
            "true, to remove what the role has installed.",
        )
        for client in ({**BASIC, "remove": True}, {"sha256": OTHER}, {"remove": False})
    },
    **{
        f"{kind} as the Oracle client": (
            {"oracle_client": {"archive": path}},
            f"…oracle_client.archive is {path}, which is no file on the controller. Relative paths start where "
            "ansible-playbook was called; one on the host is a URL, file:///path.",
        )
        for kind, path in {"nothing": "basic.zip", "a folder": "shop"}.items()
    },
    "a client's URL without its checksum": (
        {"oracle_client": {"archive": "file:///srv/basic.zip"}},
        "…oracle_client.archive is a URL; give …oracle_client.sha256 too, so that the download can be checked.",
    ),
    "a client's checksum that is none": (
        {"oracle_client": {**BASIC, "sha256": "sha256:0"}},
        "…oracle_client.sha256 is not 64 lower case hexadecimal digits, as sha256sum prints them.",
    ),
    "another client's checksum": (
        {"oracle_client": {"archive": "instantclient_12_2.zip", "sha256": OTHER}},
        f"…oracle_client.sha256 is {OTHER}, but instantclient_12_2.zip has {SHA256}. Oracle issues new files under the "
        "same name now and then: when you trust the file, change sha256.",
    ),
    **{
        f"{name} without a client": (
            {"database_url": url, "environment": environment, "oracle_client": client},
            f"{name} needs Oracle's client: give …oracle_client an archive, or use python-oracledb in its thin mode "
            "(oracle+oracledb://), which needs none.",
        )
        for name, url, environment, client in [
            ("cx_Oracle", CX, {}, {"remove": True}),
            (
                "ORA_PYTHON_DRIVER_TYPE=thick",
                THICK,
                {"ORA_PYTHON_DRIVER_TYPE": "thick"},
                {},
            ),
        ]
    },
    "a client too old for the thick mode": (
        {"database_url": THICK, "oracle_client": {"archive": "instantclient_12_2.zip"}},
        "…oracle_client.archive is Instant Client 12 by its name, but python-oracledb's thick mode needs 19 or newer. "
        "Take a newer one: 19 still talks to Oracle Database 11.2.",
    ),
    "encryption that the thin mode does not have": (
        {"database_url": THICK, "oracle_net": {"sqlnet": "A=1\n sqlnet.encryption_client=(required)"}},
        "…oracle_net.sqlnet requires Native Network Encryption, which python-oracledb has in its thick mode alone: "
        "give …oracle_client an archive, or encrypt by TLS (PROTOCOL=TCPS) and remove these lines.",
    ),
    **{
        f"a name among {said}": (
            {"database_url": THIN + "prod", "oracle_net": net},
            f"The database's URL names prod, which …oracle_net.tnsnames does not define; it defines {said}. Correct "
            "the one or the other, or name a host and service: "
            "oracle+oracledb://user:password@host:1521/?service_name=name.",
        )
        for said, net in {"SHOP.example.org, shop_ro, other": {"tnsnames": NAMES}, "nothing": {}}.items()
    },
    "wallets that cannot be read": (
        {"oracle_net": {"wallet": ["cwallet.sso", "a/cwallet.sso", "shop/../ewallet.pem"]}},
        "…oracle_net.wallet has a/cwallet.sso and shop/../ewallet.pem, which cannot be read on the controller. Give "
        "files that are there and that the user who runs ansible-playbook may read.",
    ),
    "a file that is no wallet": (
        {"oracle_net": {"wallet": ["keys.jks"]}},
        "…oracle_net.wallet has keys.jks, for which nobody would look: its files are called cwallet.sso and "
        "ewallet.p12 for the client, ewallet.pem for the thin mode.",
    ),
    "two folders of names": (
        {"environment": {"TNS_ADMIN": "/etc/oracle"}, "oracle_net": {"tnsnames": NAMES}},
        "TNS_ADMIN is given twice; remove it from …environment or leave …oracle_net empty.",
    ),
    "variables that mislead the client": (
        {
            "database_url": CX,
            "oracle_client": BASIC,
            "environment": {"ORACLE_HOME": "/opt/oracle"},
            "uwsgi_options": [{"env": "LD_LIBRARY_PATH=/opt/oracle"}, {"env": "A=ORACLE_HOME="}],
        },
        "ORACLE_HOME in …environment and LD_LIBRARY_PATH in …uwsgi_options would mislead the loader or Oracle's "
        "client: the role makes the client known by ldconfig, ORACLE_HOME belongs to another kind of installation, and "
        "what uWSGI sets comes too late for the loader. Remove it.",
    ),
    **{
        f"a line break in {name}": (
            given,
            f"…{name} has a line break inside a text. Each text becomes one line of a file on the host: write it on "
            "one line, or make it two items.",
        )
        for name, given in BROKEN.items()
    },
    "a line break in an option's name": (
        {"uwsgi_options": [{"a\nuid": "root"}]},
        "…uwsgi_options has a line break inside a text. Each text becomes one line of a file on the host: write it "
        "on one line, or make it two items.",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("place")
def test_bad_input_is_refused_in_one_message(name: str) -> None:
    given, message = BAD[name]
    assert problems(**given) == [message.replace("…", OPTION_PREFIX)]


@pytest.mark.usefixtures("place")
def test_no_message_shows_a_secret() -> None:
    bad = {"environment": {"DATABASE_URL": "hunter2", "A-B": "hunter2\r"}, "database_url": "hunter2"}
    said = problems(**bad)
    assert len(said) == 4
    assert "hunter2" not in " ".join(said)


@pytest.mark.usefixtures("place")
def test_all_that_is_wrong_is_said_at_once() -> None:
    assert len(problems(app="Shop", module="wsgi", processes=0, source={})) == 4


def test_every_rule_has_a_wrong_input_here() -> None:
    # What a message says up to its first variable tells the rules apart; what has nothing there is the list of numbers.
    begins = [str(rule["otherwise"]).split("{", maxsplit=1)[0] for rule in RULES["vars"]["__uwsgi_sqlalchemy_rules"]]
    said = [message.replace("…", OPTION_PREFIX) for _, message in BAD.values()]
    assert len(begins) > 20
    assert [begin for begin in begins if not any(message.startswith(begin) for message in said)] == []
