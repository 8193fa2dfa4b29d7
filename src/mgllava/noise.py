"""Messages of other packages that are no use to users of the commands, each hidden by its exact text."""

import logging
import warnings

# bitsandbytes, on CPUs with AVX-512, whenever it is imported: an optional faster kernel is not installed.
_BITSANDBYTES_LOGGER = "bitsandbytes.backends.cpu.ops"
_MISSING_KERNEL = "Failed to load CPU gemm_4bit_forward from kernels-community"
# peft reads this attribute of every model; transformers 5.24 has given it another name.
_OLD_ATTRIBUTE = "`is_gradient_checkpointing` is deprecated"


def hide_noise() -> None:
    """Hide these messages in this process."""
    # The same function each time: a logger keeps one copy of it.
    logging.getLogger(_BITSANDBYTES_LOGGER).addFilter(_says_more)
    warnings.filterwarnings("ignore", message=_OLD_ATTRIBUTE, category=FutureWarning)


def _says_more(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_MISSING_KERNEL)


__all__ = ["hide_noise"]
