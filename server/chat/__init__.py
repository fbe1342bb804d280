"""Chats: prompts by template, tools offered and called, what the assistant says. Text in, text out.

The one room besides the routes that reads wire models, those of chats. May import `server.requests` and `server.text`.
"""
