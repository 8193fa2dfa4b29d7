"""One `except MGLlavaError` catches every error that this package raises on purpose."""

import importlib
import pkgutil

import mgllava
from mgllava.errors import MGLlavaError

# The files that are copied into saved models cannot import the base. The last one is a signal, not an error.
EXCEPTIONS = {"UnreadableImageError", "UnsupportedLanguageModelError", "AnswerFinishedError"}


def test_all_errors_have_one_base():
    found = {}
    for module in pkgutil.walk_packages(mgllava.__path__, "mgllava."):
        if module.name.endswith(("__main__", "loading_check")):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            is_ours = isinstance(value, type) and value.__module__ == module.name
            if is_ours and issubclass(value, BaseException):
                found[name] = value
    others = {name for name, value in found.items() if not issubclass(value, MGLlavaError)}
    assert others == EXCEPTIONS
    assert {"ConversionError", "TrainingError", "BoxFileError", "ChatError", "FolderLockedError"} <= found.keys()
