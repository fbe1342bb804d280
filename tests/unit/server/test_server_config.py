"""The configuration on its way from the launcher."""

from __future__ import annotations

from server.config import ServerConfig
from tests.unit.server.harness import make_config


def test_what_arrives_is_what_was_sent() -> None:
    sent = make_config(cors_allow_origin=("http://a", "http://b"), api_key="key", payload_limit=7)
    arrived = ServerConfig.from_json(sent.to_json())
    assert (arrived, hash(arrived)) == (sent, hash(sent))
