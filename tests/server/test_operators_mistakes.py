"""An operator's mistake is answered in one line, before anything is downloaded, bound or written."""

from __future__ import annotations

import os
import socket
import sqlite3
from pathlib import Path

import pytest
from tinsmith.server.cli import app
from tinsmith.server.cli.command_line import require_writable
from tinsmith.server.cli.serve import listen
from typer.testing import CliRunner

BINARY = b"\xff\xfe\x00"
# A hub id, which would be downloaded; the hub is never asked.
SERVE = ["serve", "--model", "nobody/none-such"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TINSMITH_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(BINARY)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("nowhere")


def refusal(arguments: list[str], **environment: str) -> str:
    """Run a command that must be refused; return its one line. It has changed nothing."""
    there = set(Path().rglob("*"))
    answered = CliRunner().invoke(app, arguments, env=environment)
    assert answered.exit_code == 2, answered.output
    assert len(answered.output.splitlines()) == 1, answered.output
    assert set(Path().rglob("*")) == there
    assert "the hub" not in answered.output
    return answered.output.removeprefix("tinsmith: ").strip()


OPTIONS = {
    ("--api-key-file", "nofile"): "--api-key-file: nofile cannot be read (No such file or directory)",
    ("--api-key-file", "folder"): "--api-key-file: folder cannot be read (Is a directory)",
    ("--api-key-file", "file"): "--api-key-file: file is not a text file in UTF-8",
    ("--data-dir", "file"): "file is a file, not a folder",
    ("--data-dir", "file/below"): "file is a file, not a folder",
    ("--data-dir", "loop"): "loop leads nowhere, not a folder",
    ("--data-dir", "/proc/tinsmith"): "--data-dir: /proc/tinsmith cannot be made",
    ("--cache-dir", "file"): "file is a file, not a folder",
    ("--port", "99999"): "--port: 99999: Input should be less than or equal to 65535",
    ("--port", "eighty"): "Invalid value for '--port'",
    ("--prot", "80"): "No such option: --prot",
    ("--host", "no.such.host.invalid", "--api-key", "tml-a"): "nor a known name",
    ("--host", "203.0.113.7", "--api-key", "tml-a"): "--host: 203.0.113.7 is not an address of this machine",
    ("--host", "", "--api-key", "tml-a"): "--host: it is empty",
    ("--dtype", "int8"): "--dtype: 'int8': Input should be 'auto', 'float32' or 'bfloat16'",
    ("--mesh", "data=two"): "--mesh: 'data=two'; write data=2",
    ("--mesh", "data=2,data=4"): "--mesh: 'data=4': data is there twice",
    ("--config", "nofile"): "--config: nofile cannot be read (No such file or directory)",
    ("--config", "folder"): "--config: folder cannot be read (Is a directory)",
    ("--config", "file"): "--config: file is not TOML",
    ("--max-rank", "0"): "--max-rank: 0: Input should be greater than or equal to 1",
    ("--answer-bytes", "10XB"): "--answer-bytes: '10XB' is no size; write bytes, or a number with MB, GB,",
    ("--sglang", "nourl"): "'nourl' is not the URL of a server",
}


@pytest.mark.parametrize("arguments", OPTIONS, ids=" ".join)
def test_a_wrong_option_is_named(arguments: tuple[str, ...]) -> None:
    assert OPTIONS[arguments] in refusal([*SERVE, *arguments])


VARIABLES = {
    ("TINSMITH_PROT", "80"): "TINSMITH_PROT is not a setting; did you mean TINSMITH_PORT?",
    ("tinsmith_max_rnak", "8"): "tinsmith_max_rnak is not a setting; did you mean TINSMITH_MAX_RANK?",
    ("TINSMITH_DATADIR", "x"): "did you mean TINSMITH_DATA_DIR?",
    ("TINSMITH_QQQ", "x"): "TINSMITH_QQQ is not a setting",
    ("TINSMITH_PORT", "eighty"): "TINSMITH_PORT: 'eighty': Input should be a valid integer",
    ("TINSMITH_MAX_DATUMS", "0"): "TINSMITH_MAX_DATUMS: '0': Input should be greater than or equal to 1",
    ("TINSMITH_FULL_WEIGHT", "maybe"): "TINSMITH_FULL_WEIGHT: 'maybe': Input should be a valid boolean",
    ("TINSMITH_API_KEY_FILE", "nofile"): "TINSMITH_API_KEY_FILE: nofile cannot be read",
    ("TINSMITH_DATABASE_URL", "ledger"): "TINSMITH_DATABASE_URL: write sqlite:////path/to/ledger.db",
    ("TINSMITH_DATABASE_URL", "mysql://u:secret@h/n"): "TINSMITH_DATABASE_URL: write sqlite:////path",
    ("TINSMITH_DATABASE_URL", "postgresql+nodriver://u:secret@h/n"): "no driver that SQLAlchemy knows",
    ("TINSMITH_DATABASE_URL", "postgresql+pg8000://u:secret@h/n"): "the package pg8000 is missing",
    ("TINSMITH_DATABASE_URL", "sqlite:///nowhere/ledger.db"): "nowhere is no folder",
}


@pytest.mark.parametrize("variable", VARIABLES, ids="=".join)
def test_a_wrong_variable_is_named(variable: tuple[str, str]) -> None:
    answered = refusal(SERVE, **{variable[0]: variable[1]})
    assert VARIABLES[variable] in answered
    assert "secret" not in answered


def test_variables_that_kubernetes_sets_for_a_service_called_tinsmith_are_ignored() -> None:
    links = {
        "TINSMITH_SERVICE_HOST": "10.0.0.1",
        "TINSMITH_SERVICE_PORT_HTTP": "8000",
        "TINSMITH_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "TINSMITH_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert "is not a setting" not in CliRunner().invoke(app, SERVE, env=links).output


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_in_use_is_named(host: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        answered = refusal([*SERVE, "--host", host, "--port", str(port), "--api-key", "tml-a"])
    assert answered.startswith(f"--port: {port} is in use on {host}")


def test_one_of_two_servers_that_start_at_once_gets_the_port() -> None:
    with listen("localhost", 0) as first:
        assert first.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ValueError, match="is in use"):
            listen("127.0.0.1", first.getsockname()[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").chmod(0o500)
    assert "cannot be written to" in refusal([*SERVE, "--data-dir", "folder"])
    assert "cannot be made" in refusal([*SERVE, "--data-dir", "folder/new"])


def test_trying_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "folder", "--data-dir")
    require_writable(tmp_path / "new" / "deeper", "--data-dir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "loop"]


def write_database(file: Path, *tables: str) -> None:
    with sqlite3.connect(file) as connection:
        for table in tables:
            connection.execute(f"create table {table} (version_num text)")
        if "alembic_version" in tables:
            connection.execute("insert into alembic_version values ('9999')")
    connection.close()


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda file: file.write_bytes(b"nothing like a database" * 50), "damaged"),
        (lambda file: write_database(file, "bookmarks"), "another program's database"),
        (lambda file: write_database(file, "alembic_version", "tenants"), "newer version"),
    ],
)
@pytest.mark.parametrize("command", [SERVE, ["keys", "list"], ["keys", "create", "alice"]])
def test_a_ledger_that_cannot_be_used_is_left_as_it_is(command, write, said, tmp_path: Path) -> None:
    ledger = tmp_path / "folder" / "ledger.db"
    write(ledger)
    before = ledger.read_bytes()
    assert said in refusal([*command, "--data-dir", "folder"])
    assert ledger.read_bytes() == before


@pytest.mark.parametrize("command", [["list"], ["revoke", "1f0c9a2b"], ["quota", "alice", "--models", "4"]])
@pytest.mark.parametrize("place", [["--data-dir", "folder"], ["--data-dir", "new"], []])
def test_keys_are_looked_for_only_where_there_is_a_ledger(command: list[str], place: list[str]) -> None:
    assert "give the server's data directory with --data-dir" in refusal(["keys", *command, *place])


def test_keys_depend_on_nothing_but_the_ledger_s_place() -> None:
    answered = refusal(["keys", "list", "--data-dir", "new"], TINSMITH_HOST="0.0.0.0", TINSMITH_PORT="x")
    assert "there is no ledger" in answered
    assert "did you mean TINSMITH_DATA_DIR" in refusal(["keys", "list"], TINSMITH_DATA_DRI="new")
    assert "is a file" in refusal(["keys", "create", "alice", "--data-dir", "file"])
    assert "tenant 'a b'" in refusal(["keys", "create", "a b", "--data-dir", "new"])


def test_the_first_key_says_which_ledger_it_is_in() -> None:
    made = CliRunner().invoke(app, ["keys", "create", "alice", "--data-dir", "new"])
    assert made.stdout.startswith("tml-")
    assert str(Path("new/ledger.db").resolve()) in made.stderr
    again = CliRunner().invoke(app, ["keys", "create", "bob", "--data-dir", "new"])
    assert "no ledger" not in again.stderr
    listed = CliRunner().invoke(app, ["keys", "list", "--data-dir", "new"]).output
    assert [line.split()[1] for line in listed.splitlines()] == ["alice", "bob"]


@pytest.mark.parametrize("command", [["status"], ["top"], ["runs"], ["checkpoints", "merge", "a", "b"]])
def test_commands_for_a_running_server_name_a_wrong_variable_and_an_address_without_one(command) -> None:
    assert "did you mean TINSMITH_PORT?" in refusal(command, TINSMITH_PROT="9000")
    answered = refusal([*command, "--url", "http://127.0.0.1:9"])
    assert answered.startswith("http://127.0.0.1:9 cannot be reached: ")
    assert "--url or TINKER_BASE_URL names another one" in answered


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["models", "get"], ["keys", "create"], ["models", "get", "x"]]
)
def test_a_command_that_is_not_there_is_named(arguments: list[str]) -> None:
    assert refusal(arguments)


@pytest.mark.parametrize("name", ["a=b", "a?b=c&d", "50%41", "a b#c", "naïve;@:"])
def test_a_data_directory_may_be_called_anything(name: str) -> None:
    made = CliRunner().invoke(app, ["keys", "create", "alice", "--data-dir", name])
    assert made.exit_code == 0, made.output
    assert (Path(name) / "ledger.db").is_file()
    assert "alice" in CliRunner().invoke(app, ["keys", "list", "--data-dir", name]).output
    assert sorted(path.name for path in Path().iterdir()) == sorted(["file", "folder", "loop", name])


@pytest.mark.parametrize("arguments", [[], ["keys"], ["serve", "--help"]])
def test_help_is_still_the_whole_page(arguments: list[str]) -> None:
    assert len(CliRunner().invoke(app, arguments).output.splitlines()) > 10
