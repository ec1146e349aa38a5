"""`python -m tinsmith.engine.devices`: print the devices that JAX finds, as JSON (messages.Devices).

Exits with 1, and the reason as the last line on standard error, where there is none.
"""

from __future__ import annotations

import sys

import jax
import msgspec

from .messages import Devices


def main() -> int:
    try:
        found = jax.devices()
    except RuntimeError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 1
    limit = (found[0].memory_stats() or {}).get("bytes_limit") if found[0].platform != "cpu" else None
    print(msgspec.json.encode(Devices(found[0].platform, len(found), limit)).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
