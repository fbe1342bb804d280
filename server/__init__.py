"""The wire: command line, process supervision, HTTP routes, text. Never imports torch."""
