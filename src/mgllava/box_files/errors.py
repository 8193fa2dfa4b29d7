"""Errors of box files."""

from mgllava.errors import MGLlavaError


class BoxFileError(MGLlavaError, ValueError):
    """A box file cannot be read, written or computed; the message says what to do about it."""


class MissingBoxesError(BoxFileError, KeyError):
    """A box file has no record for an id."""

    # `KeyError.__str__` puts the message in quotes.
    __str__ = Exception.__str__


__all__ = ["BoxFileError", "MissingBoxesError"]
