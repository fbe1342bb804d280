"""Tokens and text: encoding, incremental decoding, stop strings. Imports nothing else of the server."""
