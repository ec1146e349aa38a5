"""The pages of the KV cache: who owns each, and which hold the beginning of an earlier prompt.

Host side only: page numbers, reference counts and hashes; `model.kv_cache` has the arrays.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


class PagePool:
    """Pages 1..num_pages-1 with reference counts; page 0 takes what padding writes.

    A full page may be published under the tokens up to its end and the weights that computed it. It can be
    found after its last owner released it, until the page is needed: least recently released first.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.page_size = page_size
        self.capacity = (num_pages - 1) * page_size  # tokens
        self._owners = [0] * num_pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}

    @property
    def num_pages(self) -> int:
        """The number of pages, including page 0."""
        return len(self._owners)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, positions: int) -> int:
        return -(-positions // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """Return `count` pages with one owner each, or None if there are not enough."""
        if count > len(self._free):
            return None
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._owners[page] = 1
            if (digest := self._hash_of.pop(page, None)) is not None:
                del self._page_of[digest]
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Add an owner to each page."""
        for page in pages:
            if self._owners[page] == 0:
                del self._free[page]
            self._owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Remove an owner from each page."""
        # A prompt's later pages are of no use without its earlier ones: forget them first.
        for page in reversed(list(pages)):
            self._owners[page] -= 1
            if self._owners[page] == 0:
                self._free[page] = None
                if page not in self._hash_of:
                    self._free.move_to_end(page, last=False)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """Return the published pages of these `digests`, up to the first that has none; share them before
        use."""
        found = []
        for digest in digests:
            if (page := self._page_of.get(digest)) is None:
                break
            found.append(page)
        return found

    def publish(self, digests: Iterable[bytes], pages: Sequence[int]) -> None:
        """Publish full pages, held in `pages` in order."""
        for digest, page in zip(digests, pages, strict=False):
            if digest not in self._page_of and page not in self._hash_of:
                self._page_of[digest] = page
                self._hash_of[page] = digest

    def forget(self) -> None:
        """Forget the contents of all pages."""
        self._page_of.clear()
        self._hash_of.clear()

    def digests(self, weights_id: int, tokens: np.ndarray) -> list[bytes]:
        """Return a hash per full page of `tokens`, of everything up to its end and the weights."""
        data = np.asarray(tokens, np.int32)
        digests, digest = [], weights_id.to_bytes(8, "little")
        for end in range(self.page_size, len(data) + 1, self.page_size):
            page = data[end - self.page_size : end].tobytes()
            digest = hashlib.blake2b(digest + page, digest_size=16).digest()
            digests.append(digest)
        return digests
