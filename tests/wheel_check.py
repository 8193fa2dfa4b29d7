"""Use an installed wheel away from the checkout: run by `make wheel-check` with the Python of a clean environment."""

import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import typer
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import mgllava
from mgllava.cli import app
from mgllava.training import load_recipe

ENVIRONMENT = Path(sys.prefix)


def main(model_folder: str, picture: str) -> None:
    """Import every module, read the data files, start every command, answer a question."""
    package = Path(mgllava.__file__).parent
    assert package.is_relative_to(ENVIRONMENT), f"{package} is not the installed wheel"
    for module in pkgutil.walk_packages([str(package)], "mgllava."):
        if module.name.endswith(("__main__", "loading_check")):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:  # plugins are imported by the program that they belong to
            assert module.name.startswith("mgllava.integrations."), error
    assert (package / "py.typed").is_file()
    load_recipe("finetune.yaml", "training.output_dir=x")

    command = [ENVIRONMENT / "bin" / "mgllava", "--version"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said == f"mgllava {version('mgllava')}\n" == f"mgllava {mgllava.__version__}\n", said
    for name in typer.main.get_command(app).commands:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0 and "Usage" in result.output, result.output

    processor = AutoProcessor.from_pretrained(model_folder)
    model = AutoModelForImageTextToText.from_pretrained(model_folder, dtype="float32")
    question = [{"type": "image", "path": picture}, {"type": "text", "text": "What color is the circle?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=10)
    answer = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])[0]
    assert answer.strip(), "the model answers nothing"
    print(f"mgllava {version('mgllava')} from {package} answers: {answer}")


if __name__ == "__main__":
    main(*sys.argv[1:])
