"""`mgllava serve`: MG-LLaVA (arXiv 2406.17770) behind an OpenAI-compatible API.

Generation is that of transformers, one answer at a time. What is here: the API's requests and answers, boxes in
requests, images from untrusted clients, limits, and clients that leave.

Needs `pip install 'mgllava[serve]'`.
"""
