"""The pages for browsers: their files, the headers that these need, and who counts as a browser.

Imports nothing of the server. What a page asks of the server goes over the API, as any client's requests do.
"""
