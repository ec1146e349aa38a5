"""The SDK's own command line, `tinker`, against a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from conformance.conftest import ALICE
from conformance.server_process import ServerProcess

# To import the SDK takes seconds, so that one process runs several commands.
_DRIVER = """
import contextlib, io, json, sys
from tinker.cli.__main__ import main
done = []
commands = json.loads(sys.argv[1])
for command in commands:
    out, err = io.StringIO(), io.StringIO()
    code, sys.argv = 0, ["tinker", "--format", "json", *command]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    done.append([code or 0, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


@dataclass(frozen=True)
class Printed:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out) if self.out else None


def cli(server: ServerProcess, *commands: str, key: str = ALICE) -> list[Printed]:
    """Runs the commands, each `run info ID` or the like, one after another."""
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": key, "TINKER_TELEMETRY": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, json.dumps([command.split() for command in commands])],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [Printed(*each) for each in json.loads(done.stdout)]
