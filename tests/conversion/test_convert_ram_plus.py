"""Conversion of the original files of RAM++ to a model folder, and its errors."""

import argparse
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mgllava import RamPlusForImageTagging
from mgllava.conversion import ConversionError, convert_ram_plus
from mgllava.conversion.ram_plus import source_format
from tests.ram_plus.golden import NUM_TAGS, SOURCES, original_state

from .conftest import options_of, run

BUFFERS = ("relative_position_index", "attn_mask")


def convert(tmp_path, **changes):
    return convert_ram_plus(**{"output": tmp_path / "out", **SOURCES, **changes})


def saved(tmp_path, content, name="checkpoint.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def written(tmp_path, text, name="file.txt"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


def thresholds_of(folder):
    return json.loads((folder / "config.json").read_text())["thresholds"]


def failure(tmp_path, **changes):
    """Return the error of a conversion, and check that no file is left."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConversionError) as raised:
        convert(tmp_path, **changes)
    assert sorted(tmp_path.iterdir()) == before
    return str(raised.value)


def test_every_weight_is_that_of_its_source_and_in_the_report(tmp_path):
    output = convert(tmp_path)
    _, info = RamPlusForImageTagging.from_pretrained(output, output_loading_info=True)
    assert not any(info.values())

    state, weights = original_state(), load_file(output / "model.safetensors")
    report = json.loads((output / "conversion_report.json").read_text())
    dropped = [name for names in report["dropped"].values() for name in names]
    assert dropped and all(name.endswith(BUFFERS) for name in dropped)
    origins = {entry["from"].split(":")[1].split(" as ")[0]: name for name, entry in report["tensors"].items()}
    assert origins.keys() | set(dropped) == state.keys() == set(report["checkpoint"]["keys"])
    for name, new_name in origins.items():
        assert torch.equal(weights[new_name].flatten(), state[name].flatten()), name
    assert report["tags"] == {
        "count": 20,
        "descriptions_per_tag": 4,
        "thresholds_from_file": 20,
        "thresholds_by_default": 0,
    }
    assert {source: len(entries) for source, entries in report["sources"].items()} == dict.fromkeys(SOURCES, 1)
    assert all(len(entries[0]["sha256"]) == 64 for entries in report["sources"].values())
    assert not (tmp_path / "out.incomplete").exists()


def test_optimizer_state_is_dropped_and_listed(tmp_path):
    moments = {"state": {0: {"exp_avg": torch.zeros(1000), "exp_avg_sq": torch.zeros(1000)}}}
    moments["itself"] = moments
    pair = (torch.zeros(2), [torch.zeros(3).double()])
    checkpoint = saved(tmp_path, {"model": original_state(), "optimizer": moments, "epoch": 4, "pair": pair})
    output = convert(tmp_path, checkpoint=checkpoint)
    report = json.loads((output / "conversion_report.json").read_text())
    assert report["checkpoint"]["not_read"] == {
        "optimizer": "dict with 2 tensors, 8000 bytes",
        "epoch": "int",
        "pair": "tuple with 2 tensors, 32 bytes",
    }
    assert set(load_file(output / "model.safetensors")) == set(report["tensors"])


def test_pickled_objects_need_trust(tmp_path):
    checkpoint = saved(tmp_path, {"model": original_state(), "config": argparse.Namespace(image_res=128)})
    message = failure(tmp_path, checkpoint=checkpoint)
    assert "argparse.Namespace" in message and "`trust_pickle=True`" in message
    output = convert(tmp_path, checkpoint=checkpoint, trust_pickle=True)
    assert "config" in json.loads((output / "conversion_report.json").read_text())["checkpoint"]["not_read"]


def test_bare_state_dict_old_names_and_removed_modules(tmp_path):
    state = {name.replace("tagging_head", "vision_multi"): value for name, value in original_state().items()}
    removed = [
        "tagging_head.embeddings.word_embeddings.weight",
        "vision_multi.encoder.layer.0.attention.self.key.bias",
    ]
    state |= {name: torch.zeros(2) for name in [*removed, "tagging_head.pooler.dense.bias"]}
    output = convert(tmp_path, checkpoint=saved(tmp_path, state))
    dropped = json.loads((output / "conversion_report.json").read_text())["dropped"]
    assert sum(reason.startswith("not used: ") for reason in dropped) == 3
    reference = convert(tmp_path, output=tmp_path / "reference")
    weights, expected = (load_file(folder / "model.safetensors") for folder in (output, reference))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


def test_all_differences_are_reported_at_once(tmp_path):
    state = original_state()
    del state["fc.bias"]
    state["fc.extra"] = torch.zeros(3)
    state["tagging_head.encoder.layer.0.strange.weight"] = torch.zeros(3)
    state["image_proj.bias"] = torch.zeros(7)
    message = failure(tmp_path, checkpoint=saved(tmp_path, {"model": state}))
    assert "missing: 1\n  classifier.bias (1,)" in message
    assert "unexpected: 2\n" in message and "fc.extra" in message and "layer.0.strange.weight (3,)" in message
    assert "wrong shape: 1\n  image_projection.bias: expected (512,), got (7,)" in message


def test_without_configs_the_released_sizes_are_expected(tmp_path):
    message = failure(tmp_path, swin_config=None, decoder_config=None)
    assert "the released sizes" in message
    assert "(192, 3, 4, 4), got (12, 3, 4, 4)" in message


@pytest.mark.parametrize("num_tags", [19, 21])
def test_tag_list_of_another_model(tmp_path, num_tags):
    tags = written(tmp_path, "\n".join(f"tag {number}" for number in range(num_tags)), "tags.txt")
    limits = written(tmp_path, "0.5", "limits.txt")
    message = failure(tmp_path, tag_list=tags, thresholds=limits)
    assert f"the list has {num_tags} tags" in message and "has 80 rows" in message


def test_short_threshold_file_leaves_the_default(tmp_path):
    output = convert(tmp_path, thresholds=written(tmp_path, "0.25\n1\n"))
    assert thresholds_of(output) == [0.25, 1.0] + [0.68] * 18
    report = json.loads((output / "conversion_report.json").read_text())
    assert report["tags"]["thresholds_by_default"] == 18


def test_threshold_file_with_more_lines_than_tags_is_refused(tmp_path):
    message = failure(tmp_path, thresholds=written(tmp_path, "0.5\n" * (NUM_TAGS + 1)))
    assert "has 21 lines and the tag list has 20 tags" in message


@pytest.mark.parametrize(
    ("argument", "text", "said"),
    [
        ("thresholds", "0.5\nhigh\n", "line 2 of {path} is 'high'"),
        ("thresholds", "0.5\n65\n", "line 2 of {path} is '65'"),
        ("thresholds", "nan\n", "line 1 of {path} is 'nan'"),
        ("thresholds", "0.5\n\n0.5\n", "line 2 is blank"),
        ("tag_list", "", "it is empty"),
        ("tag_list", "cat\n \ndog", "line 2 is blank"),
        ("swin_config", "{", "must be JSON"),
        ("swin_config", '{"image_res": 128}', "lacks window_size, embed_dim, depths, num_heads"),
        ("decoder_config", "[]", "must hold a JSON object"),
        (
            "decoder_config",
            '{"hidden_size": 32, "num_attention_heads": 5, "num_hidden_layers": 2, "intermediate_size": 64}',
            "No model has these sizes: `num_attention_heads` must divide `hidden_size`",
        ),
    ],
)
def test_damaged_text_files(tmp_path, argument, text, said):
    path = written(tmp_path, text)
    assert said.format(path=path) in failure(tmp_path, **{argument: path})


def test_tag_list_in_another_encoding(tmp_path):
    (tmp_path / "tags.txt").write_bytes("café\n".encode("latin-1") * 20)
    assert "must be UTF-8" in failure(tmp_path, tag_list=tmp_path / "tags.txt")


@pytest.mark.parametrize(
    ("more", "said"), [(0, "the list has 3 tags"), (1, "is too large for a text of one line per tag")]
)
def test_downloaded_texts_have_at_most_16_mebibytes(tmp_path, monkeypatch, more, said):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return io.BytesIO((b"a\na\n").ljust((1 << 24) + more, b"a"))

    monkeypatch.setattr(source_format, "urlopen", urlopen)
    limits = written(tmp_path, "0.5", "limits.txt")
    message = failure(tmp_path, tag_list="https://somewhere/", thresholds=limits)
    assert asked == ["https://somewhere/"] and said in message


def test_line_ends_and_byte_order_mark_are_not_part_of_tags(tmp_path):
    tags = SOURCES["tag_list"].read_text(encoding="utf-8").split("\n")
    (tmp_path / "tags.txt").write_bytes(("\ufeff" + "\r\n".join(tags) + "\r\n").encode())
    output = convert(tmp_path, tag_list=tmp_path / "tags.txt")
    assert list(json.loads((output / "config.json").read_text())["id2label"].values()) == tags


@pytest.mark.parametrize("argument", list(SOURCES))
def test_files_that_do_not_exist(tmp_path, argument):
    message = failure(tmp_path, **{argument: tmp_path / "nothing"})
    assert f"`{argument}` must be a file" in message and "nothing" in message


def test_checkpoint_of_another_kind(tmp_path):
    assert "not a RAM++ checkpoint" in failure(tmp_path, checkpoint=saved(tmp_path, {"model": {"w": torch.zeros(1)}}))


def test_truncated_checkpoint(tmp_path):
    content = SOURCES["checkpoint"].read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    assert "Is it truncated?" in failure(tmp_path, checkpoint=tmp_path / "cut.pth")


def test_dtype_and_shards(tmp_path):
    output = convert(tmp_path, dtype="bfloat16", max_shard_size="200KB")
    assert len(list(output.glob("model-*.safetensors"))) > 1
    model = RamPlusForImageTagging.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.decoder.label_embed.flatten(0, 1), original_state()["label_embed"].bfloat16())
    assert "must be auto, float32" in failure(tmp_path, dtype="int8", output=tmp_path / "other")


def test_output_is_replaced_only_if_it_is_a_tagger_and_overwrite_is_set(tmp_path):
    output = convert(tmp_path)
    assert "pass `overwrite=True`" in failure(tmp_path)
    convert(tmp_path, overwrite=True, thresholds=written(tmp_path, "0.5"))
    assert thresholds_of(output)[:2] == [0.5, 0.68]
    (output / "config.json").write_text('{"model_type": "mgllava"}')
    assert "is not a ram_plus model folder" in failure(tmp_path, overwrite=True)
    (output / "config.json").unlink()
    assert "`overwrite` does not replace it" in failure(tmp_path, overwrite=True)


def test_sources_inside_the_output_are_not_lost(tmp_path):
    output = convert(tmp_path)
    shutil.copy(SOURCES["tag_list"], output / "tags.txt")
    assert "tags.txt is inside" in failure(tmp_path, overwrite=True, tag_list=output / "tags.txt")
    assert (output / "tags.txt").exists()


def test_command(tmp_path):
    command = ["convert-ram-plus", *options_of(SOURCES), "--output", tmp_path / "out"]
    result = run(*command, "--dtype", "float16", "--max-shard-size", "1MB")
    assert result.exit_code == 0, result.output
    assert f'AutoModel.from_pretrained("{tmp_path / "out"}")' in result.output
    assert RamPlusForImageTagging.from_pretrained(tmp_path / "out").dtype == torch.float16
    assert run(*command, "--overwrite").exit_code == 0


def test_command_reports_an_error_in_one_message(tmp_path):
    sources = {name: path for name, path in SOURCES.items() if name != "swin_config"}
    result = run("convert-ram-plus", *options_of(sources), "--output", tmp_path / "out")
    assert result.exit_code == 1 and "error: The checkpoint does not match the model" in result.output
    assert list(tmp_path.iterdir()) == []
