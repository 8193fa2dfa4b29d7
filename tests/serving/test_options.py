"""Options of requests and limits of images, without a server."""

import io

import pytest
from PIL import Image
from transformers import GenerationConfig

from mgllava.serving.errors import RequestError
from mgllava.serving.images import decode_image
from mgllava.serving.limits import ServingLimits
from mgllava.serving.options import CHAT_FIELDS, check_fields, read_options

GREEDY, SAMPLING = {}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40}


def read(body, model=GREEDY, compile=False):
    return read_options(body, GenerationConfig(**model), vocab_size=100, compile=compile)


@pytest.mark.parametrize(
    "model, body, expected",
    [
        (GREEDY, {}, (0.0, None, None)),
        (SAMPLING, {}, (0.7, 0.9, 40)),
        (SAMPLING, {"temperature": 0}, (0.0, 0.9, 40)),
        (SAMPLING, {"temperature": 1.5, "top_k": 0, "top_p": 1}, (1.5, 1, None)),
        (GREEDY, {"temperature": 0.5}, (0.5, None, None)),
        (GREEDY, {"top_p": 0.5}, (1.0, 0.5, None)),
        (GREEDY, {"top_k": -1}, (1.0, None, None)),
        (GREEDY, {"top_p": None}, (0.0, None, None)),
        (GREEDY, {"generation_config": '{"do_sample": true, "top_k": 3}'}, (1.0, None, 3)),
        (SAMPLING, {"generation_config": '{"do_sample": false}', "top_p": 0.5}, (0.0, 0.5, 40)),
        (SAMPLING, {"generation_config": '{"do_sample": false}', "temperature": 2}, (2.0, 0.9, 40)),
    ],
)
def test_sampling_follows_the_request_and_then_the_model(model, body, expected):
    options = read(body, model)
    assert (options.temperature, options.top_p, options.top_k) == expected
    # transformers itself never samples, as all requests share its generator.
    config = options.config
    assert not config.do_sample and (config.temperature, config.top_p, config.top_k) == (None, None, None)


@pytest.mark.parametrize(
    "body, expected",
    [
        ({}, 1024),
        ({"generation_config": '{"max_new_tokens": 5}'}, 5),
        ({"max_tokens": 6, "generation_config": '{"max_new_tokens": 5}'}, 6),
        ({"max_tokens": 6, "max_completion_tokens": 7}, 7),
    ],
)
def test_length_follows_the_most_specific_field(body, expected):
    assert read(body, {"max_new_tokens": 20}).max_tokens == expected
    assert read({}, {"max_new_tokens": 3000}).max_tokens == 3000


def test_tokens_that_the_model_suppresses_stay_suppressed():
    """Among them is the placeholder of images, which no answer may hold."""
    body = {"generation_config": '{"suppress_tokens": [7, 3]}'}
    assert read(body, {"suppress_tokens": [99, 3]}).config.suppress_tokens == [3, 7, 99]
    assert read({}, {"suppress_tokens": [99]}).config.suppress_tokens == [99]


def test_stop_replaces_stop_strings_of_the_generation_config():
    config = {"generation_config": '{"stop_strings": "a"}'}
    assert read(config).stop == ("a",) and read({**config, "stop": []}).stop == ()
    assert read({**config, "stop": ["b", "c"]}).stop == ("b", "c") and read(config).config.stop_strings is None


def test_beams_do_not_sample():
    beams = {"generation_config": '{"num_beams": 2}'}
    assert read({**beams, "temperature": 0}).config.num_beams == 2
    with pytest.raises(RequestError, match="num_beams` must be 1 for sampling"):
        read({**beams, "temperature": 0.5})


def test_cache_is_static_where_decoding_is_compiled():
    assert read({}).config.cache_implementation is None
    assert read({}, compile=True).config.cache_implementation == "static"
    assert read({}, {"cache_implementation": "offloaded"}, compile=True).config.cache_implementation == "offloaded"


def test_usage_in_streams_needs_a_stream():
    assert read({"stream": True}).usage_in_stream is None
    assert read({"stream": True, "stream_options": {"include_usage": True}}).usage_in_stream is True
    with pytest.raises(RequestError, match="must be absent unless `stream` is true"):
        read({"stream_options": {"include_usage": True}})


def test_neutral_values_are_accepted_and_compared_as_json():
    check_fields({"n": 1, "logprobs": False, "tools": [], "user": "me", "audio": None}, CHAT_FIELDS)
    for field in ({"n": True}, {"n": 2}, {"logprobs": 0}, {"tools": {}}, {"audio": {}}):
        with pytest.raises(RequestError) as error:
            check_fields(field, CHAT_FIELDS)
        assert (error.value.status, error.value.code) == (400, "unsupported")
    with pytest.raises(RequestError) as error:
        check_fields({"boxez": []}, CHAT_FIELDS)
    assert error.value.status == 422


def png(*size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


def test_images_up_to_their_limits_are_decoded():
    limits = ServingLimits(image_side=20, pixels=500)
    assert decode_image(png(20, 3), "image", limits, 400).size == (20, 3)
    with pytest.raises(RequestError, match="at most 20 pixels wide and high, got 21"):
        decode_image(png(3, 21), "image", limits, 500)
    with pytest.raises(RequestError, match=r"500 pixels together.*`image` has 400, and the images before it left 399"):
        decode_image(png(20, 3), "image", limits, 399)
