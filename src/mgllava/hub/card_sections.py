"""Contents and sections that the model cards of all families share."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class License:
    """License of a published model: its name, and its identifier in the metadata of model cards."""

    text: str
    identifier: str | None = None


# As the model cards of published models state them.
LICENSES = {
    "lmsys/vicuna-7b-v1.5": License("Llama 2 Community License", "llama2"),
    "lmsys/vicuna-13b-v1.5": License("Llama 2 Community License", "llama2"),
    "meta-llama/Meta-Llama-3-8B-Instruct": License("Meta Llama 3 Community License", "llama3"),
    "microsoft/Phi-3-mini-4k-instruct": License("MIT", "mit"),
    "01-ai/Yi-1.5-34B-Chat": License("Apache-2.0", "apache-2.0"),
    "openai/clip-vit-large-patch14-336": License("not stated on its model card; the code of CLIP is MIT"),
    "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup": License("MIT", "mit"),
    "google/owlv2-large-patch14-ensemble": License("Apache-2.0", "apache-2.0"),
}


# Bytes for each quantized weight. 4 bits: one 8-bit scale per 64 weights, and one 32-bit scale per 256 of those.
_QUANTIZED_BYTES = {8: 1.0, 4: 0.5 + 1 / 64 + 4 / (64 * 256)}


@dataclass(frozen=True)
class Contents:
    """The facts on a card.

    Attributes:
        config: The model's configuration.
        shapes: Shapes of the model's parameters by name; tied ones occur once.
        report: The conversion's report, or empty.
        box_detector: The processor's `box_detector_config`.
        repo_id: Name of the model repository on the Hub.
        tag: Revision in the examples.
        checked_with: Release of transformers that loaded the model without this package.
    """

    config: Any
    shapes: Mapping[str, tuple[int, ...]]
    report: Mapping[str, Any]
    box_detector: Mapping[str, Any] | None
    repo_id: str
    tag: str
    checked_with: str | None

    @property
    def title(self) -> str:
        """Name of the repository without its owner."""
        return self.repo_id.rsplit("/", maxsplit=1)[-1]

    def argument(self, name: str) -> str | None:
        """Return an argument of the conversion, if the report has it."""
        value: str | None = self.report.get("arguments", {}).get(name)
        return value


def table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """Format a Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def parameter_table(contents: Contents, parts: Mapping[str, str], others: str) -> str:
    """Count the parameters of each part; `parts` names modules, `others` is the name of the rest."""
    counts: dict[str, int] = {}
    for name, shape in contents.shapes.items():
        part = parts.get(name.removeprefix("model.").split(".")[0], others)
        counts[part] = counts.get(part, 0) + prod(shape)
    rows = [*counts.items(), ("**all**", sum(counts.values()))]
    return table(("part", "parameters"), [(name, f"{count:,}") for name, count in rows])


def storage_note(config: Any) -> str:
    """Describe the dtype or the quantization of the stored weights."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        return f"The weights are stored quantized ({getattr(method, 'value', method)})."
    return f"The weights are stored as {str(config.dtype).removeprefix('torch.')}." if config.dtype else ""


def memory_note(contents: Contents) -> str:
    """Say how much memory the weights take, whole and quantized, and how they are stored."""
    total = sum(map(prod, contents.shapes.values()))
    quantized = sum(
        prod(shape)
        for name, shape in contents.shapes.items()
        if name.startswith("model.language_model.") and len(shape) == 2 and "embed_tokens" not in name
    )
    memory = {"bf16": 2.0 * total}
    for bits, size in _QUANTIZED_BYTES.items():
        memory[f"{bits} bits"] = 2 * (total - quantized) + size * quantized
    unit, divisor = ("GB", 1e9) if total > 1e8 else ("MB", 1e6)
    listed = ", ".join(f"{size / divisor:.2f} {unit} in {name}" for name, size in memory.items())
    return (
        f"Memory of the weights alone, computed from the number of parameters, not measured: {listed}. In 8 and 4 "
        "bits only the layers of the language model are quantized, as `mgllava.quantization_config` does it.\n"
        f"{storage_note(contents.config)}"
    )


def is_hub_id(name: str) -> bool:
    """Tell whether a name can be that of a model repository on the Hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def hub_ids(names: Iterable[str | None]) -> list[str] | None:
    """Keep the names that are on the Hub, for `base_model`."""
    return [name for name in names if name and is_hub_id(name)] or None


def place(name: str | None, revision: str | None = None) -> str:
    """Describe the origin of a part, with a link if it is on the Hub."""
    if not name:
        return "unknown"
    if name.startswith("./"):
        return f"in this repository, `{name[2:]}`"
    commit = f" at `{revision}`" if revision else ""
    return f"[{name}](https://huggingface.co/{name}){commit}" if is_hub_id(name) else f"`{name}`"


def terms(name: str | None) -> str:
    """Name the license of a published model."""
    return LICENSES.get(name or "", License("unknown: see where it comes from")).text


def license_section(rows: Iterable[tuple[str, str, str]]) -> str:
    """List part, origin and license of all parts, and of the code."""
    rows = [*rows, ("code", "mgllava", "Apache-2.0")]
    return f"## License\n\nEach part keeps its own.\n\n{table(('part', 'from', 'license'), rows)}"


def usage(contents: Contents, image: str, note: str, packages: str) -> str:
    """Show how to use the model: `image` is the content block of an image."""
    return f"""\
## Use

With the code in this repository (read it first; `revision` pins it):

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

name, options = "{contents.repo_id}", {{"revision": "{contents.tag}", "trust_remote_code": True}}
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto", **options)
processor = AutoProcessor.from_pretrained(name, **options)

conversation = [{{"role": "user", "content": [
    {image},
    {{"type": "text", "text": "What is in the image?"}},
]}}]
inputs = processor.apply_chat_template(
    conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=100)
print(processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1]:])[0])
```

{note}

This needs `pip install "transformers>=5.16.1,<6" {packages}`. With the package mgllava
installed, write `import mgllava` first and leave out `trust_remote_code`; its code is then used instead of the code
here."""


def checks(contents: Contents) -> str:
    """List the checks that the export made."""
    lines = ["Weight files are safetensors and hold what their index names."]
    if getattr(contents.config, "quantization_config", None) is None:
        lines.append(f"Names and shapes of all {len(contents.shapes)} tensors are those of the model.")
    if contents.checked_with is not None:
        lines.append(
            "Configuration, model (without its weights) and processor load with the code in this repository, where "
            f"mgllava cannot be imported ({contents.checked_with})."
        )
    if contents.report.get("versions"):
        lines.append(
            f"Converted with mgllava {contents.report['versions'].get('mgllava')}; `conversion_report.json` has the "
            "digests of all sources."
        )
    return "## What was checked\n\n" + "\n".join(f"- {line}" for line in lines)


def citation(bibtex: str) -> str:
    """Return the section with the citation."""
    return f"## Citation\n\n```bibtex\n{bibtex}\n```"


__all__ = [
    "LICENSES",
    "Contents",
    "License",
    "checks",
    "citation",
    "hub_ids",
    "is_hub_id",
    "license_section",
    "memory_note",
    "parameter_table",
    "place",
    "storage_note",
    "table",
    "terms",
    "usage",
]
