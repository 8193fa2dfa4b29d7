"""Find the test folder of transformers, and import its modules.

Wheels do not contain it. It is cloned into `build/` from the git tag of the installed release; or the environment
variable `TRANSFORMERS_SOURCE` names a checkout, complete or sparse with `tests`, `utils` and `src/transformers`.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import unittest
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

import transformers

REPOSITORY = "https://github.com/huggingface/transformers"
CACHE = Path(__file__).parents[2] / "build" / "transformers"
# Not `tests`, which is the name of our own folder.
PACKAGE = "transformers_tests"


def fetch() -> Path:
    """Return a checkout of the installed release, and clone it if needed; raise `SystemExit` if that fails."""
    if given := os.environ.get("TRANSFORMERS_SOURCE"):
        if not (Path(given) / "tests" / "test_modeling_common.py").is_file():
            raise SystemExit(f"TRANSFORMERS_SOURCE must be a checkout of transformers, but {given} has no tests.")
        return Path(given).resolve()
    tag = f"v{transformers.__version__}"
    checkout = CACHE / tag
    if checkout.is_dir():
        return checkout
    if shutil.which("git") is None:
        raise SystemExit("git is not installed. Install it, or set TRANSFORMERS_SOURCE to a checkout of transformers.")
    partial = CACHE / f"{tag}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    clone = ["git", "clone", "--quiet", "--depth=1", "--filter=blob:none", "--sparse", f"--branch={tag}"]
    try:
        subprocess.run([*clone, REPOSITORY, partial], check=True, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
        subprocess.run(
            ["git", "-C", partial, "sparse-checkout", "set", "tests", "utils", "src/transformers"], check=True
        )
    except subprocess.CalledProcessError:
        shutil.rmtree(partial, ignore_errors=True)
        raise SystemExit(
            f"{REPOSITORY} at {tag} could not be cloned. Without a network, or with an unreleased transformers, set "
            "TRANSFORMERS_SOURCE to a checkout of that version."
        ) from None
    partial.rename(checkout)
    return checkout


def mixins(module: str) -> ModuleType:
    """Import a module of transformers' test folder, such as `"test_modeling_common"`."""
    if PACKAGE not in sys.modules:
        folder = fetch() / "tests"
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[PACKAGE] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"{PACKAGE}.{module}")


def skip(reasons: dict[str, str]):
    """Make a class decorator that skips tests; `reasons` maps names or patterns of names to reasons."""

    def decorate(case: type) -> type:
        for name in dir(case):
            reason = next((why for pattern, why in reasons.items() if fnmatch(name, pattern)), None)
            if name.startswith("test_") and reason is not None:
                setattr(case, name, unittest.skip(reason)(getattr(case, name)))
        return case

    return decorate
