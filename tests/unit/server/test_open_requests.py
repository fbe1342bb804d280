"""How many requests each replica has from this front, and that a burst is spread before any of it is sent."""

from __future__ import annotations

from collections import Counter

from server.replicas.open_requests import CHOICE_S, OpenRequests
from server.replicas.prefix_rule import PrefixRule


def test_a_burst_is_spread_though_none_of_it_is_sent_yet() -> None:
    rule, requests = PrefixRule(capacity=1_000, seed=0), OpenRequests()
    stale = {"a": 1, "b": 0}  # what Serve still knows of an earlier request
    for index in range(16):
        loads = {name: max(requests.count(name), stale[name]) for name in stale}
        requests.choose(str(index), rule.choose((), loads))
    assert [requests.count(name) for name in stale] == [8, 8]


def test_a_request_counts_once_and_where_it_was_sent() -> None:
    requests = OpenRequests()
    requests.choose("1", "a")
    requests.choose("1", "b")  # the first choice could not be sent
    requests.send("1", "c")
    assert counts(requests) == {"c": 1}
    requests.complete("1")
    assert not counts(requests)


def test_the_end_of_a_call_that_was_not_routed_takes_nothing_away() -> None:
    requests = OpenRequests()
    requests.send("1", "a")
    requests.complete("a call to all replicas")
    requests.complete("1")
    requests.complete("1")
    requests.send("2", "a")
    assert counts(requests) == {"a": 1}


def test_a_request_that_is_never_sent_stops_counting_and_one_that_is_sent_does_not() -> None:
    now = 0.0
    requests = OpenRequests(lambda: now)
    for name in "12":
        requests.choose(name, "a")
    requests.send("2", "a")
    assert counts(requests) == {"a": 2}
    now = CHOICE_S + 1
    assert counts(requests) == {"a": 1}
    requests.send("1", "a")  # late, but it was sent
    assert counts(requests) == {"a": 2}


def test_the_requests_of_a_replica_that_is_gone_are_forgotten() -> None:
    requests = OpenRequests()
    requests.choose("1", "a")
    requests.send("2", "b")
    requests.keep({"b"})
    requests.complete("1")
    assert counts(requests) == {"b": 1}


def counts(requests: OpenRequests) -> Counter[str]:
    return +Counter({name: requests.count(name) for name in "abc"})
