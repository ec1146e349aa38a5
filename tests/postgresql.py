"""A PostgreSQL server of a test's own, where its programs and a driver are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def _program(name: str) -> str:
    found = shutil.which(name) or next(
        (str(path) for path in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None
    )
    if found is None:
        pytest.skip(f"PostgreSQL is not installed here: there is no {name}")
    return found


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """The URL of an empty database; its server ends with the block. Skips the test where it cannot be run."""
    pytest.importorskip("psycopg", reason="psycopg is not installed here (the extra `postgresql`)")
    programs = {name: _program(name) for name in ("initdb", "pg_ctl")}
    folder.mkdir()
    as_user: dict = {}
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        for parent in folder.parents:
            if parent.owner() == "root" and parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o011)
        as_user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    data = folder / "data"

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, **as_user)
        if done.returncode:
            pytest.skip(f"PostgreSQL does not run here: {done.stdout}{done.stderr}")

    run(programs["initdb"], "-D", str(data), "-A", "trust", "-U", "tinsmith", "-E", "UTF8", "--no-sync")
    options = f"-k {folder} -c listen_addresses= -c fsync=off -c shared_buffers=16MB"
    run(programs["pg_ctl"], "-D", str(data), "-w", "-o", options, "-l", str(folder / "log"), "start")
    try:
        yield f"postgresql+psycopg://tinsmith@/postgres?host={folder}"
    finally:
        subprocess.run(
            [programs["pg_ctl"], "-D", str(data), "-m", "immediate", "stop"], check=True, **as_user
        )
