"""The numbers that the paper reports (arXiv 2406.17770, tables 1 and 2), for the column next to one's own."""

from collections.abc import Mapping

# By language model; in the paper's abbreviations.
REPORTED: Mapping[str, Mapping[str, float]] = {
    "Phi3-3.8B": {
        "MMB-D": 73.4, "MMB-T": 72.9, "SEED-I": 70.2, "MMStar": 35.5, "TextVQA": 65.3, "DocVQA": 49.3, "SQA-I": 73.9,
        "AI2D": 75.1, "VQAv2": 77.9, "MMVet": 47.3, "LLaVA-W": 75.4,
    },
    "Vicuna-7B": {
        "MMB-D": 72.1, "MMB-T": 71.9, "SEED-I": 69.4, "MMStar": 35.1, "TextVQA": 67.3, "DocVQA": 47.9, "SQA-I": 70.8,
        "AI2D": 69.3, "VQAv2": 80.2, "MMVet": 41.0, "LLaVA-W": 75.5, "MMVP": 47.3,
    },
    "Llama3-8B": {
        "MMB-D": 76.5, "MMB-T": 76.6, "SEED-I": 71.5, "MMStar": 36.9, "TextVQA": 68.1, "DocVQA": 49.0, "SQA-I": 76.3,
        "AI2D": 75.6, "VQAv2": 80.7, "MMVet": 46.9, "LLaVA-W": 75.5,
    },
    "Vicuna-13B": {
        "MMB-D": 72.2, "MMB-T": 73.5, "SEED-I": 70.8, "MMStar": 34.1, "TextVQA": 69.6, "DocVQA": 52.1, "SQA-I": 74.7,
        "AI2D": 73.4, "VQAv2": 81.2, "MMVet": 46.7, "LLaVA-W": 82.0,
    },
    "Yi1.5-34B": {
        "MMB-D": 80.1, "MMB-T": 79.1, "SEED-I": 73.7, "MMStar": 47.9, "TextVQA": 70.0, "DocVQA": 56.1, "SQA-I": 77.0,
        "AI2D": 81.1, "VQAv2": 82.0, "MMVet": 48.4, "LLaVA-W": 80.5, "MMVP": 50.0,
    },
}  # fmt: skip


def reported(benchmark: str | None) -> dict[str, float]:
    """Return the paper's numbers for a benchmark by language model.

    Args:
        benchmark (`str`, *optional*): The paper's abbreviation.

    Returns:
        `dict[str, float]`: Empty if the paper has no number for it.
    """
    return {model: row[benchmark] for model, row in REPORTED.items() if benchmark is not None and benchmark in row}


__all__ = ["REPORTED", "reported"]
