"""`mgllava serve`: an image-text model behind an OpenAI-compatible API.

transformers generates, one answer at a time. This folder adds the API's requests and answers, boxes in requests,
images from untrusted clients, limits, and the handling of clients that disconnect.

Needs the extra `serve`: `pip install -e '.[serve]'` from a clone.
"""
