"""`text-generation-benchmark`: load on any TGI or OpenAI server, or on an engine in a process of its own.

A trace says what is sent and when, a wire how; exchanges keep what came and when it came; statistics make numbers of
them, and a report is written in several forms. Nothing here knows how this repository's server works.
"""
