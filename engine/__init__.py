"""The engine: scheduling, paged KV cache, models, sampling. Token ids in, token ids out; it never sees text or HTTP."""
