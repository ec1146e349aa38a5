"""Which file systems other machines may write to as well.

SQLite's write-ahead log is shared memory between the processes of one machine. On a network file system two
machines see different logs, and the database is damaged (https://www.sqlite.org/wal.html).
"""

from __future__ import annotations

import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "9p", "coda"),
        *("ceph", "lustre", "gpfs", "beegfs", "glusterfs", "pvfs2", "orangefs", "wekafs", "panfs"),
        *("ocfs2", "gfs2", "vxfs", "acfs", "davfs", "davfs2"),
    )
)
_LOCAL = frozenset(("fuseblk", "fusectl", "fuse-overlayfs", "fuse.fuse-overlayfs"))


def network_filesystem(path: Path, mounts: str | None = None) -> str | None:
    """Return the type of the network file system that `path` is on, or None for a local one.

    `mounts` has the format of /proc/self/mountinfo, which is read by default. Where the system has no such
    file, every file system counts as local. So does a root of 9p or FUSE: containers and sandboxes have them.
    """
    if mounts is None:
        try:
            mounts = _MOUNTS.read_text()
        except OSError:
            return None
    resolved = path.resolve()
    mounted_on, found = Path("/"), ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields, described = before.split(), after.split()
        if len(fields) < 5 or not described:
            continue
        point = Path(_unescaped(fields[4]))
        # Of two mounts on one folder, the later one covers the earlier.
        if resolved.is_relative_to(point) and len(point.parts) >= len(mounted_on.parts):
            mounted_on, found = point, described[0]
    is_fuse = found.startswith("fuse") and found not in _LOCAL
    if mounted_on == Path("/") and (found == "9p" or is_fuse):
        return None
    return found if found in _NETWORK or is_fuse else None


def _unescaped(text: str) -> str:
    """Spaces and some other characters are written as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)
