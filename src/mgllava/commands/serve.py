"""The command `mgllava serve`."""

from typing import Annotated

import typer

from .console import errors_as_messages


def serve(
    model: Annotated[str, typer.Argument(help="MG-LLaVA repository: folder or Hub id, also id@revision.")],
    host: Annotated[str, typer.Option(help="Server listen address.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Server listen port.")] = 8000,
    device: Annotated[str, typer.Option(help="Device for inference (e.g. 'auto', 'cuda:0', 'cpu').")] = "auto",
    dtype: Annotated[str, typer.Option(help="Override model dtype. 'auto' derives from weights.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="'bnb-4bit' or 'bnb-8bit'.")] = None,
    attn_implementation: Annotated[
        str | None, typer.Option(help="Attention implementation (e.g. flash_attention_2).")
    ] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Decode with a static cache and torch.compile.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code of repositories that bring their own.")
    ] = False,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="JSON object: variables of the chat template.")
    ] = None,
    box_detector: Annotated[
        bool, typer.Option(help="Find the boxes of images that come without; needs a repository with a detector.")
    ] = True,
    served_model_name: Annotated[
        str | None, typer.Option(help="How clients call the model.", show_default="the folder's name, or the id")
    ] = None,
    allowed_image_hosts: Annotated[
        str,
        typer.Option(
            help="Where images may be downloaded from: 'none', or a list of 'public' (all public addresses), 'host' "
            "and 'host:port', separated by commas. Hosts in the list may have private addresses."
        ),
    ] = "public",
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name under which clients reach this server, as behind a proxy; may be given several times. "
            "'*' allows all names, and web pages that point theirs here (DNS rebinding)."
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MGLLAVA_API_KEY",
            help="Key of which requests must have one (Authorization: Bearer KEY); may be given several times. "
            "Others on this machine can see options, but not the environment.",
            show_default="none: all may ask",
        ),
    ] = None,
    max_request_bytes: Annotated[int, typer.Option(help="Size of a request with its base64 images.")] = 32 * 2**20,
    max_images: Annotated[int, typer.Option(help="Images in a request.")] = 8,
    max_image_bytes: Annotated[int, typer.Option(help="Size of an image file.")] = 10 * 2**20,
    max_image_side: Annotated[int, typer.Option(help="Pixels of an image's longer side.")] = 8192,
    max_pixels: Annotated[
        int, typer.Option(help="Pixels of all images in a request, each counted as a square of its longer side.")
    ] = 2**27,
    max_boxes: Annotated[int, typer.Option(help="Boxes of an image.")] = 1000,
    image_timeout: Annotated[float, typer.Option(help="Seconds to download an image.")] = 10.0,
    max_concurrent_requests: Annotated[
        int, typer.Option(help="Requests that may wait or be answered; more get status 429.")
    ] = 32,
    enable_cors: Annotated[
        bool, typer.Option("--enable-cors", help="Let web pages of all origins send requests.")
    ] = False,
    log_level: Annotated[str, typer.Option(help="Logging level (e.g. 'info', 'warning').")] = "warning",
    default_seed: Annotated[
        int | None, typer.Option(help="Seed of sampling for requests that have none.", show_default="random")
    ] = None,
) -> None:
    """Serve a model through an OpenAI-compatible API, as `transformers serve` does, with boxes in requests.

    Needs pip install 'mgllava[serve]'. Answers come one after another.
    """
    with errors_as_messages(ImportError, ValueError):
        from transformers.utils.import_utils import is_serve_available

        if not is_serve_available():
            raise ImportError("Serving needs more packages. Install them: pip install 'mgllava[serve]'")
        from mgllava.serving.limits import ServingLimits
        from mgllava.serving.server import run_server

        limits = ServingLimits(
            request_bytes=max_request_bytes,
            images=max_images,
            image_bytes=max_image_bytes,
            image_side=max_image_side,
            pixels=max_pixels,
            boxes=max_boxes,
            image_timeout=image_timeout,
            concurrent_requests=max_concurrent_requests,
        )
        run_server(
            model,
            host=host,
            port=port,
            limits=limits,
            allowed_image_hosts=allowed_image_hosts,
            allowed_hosts=allowed_hosts or [],
            api_keys=api_key or [],
            served_model_name=served_model_name,
            box_detector=box_detector,
            compile=compile,
            chat_template_kwargs=chat_template_kwargs,
            enable_cors=enable_cors,
            log_level=log_level,
            default_seed=default_seed,
            device=device,
            dtype=dtype,
            quantization=quantization,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )


__all__ = ["serve"]
