"""The source format of the toy family: one `.pth` file with a configuration and weights under `toy.`."""

import json
from pathlib import Path

from mgllava.modeling.modeling_toy import ToyConfig
from mgllava.processing.processing_toy import TOY_CHAT_TEMPLATES, ToyImageProcessor, ToyProcessor

from mgllava.model_files.tensor_files import tensors_of
from mgllava.model_files.torch_files import open_torch_file
from mgllava.model_files.vocabulary import load_tokenizer

from .detect import tensor_names
from .source_format import Gathered, GatheredTensors, SourceFormat

_PREFIX = "toy."


def recognizes(path):
    """Recognize a file by the names of its tensors."""
    is_ours = path.is_file() and any(name.startswith(_PREFIX) for name in tensor_names(path) or [])
    return SOURCE_FORMAT.title if is_ours else None


def find(paths):
    """Pick `.pth` files."""
    return {path for path in paths if path.suffix == ".pth"}


def gather(path, options, trust_pickle, scratch):
    """Collect the configuration, the weights and the tokenizer."""
    content = open_torch_file(path, trust_pickle)
    config = ToyConfig(**json.loads(content["config"]))
    tensors = GatheredTensors(files={"checkpoint": [path]})
    for name, tensor in tensors_of(content["state_dict"], path).items():
        tensors.used[name.removeprefix(_PREFIX)] = tensor
    size = config.vision_config.image_size
    processor = ToyProcessor(
        ToyImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        load_tokenizer(Path(options["llm"])),
        image_seq_length=config.image_seq_length,
        chat_template=TOY_CHAT_TEMPLATES[options["prompt_template"]],
    )
    dtype = next(iter(tensors.used.values())).dtype
    return Gathered(tensors=tensors, config=config, dtype=dtype, processor=processor, report={})


SOURCE_FORMAT = SourceFormat(
    title="a toy checkpoint",
    model_type="toy",
    looked_for="tensors whose names start with toy.",
    recognizes=recognizes,
    find=find,
    patterns=("*.pth",),
    gather=gather,
    problem="The toy checkpoint does not match the model.",
    needs=("llm", "prompt_template"),
)

__all__ = ["SOURCE_FORMAT"]
