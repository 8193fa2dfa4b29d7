"""The plugin for vLLM: models of this package with boxes, ids and images as in this package.

vLLM loads [`register`] through the entry point group `vllm.general_plugins`. Nothing here imports vLLM before that.
"""

import importlib
import logging

logger = logging.getLogger(__name__)

# The name of the plugin's tokenizer and renderer in vLLM, and of its options in `additional_config`.
NAME = "mgllava"


def register() -> None:
    """Register the models of all families with vLLM.

    A release of vLLM that this plugin does not know must still run other models. So what is missing is logged here,
    and raises an error when a model of this package is loaded.
    """
    import mgllava  # noqa: F401  (registers the families with the Auto classes)

    try:
        importlib.import_module(".registration", __name__).register_all()
    except ImportError as error:
        logger.error(
            "mgllava cannot be used with this release of vLLM: %s. Install a release that docs/vllm.md names.", error
        )


__all__ = ["NAME", "register"]
