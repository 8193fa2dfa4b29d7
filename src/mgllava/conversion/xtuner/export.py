"""Export an MG-LLaVA model folder to an XTuner checkpoint."""

import os
from pathlib import Path
from typing import Any

import torch

import mgllava
from mgllava.atomic_files import remove_partial, replacing
from mgllava.conversion.model_folder import check_weights, read_model_config, read_report
from mgllava.conversion.parts import rename
from mgllava.folder_lock import FolderLock, FolderLockedError
from mgllava.model_files.errors import ConversionError
from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.shard_writer import check_disk_space
from mgllava.model_files.staging import REPORT_NAME
from mgllava.model_files.tensor_files import open_weights
from mgllava.modeling import MGLlavaConfig

from .key_mapping import XTUNER_TO_MODEL, to_xtuner

_TOWERS = ("model.vision_tower.", "model.high_res_vision_tower.")
_EMBEDDING = "model.language_model.embed_tokens.weight"
_TABLES = (_EMBEDDING, "lm_head.weight", "lm_head.bias")


def export_xtuner(repository: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write an XTuner checkpoint, `{"meta", "state_dict"}`, from a model folder.

    As in XTuner's checkpoints, the towers are left out. Embedding tables lose the rows that the converter added. If
    the model folder has the report of its conversion, the checkpoint gets the keys, in order, of the checkpoint that
    was converted: no `llm.*` for a pretrain-stage checkpoint, the merged `llm.*` for a LoRA checkpoint. Without a
    report, all of `llm.*` is written.

    Args:
        repository (`str` or `Path`): An MG-LLaVA model folder.
        output (`str` or `Path`): The `.pth` file to write.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a file at `output`.

    Returns:
        `Path`: The output.

    Raises:
        ConversionError: If `repository` is not an MG-LLaVA model folder, is quantized or incomplete, or has parts
            that XTuner's MG-LLaVA does not know; or if the output exists.
    """
    repository, output = Path(repository), Path(output).absolute()
    config = read_model_config(repository, MGLlavaConfig.model_type)
    # The target of a link is written.
    target = Path(os.path.realpath(output))
    if target.is_dir():
        raise ConversionError(f"{output} is a folder. Choose a file as `output`.")
    try:
        with FolderLock(target, f"writing {target.name}") as lock:
            _export(repository, config, target, overwrite, lock)
    except FolderLockedError as error:
        raise ConversionError(str(error)) from error
    return output


def _export(repository: Path, config: MGLlavaConfig, output: Path, overwrite: bool, lock: FolderLock) -> None:
    if output.is_symlink():
        raise ConversionError(f"{output} is a link that leads nowhere. Choose another `output`.")
    if output.is_dir() or (os.path.lexists(output) and not overwrite):
        raise ConversionError(f"{output} exists. Choose another `output`, or pass `overwrite=True` to replace a file.")
    report = _read_report(repository)
    tensors, files = open_weights(repository)
    if any(path.resolve() == output.resolve() for path in files):
        raise ConversionError(f"{output} holds weights of the model folder. Choose another `output`.")
    renamed = _rename(tensors, config)
    check_weights(tensors, config, repository)
    keys = _keys(renamed, report)

    state = {key: _rows(renamed[key], config) for key in keys}
    check_disk_space(output.parent, sum(tensor.nbytes for tensor in state.values()))
    remove_partial(output)
    with replacing(output) as partial:
        torch.save({"meta": _meta(config, report), "state_dict": state}, partial)
        lock.check()


def _read_report(repository: Path) -> dict[str, Any]:
    consequence = "all tensors of the language model"
    report = read_report(repository, {"keys": list, "kind": str, "meta": dict}, consequence)
    if not all(isinstance(key, str) for key in report.get("keys", ())):
        raise ConversionError(
            f"{repository / REPORT_NAME} is damaged: `keys` must be text. Remove it to export {consequence}."
        )
    return report


def _rename(tensors: dict[str, LazyTensor], config: MGLlavaConfig) -> dict[str, tuple[str, LazyTensor]]:
    """Map the names in XTuner of all tensors, except for the towers', to names in the model and tensors."""
    renamed: dict[str, tuple[str, LazyTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name.startswith(_TOWERS):
            continue
        if (key := to_xtuner(name)) is None:
            unknown.append(name)
        else:
            renamed[key] = (name, tensor)
    if unknown:
        raise ConversionError(
            f"XTuner's MG-LLaVA has no place for {len(unknown)} of the tensors (fusion_type={config.fusion_type!r}, "
            f"object_merging={config.object_merging!r}): {', '.join(unknown[:10])}."
        )
    if config.tie_word_embeddings and _EMBEDDING in tensors:
        renamed.setdefault("llm.lm_head.weight", ("lm_head.weight", tensors[_EMBEDDING]))
    return renamed


def _keys(renamed: dict[str, tuple[str, LazyTensor]], report: dict[str, Any]) -> list[str]:
    if not report:
        return list(renamed)
    original = [key for key in report["keys"] if key in renamed]
    if report["kind"] == "lora":
        return [key for key in renamed if key.startswith("llm.")] + [k for k in original if not k.startswith("llm.")]
    lost = [key for key in report["keys"] if rename(key, XTUNER_TO_MODEL) is not None and key not in renamed]
    lost = [key for key in lost if not key.endswith("rotary_emb.inv_freq")]
    if lost:
        raise ConversionError(f"The model folder lacks tensors that {REPORT_NAME} lists: {', '.join(lost[:10])}.")
    return original


def _rows(named: tuple[str, LazyTensor], config: MGLlavaConfig) -> torch.Tensor:
    """Return a tensor, mapped from its file, without the rows that the converter added to tables."""
    name, lazy = named
    tensor = lazy.load()
    rows = config.unpadded_vocab_size
    if name not in _TABLES or rows is None or tensor.shape[0] <= rows:
        return tensor
    kept = tensor[:rows]
    # The storage is cut as well, because `torch.save` writes whole storages. It still points into the mapped file.
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + kept.numel() * tensor.element_size()]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, kept.shape, kept.stride())


def _meta(config: Any, report: dict[str, Any]) -> dict[str, Any]:
    # `convert` reads the image size from `cfg`; the other entries are for information.
    own = {"cfg": f"image_size_aux = {config.high_res_vision_config.image_size}\n"}
    return {**own, **report.get("meta", {}), "mgllava_version": mgllava.__version__}


__all__ = ["export_xtuner"]
