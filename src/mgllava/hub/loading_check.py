"""Script of `verify.py`: load a model folder by remote code, in a process that cannot import this package."""

import json
import sys
from pathlib import Path


def check(folder: Path) -> None:
    """Load everything that has code in a model folder, and in the box detector inside it."""
    import torch
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    for name in config.auto_map:
        if name.startswith("AutoModel"):
            with torch.device("meta"):
                getattr(transformers, name).from_config(config, trust_remote_code=True)
    for backend in ("torchvision", "pil"):
        AutoImageProcessor.from_pretrained(folder, backend=backend, trust_remote_code=True)
    if (folder / "processor_config.json").is_file():
        AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    for path in folder.glob("box_detector/*/config.json"):
        if "auto_map" in json.loads(path.read_text(encoding="utf-8")):
            check(path.parent)


if __name__ == "__main__":
    sys.modules["mgllava"] = None  # type: ignore[assignment]  # importing it fails, installed or not
    check(Path(sys.argv[1]))
