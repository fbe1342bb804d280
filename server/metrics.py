"""Prometheus text of the engine's counts. Written by hand: `tgi_*` names have no unit or `_total` suffix."""

from __future__ import annotations

from engine.types import EngineStats


def render_metrics(stats: EngineStats) -> str:
    """The gauges of the reference's section 7.2 that exist so far, and the KV blocks under our own names."""
    gauges = {
        "tgi_batch_current_size": stats.num_running,
        "tgi_batch_current_max_tokens": stats.num_used_blocks * stats.block_size,
        "tgi_queue_size": stats.num_waiting,
        "pytgi_kv_blocks_used": stats.num_used_blocks,
        "pytgi_kv_blocks_cached": stats.num_cached_blocks,
        "pytgi_kv_blocks_total": stats.num_blocks,
    }
    text = "".join(f"# TYPE {name} gauge\n{name} {value}\n\n" for name, value in gauges.items())
    counters = {
        "pytgi_preemptions": stats.num_preemptions,
        "pytgi_draft_steps": stats.num_draft_steps,
        "pytgi_draft_tokens": stats.num_drafted_tokens,
        "pytgi_draft_tokens_accepted": stats.num_accepted_tokens,
    }
    return text + "".join(f"# TYPE {name} counter\n{name} {value}\n\n" for name, value in counters.items())
