"""Tar archives: of checkpoints, written while they are sent, and of adapters that clients import.

Nothing in an imported tar becomes a path: only the two files of a PEFT adapter are written, under our names.
Links, pickles, names that lead elsewhere, sparse files, very long headers and compressed tars are refused, so
that never more is written than was sent. The engine checks whether the adapter fits its base model
(`ckpt.peft.load_adapter`).
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import tarfile
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ...ckpt import model_card, peft_config, tokenizer_files
from ...engine import messages
from ..errors import BadRequest
from ..files import tensor_entries

_CHUNK_BYTES = 1 << 20
COMPLETE = "checkpoint_complete"
"""An empty last file. Clients take an archive without it for one that was cut off."""


def files(directory: Path, base_folder: Path | None = None) -> dict[str, Path | bytes]:
    """Return what is downloaded of a checkpoint's directory, by relative name: its files, but no hidden ones.

    A sampler's adapter has nothing beside it on disk. It gets the tokenizer of `base_folder`, and a model
    card, which is returned as its content.
    """
    found = (path for path in directory.rglob("[!.]*") if path.is_file() and not path.is_symlink())
    sent: dict[str, Path | bytes] = {path.relative_to(directory).as_posix(): path for path in sorted(found)}
    if CONFIG_FILE not in sent or model_card.FILE in sent:
        return sent
    config = json.loads((directory / CONFIG_FILE).read_bytes())
    base, revision = config["base_model_name_or_path"], config.get("revision")
    card = model_card.of_adapter(
        f"{base}@{revision}" if revision else base, config["r"], config["lora_alpha"]
    )
    sent[model_card.FILE] = card.encode()
    if base_folder is not None:
        there = {name: base_folder / name for name in tokenizer_files.FILES}
        sent |= {name: path for name, path in there.items() if path.is_file()}
    return sent


class Archive:
    """What is downloaded of a checkpoint (`files`), as a tar. Files are opened at once, so that a deleted one
    is still sent to its end.

    `length`: the tar's bytes. Raises FileNotFoundError.
    """

    def __init__(self, directory: Path, base_folder: Path | None = None):
        self._parts: list[tuple[bytes, BinaryIO | None, int]] = []
        for name, content in files(directory, base_folder).items():
            if isinstance(content, bytes):
                self._parts.append((_header(name, len(content), 0.0), io.BytesIO(content), len(content)))
                continue
            file = content.open("rb")
            status = os.fstat(file.fileno())
            self._parts.append((_header(name, status.st_size, status.st_mtime), file, status.st_size))
        if not self._parts:
            raise FileNotFoundError(directory)
        self._parts.append((_header(COMPLETE, 0, 0.0), None, 0))
        sizes = sum(len(header) + size + _padding(size) for header, _file, size in self._parts)
        self._end = 2 * tarfile.BLOCKSIZE
        self.length = sizes + self._end

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            for header, file, size in self._parts:
                yield header
                left = size
                while file is not None and left:
                    chunk = await asyncio.to_thread(file.read, min(left, _CHUNK_BYTES))
                    if not chunk:
                        raise OSError(f"{file.name} is shorter than it was")
                    left -= len(chunk)
                    yield chunk
                if _padding(size):
                    yield bytes(_padding(size))
            yield bytes(self._end)
        finally:
            for _, open_file, _ in self._parts:
                if open_file is not None:
                    open_file.close()


def _header(name: str, size: int, modified_at: float) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, int(modified_at), 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


CONFIG_FILE, TENSORS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAX_MEMBERS = 1000
_MAX_EXTENSION_BYTES = 64 << 10
_EXTENSIONS_OF_CONTENT = ("path", "linkpath", "size", "GNU.sparse")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip"}
_A = ".lora_A.weight"


def unpack(tar: BinaryIO, directory: Path) -> None:
    """Write the adapter's two files into a new directory. Raises BadRequest unless it is a plain adapter."""
    found: dict[str, PurePosixPath] = {}
    directory.mkdir(parents=True)
    for member in _members(tar):
        path = _checked(member)
        if path.name not in (CONFIG_FILE, TENSORS_FILE) or not member.isreg():
            continue
        if path.name in found:
            raise BadRequest(f"the archive has two adapters, {found[path.name].parent} and {path.parent}")
        if path.name == CONFIG_FILE and member.size > peft_config.MAX_BYTES:
            raise BadRequest(f"{CONFIG_FILE} has {member.size} bytes; it may have {peft_config.MAX_BYTES}")
        found[path.name] = path
        with (directory / path.name).open("xb") as file:
            _copy(tar, file, member.size)
    missing = [name for name in (CONFIG_FILE, TENSORS_FILE) if name not in found]
    if missing:
        raise BadRequest(
            f"the archive has no {' and no '.join(missing)}; send the folder that PEFT's save_pretrained "
            "writes, as an uncompressed tar"
        )
    if found[CONFIG_FILE].parent != found[TENSORS_FILE].parent:
        raise BadRequest("the adapter's two files are in different folders of the archive")


def _members(tar: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of the tar's members; at each, `tar` stands at the member's content.

    Only headers are read: `tarfile` would follow an extension, and read it into memory first.
    """
    begin = tar.read(tarfile.BLOCKSIZE)
    for magic, what in _COMPRESSED.items():
        if begin.startswith(magic):
            raise BadRequest(f"the archive is compressed ({what}); send it as a plain tar")
    at, size = 0, tar.seek(0, 2)
    for _ in range(_MAX_MEMBERS):
        tar.seek(at)
        header = tar.read(tarfile.BLOCKSIZE)
        if header == bytes(tarfile.BLOCKSIZE) and at:
            return
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise BadRequest("the body is not a tar, or was cut off") from None
        at += tarfile.BLOCKSIZE
        if member.size < 0 or at + member.size > size:
            raise BadRequest("the tar was cut off, or a member's size is wrong")
        if member.type in (tarfile.XHDTYPE, tarfile.XGLTYPE):
            _check_extension(tar, member)
        else:
            yield member
        at += -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    raise BadRequest(f"the archive has over {_MAX_MEMBERS} members; send the adapter's folder alone")


def _check_extension(tar: BinaryIO, member: tarfile.TarInfo) -> None:
    """Refuse pax headers that change a member's content. They may have times and owners."""
    if member.size > _MAX_EXTENSION_BYTES:
        raise BadRequest("the archive has an extended header of excessive length")
    text = tar.read(member.size)
    if any(b" " + key.encode() in text for key in _EXTENSIONS_OF_CONTENT):
        raise BadRequest("the archive has names over 100 characters, or sparse files; send the adapter alone")


def _checked(member: tarfile.TarInfo) -> PurePosixPath:
    shown = repr(member.name)[:160]
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise BadRequest(f"the archive's {shown} leads out of it")
    if not member.isdir() and member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise BadRequest(
            f"the archive's {shown} is not a plain file or folder (links and the like are refused)"
        )
    if path.suffix.lower() in _PICKLES:
        raise BadRequest(
            f"the archive's {shown} is a pickle, which is code; send safetensors "
            "(save_pretrained writes them by default), and leave that file out"
        )
    return path


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        chunk = source.read(min(size, 1 << 20))
        if not chunk:
            raise BadRequest("the tar was cut off")
        target.write(chunk)
        size -= len(chunk)


def described(directory: Path, modules: Mapping[str, frozenset[str]]) -> messages.LoraSpec:
    """Return the adapter's rank and alpha, and which parts of the base model it trains.

    `modules` are the base model's (`BaseModel.adapter_modules`). Raises BadRequest unless it is a plain LoRA.
    """
    try:
        config = peft_config.read((directory / CONFIG_FILE).read_bytes())
        entries = tensor_entries(directory / TENSORS_FILE)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    # experts may be in one tensor with an axis for them
    ranks = {
        name: config.rank_in_file(name.removeprefix("base_model.model.").removesuffix(_A), entry.shape)
        for name, entry in entries.items()
        if _is_a(name) and len(entry.shape) > 1
    }
    trained = [name.removesuffix(_A).split(".") for name in ranks]
    rank, alpha = config.overall(ranks.values())
    return messages.LoraSpec(
        rank=rank,
        alpha=alpha,
        seed=0,
        train_attn=any(module[-1] in modules.get("attn", ()) for module in trained),
        # experts have other names in some forms
        train_mlp=any(module[-1] in modules.get("mlp", ()) or "experts" in module for module in trained),
        train_unembed=any(module[-1] == "lm_head" for module in trained),
    )


def _is_a(name: str) -> bool:
    return name.endswith(_A) and name.count(".") > 2
