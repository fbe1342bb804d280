"""Metrics, spans and the lines of a request. Imports nothing else of the server but errors and operations."""
