"""From generated tokens to the bytes of an answer: JSON, events, headers."""
