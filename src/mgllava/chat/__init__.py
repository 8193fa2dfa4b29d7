"""Conversations with a model about images, from Python and in a terminal."""

from .session import Answer, ChatError, ChatImage, ChatSession

__all__ = ["Answer", "ChatError", "ChatImage", "ChatSession"]
