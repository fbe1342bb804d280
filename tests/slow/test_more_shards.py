"""Shards in other numbers, and what else can become of them: more cases of the tests of shards in `tests/e2e`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import test_shards as one_host
from tests.e2e import test_two_hosts as two_hosts
from tests.e2e.namespaces import Hosts, why_not
from tests.e2e.test_two_hosts import expected, hosts, model

__all__ = ["expected", "hosts", "model"]

needs_hosts = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_four_shards_give_the_ids_of_one_process(model: Path, tmp_path: Path, expected: list[list[int]]) -> None:
    one_host.check_ids(model, tmp_path, expected, 4)


@needs_hosts
def test_two_shards_on_each_host_give_the_ids_of_one_process(
    hosts: Hosts, model: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    with two_hosts.served(hosts, model, tmp_path, "--num-shard", "4", "--dtype", "float32") as (first, _):
        two_hosts.check_ids(hosts, first, expected, 4)


def test_a_busy_rank_that_hangs_ends_everything_and_is_named(model: Path, tmp_path: Path) -> None:
    one_host.check_hang(model, tmp_path, 1, is_busy=True)


@needs_hosts
def test_a_cut_link_of_the_first_host_ends_both(hosts: Hosts, model: Path, tmp_path: Path) -> None:
    two_hosts.check_cut(hosts, model, tmp_path, "first host's interface down", is_busy=True)
