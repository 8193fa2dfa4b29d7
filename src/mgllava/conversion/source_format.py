"""Source formats: the checkpoint layouts that a conversion reads."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from mgllava.model_files.lazy_tensor import LazyTensor
from mgllava.model_files.vocabulary import Vocabulary

from .parts import Source


@dataclass
class GatheredTensors:
    """Tensors of all sources, each of which is either used, dropped for a reason, or unexpected.

    Attributes:
        used: Tensors by the model's names.
        kept: Names of tensors that keep their dtype, unless the user asks for one.
        dropped: For each source the names of unused tensors, with reasons.
        unexpected: Descriptions of tensors that no rule covers.
        files: Files by source, for digests and the report.
    """

    used: dict[str, LazyTensor] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    dropped: dict[str, dict[str, str]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    files: dict[str, list[Path]] = field(default_factory=dict)

    def drop(self, source: str, name: str, reason: str) -> None:
        """Record that a tensor is not used."""
        self.dropped.setdefault(source, {})[name] = reason

    def use(self, source: Source, title: str, replaced: Iterable[str] = (), reason: str = "") -> None:
        """Use the tensors of a source, except for the `replaced` ones, which are dropped for `reason`."""
        for name, why in source.dropped.items():
            self.drop(title, name, why)
        self.unexpected += [f"{title}: {name}" for name in source.unexpected]
        replaced = set(replaced)
        for name, tensor in source.tensors.items():
            if name in replaced:
                self.drop(title, source.names[name], reason)
            else:
                self.used[name] = tensor
        self.files.setdefault(title, []).extend(source.files)


@dataclass
class Gathered:
    """Contents of a model folder that is to be written.

    Attributes:
        tensors: The tensors, still in their files.
        config: The model's configuration; its dtype is set later.
        dtype: Dtype of all tensors that are not in `tensors.kept`.
        processor: Processor or image processor.
        report: Entries for the report; without `"dropped"`, all dropped tensors are listed by source.
        generation_config: Generation config of a model that generates.
        vocabulary: Sizes that the embedding table and the output head are grown to.
        resources: Temporary files and the like, closed after the model folder is written.
    """

    tensors: GatheredTensors
    config: PreTrainedConfig
    dtype: torch.dtype
    processor: Any
    report: dict[str, Any]
    generation_config: GenerationConfig | None = None
    vocabulary: Vocabulary | None = None
    resources: ExitStack = field(default_factory=ExitStack)


def _no_hint(options: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True, kw_only=True)
class SourceFormat:
    """A checkpoint layout. `Family.source_formats` names the formats of a family.

    Attributes:
        title: Name in messages, with an article.
        model_type: Key of the family in `FAMILIES`.
        looked_for: What `recognizes` looks for, for the error about a checkpoint that no format recognizes.
        recognizes: Returns a description of a file or folder that has this format; `None` for others.
        find: Picks the paths that may be checkpoints of this format from all file paths of a repository.
        patterns: Files to download if the Hub cannot list the repository's files.
        gather: Reads a checkpoint and the other sources: `gather(path, options, trust_pickle, scratch)`, where
            `scratch` is a folder with room for temporary files.
        problem: Start of the error about tensors that do not match the model.
        needs: Arguments that a conversion of this format needs.
        takes: Further arguments that it accepts.
        advice: Where to get missing arguments, for the error that names them.
        convert: Name of the function that has the arguments of this format.
        hint: Returns words that the path of a checkpoint has, joined by `-`, to choose among several.
        presets: Arguments of the conversion for each model size, by a name that no other format uses.
        export: Converts a model folder to this format, if supported: `export(model_folder, output, overwrite=...)`.
    """

    title: str
    model_type: str
    looked_for: str
    recognizes: Callable[[Path], str | None]
    find: Callable[[Iterable[PurePosixPath]], set[PurePosixPath]]
    patterns: tuple[str, ...]
    gather: Callable[[Path, Mapping[str, Any], bool, Path], Gathered]
    problem: str
    told_by: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    advice: str = ""
    convert: str = "convert_checkpoint"
    hint: Callable[[Mapping[str, Any]], str] = _no_hint
    presets: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    export: Callable[..., Path] | None = None


__all__ = ["Gathered", "GatheredTensors", "SourceFormat"]
