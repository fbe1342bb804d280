"""The routes: an area of the wire in each file, each handler below its `Operation`.

The only room that knows a whole request and its answer. `server.app` lists the areas.
"""
