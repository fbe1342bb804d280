"""Whether a model's output head is its table of embeddings, by config.json and by what is stored."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from engine.checkpoint.renamed_weights import DECODER, EMBEDDING, HEAD
from engine.checkpoint.weights import WeightSource

logger = logging.getLogger(__name__)

TIED_KEY = "tie_word_embeddings"
ROWS_AT_A_TIME = 8192


def with_stored_head(config: Mapping[str, Any], weights: WeightSource) -> dict[str, Any]:
    """config.json that does not say tied where the checkpoint has a head of its own, as `transformers` 5 has it.

    A copy of the table, which some tools store, is none.
    """
    if not config.get(TIED_KEY) or not _has_own_head(weights):
        return dict(config)
    logger.warning(
        "config.json says %s, and the checkpoint has a head that is not the table of embeddings: the head is used, as "
        "by transformers",
        TIED_KEY,
    )
    return {**config, TIED_KEY: False}


def _has_own_head(weights: WeightSource) -> bool:
    """Whether a head is stored that is quantized, or has other numbers than the table of embeddings."""
    head, table = f"{HEAD}weight", f"{DECODER}{EMBEDDING}"
    stored = [name for name in weights.names if name.startswith(HEAD)]
    if stored != [head] or table not in weights.names:
        return bool(stored)
    if weights.shape(head) != weights.shape(table):
        return True
    num_rows = weights.shape(table)[0]
    parts = (slice(first, first + ROWS_AT_A_TIME) for first in range(0, num_rows, ROWS_AT_A_TIME))
    return any(not weights.read(head, (rows,)).float().equal(weights.read(table, (rows,)).float()) for rows in parts)
