"""Conversations with a model about images and videos, from Python and in a terminal."""

from .session import Answer, ChatError, ChatImage, ChatSession, ChatVideo

__all__ = ["Answer", "ChatError", "ChatImage", "ChatSession", "ChatVideo"]
