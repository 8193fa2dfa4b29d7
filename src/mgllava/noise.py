"""Messages of other packages that mean nothing to users of the commands, and are hidden by their exact text."""

import logging
import warnings

# bitsandbytes logs this on import, on CPUs with AVX-512, if an optional faster kernel is not installed.
_BITSANDBYTES_LOGGER = "bitsandbytes.backends.cpu.ops"
_MISSING_KERNEL = "Failed to load CPU gemm_4bit_forward from kernels-community"
# peft reads this attribute of every model; transformers 5.24 renamed it.
_OLD_ATTRIBUTE = "`is_gradient_checkpointing` is deprecated"


def hide_noise() -> None:
    """Hide these messages in this process."""
    # Calling this again adds nothing, since a logger keeps one copy of the same function.
    logging.getLogger(_BITSANDBYTES_LOGGER).addFilter(_says_more)
    warnings.filterwarnings("ignore", message=_OLD_ATTRIBUTE, category=FutureWarning)


def _says_more(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_MISSING_KERNEL)


__all__ = ["hide_noise"]
