"""The adapters that requests may name, and which of them are in memory. Plain Python over names and counts.

There are slots for so many adapters at a time. A running sequence holds its adapter's slot; one that nobody holds
keeps its adapter until the slot is needed for another, least recently used first. Whoever runs steps looks at what each
step's slots are to hold, and loads what is not there yet.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Collection

NO_SLOT = -1


@dataclasses.dataclass(slots=True, eq=False)
class Adapter:
    """An adapter under its name. Another one that comes under the same name later is another adapter."""

    name: str
    number: int
    """Unique in this process."""
    slot: int = NO_SLOT
    num_holders: int = 0
    """Running sequences that have it."""

    @property
    def salt(self) -> bytes:
        """What sets the KV of its sequences apart."""
        return b"adapter %d" % self.number


class AdapterCache:
    """Knows the adapters, and hands out the slots."""

    def __init__(self, num_slots: int = 0) -> None:
        self._by_name: dict[str, Adapter] = {}
        self.next_number = 0
        """The number of the next adapter."""
        self._in_slot: list[Adapter | None] = [None] * num_slots
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_slots))
        """Slots that no running sequence holds, the least recently used first."""
        self._retired: dict[Adapter, None] = {}
        """Adapters that no further request is to name, and that some may still have."""
        self.num_loads = 0
        """Times that an adapter got a slot."""

    @property
    def num_slots(self) -> int:
        return len(self._in_slot)

    @property
    def num_adapters(self) -> int:
        """Adapters that requests may name."""
        return sum(adapter not in self._retired for adapter in self._by_name.values())

    @property
    def has_retired(self) -> bool:
        """Whether there is something to forget."""
        return bool(self._retired)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def add(self, name: str) -> Adapter:
        """Let requests name an adapter; one of that name is retired, and sequences that have it go on with it.

        It gets a slot if there is one that was never used.
        """
        self.retire(name)
        adapter = self._by_name[name] = Adapter(name, self.next_number)
        self.next_number += 1
        if None in self._in_slot:
            self._put(adapter, self._in_slot.index(None))
        return adapter

    def find(self, name: str) -> Adapter:
        """Raises KeyError for a name that was never added, or is forgotten."""
        return self._by_name[name]

    def retire(self, name: str) -> None:
        """Let an adapter that nobody is to name any more be the first to make place. It stays known until forgotten."""
        adapter = self._by_name.get(name)
        if adapter is not None:
            self._retired[adapter] = None
            if adapter.slot in self._idle:
                self._idle.move_to_end(adapter.slot, last=False)

    def forget_unused(self, users: Collection[Adapter | None], names: Collection[str | None]) -> list[int]:
        """Forget the retired adapters that are none of `users` and have none of `names`: their numbers."""
        unused = [adapter for adapter in self._retired if adapter not in users and adapter.name not in names]
        for adapter in unused:
            del self._retired[adapter]
            if self._by_name.get(adapter.name) is adapter:
                del self._by_name[adapter.name]
        return [adapter.number for adapter in unused]

    def hold(self, adapter: Adapter | None) -> bool:
        """Give the adapter of a sequence that begins to run a slot; False, and no change, if all are held.

        A sequence without an adapter needs none.
        """
        if adapter is None:
            return True
        if adapter.slot == NO_SLOT:
            if not self._idle:
                return False
            self._put(adapter, next(iter(self._idle)))
        self._idle.pop(adapter.slot, None)
        adapter.num_holders += 1
        return True

    def release(self, adapter: Adapter | None) -> None:
        """A sequence with the adapter runs no longer."""
        if adapter is not None:
            adapter.num_holders -= 1
            if not adapter.num_holders:
                self._idle[adapter.slot] = None
                if adapter in self._retired:
                    self._idle.move_to_end(adapter.slot, last=False)

    def check_integrity(self, running: list[Adapter | None]) -> None:
        """Check what holds between any two operations, if `running` are those of all running sequences. For tests.

        Raises AssertionError.
        """
        held = {adapter for adapter in running if adapter is not None}
        assert all(self._in_slot[adapter.slot] is adapter for adapter in held), "a running sequence's adapter is gone"
        assert all(adapter.num_holders == running.count(adapter) for adapter in held)
        assert set(self._idle) == set(range(self.num_slots)) - {adapter.slot for adapter in held}

    def _put(self, adapter: Adapter, slot: int) -> None:
        former = self._in_slot[slot]
        if former is not None:
            former.slot = NO_SLOT
        self._in_slot[slot], adapter.slot = adapter, slot
        self.num_loads += 1
