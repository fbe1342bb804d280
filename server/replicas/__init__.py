"""Replicas on Ray Serve: one front for several whole servers, the rule that routes requests to them, their command.

Everything but `prefix_rule`, `prompt_blocks` and `labels` needs the extra `ray`.
"""
