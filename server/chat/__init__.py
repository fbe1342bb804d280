"""Chats: prompts by template, tools offered and called, what the assistant says. Text in, text out."""
