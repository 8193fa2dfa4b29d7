"""`except MGLlavaError` catches all error classes of this package."""

from mgllava.errors import MGLlavaError
from tests.test_docstrings import modules

# Hub folders cannot import the base class. The last one is a signal, not an error.
EXCEPTIONS = {"UnreadableImageError", "UnreadableVideoError", "UnsupportedLanguageModelError", "AnswerFinishedError"}


def test_all_errors_have_one_base():
    found = {}
    for module in modules():
        for name, value in vars(module).items():
            is_ours = isinstance(value, type) and value.__module__ == module.__name__
            if is_ours and issubclass(value, BaseException):
                found[name] = value
    others = {name for name, value in found.items() if not issubclass(value, MGLlavaError)}
    assert others == EXCEPTIONS
    assert {"ConversionError", "TrainingError", "BoxFileError", "ChatError", "FolderLockedError"} <= found.keys()
