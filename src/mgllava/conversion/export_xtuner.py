"""The way back: from an MG-LLaVA repository to a checkpoint as XTuner writes it."""

import json
from pathlib import Path
from typing import Any

import torch

import mgllava
from mgllava.atomic_files import replacing
from mgllava.modeling import MGLlavaConfig

from .errors import ConversionError
from .key_mapping import XTUNER_TO_MODEL, rename, to_xtuner
from .repository_writer import REPORT_NAME
from .shard_writer import check_disk_space
from .tensor_files import LazyTensor, open_weights

_TOWERS = ("model.vision_tower.", "model.high_res_vision_tower.")
_EMBEDDING = "model.language_model.embed_tokens.weight"
_TABLES = (_EMBEDDING, "lm_head.weight", "lm_head.bias")


def export_xtuner(repository: str | Path, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write an XTuner checkpoint, `{"meta", "state_dict"}`, from a repository.

    The towers are left out, as XTuner leaves them out, and embedding tables lose the rows that the converter added.
    Where the repository still has the report of its conversion, the checkpoint gets exactly the keys, and their
    order, of the checkpoint that it was made from: without `llm.*` for a pretrain-stage checkpoint; with the merged
    `llm.*` for a LoRA checkpoint. Without a report all of `llm.*` is written.

    Args:
        repository (`str` or `Path`): Folder of an MG-LLaVA repository.
        output (`str` or `Path`): The `.pth` file to write.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a file at `output`.

    Returns:
        `Path`: The output.

    Raises:
        ConversionError: If the repository is none, or has parts that XTuner's MG-LLaVA does not know, or the output
            exists.
    """
    repository, output = Path(repository), Path(output).absolute()
    if not (repository / "config.json").is_file():
        raise ConversionError(f"{repository} is no MG-LLaVA repository: it has no config.json.")
    model_type = json.loads((repository / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != MGLlavaConfig.model_type:
        raise ConversionError(
            f"{repository} is no MG-LLaVA repository: its config.json has model type {model_type!r}."
        )
    if output.is_dir() or (output.exists() and not overwrite):
        raise ConversionError(f"{output} exists. Choose another --output, or pass --overwrite to replace a file.")
    config = MGLlavaConfig.from_pretrained(repository)
    report = _read_report(repository)
    tensors, _ = open_weights(repository)
    renamed = _rename(tensors, config)
    keys = _keys(renamed, report)

    state = {key: _rows(renamed[key], config) for key in keys}
    output.parent.mkdir(parents=True, exist_ok=True)
    check_disk_space(output.parent, sum(tensor.nbytes for tensor in state.values()))
    with replacing(output) as partial:
        torch.save({"meta": _meta(config, report), "state_dict": state}, partial)
    return output


def _read_report(repository: Path) -> dict[str, Any]:
    path = repository / REPORT_NAME
    if not path.is_file():
        return {}
    checkpoint: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["checkpoint"]
    return checkpoint


def _rename(tensors: dict[str, LazyTensor], config: MGLlavaConfig) -> dict[str, tuple[str, LazyTensor]]:
    """Give every tensor but the towers' its name in XTuner, with the name that it has in the model."""
    renamed: dict[str, tuple[str, LazyTensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name.startswith(_TOWERS):
            continue
        key = to_xtuner(name)
        if key is None:
            unknown.append(name)
        else:
            renamed[key] = (name, tensor)
    if unknown:
        raise ConversionError(
            f"XTuner's MG-LLaVA has no place for {len(unknown)} of the tensors (fusion_type={config.fusion_type!r}, "
            f"object_merging={config.object_merging!r}): {', '.join(unknown[:10])}."
        )
    if config.tie_word_embeddings and _EMBEDDING in tensors:
        head = to_xtuner("lm_head.weight")
        assert head is not None  # one of the rules
        renamed.setdefault(head, ("lm_head.weight", tensors[_EMBEDDING]))
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
        raise ConversionError(f"The repository lacks tensors that {REPORT_NAME} lists: {', '.join(lost[:10])}.")
    return original


def _rows(named: tuple[str, LazyTensor], config: MGLlavaConfig) -> torch.Tensor:
    """Load a tensor, still mapped from its file, without the rows that the converter added to tables."""
    name, lazy = named
    tensor = lazy.load()
    rows = config.unpadded_vocab_size
    if name not in _TABLES or rows is None or tensor.shape[0] <= rows:
        return tensor
    kept = tensor[:rows]
    # `torch.save` writes whole storages, so the storage is cut as well; it still points into the mapped file.
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + kept.numel() * tensor.element_size()]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, kept.shape, kept.stride())


def _meta(config: Any, report: dict[str, Any]) -> dict[str, Any]:
    # The reader of the file needs the image size; the rest is for people.
    own = {"cfg": f"image_size_aux = {config.high_res_vision_config.image_size}\n"}
    return {**own, **report.get("meta", {}), "mgllava_version": mgllava.__version__}


__all__ = ["export_xtuner"]
