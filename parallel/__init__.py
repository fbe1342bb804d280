"""Tensor parallelism: how layers are split over ranks, and how ranks meet. Knows no engine and no server."""
