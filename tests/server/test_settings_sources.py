"""Settings come from options, the environment and a file, and the pages about them are made of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tinsmith
import typer
from tinsmith.server.cli import app
from tinsmith.server.cli.command_line import read_settings
from tinsmith.server.settings import LedgerSettings, Settings

ROOT = Path(tinsmith.__file__).resolve().parent


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"TINSMITH_{name.upper()}", raising=False)
    file = tmp_path / "tinsmith.toml"
    file.write_text("""
model = ["one", "two"]
port = 9000
max_rank = 64
lora_alpha = 16
full_weight = true
data_dir = "somewhere"
mesh = {data = 2, fsdp = 4}
""")
    return file


def test_options_win_over_the_environment_and_that_over_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINSMITH_MAX_RANK", "32")
    monkeypatch.setenv("TINSMITH_PORT", "9001")
    settings = read_settings(Settings, {"port": 9002}, config)
    assert (settings.port, settings.max_rank, settings.lora_alpha) == (9002, 32, 16.0)
    assert settings.model == ["one", "two"]
    assert settings.mesh == {"data": 2, "fsdp": 4}
    assert settings.full_weight


def test_a_file_that_the_environment_names_serves_every_command(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINSMITH_CONFIG", str(config))
    assert read_settings(LedgerSettings, {}).data_dir == Path("somewhere")
    assert read_settings(LedgerSettings, {"data_dir": "other"}).data_dir == Path("other")


def test_sizes_may_have_units(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('answer_bytes = "1.5 GiB"\nsnapshot_bytes = 4096')
    monkeypatch.setenv("TINSMITH_MAX_BODY_BYTES", "10MB")
    settings = read_settings(Settings, {"disk_reserve_bytes": "2kib"}, config)
    sizes = (settings.answer_bytes, settings.snapshot_bytes, settings.max_body_bytes)
    assert sizes == (3 << 29, 4096, 10_000_000)
    assert settings.disk_reserve_bytes == 2048


@pytest.mark.parametrize(
    ("line", "refusal"),
    [
        ("prot = 1", "tinsmith.toml: prot is not a setting; did you mean port?"),
        ('port = "x"', "tinsmith.toml: port: 'x': Input should be a valid integer"),
        ("max_rank = 0", "tinsmith.toml: max_rank: 0: Input should be greater than or equal to 1"),
        ('mesh = "fsdp=x"', "tinsmith.toml: mesh: 'fsdp=x'; write data=2"),
        ('answer_bytes = "10XB"', "tinsmith.toml: answer_bytes: '10XB' is no size; write bytes, or"),
        ("[", "tinsmith.toml is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name(
    config: Path, capsys: pytest.CaptureFixture[str], line: str, refusal: str
) -> None:
    config.write_text(line)
    with pytest.raises(typer.Exit):
        read_settings(Settings, {}, config)
    message = capsys.readouterr().err
    assert refusal in message
    assert len(message.splitlines()) == 1


def test_every_setting_is_an_option_with_a_help_text() -> None:
    serve = typer.main.get_command(app).commands["serve"]
    helps = {parameter.name: parameter.help for parameter in serve.params}
    assert set(Settings.model_fields) <= set(helps)
    assert all(helps[name] for name in Settings.model_fields)


def test_the_generated_pages_are_up_to_date() -> None:
    where = ROOT / "docs" / "generate.py"
    spec = importlib.util.spec_from_file_location("generate", where)
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, page in generate.PAGES.items():
        assert (ROOT / "docs" / name).read_text() == page(), f"docs/{name}: run `make docs`"
