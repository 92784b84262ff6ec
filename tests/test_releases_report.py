"""The page that is made from what the scenario `releases` and its benchmark recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import releases_report

SEEN = {
    "step": "deploy v2",
    "host": "debian12",
    "app": "single",
    "requests": 10,
    "failed": 0,
    "wrong": 0,
    "longest_ms": 54.4,
    "code": 0,
    "journal": {"result": "ok", "how": "chain reload"},
    "current": "0123456789ab",
    "workers": ["0123456789ab"] * 4,
    "same_workers": False,
}
REFUSED = {"result": "refused", "note": "release 0123456789ab of uwsgi-double failed on 2026-01-02T03:04:05Z | <x>"}
RECORD = {
    "date": "2026-01-02",
    "connections": 16,
    "platforms": {"debian12": ["Debian 12", "2.0.21"]},
    "names": [{"host": "debian12", "app": "single", "releases": {"v2": "0123456789ab"}}],
    "steps": [
        SEEN,
        {**SEEN, "app": "double", "requests": 5, "failed": 2, "longest_ms": 80},
        {**SEEN, "step": "break it", "code": 3, "journal": REFUSED, "same_workers": True},
    ],
}
BENCH = {
    "date": "2026-01-03",
    "rows": [
        {"host": "debian12", "app": "single", "action": "rollback", "rounds": 2, "imports": 6.0, "seconds": [8.1, 8.3]}
        | {"beyond_imports": 2.2, "longest_ms": [90, 110]}
    ],
}


def test_the_page_says_what_was_done_and_what_came_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, bench, page = (tmp_path / name for name in ("record.json", "bench.json", "docs/page.md"))
    record.write_text(json.dumps(RECORD))
    monkeypatch.setattr(releases_report, "BENCH", bench)
    assert releases_report.main([str(record), str(page)]) == 0
    text = page.read_text()
    assert "| deploy v2 | 15 | 2 | 0 | 54 / 80 | exit 0: ok, chain reload | v2 |" in text
    refused = "exit 3: refused. release v2 of uwsgi-APP failed on (when) \\| &lt;x>"
    assert f"| break it | 10 | 0 | 0 | 54 / - | {refused} | v2, same workers |" in text
    assert "25 requests" in text and "How long it takes" not in text

    bench.write_text(json.dumps(BENCH))
    assert releases_report.main([str(record), str(page)]) == 0
    assert "| debian12 | `single` | rollback | 6.0 | 8.1 / 8.3 | 2.2 | 90 / 110 |" in page.read_text()


def test_without_a_record_it_says_how_to_make_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert releases_report.main([str(tmp_path / "record.json")]) == 1
    assert "run `make scenario-releases` first" in capsys.readouterr().err
