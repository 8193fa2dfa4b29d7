import pytest

from mgllava.training import TrainingError, load_recipe, recipe_names

OVERLAYS = {"fsdp2.yaml", "lora.yaml", "qlora.yaml", "zero2.yaml", "zero3.yaml"}
MODELS = ("phi3_mini", "vicuna_7b", "vicuna_13b", "llama3_8b", "yi_34b")
NEW_PARTS = ["fusion", "multi_modal_projector", "box_projector", "object_attention"]


def test_the_package_has_both_stages_for_every_language_model():
    stages = {f"stage_{stage}_{model}.yaml" for stage in (1, 2) for model in MODELS}
    assert set(recipe_names()) == stages | OVERLAYS | {"stage_1.yaml", "stage_2.yaml", "finetune.yaml"}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [1, 2])
def test_settings_are_the_papers(stage, model):
    """Section 11 of what is known of the original: its table, and the batches of its devices."""
    recipe = load_recipe(f"stage_{stage}_{model}.yaml")
    training = recipe.training
    learning_rate = {1: 2e-3 if model == "yi_34b" else 1e-3, 2: 2e-5}[stage]
    devices = 32 if model == "yi_34b" else 8
    assert recipe.train == (NEW_PARTS if stage == 1 else [*NEW_PARTS, "language_model", "lm_head"])
    assert recipe.global_batch_size == {1: 256, 2: 128}[stage] == devices * training["per_device_train_batch_size"]
    assert training["learning_rate"] == learning_rate
    assert training.get("train_sampling_strategy") == {1: None, 2: "group_by_length"}[stage]
    assert recipe.data.max_text_length == 2048 - 576
    common = {"weight_decay": 0, "max_grad_norm": 1, "warmup_steps": 0.03, "lr_scheduler_type": "cosine"}
    assert {name: training[name] for name in common} == common
    assert training["num_train_epochs"] == 1 and training["bf16"] is True
    assert ("deepspeed" in training) == (model == "yi_34b")
    if stage == 1:
        assert recipe.model.parts.llm and recipe.model.parts.prompt_template in ("vicuna", "llama3", "phi3", "yi")
        following = load_recipe(f"stage_2_{model}.yaml")
        assert following.model.name == training["output_dir"]


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_recipes_are_laid_over_each_other(overlay):
    plain, changed = load_recipe("stage_2_vicuna_7b.yaml"), load_recipe("stage_2_vicuna_7b.yaml", overlay)
    assert changed != plain
    assert changed.model.name == plain.model.name
    assert (changed.lora is not None) == ("language_model" not in changed.train)


def test_fine_tuning_is_for_any_model_and_box_file():
    """docs/finetune.md names model, samples and boxes; the detector of the published models is not asked for."""
    changes = ["model.name=mine", "training.output_dir=out", "data.samples=a.json", "data.boxes=b.json"]
    recipe = load_recipe("finetune.yaml", "model.bits=4", *changes)
    assert recipe.data.detector is None
    assert recipe.lora["r"] == 32 and "language_model" not in recipe.train


def test_changes_reach_every_depth_and_later_ones_win(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: stage_2_vicuna_7b.yaml\ndata: {samples: a.json}\n")
    recipe = load_recipe(
        tmp_path / "mine.yaml",
        "training.learning_rate=1e-6",
        "data.detector.tagger=x",
        "data.samples=[b.json, c.json]",
    )
    assert recipe.training["learning_rate"] == 1e-6
    assert recipe.data.samples == ["b.json", "c.json"]
    assert recipe.data.detector.tagger == "x"
    assert recipe.data.detector.detector == "google/owlv2-large-patch14-ensemble"
    assert load_recipe(tmp_path / "mine.yaml", "training.save_strategy=no").training["save_strategy"] == "no"


def test_a_recipe_says_itself_in_yaml(tmp_path):
    recipe = load_recipe("stage_1_yi_34b.yaml", "evaluation.samples=x.json")
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("trainnig.seed=1", "training"),
        ("training.learning_rat=1", "training.learning_rate"),
        ("model.parts.lllm=x", "model.parts.llm"),
        ("data.box=x", "data.boxes"),
        ("data.detector.treshold=1", "data.detector.threshold"),
        ("lora.alpha=1", "lora.lora_alpha"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(change, expected):
    with pytest.raises(TrainingError) as caught:
        load_recipe("stage_2_vicuna_7b.yaml", change)
    assert f"Did you mean `{expected}`?" in str(caught.value)


def test_what_is_no_recipe_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "circle.yaml").write_text("extends: circle.yaml\n")
    (tmp_path / "broken.yaml").write_text("a: [\n")
    for name, problem in (("list", "keys and values"), ("circle", "extend each other"), ("broken", "not YAML")):
        with pytest.raises(TrainingError, match=problem):
            load_recipe(tmp_path / f"{name}.yaml")
    with pytest.raises(TrainingError, match=r"stage_1_vicuna_7b\.yaml"):
        load_recipe("stage1_vicuna_7b.yaml")
    with pytest.raises(TrainingError, match="`training` must hold keys"):
        load_recipe("stage_1.yaml", "training=3")
