"""Options of requests and limits of images, without a server."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
import typer
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from PIL import Image
from transformers import GenerationConfig

from mgllava.commands.serve import serve
from mgllava.serving import limits as fixed_limits
from mgllava.serving.errors import RequestError
from mgllava.serving.images import decode_image, read_data_url
from mgllava.serving.limits import ServingLimits
from mgllava.serving.options import CHAT_FIELDS, COMPLETION_FIELDS, RESPONSE_FIELDS, check_fields, read_options

GREEDY, SAMPLING = {}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 40}


def read(body, model=GREEDY, compile=False):
    return read_options(body, GenerationConfig(**model), vocab_size=100, compile=compile)


def check_field(name, value, found, said):
    """Check that a field is read as `found`, or refused with an error that names it if that is `None`."""
    if found is not None:
        assert getattr(read({name: value}), name) == found
        return
    with pytest.raises(RequestError) as error:
        read({name: value})
    assert error.value.param == name and said in error.value.message


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


# Fields of OpenAI's API, and values of them that this server accepts because they change nothing.
EVERYWHERE = {
    **dict.fromkeys(("user", "metadata", "service_tier", "store", "prompt_cache_key"), (None, "a", {"a": 1})),
    **dict.fromkeys(
        ("prompt_cache_retention", "safety_identifier", "parallel_tool_calls", "prediction"), ("a", [True])
    ),
    **{"n": (None, 1), "best_of": (1,), "chat_template_kwargs": ({},)},
}
NEUTRAL = [
    (
        CHAT_FIELDS,
        chat_create_params.CompletionCreateParamsBase,
        {
            **EVERYWHERE,
            **{"audio": (None,), "function_call": ("none", "auto"), "functions": ([],), "logprobs": (False,)},
            **{"modalities": (["text"],), "reasoning_effort": ("none",), "response_format": ({"type": "text"},)},
            **{"tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "verbosity": ("medium",)},
            "web_search_options": (None,),
        },
    ),
    (
        RESPONSE_FIELDS,
        response_create_params.ResponseCreateParamsBase,
        {
            **EVERYWHERE,
            **{"background": (False,), "context_management": ([],), "conversation": (None,), "include": ([],)},
            **{"max_tool_calls": (None,), "previous_response_id": (None,), "prompt": (None,)},
            "reasoning": ({}, {"effort": None}, {"effort": "none"}),
            "text": ({}, {"format": {"type": "text"}}, {"verbosity": "medium", "format": {"type": "text"}}),
            **{"tool_choice": ("none", "auto"), "tools": ([],), "top_logprobs": (0,), "truncation": ("disabled",)},
        },
    ),
    (
        COMPLETION_FIELDS,
        completion_create_params.CompletionCreateParamsBase,
        {**EVERYWHERE, "echo": (False,), "logprobs": (None,), "suffix": ("",)},
    ),
]
SAMPLING_FIELDS = {"frequency_penalty", "logit_bias", "presence_penalty", "seed", "stop", "temperature", "top_p"}
READ = [
    {"messages", "max_tokens", "max_completion_tokens", "boxes", "model", "stream", "stream_options"},
    {"input", "instructions", "max_output_tokens", "boxes", "model", "stream", "stream_options"},
    {"prompt", "max_tokens", "model", "stream", "stream_options"},
]


@pytest.mark.parametrize(("fields", "api", "neutral"), NEUTRAL, ids=["chat", "responses", "completions"])
def test_fields_of_the_api_are_accepted_where_they_change_nothing(fields, api, neutral):
    own = {"chat_template_kwargs"}  # of `transformers serve` and vLLM
    known = set().union(*(params.__annotations__ for _, params, _ in NEUTRAL))
    assert set(neutral) - own <= known and set(neutral) - own - set(EVERYWHERE) <= set(api.__annotations__)
    for name, values in neutral.items():
        for value in values:
            check_fields({name: value}, fields)
    # Values with an effect.
    for name in set(neutral) - set(EVERYWHERE) | {"n", "best_of", "chat_template_kwargs"}:
        for value in ({"a": 1}, "high", True, 7):
            with pytest.raises(RequestError) as error:
                check_fields({name: value}, fields)
            assert (error.value.status, error.value.code, error.value.param) == (400, "unsupported", name)


@pytest.mark.parametrize(
    ("fields", "api", "read"),
    [(fields, api, read) for (fields, api, _), read in zip(NEUTRAL, READ, strict=True)],
    ids=["chat", "responses", "completions"],
)
def test_fields_that_the_server_reads(fields, api, read):
    """Those of OpenAI's API for the endpoint, and some more of `transformers serve` and vLLM."""
    assert read - {"boxes", "stream"} <= set(api.__annotations__)
    more = {"top_k", "min_p", "repetition_penalty", "generation_config"}
    for name in read | SAMPLING_FIELDS | more:
        check_fields({name: {"a": 1}}, fields)
    others = set().union(*READ) - read
    for name in others:
        with pytest.raises(RequestError) as error:
            check_fields({name: {"a": 1}}, fields)
        assert error.value.param == name


def test_names_of_unknown_fields_are_cut():
    with pytest.raises(RequestError) as error:
        check_fields({"x" * 1000: 1}, CHAT_FIELDS)
    assert error.value.param == "x" * 50 and error.value.code == "unknown_parameter" and error.value.status == 422


# The least and the greatest value of options, and values just beyond them.
RANGES = {
    "temperature": ((1e-6, 2), (9e-7, 2.01)),
    "top_p": ((0, 1), (-0.01, 1.01)),
    "min_p": ((0, 1), (-0.01, 1.01)),
    "repetition_penalty": ((0.01, 100), (0.009, 100.1)),
    "frequency_penalty": ((-2, 2), (-2.01, 2.01)),
    "presence_penalty": ((-2, 2), (-2.01, 2.01)),
    "top_k": ((-1, 2**63 - 1), (-2, 2**63)),
    "seed": ((-(2**63), 2**63 - 1), (-(2**63) - 1, 2**63)),
    "max_tokens": ((1, 2**63 - 1), (0, 2**63)),
    "max_completion_tokens": ((1, 2**63 - 1), (0, 2**63)),
    "max_output_tokens": ((1, 2**63 - 1), (0, 2**63)),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_have_limits_which_are_allowed(name):
    allowed, refused = RANGES[name]
    for value in allowed:
        options = read({name: value})
        attribute = "max_tokens" if name.startswith("max_") else name
        found = getattr(options.config if name == "repetition_penalty" else options, attribute)
        assert found == (None if (name, value) == ("top_k", -1) else value)
    for value in (*refused, "1", True, [1], float("nan")):
        with pytest.raises(RequestError) as error:
            read({name: value})
        assert (error.value.status, error.value.param) == (400, name) and error.value.message.startswith(f"`{name}` ")


def config_of(**values):
    return {"generation_config": json.dumps(values)}


# For the options of transformers that a request may set: values that are allowed, and values that are refused.
CONFIG = {
    "bad_words_ids": (([[0]], [[99] * 100], [[1]] * 1000), ([], [[]], [[100]], [[1] * 101], [[1]] * 1001, [1], {})),
    "bos_token_id": ((0, 99), (-1, 100, True, "1")),
    "early_stopping": ((True, False, "never"), ("always", 1)),
    "eos_token_id": ((0, 99, [1, 99], [1] * 100), (-1, 100, [], [100], [1] * 101, "1")),
    "length_penalty": ((-5, 5, 0.5), (-5.1, 5.1)),
    "min_new_tokens": ((0, 2**63 - 1), (-1, 2**63, 1.5)),
    "no_repeat_ngram_size": ((0, 1000), (-1, 1001)),
    "num_beams": ((1, 8), (0, 9)),
    "pad_token_id": ((0, 99), (-1, 100)),
}


@pytest.mark.parametrize("name", CONFIG)
def test_options_of_transformers_have_limits_which_are_allowed(name):
    allowed, refused = CONFIG[name]
    for value in allowed:
        assert getattr(read(config_of(**{name: value})).config, name) == value
    assert getattr(read(config_of(**{name: None})).config, name) == getattr(GenerationConfig(), name)
    for value in refused:
        with pytest.raises(RequestError, match=rf"`generation_config\.{name}` must be") as error:
            read(config_of(**{name: value}))
        assert error.value.param == "generation_config"


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
        ({"do_sample": True, "typical_p": 1e-6}, {"temperature": 1.0, "typical_p": 1e-6}),
        ({"typical_p": 1}, {"temperature": 0.0, "typical_p": 1}),
        ({"min_p": 0.1}, {"temperature": 1.0, "min_p": 0.1}),
        ({"max_new_tokens": 1}, {"max_tokens": 1}),
        ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"transformers_version": "5.16"}, {}),
        ({"suppress_tokens": []}, {}),
    ],
)
def test_options_that_transformers_does_not_apply_itself(values, found):
    options = read(config_of(**values))
    assert {name: getattr(options, name) for name in found} == found


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", "3", "[" * 90_000, {"top_k": 1}, ["a"], 5),
        *('{"seed": 1}', '{"frequency_penalty": 1}', '{"presence_penalty": 1}', '{"cache_implementation": "static"}'),
        *('{"do_sample": 1}', '{"typical_p": 9e-7}', '{"typical_p": 1.1}', '{"max_new_tokens": 0}'),
        *(
            '{"stop_strings": 1}',
            '{"stop_strings": {"a": 1}}',
            '{"stop_strings": [""]}',
            '{"transformers_version": 5}',
        ),
        *('{"suppress_tokens": [100]}', '{"suppress_tokens": 5}'),
        *(json.dumps({"suppress_tokens": [1] * 101}), " " * 100_000 + "{}"),
    ],
)
def test_other_generation_configs_are_refused(text):
    with pytest.raises(RequestError, match="`generation_config") as error:
        read({"generation_config": text})
    assert error.value.param == "generation_config"


def test_generation_config_may_be_long():
    assert read({"generation_config": " " * 99_998 + "{}"}).max_tokens == 1024
    assert read(config_of(suppress_tokens=[1] * 100)).config.suppress_tokens == [1]


@pytest.mark.parametrize(
    ("bias", "found"),
    [
        ({"0": 100, "99": -100.0}, {0: 100, 99: -100}),
        ({"0000000005": 1}, {5: 1}),
        ({}, {}),
        (None, {}),
        *[(bias, None) for bias in ({"100": 1}, {"1": 100.1}, {"1": -100.1}, {"1": "1"}, {"1": True}, {"-1": 1})],
        *[(bias, None) for bias in ({"a": 1}, {"": 1}, {"00000000005": 1}, {"1": 1, "٣": 1}, [5], "5", 5)],
    ],
)
def test_bias_maps_tokens_to_numbers(bias, found):
    check_field("logit_bias", bias, found, "below 100 to numbers from -100 to 100, got")


@pytest.mark.parametrize(
    ("stop", "found"),
    [
        ("a" * 100, ("a" * 100,)),
        (["a"] * 4, ("a",) * 4),
        ("", None),
        (["a"] * 5, None),
        ("a" * 101, None),
        ([1], None),
        ({"a": 1}, None),
    ],
)
def test_at_most_four_short_stop_strings(stop, found):
    check_field("stop", stop, found, "4 strings of 1 to 100 characters")


@pytest.mark.parametrize(
    "body",
    [
        *({"stream": 1}, {"stream": "yes"}, {"stream": True, "stream_options": []}),
        {"stream": True, "stream_options": {"include_usage": 1}},
        {"stream": True, "stream_options": {"other": True}},
        *({"stream_options": {}}, {"stream": False, "stream_options": {}}),
    ],
)
def test_streams_are_asked_for_by_booleans(body):
    with pytest.raises(RequestError) as error:
        read(body)
    assert error.value.param == list(body)[-1]


def test_streams():
    assert [read({"stream": value}).is_stream for value in (None, False, True)] == [False, False, True]
    options = read({"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": None}})
    assert options.is_stream and options.usage_in_stream is False


def test_a_penalty_of_the_model_stays_unless_the_request_has_its_own():
    model = {"repetition_penalty": 1.2}
    assert read({}, model).config.repetition_penalty == 1.2
    assert read({"repetition_penalty": 2}, model).config.repetition_penalty == 2.0
    assert read(config_of(repetition_penalty=3), model).config.repetition_penalty == 3.0
    assert read({"repetition_penalty": 2, **config_of(repetition_penalty=3)}, model).config.repetition_penalty == 2.0
    # The request's penalties are not those of the model.
    assert (read({}).frequency_penalty, read({}).presence_penalty, read({}).seed) == (0.0, 0.0, None)


def test_the_config_of_the_model_is_not_changed():
    config = GenerationConfig(do_sample=True, top_k=5, max_length=30, stop_strings=["a"])
    options = read_options(config_of(num_beams=1, eos_token_id=3), config, vocab_size=100, compile=True)
    assert (config.do_sample, config.top_k, config.eos_token_id, config.cache_implementation) == (True, 5, None, None)
    assert (options.config.max_length, options.config.stop_strings) == (None, None)


PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_limits_are_those_of_the_page():
    page = PAGE.read_text()
    rows = dict(re.findall(r"^\| `(--[\w-]+)` \| ([\d,^]+(?: (?:[MG]iB|s))?) \|", page, re.MULTILINE))
    units = {"MiB": 2**20, "s": 1}

    def number(text):
        value, _, unit = text.replace(",", "").partition(" ")
        base, _, power = value.partition("^")
        return int(base) ** int(power or 1) * units.get(unit, 1)

    command = typer.Typer()
    command.command()(serve)
    options = {word: option for option in typer.main.get_command(command).params for word in option.opts}
    assert len(rows) == len(ServingLimits.__dataclass_fields__)
    for word, text in rows.items():
        assert options[word].default == getattr(ServingLimits(), options[word].name) == number(text)
    (fixed,) = re.findall(r"^Fixed: (.*?)\. Prompts", page, re.MULTILINE | re.DOTALL)
    names = ["TEXT_CHARACTERS", "MESSAGES", "PARTS", "PROMPTS", "STOP_STRINGS", "BEAMS", "JSON_VALUES", "JSON_DEPTH"]
    expected = [getattr(fixed_limits, f"MAX_{name}") for name in names]
    expected += [fixed_limits.HEAD_TIMEOUT, fixed_limits.BODY_TIMEOUT, fixed_limits.SEND_TIMEOUT]
    assert list(map(number, re.findall(r"[\d,]*\d", fixed))) == [*expected, fixed_limits.MAX_LOOKUPS]
    assert fixed_limits.BODY_PAUSE == fixed_limits.HEAD_TIMEOUT
    assert f"at most {fixed_limits.MAX_REQUESTS_WITH_PIXELS} requests with images" in page


@pytest.mark.parametrize("name", ServingLimits.__dataclass_fields__)
def test_limits_are_positive_numbers(name):
    for value in (-1, float("nan"), float("inf"), *(() if name == "videos" else (0,))):
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            ServingLimits(**{name: value})
    assert getattr(ServingLimits(**{name: 1}), name) == 1


def data_url(size, kind="image/png", encoding=";base64"):
    return f"data:{kind}{encoding}," + base64.b64encode(bytes(size)).decode()


@pytest.mark.parametrize("size", [1, 2, 3, 10, 11, 12])
def test_data_urls_have_at_most_the_bytes_of_their_kind(size):
    limits = ServingLimits(image_bytes=size, video_bytes=size + 20)
    assert read_data_url(data_url(size), "image", limits) == bytes(size)
    assert read_data_url(data_url(size + 20, "video/mp4"), "video", limits, "video") == bytes(size + 20)
    for kind, more in (("image", 1), ("video", 21)):
        with pytest.raises(RequestError, match=f"--max-{kind}-bytes") as error:
            read_data_url(data_url(size + more, f"{kind}/x"), "field", limits, kind)
        assert (error.value.code, error.value.param) == (f"{kind}_too_large", "field")


@pytest.mark.parametrize(
    ("url", "kind", "code"),
    [
        (data_url(9, "video/mp4"), "image", "invalid_image_url"),
        (data_url(9, "text/plain"), "video", "invalid_video_url"),
        (data_url(9, encoding=""), "image", "invalid_image_url"),
        ("data:image/png;base64", "image", "invalid_image_url"),
        ("data:image/png;base64,a", "image", "invalid_base64_image"),
        ("data:image/png;base64,é===", "image", "invalid_base64_image"),
        ("data:video/mp4;base64,*", "video", "invalid_base64_video"),
    ],
)
def test_other_data_urls_are_refused(url, kind, code):
    with pytest.raises(RequestError) as error:
        read_data_url(url, "field", ServingLimits(), kind)
    assert (error.value.status, error.value.code, error.value.param) == (400, code, "field")


def test_a_video_may_be_an_animated_image():
    assert read_data_url(data_url(9, "image/gif"), "video", ServingLimits(), "video") == bytes(9)


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


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats_of_the_web_are_decoded(form):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(file, form)
    picture = decode_image(file.getvalue(), "image", ServingLimits(), 10_000)
    assert picture.size == (8, 6) and picture.mode == "RGB" and picture.getpixel((3, 3))[0] > 250


@pytest.mark.parametrize("form", ["TIFF", "PPM", "ICO", "TGA", "PCX"])
def test_other_formats_are_not_decoded(form):
    """Each decoder reads bytes of strangers."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, form)
    with pytest.raises(RequestError) as error:
        decode_image(file.getvalue(), "image", ServingLimits(), 10_000)
    assert (error.value.code, error.value.param) == ("invalid_image", "image")


def test_memory_that_does_not_suffice_is_no_fault_of_the_image(monkeypatch):
    def fail(*args, **options):
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode_image(b"", "image", ServingLimits(), 10_000)
