"""The edge between a client's connection and the routes: keys, origins, permits, clients that leave.

It may import errors, operations, the pages and the link, and no other room of the server.
"""
