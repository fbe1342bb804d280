"""Replicas on Ray Serve: one front for several whole servers, the rule that routes requests to them, their command.

`deployment`, `front` and `router` need the extra `ray`; `command` looks for it before it imports them.
"""
