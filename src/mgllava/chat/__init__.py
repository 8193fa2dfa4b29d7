"""Talking with a model about images: the conversation, and the terminal around it."""

from .session import Answer, ChatError, ChatImage, ChatSession

__all__ = ["Answer", "ChatError", "ChatImage", "ChatSession"]
