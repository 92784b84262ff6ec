"""Run the program that switches releases, and have it killed before one of its steps. Runs on the test hosts.

    cut.py NUMBER ARGUMENT …    SIGKILL before the step of that number, counted from 1; 0 lets it finish

Each step is told on standard error as `cut: STEP`, the one that was never reached included.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any

PROGRAM = "/usr/local/sbin/uwsgi-sqlalchemy"


def main(number: int, arguments: list[str]) -> int:
    """Run the program's own `main` with its `step` replaced, and return its exit code."""
    sys.dont_write_bytecode = True
    loader = SourceFileLoader("program", PROGRAM)
    spec = spec_from_loader("program", loader)
    assert spec  # noqa: S101 (for the type checker)
    program: Any = module_from_spec(spec)
    sys.modules["program"] = program  # its dataclasses look themselves up
    loader.exec_module(program)
    announce = program.step
    reached = 0

    def step(name: str, *rest: Any, **named: Any) -> Any:
        nonlocal reached
        reached += 1
        print(f"cut: {name}", file=sys.stderr, flush=True)
        if reached == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return announce(name, *rest, **named)

    program.step = step
    code: int = program.main(arguments)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
