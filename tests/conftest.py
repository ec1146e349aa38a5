"""Shape and dtype annotations of the array rooms are checked at run time in every test."""

import os

from jaxtyping import install_import_hook

# Tests run on the CPU unless told otherwise, whatever accelerator the machine has.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

install_import_hook(["tinsmith.model", "tinsmith.losses"], "beartype.beartype")
