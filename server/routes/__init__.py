"""A router per area of the wire."""
