"""The routes: one router for each area of the wire. The only room that knows a whole request and its answer."""
