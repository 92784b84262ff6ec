"""What `make test` counts, and what it does not let pass."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import testrun
from testrun import Count

PASSED = '<testcase classname="a" name="one"/>'
FAILED = '<testcase classname="a" name="two"><failure/></testcase>'
ERROR = '<testcase classname="a" name="three"><error/></testcase>'
SKIPPED = '<testcase classname="a" name="four"><skipped/></testcase>'


def report(folder: Path, name: str, *cases: str) -> None:
    (folder / name).write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")


def test_every_report_of_a_folder_counts(tmp_path: Path) -> None:
    report(tmp_path, "1.xml", PASSED, FAILED)
    report(tmp_path, "2.xml", PASSED, ERROR, SKIPPED)
    assert testrun.of_reports(tmp_path) == Count(passed=2, failed=2, skipped=1)


def test_a_case_that_fails_again_in_its_teardown_is_one_failure(tmp_path: Path) -> None:
    report(tmp_path, "1.xml", FAILED, FAILED.replace("failure", "error"))
    assert testrun.of_reports(tmp_path) == Count(failed=1)


def test_the_count_is_that_of_pytest_itself(tmp_path: Path) -> None:
    cases = "def test_a(): pass\ndef test_b(): assert False\n@pytest.mark.skip\ndef test_c(): pass\n"
    (tmp_path / "test_it.py").write_text(f"import pytest\n{cases}")
    command = ("pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, f"--junit-xml={tmp_path}/r.xml", tmp_path)
    subprocess.run(command, check=False, capture_output=True)
    assert testrun.of_reports(tmp_path) == Count(1, 1, 1)


@pytest.mark.parametrize("cases", [(), (SKIPPED,)])
def test_a_scenario_that_ran_no_test_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: tuple[str, ...]
) -> None:
    def molecule(command: tuple[str, ...], **variables: str) -> int:
        if command[0] != "tools/molecule":
            return 0
        report(Path(variables["TEST_REPORTS"]), "1.xml", *cases)
        return 0

    monkeypatch.setattr(testrun, "REPORTS", tmp_path)
    monkeypatch.setattr(testrun, "run", molecule)
    assert testrun.scenario("empty") == Count(passed=1, failed=1, skipped=len(cases))


def test_a_scenario_counts_its_cases_and_its_sequence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def molecule(command: tuple[str, ...], **variables: str) -> int:
        if command[0] != "tools/molecule":
            return 0
        report(Path(variables["TEST_REPORTS"]), "1.xml", PASSED, SKIPPED)
        return 0

    monkeypatch.setattr(testrun, "REPORTS", tmp_path)
    monkeypatch.setattr(testrun, "run", molecule)
    assert testrun.scenario("default") == Count(passed=2, skipped=1)


def test_a_report_of_an_earlier_run_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testrun, "REPORTS", tmp_path)
    monkeypatch.setattr(testrun, "run", lambda _command, **_variables: 0)
    report(testrun.fresh("default"), "old.xml", PASSED)
    assert testrun.scenario("default") == Count(passed=1, failed=1)


def test_a_sequence_that_breaks_off_is_a_failure_though_all_its_tests_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def molecule(command: tuple[str, ...], **variables: str) -> int:
        if command[0] != "tools/molecule":
            return 0
        report(Path(variables["TEST_REPORTS"]), "1.xml", PASSED)
        return 2

    monkeypatch.setattr(testrun, "REPORTS", tmp_path)
    monkeypatch.setattr(testrun, "run", molecule)
    assert testrun.scenario("default") == Count(passed=1, failed=1)


def test_pytest_that_fails_without_a_failed_test_is_a_failure() -> None:
    assert testrun.of_tests("x", 3, Count(passed=5)) == Count(passed=5, failed=1)
    assert testrun.of_tests("x", 1, Count(passed=5, failed=2)) == Count(passed=5, failed=2)


def test_each_linter_counts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testrun, "run", lambda command, _output: command[0] == "mypy")
    assert testrun.lint() == Count(passed=len(testrun.LINTERS) - 1, failed=1)


@pytest.mark.parametrize(
    ("count", "status"), [(Count(3, 0, 1), 0), (Count(3, 1, 0), 1), (Count(), 1), (Count(skipped=4), 1)]
)
def test_the_last_line_counts_everything(count: Count, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert testrun.everything({"a": lambda: count, "b": Count}) == status
    last = capsys.readouterr().out.rstrip("\n").splitlines()[-1]
    assert last == f"{count.passed} passed, {count.failed} failed, {count.skipped} skipped"


def test_an_unfinished_scenario_is_left_out_by_name_and_counts_as_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("default", "late"):
        (tmp_path / "molecule" / name).mkdir(parents=True)
        (tmp_path / "molecule" / name / "molecule.yml").touch()
    (tmp_path / "molecule" / "late" / "UNFINISHED").write_text("too slow yet\n")
    monkeypatch.setattr(testrun, "ROOT", tmp_path)
    for step in ("lint", "unit", "scenario"):
        monkeypatch.setattr(testrun, step, lambda *_: Count(passed=1))
    assert testrun.main(["all"]) == 0
    said = capsys.readouterr().out
    assert "=== scenario late\ntoo slow yet\n" in said
    assert said.endswith("\n3 passed, 0 failed, 1 skipped\n")
    assert testrun.main(["scenario", "late"]) == 0, "asked for by its name, it runs"
    assert capsys.readouterr().out.endswith("\n1 passed, 0 failed, 0 skipped\n")


def test_every_scenario_runs_and_shared_is_none() -> None:
    folders = {path.name for path in (testrun.ROOT / "molecule").iterdir() if path.is_dir()}
    assert set(testrun.scenarios()) == folders - {"shared"}
