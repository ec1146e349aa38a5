"""The wheel and the sdist hold the whole package, and the metadata is complete and consistent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version
from tinsmith import __version__

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("server", "engine", "model", "losses", "ckpt")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
RESOLVED = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin", "tpu": "libtpu", "client": "tinker"}
"""A package that only the extra brings."""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a program that finds this repository neither in its folder nor in its environment."""
    own = ("PYTHON", "TINSMITH")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(own)}
    arguments = list(map(str, command))
    done = subprocess.run(
        arguments, cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def image_context(folder: Path) -> Path:
    """Copy what .dockerignore lets into the image's build."""
    folder.mkdir()
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line.startswith("!"):
            continue
        source, target = ROOT / line[1:], folder / line[1:]
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(source, target)
    return folder


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a `wheel` or an `sdist` of a source folder."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(target)!r})"
    before = set(target.iterdir())
    run(sys.executable, "-c", code, cwd=source)
    (built,) = set(target.iterdir()) - before
    return built


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "out").mkdir()
    return build("wheel", image_context(folder / "source"), folder / "out")


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    expected = {"tinsmith/__init__.py"}
    for room in ROOMS:
        found = (path.relative_to(ROOT) for path in (ROOT / room).rglob("*") if path.is_file())
        expected |= {
            f"tinsmith/{path.as_posix()}"
            for path in found
            if not any(part.startswith(".") or part == "__pycache__" for part in path.parts)
        }
    assert {name for name in files(wheel) if ".dist-info/" not in name} == expected


def test_the_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    source = image_context(tmp_path / "source")
    extra = (ROOT / "MANIFEST.in").read_text().removeprefix("include ").split()
    for name in (*extra, "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    (tmp_path / "out").mkdir()
    sdist = build("sdist", source, tmp_path / "out")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert all((unpacked / name).is_file() for name in extra)
    assert files(build("wheel", unpacked, tmp_path / "out")) == files(wheel)


def test_the_wheel_works_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """The command answers and makes a ledger without the repository. Dependencies are borrowed from here."""
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    install = ("--python", python, "install", "--no-deps", "--no-index", "--no-compile")
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", *install, wheel, cwd=tmp_path)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    borrowed = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")

    tinsmith = tmp_path / "venv" / "bin" / "tinsmith"
    assert run(tinsmith, "version", cwd=tmp_path).strip() == __version__
    key = run(tinsmith, "keys", "create", "alice", "--data-dir", tmp_path / "runs", cwd=tmp_path)
    assert "tml-" in key
    where = run(python, "-c", "import tinsmith.engine.messages as m; print(m.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(packages)


def test_the_wheel_s_metadata_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name), validate=True)
    assert (metadata.name, metadata.version) == ("tinsmith", Version(__version__))
    assert metadata.license_expression == "Apache-2.0"
    assert metadata.license_files == ["LICENSE"]
    assert f"{name.removesuffix('METADATA')}licenses/LICENSE" in files(wheel)
    assert metadata.author == "The Tinsmith authors"
    assert metadata.keywords
    assert metadata.description_content_type == "text/markdown"
    assert set(metadata.provides_extra or ()) == set(EXTRAS)
    assert not [each for each in metadata.classifiers or () if each.startswith("License ::")]


def test_the_lock_file_has_every_version_that_it_is_to_have() -> None:
    """Exactly one version of each dependency for each Python, within the range of pyproject.toml."""
    locked = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines()]
    wanted = [Requirement(each) for each in PROJECT["dependencies"]]
    wanted += [
        Requirement(each) for extra in ("demo", "notebooks", "reference", "dev") for each in EXTRAS[extra]
    ]
    for python in ("3.11", "3.12", "3.13"):
        machine = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
        for requirement in wanted:
            if requirement.name == "tinsmith":  # with an extra, which has the requirement that counts
                continue
            found = [
                each
                for each in locked
                if each.name == requirement.name and (each.marker is None or each.marker.evaluate(machine))
            ]
            assert len(found) == 1, f"{requirement} on Python {python}"
            (pin,) = found[0].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), f"{requirement}: {found[0]}"


def test_the_lock_file_has_nothing_for_accelerators() -> None:
    names = [Requirement(line).name for line in (ROOT / "requirements.lock").read_text().splitlines()]
    assert not [name for name in names if name.startswith(("nvidia", "jax-cuda", "libtpu"))]


@pytest.mark.slow
@pytest.mark.parametrize("extra", RESOLVED)
def test_an_extra_resolves_with_the_locked_versions(wheel: Path, tmp_path: Path, extra: str) -> None:
    """pip finds a version of everything, and installs nothing; it needs a package index."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    options = ("--dry-run", "--ignore-installed", "--only-binary=:all:")
    constraint = ("--constraint", ROOT / "requirements.lock")
    output = run(*pip, *options, *constraint, f"tinsmith[{extra}] @ {wheel.as_uri()}", cwd=tmp_path)
    (installed,) = (line for line in output.splitlines() if line.startswith("Would install"))
    assert f" {RESOLVED[extra]}-" in installed


def test_the_citation_is_valid_and_of_this_version() -> None:
    citation = ROOT / "CITATION.cff"
    schema = ("--builtin-schema", "vendor.citation-file-format")
    run(sys.executable, "-m", "check_jsonschema", *schema, citation, cwd=ROOT)
    assert f"\nversion: {__version__}\n" in citation.read_text()


def test_the_changelog_has_this_version() -> None:
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text()
