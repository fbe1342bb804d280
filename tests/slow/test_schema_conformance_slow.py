"""What tests/contract/test_schema_conformance.py shows, with 5,000 requests, and in more circumstances."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.conformance import Server


@pytest.mark.timeout(3600)
def test_answers_are_as_described(tmp_path: Path) -> None:
    statuses = Server(tmp_path).try_out(5000, is_random=True)
    assert statuses.keys() >= {200, 400, 422}


@pytest.mark.timeout(3600)
def test_answers_to_tgi_clients_are_as_described(tmp_path: Path) -> None:
    assert 200 in Server(tmp_path, is_strict_tgi=True).try_out(500, is_random=True)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("is_strict", [False, True])
def test_answers_of_a_failing_engine_are_as_described(tmp_path: Path, is_strict: bool) -> None:
    server = Server(tmp_path, is_strict_tgi=is_strict)
    server.engine.error = "logits are not finite"
    assert 424 in server.try_out(500, is_random=True)


@pytest.mark.timeout(3600)
def test_without_the_key_all_is_refused_as_described(tmp_path: Path) -> None:
    assert 401 in Server(tmp_path, api_key="s3cret").try_out(500, is_random=True)
