"""Facts on the model cards of all families."""

from types import SimpleNamespace

import pytest
from transformers.utils.quantization_config import BitsAndBytesConfig

from mgllava import MGLlavaConfig, RamPlusConfig, SlimeConfig
from mgllava.hub.card_sections import Contents, is_hub_id, memory_note, place, storage_note, terms
from mgllava.hub.model_card import model_card

MGLLAVA_BENCHMARKS = "MMBench-dev MMBench-test SEED-I MMStar TextVQA DocVQA SQA-I AI2D VQAv2 MM-Vet LLaVA-W"
SLIME_BENCHMARKS = "TextVQA|GQA|VQAv2|MMBench|MMBench-CN|MMMU val|LLaVA-W|MME-P|MME-C|MM-Vet"
# By the tables of arXiv 2406.17770, and of arXiv 2406.08487 and its README.
MGLLAVA_RESULTS = {
    "microsoft/Phi-3-mini-4k-instruct": "73.4 72.9 70.2 35.5 65.3 49.3 73.9 75.1 77.9 47.3 75.4",
    "lmsys/vicuna-7b-v1.5": "72.1 71.9 69.4 35.1 67.3 47.9 70.8 69.3 80.2 41.0 75.5",
    "meta-llama/Meta-Llama-3-8B-Instruct": "76.5 76.6 71.5 36.9 68.1 49.0 76.3 75.6 80.7 46.9 75.5",
    "lmsys/vicuna-13b-v1.5": "72.2 73.5 70.8 34.1 69.6 52.1 74.7 73.4 81.2 46.7 82.0",
    "01-ai/Yi-1.5-34B-Chat": "80.1 79.1 73.7 47.9 70.0 56.1 77.0 81.1 82.0 48.4 80.5",
}
SLIME_RESULTS = {
    "yifanzhang114/SliME-vicuna-7B": "64.39 63.13 80.32 69.32 61.85 37.2 76.1 1544 383 35.4",
    "yifanzhang114/SliME-Llama3-8B": "64.76 63.94 80.69 75.0 71.8 41.2 73.9 1578 337 37.4",
    "yifanzhang114/SliME-vicuna-13B": "66.11 63.6 80.43 71.13 65.2 38.0 73.1 1606 293 41.2",
}
LICENSES = {
    "lmsys/vicuna-7b-v1.5": ("Llama 2 Community License", "llama2"),
    "lmsys/vicuna-13b-v1.5": ("Llama 2 Community License", "llama2"),
    "meta-llama/Meta-Llama-3-8B-Instruct": ("Meta Llama 3 Community License", "llama3"),
    "microsoft/Phi-3-mini-4k-instruct": ("MIT", "mit"),
    "01-ai/Yi-1.5-34B-Chat": ("Apache-2.0", "apache-2.0"),
}


def _contents(config, **changes):
    values = {
        "shapes": {},
        "report": {},
        "box_detector": None,
        "repo_id": "org/name",
        "tag": "v1",
        "checked_with": None,
    }
    return Contents(config=config, **{**values, **changes})


def _converted(**arguments):
    """A report of a conversion of a fine-tuned checkpoint."""
    return {"arguments": arguments, "checkpoint": {"kind": "sft"}, "versions": {"mgllava": "9.8"}}


def _rows(text, header):
    """Return the table with this header as a dict."""
    lines = text[text.index(f"| {header} |") :].split("\n")[2:]
    rows = lines[: next(number for number, line in enumerate([*lines, ""]) if not line.startswith("|"))]
    return dict(row.strip("| ").split(" | ", 1) for row in rows)


@pytest.mark.parametrize("llm", MGLLAVA_RESULTS)
def test_results_and_license_of_the_published_mgllava(llm):
    card = model_card(_contents(MGLlavaConfig(), report=_converted(llm=llm)))
    results = dict(zip(MGLLAVA_BENCHMARKS.split(), MGLLAVA_RESULTS[llm].split(), strict=True))
    assert _rows(card.text, "benchmark | paper") == results
    text, identifier = LICENSES[llm]
    assert card.data.license == identifier and terms(llm) == text
    licenses = _rows(card.text, "part | from | license")
    assert licenses["language model"] == f"[{llm}](https://huggingface.co/{llm}) | {text}"


@pytest.mark.parametrize(
    "variant", [{"fusion_type": "none"}, {"object_merging": "none"}, {"box_feature_type": "last_stage"}]
)
def test_other_variants_than_that_of_the_paper_have_no_results(variant):
    report = _converted(llm="lmsys/vicuna-7b-v1.5")
    text = model_card(_contents(MGLlavaConfig(**variant), report=report)).text
    assert "Results of the paper" not in text
    assert ("It takes no boxes." in text) == ("object_merging" in variant)


@pytest.mark.parametrize("checkpoint", SLIME_RESULTS)
def test_results_and_license_of_the_published_slime(checkpoint):
    card = model_card(_contents(SlimeConfig(), report=_converted(checkpoint=checkpoint)))
    results = dict(zip(SLIME_BENCHMARKS.split("|"), SLIME_RESULTS[checkpoint].split(), strict=True))
    assert _rows(card.text, "benchmark | paper") == results
    kind = "Llama 3" if "Llama3" in checkpoint else "Llama 2"
    licenses = _rows(card.text, "part | from | license")
    assert kind in licenses["language model"] and ("13b" in licenses["language model"]) == ("13B" in checkpoint)
    assert card.data.license == kind.lower().replace(" ", "")
    assert card.data.base_model == [licenses["language model"].split("]")[0][1:], checkpoint]
    assert licenses["adapters, tuning"].startswith(f"[{checkpoint}]")
    # Without an argument, that of all releases.
    clip = "openai/clip-vit-large-patch14-336"
    assert licenses["CLIP"].startswith(f"[{clip}]") and licenses["CLIP"].endswith("the code of CLIP is MIT")


def test_other_slime_models_have_no_results_and_the_license_of_their_language_model():
    arguments = {"checkpoint": "somebody/slime", "llm": "lmsys/vicuna-7b-v1.5", "vision_tower": "somebody/clip"}
    card = model_card(_contents(SlimeConfig(), report=_converted(**arguments)))
    assert "Results of the paper" not in card.text and card.data.license == "llama2"
    assert card.data.base_model == ["lmsys/vicuna-7b-v1.5", "somebody/clip", "somebody/slime"]
    assert _rows(card.text, "part | from | license")["CLIP"].startswith("[somebody/clip]")
    assert model_card(_contents(SlimeConfig())).data.license is None


PARTS = {
    MGLlavaConfig: {
        "language model": ["model.language_model.layers.0.x", "lm_head.weight"],
        "CLIP": ["model.vision_tower.x"],
        "ConvNeXt": ["model.high_res_vision_tower.stages.0"],
        "fusion and projectors": [
            "model.fusion.gate",
            "model.multi_modal_projector.linear_1",
            "model.box_projector.x",
        ],
    },
    SlimeConfig: {
        "language model": ["model.language_model.layers.0.x", "lm_head.weight"],
        "CLIP": ["model.vision_tower.x"],
        "adapters": ["model.multi_modal_projector.gate", "model.local_compressor.queries"],
    },
    RamPlusConfig: {
        "Swin": ["vision_tower.layers.0"],
        "tag decoder and embeddings of the tags": ["decoder.label_embed", "decoder.layers.0"],
        "projection and classifier": ["image_projection.weight", "classifier.weight"],
    },
}


@pytest.mark.parametrize("config", PARTS)
def test_parameters_are_counted_by_part(config):
    shapes, expected = {}, {}
    for names in PARTS[config].values():
        for name in names:
            shapes[name] = (10 ** len(shapes), 3)
    for part, names in PARTS[config].items():
        expected[part] = f"{sum(3 * shapes[name][0] for name in names):,}"
    text = model_card(_contents(config(), shapes=shapes)).text
    assert _rows(text, "part | parameters") == {**expected, "**all**": f"{sum(3 * s[0] for s in shapes.values()):,}"}
    assert f"all {len(shapes)} tensors" in text


def test_sizes_of_slime_on_its_card():
    values = {"branch": "both", "router_top_p": 0.7, "router_temperature": 0.9, "num_local_queries": 16}
    rows = _rows(model_card(_contents(SlimeConfig(**values))).text, " | size")
    assert rows["router"] == "top-p 0.7, temperature 0.9" and rows["branch, expert"] == "both, mixed by the gate"
    assert rows["tokens per image"] == "576 of the whole image, 16 of each tile before the router"
    values = {"num_local_queries": None, "forced_expert": 1, "branch": "local"}
    rows = _rows(model_card(_contents(SlimeConfig(**values))).text, " | size")
    assert rows["router"] == "none" and rows["branch, expert"] == "local, 1 alone"
    assert rows["tokens per image"] == "576 of the whole image, 576 of each tile"


@pytest.mark.parametrize(("total", "unit"), [(10**8, "200.00 MB"), (10**8 + 10**7, "0.22 GB")])
def test_memory_is_in_gigabytes_for_large_models(total, unit):
    assert f"{unit} in bf16" in memory_note(_contents(MGLlavaConfig(), shapes={"x": (total,)}))


def test_memory_of_quantized_weights_is_that_of_bitsandbytes():
    """NF4: half a byte, a scale of 8 bits for 64 weights, and one of 32 bits for 256 of those."""
    side = 10**7
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    note = memory_note(_contents(MGLlavaConfig(), shapes={name: (side, side)}))
    nf4 = side**2 / 2 + side**2 / 64 + 4 * side**2 / (64 * 256)
    assert f"{side**2 / 1e9:.2f} GB in 8 bits, {nf4 / 1e9:.2f} GB in 4 bits" in note
    # Embeddings, vectors and the head keep their dtype.
    for other in ("model.language_model.embed_tokens.weight", "lm_head.weight", "model.vision_tower.x"):
        note = memory_note(_contents(MGLlavaConfig(), shapes={other: (side, side)}))
        assert note.count(f"{2 * side**2 / 1e9:.2f} GB") == 3
    note = memory_note(_contents(MGLlavaConfig(), shapes={"model.language_model.norm.weight": (10**9,)}))
    assert note.count("2.00 GB") == 3


def test_dtype_and_quantization_of_the_stored_weights():
    assert storage_note(MGLlavaConfig(dtype="bfloat16")) == "The weights are stored as bfloat16."
    assert storage_note(SimpleNamespace(dtype=None)) == ""
    for quantization in (BitsAndBytesConfig(load_in_4bit=True), {"quant_method": "bitsandbytes"}):
        config = MGLlavaConfig(dtype="bfloat16")
        config.quantization_config = quantization
        assert storage_note(config) == "The weights are stored quantized (bitsandbytes)."
        text = model_card(_contents(config, shapes={"lm_head.weight": (2, 2)})).text
        assert "stored quantized" in text and "Names and shapes of all" not in text


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("a/b", True),
        ("a-b/c.d_e", True),
        ("-a/b", True),
        ("./a", False),
        ("../b", False),
        ("a/b/c", False),
        ("a", False),
    ],
)
def test_names_of_repositories_on_the_hub(name, is_one):
    assert is_hub_id(name) == is_one
    assert (place(name) == f"[{name}](https://huggingface.co/{name})") == is_one


def test_places_of_parts():
    assert place("./box_detector/tagger") == "in this repository, `box_detector/tagger`"
    assert place("a/b", "abc") == "[a/b](https://huggingface.co/a/b) at `abc`"
    assert place("folder") == "`folder`" and place(None) == "unknown"
    assert terms(None) == terms("somebody/else") == "unknown: see where it comes from"


@pytest.mark.parametrize("config", PARTS)
def test_cards_name_code_paper_and_checks(config):
    card = model_card(_contents(config(), report=_converted(checkpoint="a/b"), checked_with="transformers 5"))
    pages = {"mgllava": "2406.17770", "slime": "2406.08487", "ram_plus": "2310.15200"}
    paper = pages[config.model_type]
    is_tagger = config is RamPlusConfig
    more = ["image-tagging"] if is_tagger else []
    assert card.data.tags == [config.model_type, *more, "custom_code", f"arxiv:{paper}"]
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == ("image-classification" if is_tagger else "image-text-to-text")
    assert f"(https://arxiv.org/abs/{paper})" in card.text and f"arXiv:{paper}}}" in card.text
    assert "Converted with mgllava 9.8" in card.text and "(transformers 5)" in card.text
    assert "a/b" in card.data.base_model and "| code | mgllava | Apache-2.0 |" in card.text
    assert '"org/name", {"revision": "v1"' in card.text
    assert "Converted with" not in model_card(_contents(config())).text
