"""`mmaccel answer`, `run` and `demo` on tiny checkpoints, and what they say about wrong folders and pictures."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from mmaccel.cli import app
from mmaccel.pocket.pictures import pictures
from tests.checkpoints import save_llava, save_llava_next
from vision_tokens import HiRED
from vision_tokens.answering import ask, prepare, speeds
from vision_tokens.loading import load, open_picture

PICTURE = pictures("pocket-llava")[0].file
WIDE = pictures("pocket-llava-next")[-1].file
QUESTION = "what colour is the cross?"


def mmaccel(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(result: Result) -> str:
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("checkpoints") / "llava")


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory):
    return save_llava_next(tmp_path_factory.mktemp("checkpoints") / "llava-next")


@pytest.fixture
def copy(llava, tmp_path):
    """A checkpoint folder that a test may spoil."""
    return shutil.copytree(llava, tmp_path / "spoiled")


def asked(model, *more):
    return mmaccel("answer", "--image", PICTURE, "--question", QUESTION, "--model", model, "--longest", 3, *more)


def test_an_answer_is_what_the_library_itself_generates(llava):
    model, processor = load(llava)
    inputs = prepare(processor, open_picture(PICTURE), QUESTION)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=3)
    expected = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    command = ["answer", "--image", PICTURE, "--question", QUESTION, "--model", llava, "--longest", "3"]
    script = "from mmaccel.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == (f"{expected}\n", "")


def test_a_method_reports_what_it_kept(llava):
    result = asked(llava, "--method", "hired", "--set", "budget=0.25")
    assert "mmaccel report: hired" in result.stdout
    assert "visual tokens: 144 -> 36 tokens" in result.stdout


def test_settings_without_a_method_are_refused(llava):
    assert "--set budget=0.3 needs a method" in complaint(asked(llava, "--set", "budget=0.3"))


def test_a_recipe_is_applied_with_its_settings_overridden(llava, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- method: hired\n  budget: 0.5\n")
    arguments = ["run", recipe, "--image", PICTURE, "--question", QUESTION, "--model", llava, "--longest", 2]
    assert "144 -> 72 tokens" in mmaccel(*arguments).stdout
    assert "144 -> 36 tokens" in mmaccel(*arguments, "--set", "budget=0.25").stdout
    arguments[1] = tmp_path / "nothing.yaml"
    assert "there is no recipe" in complaint(mmaccel(*arguments))


def test_check_holds_the_laws_on_a_checkpoint_folder(llava, monkeypatch):
    monkeypatch.setattr("vision_tokens.laws.ORACLE_BAR", 100.0)  # the one law that a busy machine may break
    result = mmaccel("check", llava, "random", "--set", "budget=0.3")
    assert f"random on {llava}: passed" in result.stdout.replace("\n", "")
    assert result.exit_code == 0


def test_the_demo_compares_four_ways_and_draws_them(llava, tmp_path):
    drawing = tmp_path / "kept.png"
    result = mmaccel("demo", "--image", PICTURE, "--question", QUESTION, "--model", llava, "--output", drawing,
                     "--longest", 3)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for label, tokens in {"dense": 144, "HiRED 20 %": 28, "Fourier-VLM 25 %": 36, "random 20 %": 28}.items():
        (row,) = [line for line in result.stdout.splitlines() if f" {label} " in line]
        assert f" {tokens} " in row
        assert " ms " in row
    with Image.open(drawing) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 4 * 280


def test_the_demo_draws_tiles(llava_next, tmp_path):
    drawing = tmp_path / "kept.png"
    result = mmaccel("demo", "--image", WIDE, "--question", QUESTION, "--model", llava_next, "--output", drawing,
                     "--longest", 2)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    with Image.open(drawing) as drawn:
        assert drawn.width > 2 * 2 * 280  # whole image and mosaic, two panels in a row
        assert drawn.height > 2 * 280


def test_the_demo_says_what_it_lacks(llava, tmp_path):
    assert "Add --question" in complaint(mmaccel("demo", "--image", PICTURE, "--model", llava))
    assert "a .png file in a folder that exists" in complaint(mmaccel("demo", "--output", tmp_path / "no" / "kept.png"))
    assert "a .png file" in complaint(mmaccel("demo", "--output", tmp_path / "kept.jpg"))


def test_without_pocket_models_the_demo_names_the_mend(monkeypatch):
    monkeypatch.setattr("mmaccel.pocket.names", list)
    assert "give a checkpoint folder with --model PATH, or train one" in complaint(mmaccel("demo"))


def test_every_shipped_picture_opens_and_its_answers_are_the_parsers():
    import numpy as np

    from mmaccel.pocket.world import parse, questions

    for picture in pictures():
        scene = parse(np.asarray(open_picture(picture.file)))
        right = {question.text: question.answer for question in questions(scene, np.random.default_rng(0))}
        for question, answer in picture.questions:
            assert right[question] == answer, (picture.file.name, question)


def test_speed_is_measured_on_the_variant_and_leaves_the_model_plain(llava):
    model, processor = load(llava)
    inputs = prepare(processor, open_picture(PICTURE), QUESTION)
    before = ask(model, processor, inputs, longest=4).text
    found = speeds(model, inputs, {"dense": [], "cut": [HiRED(budget=0.2)]}, tokens=3, rounds=1)
    assert set(found) == {"dense", "cut"}
    assert all(speed.first_token_seconds > 0 and speed.tokens_per_second > 0 for speed in found.values())
    assert ask(model, processor, inputs, longest=4).text == before


def test_a_model_is_read_in_float32_and_evaluation_mode(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    model, _ = load(copy)
    assert model.dtype == torch.float32
    assert not model.training


# Wrong folders


def test_a_missing_model_is_named(tmp_path):
    assert f"there is no model '{tmp_path / 'nothing'}'; give a folder that model.save_pretrained wrote" in complaint(
        asked(tmp_path / "nothing")
    )


def test_a_folder_without_configuration_is_refused(copy):
    (copy / "config.json").unlink()
    assert "holds no config.json; give the folder that model.save_pretrained wrote" in complaint(asked(copy))


def test_a_broken_configuration_is_refused(copy):
    (copy / "config.json").write_text("{")
    assert "config.json is no JSON object" in complaint(asked(copy))


def test_an_unsupported_family_is_refused_before_its_weights_are_read(copy):
    (copy / "config.json").write_text('{"model_type": "mllama"}')
    assert "family 'mllama' are not supported; supported: fast_vlm, gemma3" in complaint(asked(copy))


def test_weights_in_other_formats_are_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "holds no .safetensors file, and other formats are not read" in complaint(asked(copy))


def test_truncated_weights_are_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "the weights cannot be read" in complaint(asked(copy))


def test_missing_weights_are_not_made_up(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    gone = next(name for name in weights if "projector" in name)
    del weights[gone]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing" in complaint(asked(copy))


def test_a_folder_without_processor_is_refused(copy):
    (copy / "processor_config.json").unlink()
    assert "save it there with processor.save_pretrained(folder)" in complaint(asked(copy))


def test_a_processor_without_chat_template_is_refused(copy):
    (copy / "chat_template.jinja").unlink()
    assert "a chat template" in complaint(asked(copy))


# Wrong pictures


def answered(picture, model):
    return mmaccel("answer", "--image", picture, "--question", QUESTION, "--model", model)


def test_a_missing_picture_is_named(llava, tmp_path):
    assert f"there is no picture '{tmp_path / 'no.png'}'" in complaint(answered(tmp_path / "no.png", llava))


def test_a_file_that_is_no_picture_is_refused(llava, tmp_path):
    file = tmp_path / "text.png"
    file.write_text("not a picture")
    assert f"{file} cannot be read as a picture" in complaint(answered(file, llava))


def test_a_truncated_picture_is_refused(llava, tmp_path):
    file = tmp_path / "half.png"
    file.write_bytes(PICTURE.read_bytes()[:4000])
    assert "cannot be read as a picture" in complaint(answered(file, llava))


def test_pictures_with_transparency_or_a_palette_are_read_as_rgb(tmp_path):
    for mode in ("RGBA", "P", "L", "I;16", "1"):
        file = tmp_path / "other.png"
        Image.new(mode, (8, 8)).save(file)
        assert open_picture(file).mode == "RGB"


@pytest.mark.parametrize(("method", "settings"), [("prefix-kv", ["budget=0.4"]), ("shortv", ["budget=0.5"])])
def test_a_method_is_fitted_to_a_model_and_runs_as_a_recipe(llava, tmp_path, method, settings):
    recipe = tmp_path / "fitted.json"
    options = [part for setting in settings for part in ("--set", setting)]
    fitted = mmaccel("calibrate", llava, method, "--output", recipe, "--image", PICTURE, *options)
    assert fitted.exit_code == 0
    assert fitted.stdout == f"{method} for {llava}, prompts read: 1, recipe: {recipe}\n"
    (data,) = json.loads(recipe.read_text())
    assert data["method"] == method and len(data["layers"]) == 2
    answer = mmaccel("run", recipe, "--image", PICTURE, "--question", QUESTION, "--model", llava, "--longest", 3)
    assert answer.exit_code == 0 and "kv bytes" in answer.stdout


def test_what_is_not_fitted_to_models_says_so(llava, tmp_path):
    refused = mmaccel("calibrate", llava, "hired", "--output", tmp_path / "recipe.json")
    assert "hired takes its settings as they are; prefix-kv and shortv are fitted to a model" in complaint(refused)
    refused = mmaccel("calibrate", llava, "shortv", "--output", tmp_path / "recipe.txt")
    assert "the recipe goes to a .json, .yaml or .yml file in a folder that exists" in complaint(refused)
