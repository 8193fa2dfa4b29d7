"""The model card of RAM++."""

from huggingface_hub import ModelCardData

from .card_sections import (
    Contents,
    checks,
    citation,
    hub_ids,
    license_section,
    parameter_table,
    place,
    storage_note,
    table,
)

_MODULES = {"vision_tower": "Swin", "decoder": "tag decoder and embeddings of the tags"}
_UNKNOWN_LICENSE = "unknown: ask where the checkpoint came from (the original code is Apache-2.0)"

_CITATION = """\
@article{huang2023open,
  title   = {Open-Set Image Tagging with Multi-Grained Text Supervision},
  author  = {Huang, Xinyu and Huang, Yi-Jie and Zhang, Youcai and Tian, Weiwei and Feng, Rui and Zhang, Yuejie and
             Xie, Yanchun and Li, Yaqian and Zhang, Lei},
  journal = {arXiv preprint arXiv:2310.15200},
  year    = {2023}
}"""


def ram_plus_card(contents: Contents) -> tuple[ModelCardData, list[str]]:
    """Return the metadata and the sections of a card."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=hub_ids([contents.argument("checkpoint")]),
        tags=["ram_plus", "image-tagging", "custom_code", "arxiv:2310.15200"],
    )
    return data, [
        f"# {contents.title}",
        "RAM++ ([arXiv 2310.15200](https://arxiv.org/abs/2310.15200)) for transformers: it decides which tags "
        "of a fixed list apply to an image. The box detector of MG-LLaVA searches the image for these tags.",
        _use(contents),
        _numbers(contents),
        license_section([("weights and tags", place(contents.argument("checkpoint")), _UNKNOWN_LICENSE)]),
        "## Limits\n\n- It knows only its tags; each has a threshold of its own.\n"
        "- No benchmark was run on this model.",
        checks(contents),
        citation(_CITATION),
    ]


def _use(contents: Contents) -> str:
    return f"""\
## Use

With the code in this repository (read it first; `revision` pins it):

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

name, options = "{contents.repo_id}", {{"revision": "{contents.tag}", "trust_remote_code": True}}
model = AutoModel.from_pretrained(name, **options)
image_processor = AutoImageProcessor.from_pretrained(name, **options)

outputs = model(**image_processor(Image.open("photo.jpg"), return_tensors="pt"))
print(model.post_process_image_tagging(outputs)[0]["labels"])
```

This needs `pip install "transformers>=5.16.1,<6" torch torchvision timm pillow`. With the package mgllava installed,
write `import mgllava` first and leave out `trust_remote_code`."""


def _numbers(contents: Contents) -> str:
    config = contents.config
    sizes = {
        "tags": f"{len(config.id2label)}, with {config.num_descriptions} descriptions each",
        "Swin": f"depths {list(config.depths)}, {config.embed_dim} channels in the first stage, "
        f"{config.image_size} px",
        "tag decoder": f"{config.num_hidden_layers} layers, width {config.hidden_size}",
    }
    parameters = parameter_table(contents, _MODULES, "projection and classifier")
    return f"## Numbers\n\n{parameters}\n\n{table(('', 'size'), sizes.items())}\n\n{storage_note(config)}"


__all__ = ["ram_plus_card"]
