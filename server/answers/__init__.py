"""From generated tokens to the bytes of an answer: JSON, events, headers. It knows no route and no service.

It may import `engine.link`, `server.edge`, `server.requests`, `server.telemetry`, `server.text`, the configuration, the
errors and generations.
"""
