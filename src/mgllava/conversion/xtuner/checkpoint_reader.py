"""XTuner checkpoints: mmengine `.pth` files and DeepSpeed folders, read lazily and without running their code."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgllava.model_files.errors import ConversionError
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.tensor_files import tensors_of
from mgllava.model_files.torch_files import open_torch_file

from .zero import meta_of, open_zero_folder


@dataclass
class XTunerCheckpoint:
    """An opened checkpoint.

    Attributes:
        tensors: The state dict, still in its files.
        meta: What XTuner's runner stored: config text, iteration, versions.
        files: The files that were opened.
        path: The file or folder that was given.
    """

    tensors: dict[str, LazyTensor]
    meta: dict[str, Any]
    files: list[Path]
    path: Path

    @property
    def config_text(self) -> str:
        """Text of the training config: Python source, which is parsed and never executed."""
        text = self.meta.get("cfg", "")
        return text if isinstance(text, str) else ""


def read_checkpoint(path: str | Path, trust_pickle: bool = False, scratch: Path | None = None) -> XTunerCheckpoint:
    """Open an XTuner checkpoint.

    Args:
        path (`str` or `Path`): A `.pth` file, or the folder that DeepSpeed writes (often named `….pth` as well).
        trust_pickle (`bool`, *optional*, defaults to `False`): Read files that hold pickled objects next to the
            weights. The objects are skipped; their code is not run.
        scratch (`Path`, *optional*): Folder for the temporary files that some DeepSpeed checkpoints need, as large as
            the weights in float32. The system's temporary folder by default.

    Returns:
        `XTunerCheckpoint`: The checkpoint; its tensors are still on disk.

    Raises:
        ConversionError: If the checkpoint does not exist, is damaged, or holds pickled objects without
            `trust_pickle`.
    """
    path = Path(path)
    if path.is_dir():
        tensors, meta, files = open_zero_folder(path, trust_pickle, scratch)
        return XTunerCheckpoint(tensors, meta, files, path)
    if not path.is_file():
        raise ConversionError(f"`checkpoint` must be a file or a folder, but {path} does not exist.")
    content = open_torch_file(path, trust_pickle)
    # mmengine's layout, or a bare state dict.
    if isinstance(content, dict) and "state_dict" in content:
        return XTunerCheckpoint(tensors_of(content["state_dict"], path), meta_of(content, path), [path], path)
    return XTunerCheckpoint(tensors_of(content, path), {}, [path], path)


__all__ = ["XTunerCheckpoint", "read_checkpoint"]
