"""PrefixCache: keys and values of beginnings of prompts, the least recently used given up for a byte budget.

Lives on the owner thread. An entry and the caches forked from it share their memory until one is written to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..generate.options import GenerateOptions
from ..generate.prompt_cache import PromptCache

CacheKind = tuple[int | None, int | None]


class PrefixCache:
    """Finds the entry that has most of a prompt.

    Attributes:
        limit_bytes: of all entries together.
        held_bytes: by them now.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._entries: list[PromptCache] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    def fork(self, ids: list[int], kind: CacheKind) -> tuple[list[Any], int] | None:
        """A cache of its own that holds the beginning of `ids`, and how many of them: never all. None for no match."""
        found = [(_common(entry.ids or (), ids), entry) for entry in self._entries if kind_of(entry) == kind]
        common, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or min(common, len(ids) - 1) < 1:
            return None
        self._use(best)
        layers, kept = best.fork(ids)
        for layer in layers:  # what it shares is to be no longer than what it needs, or it would all be copied
            layer.state = tree_map(lambda x: x[..., :kept, :] if isinstance(x, mx.array) else x, layer.state)
        return layers, kept

    def insert(self, ids: Sequence[int], layers: list[Any]) -> None:
        """Keeps a cache that holds exactly these tokens; entries that it has whole go, being of no more use.

        One that is larger than the limit is not kept.
        """
        new = PromptCache(layers, tuple(ids), weights_sha256="")
        if not new.ids or entry_bytes(new) > self.limit_bytes:
            return
        for entry in [entry for entry in self._entries if kind_of(entry) == kind_of(new)]:
            assert entry.ids is not None
            common = _common(entry.ids, new.ids)
            if common == len(new.ids):  # this entry has all of it already
                self._use(entry)
                return
            if common == len(entry.ids):
                self._drop(entry)
        self._entries.append(new)
        self.held_bytes += entry_bytes(new)
        self.shrink(self.limit_bytes)

    def shrink(self, limit_bytes: int) -> None:
        """Gives up the least recently used entries until they hold no more than that."""
        while self._entries and self.held_bytes > limit_bytes:
            self._drop(self._entries[0])

    def _use(self, used: PromptCache) -> None:
        self._entries = [entry for entry in self._entries if entry is not used] + [used]

    def _drop(self, dropped: PromptCache) -> None:
        self._entries = [entry for entry in self._entries if entry is not dropped]
        self.held_bytes -= entry_bytes(dropped)


def kind_of(source: PromptCache | GenerateOptions) -> CacheKind:
    """(kv_bits, kv_group_size): caches of one kind serve requests of that kind only."""
    return (source.kv_bits, source.kv_group_size) if source.kv_bits else (None, None)


def entry_bytes(entry: PromptCache) -> int:
    """Memory of its arrays."""
    return sum(layer.nbytes for layer in entry.layers)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning, by halves, so that Python compares whole slices at once."""
    same, most = 0, min(len(a), len(b))
    while same < most:
        middle = (same + most + 1) // 2
        if tuple(a[same:middle]) == tuple(b[same:middle]):
            same = middle
        else:
            most = middle - 1
    return same
