"""What is known about the published models that a card may name: licences, and the paper's results."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """Terms of a published model.

    Args:
        text (`str`): For people.
        identifier (`str`, *optional*): For the Hub, as model cards of the Hub name it.
    """

    text: str
    identifier: str | None = None


# As their model cards say.
LICENCES = {
    "lmsys/vicuna-7b-v1.5": Licence("Llama 2 Community License", "llama2"),
    "lmsys/vicuna-13b-v1.5": Licence("Llama 2 Community License", "llama2"),
    "meta-llama/Meta-Llama-3-8B-Instruct": Licence("Meta Llama 3 Community License", "llama3"),
    "microsoft/Phi-3-mini-4k-instruct": Licence("MIT", "mit"),
    "01-ai/Yi-1.5-34B-Chat": Licence("Apache-2.0", "apache-2.0"),
    "openai/clip-vit-large-patch14-336": Licence("not stated on its model card; the code of CLIP is MIT"),
    "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup": Licence("MIT", "mit"),
    "google/owlv2-large-patch14-ensemble": Licence("Apache-2.0", "apache-2.0"),
}

BENCHMARKS = (
    "MMBench-dev",
    "MMBench-test",
    "SEED-I",
    "MMStar",
    "TextVQA",
    "DocVQA",
    "SQA-I",
    "AI2D",
    "VQAv2",
    "MM-Vet",
    "LLaVA-W",
)
# As arXiv 2406.17770 reports them, by language model.
PAPER_RESULTS = {
    "microsoft/Phi-3-mini-4k-instruct": (73.4, 72.9, 70.2, 35.5, 65.3, 49.3, 73.9, 75.1, 77.9, 47.3, 75.4),
    "lmsys/vicuna-7b-v1.5": (72.1, 71.9, 69.4, 35.1, 67.3, 47.9, 70.8, 69.3, 80.2, 41.0, 75.5),
    "meta-llama/Meta-Llama-3-8B-Instruct": (76.5, 76.6, 71.5, 36.9, 68.1, 49.0, 76.3, 75.6, 80.7, 46.9, 75.5),
    "lmsys/vicuna-13b-v1.5": (72.2, 73.5, 70.8, 34.1, 69.6, 52.1, 74.7, 73.4, 81.2, 46.7, 82.0),
    "01-ai/Yi-1.5-34B-Chat": (80.1, 79.1, 73.7, 47.9, 70.0, 56.1, 77.0, 81.1, 82.0, 48.4, 80.5),
}
# The variant that those results belong to.
PAPER_VARIANT = {"fusion_type": "conv_gate", "object_merging": "concat", "box_feature_type": "pyramid"}


__all__ = ["BENCHMARKS", "LICENCES", "PAPER_RESULTS", "PAPER_VARIANT", "Licence"]
