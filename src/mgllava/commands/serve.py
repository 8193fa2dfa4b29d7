"""The command `mgllava serve`."""

from dataclasses import fields
from typing import Annotated, Literal

import typer

from mgllava.extras import install_hint
from mgllava.serving.limits import ServingLimits

from .console import errors_as_messages
from .options import AttnImplementation, Bits, Device, Dtype, Model, Revision, TrustRemoteCode, UseBoxDetector


@errors_as_messages(ValueError, ImportError)
def serve(
    model: Model,
    engine: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What runs the model. vllm answers many requests at once; needs the extra `vllm`."),
    ] = "transformers",
    engine_options: Annotated[
        str | None, typer.Option(help="JSON object: further options of vLLM, such as tensor_parallel_size.")
    ] = None,
    host: Annotated[str, typer.Option(help="Server listen address.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Server listen port.")] = 8000,
    revision: Revision = None,
    bits: Bits = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: AttnImplementation = None,
    compile: Annotated[bool, typer.Option("--compile", help="Decode with a static cache and torch.compile.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="JSON object: variables of the chat template.")
    ] = None,
    use_box_detector: UseBoxDetector = True,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="the folder's name, or the id")
    ] = None,
    allowed_image_hosts: Annotated[
        str,
        typer.Option(
            help="Where images and videos may be downloaded from: 'none', or a list of 'public' (all public "
            "addresses), 'host' and 'host:port', separated by commas. Hosts in the list may have private addresses."
        ),
    ] = "public",
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Further host name of this server, for example behind a proxy; can be given several times. '*' "
            "allows all names, even of web pages that resolve to this server (DNS rebinding)."
        ),
    ] = None,
    api_keys: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="MGLLAVA_API_KEY",
            help="Requests need a key (Authorization: Bearer KEY); can be given several times. Other users of this "
            "machine can see options, but not the environment.",
            show_default="none: no key is needed",
        ),
    ] = None,
    request_bytes: Annotated[
        int, typer.Option("--max-request-bytes", help="Size of a request with its base64 images and videos.")
    ] = ServingLimits.request_bytes,
    images: Annotated[int, typer.Option("--max-images", help="Images in a request.")] = ServingLimits.images,
    image_bytes: Annotated[
        int, typer.Option("--max-image-bytes", help="Size of an image file.")
    ] = ServingLimits.image_bytes,
    image_side: Annotated[
        int, typer.Option("--max-image-side", help="Pixels of an image's longer side.")
    ] = ServingLimits.image_side,
    pixels: Annotated[
        int,
        typer.Option(
            "--max-pixels",
            help="Pixels of all images in a request, each counted as a square of its longer side.",
        ),
    ] = ServingLimits.pixels,
    boxes: Annotated[int, typer.Option("--max-boxes", help="Boxes of an image or frame.")] = ServingLimits.boxes,
    image_timeout: Annotated[float, typer.Option(help="Seconds to download an image.")] = ServingLimits.image_timeout,
    videos: Annotated[
        int, typer.Option("--max-videos", help="Videos in a request; 0: none are taken.")
    ] = ServingLimits.videos,
    num_frames: Annotated[
        int | None,
        typer.Option(
            help="Frames that are sampled from a video; requests may ask for fewer.", show_default="the model's"
        ),
    ] = None,
    video_bytes: Annotated[
        int, typer.Option("--max-video-bytes", help="Size of a video file.")
    ] = ServingLimits.video_bytes,
    video_seconds: Annotated[
        float, typer.Option("--max-video-seconds", help="Length of a video.")
    ] = ServingLimits.video_seconds,
    video_frames: Annotated[
        int, typer.Option("--max-video-frames", help="Frames in a video file.")
    ] = ServingLimits.video_frames,
    video_side: Annotated[
        int, typer.Option("--max-video-side", help="Pixels of a frame's longer side.")
    ] = ServingLimits.video_side,
    video_timeout: Annotated[
        float, typer.Option(help="Seconds to download a video, and to decode it.")
    ] = ServingLimits.video_timeout,
    concurrent_requests: Annotated[
        int,
        typer.Option("--max-concurrent-requests", help="Requests that wait or are answered; others get status 429."),
    ] = ServingLimits.concurrent_requests,
    enable_cors: Annotated[
        bool, typer.Option("--enable-cors", help="Let web pages of all origins send requests.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="Logging level (e.g. 'info', 'warning').")] = "warning",
    default_seed: Annotated[
        int | None,
        typer.Option(help="Random seed of requests without one.", show_default="random"),
    ] = None,
) -> None:
    """Serve a model through an OpenAI-compatible API like that of `transformers serve`, with boxes in requests.

    One answer is generated at a time, unless vLLM is the engine. Needs the extra `serve`.
    """
    options = {**locals(), "allowed_hosts": allowed_hosts or [], "api_keys": api_keys or []}
    limits = ServingLimits(**{field.name: options.pop(field.name) for field in fields(ServingLimits)})
    del options["engine"]
    if engine == "vllm":
        from mgllava.integrations.vllm.command import run_vllm

        return run_vllm(**options, limits=limits)
    if options.pop("engine_options") is not None:
        raise ValueError("`engine_options` must be left out without `--engine vllm`.")
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(f"Serving needs FastAPI and other packages. {install_hint('serve')}")
    from mgllava.serving.server import run_server

    run_server(**options, limits=limits)


__all__ = ["serve"]
