"""What the server of `processes.py` has imported: packages that this one needs, but nothing of this one."""

import contextlib
import sys

import datasets  # noqa: F401
import peft  # noqa: F401
import timm  # noqa: F401
import torch  # noqa: F401
import torchvision  # noqa: F401
import typer  # noqa: F401
from transformers import (  # noqa: F401
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    Trainer,
    pipeline,
)

with contextlib.suppress(ImportError):
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401

assert "mgllava" not in sys.modules
