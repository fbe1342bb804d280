"""The edge between a client's connection and the routes: keys, origins, permits, clients that leave.

It may import errors, operations and the pages, and no other room of the server.
"""
