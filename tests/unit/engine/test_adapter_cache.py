"""Which adapters are in memory: names and counts, no weights."""

from __future__ import annotations

import pytest

from engine.scheduling.adapters import NO_SLOT, AdapterCache


def filled(num_slots: int, names: str) -> AdapterCache:
    cache = AdapterCache(num_slots)
    for name in names:
        cache.add(name)
    return cache


def use(cache: AdapterCache, name: str) -> None:
    """A sequence with the adapter begins and ends."""
    assert cache.hold(cache.find(name))
    cache.release(cache.find(name))


def in_memory(cache: AdapterCache, names: str) -> str:
    return "".join(name for name in names if cache.find(name).slot != NO_SLOT)


def test_the_least_recently_used_adapter_makes_place() -> None:
    cache = filled(3, "abcde")
    assert in_memory(cache, "abcde") == "abc"
    use(cache, "a")
    use(cache, "d")
    assert in_memory(cache, "abcde") == "acd"
    use(cache, "c")
    use(cache, "e")
    assert in_memory(cache, "abcde") == "cde"


def test_sixty_four_adapters_and_eight_in_memory() -> None:
    cache = AdapterCache(8)
    adapters = [cache.add(f"adapter-{number}") for number in range(64)]
    for number in [*range(64), *range(56, 64), 0]:
        use(cache, f"adapter-{number}")
    assert [adapter.number for adapter in adapters if adapter.slot != NO_SLOT] == [0, *range(57, 64)]
    assert cache.num_loads == 64 + 1
    assert sorted(adapter.slot for adapter in adapters if adapter.slot != NO_SLOT) == list(range(8))


def test_an_adapter_that_runs_keeps_its_place() -> None:
    cache = filled(2, "abc")
    a, b, c = map(cache.find, "abc")
    assert cache.hold(a) and cache.hold(a) and cache.hold(b)
    assert not cache.hold(c), "all places are held"
    cache.release(a)
    assert not cache.hold(c), "another sequence has it"
    cache.release(a)
    assert cache.hold(c)
    assert (a.slot, c.slot) == (NO_SLOT, 0)
    cache.check_integrity([b, c])


def test_the_base_needs_no_place() -> None:
    cache = AdapterCache(0)
    assert cache.hold(None)
    cache.release(None)


def test_another_adapter_of_the_same_name_is_another_one() -> None:
    cache = filled(2, "a")
    former = cache.find("a")
    assert cache.hold(former)
    latter = cache.add("a")
    assert cache.find("a") is latter
    assert former.salt != latter.salt
    assert cache.hold(latter) and former.slot != latter.slot
    cache.check_integrity([former, latter])


def test_what_nobody_will_name_makes_place_first() -> None:
    """Also what was replaced, and what still ran when it was retired."""
    cache = filled(4, "abcd")
    for name in "abcd":
        use(cache, name)
    running = cache.find("c")
    assert cache.hold(running)
    cache.retire("d")
    cache.retire("c")
    replaced = cache.find("b")
    cache.add("b")
    assert cache.num_adapters == 2
    cache.release(running)
    for name in "efg":
        use(cache, cache.add(name).name)
    assert in_memory(cache, "acdefg") == "aefg"
    assert replaced.slot == NO_SLOT
    cache.check_integrity([])


def test_what_is_retired_is_forgotten_once_no_request_has_it() -> None:
    cache = filled(2, "abcd")
    a, b, c, _ = map(cache.find, "abcd")
    cache.retire("a")
    cache.retire("b")
    cache.add("c")
    assert cache.has_retired
    assert cache.forget_unused({a, c}, {"b"}) == []
    assert all(name in cache for name in "abcd"), "a request that named it before may wait for its grammar"
    assert cache.forget_unused({c}, set()) == [a.number, b.number]
    assert [name for name in "abcd" if name in cache] == ["c", "d"]
    assert cache.forget_unused(set(), {None}) == [c.number]
    assert cache.find("c") is not c
    assert not cache.has_retired


def test_a_name_that_was_never_added() -> None:
    with pytest.raises(KeyError):
        AdapterCache(1).find("a")
