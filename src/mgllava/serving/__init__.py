"""`mgllava serve`: MG-LLaVA (arXiv 2406.17770) behind an OpenAI-compatible API.

Generation, streaming and the form of the answers are those of `transformers serve`. What is here: boxes in requests,
images from untrusted clients, limits, errors in OpenAI's form, and clients that leave.

Needs `pip install 'mgllava[serve]'`.
"""
