"""From the bytes of a body to a `GenerationRequest`: wire models, parameters, refusals, limits, grammars.

A wire model does not leave this room, but for the route that reads it and, if it is a chat, `server.chat`. May import
`server.text`, the configuration and the errors.
"""
