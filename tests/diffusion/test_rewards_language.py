"""What a vision-language model says of a picture."""

import shutil

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from diffusion.rewards import VqaScore, release_models
from mmaccel import pocket
from mmaccel.pocket import world
from tests import checkpoints
from tests.diffusion.reward_inputs import as_tensor, moving, pictures

QUESTION = 'Does this figure show "{prompt}"? Please answer yes or no.'


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """The folder of a tiny random LLaVA whose vocabulary has a "yes"."""
    folder = checkpoints.save_llava(tmp_path_factory.mktemp("llava"))
    processor, model = AutoProcessor.from_pretrained(folder), LlavaForConditionalGeneration.from_pretrained(folder)
    processor.tokenizer.add_tokens(["yes", "Yes", "no"])
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=2.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_it_is_the_probability_of_yes_after_the_question(speaker):
    images, prompts = pictures(2)
    processor, model = AutoProcessor.from_pretrained(speaker), LlavaForConditionalGeneration.from_pretrained(speaker)
    yes = [processor.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "Yes")]
    for row in range(2):
        text = f"USER: <image>\n{QUESTION.replace('{prompt}', prompts[row])} ASSISTANT:"
        picture = (images[row] * 255).round().byte().permute(1, 2, 0).numpy()
        with torch.no_grad():
            logits = model(**processor(images=picture, text=text, return_tensors="pt")).logits[0, -1]
        expected = logits.softmax(dim=-1)[yes].sum()
        got = VqaScore(model=speaker)(images[row : row + 1], prompts[row : row + 1])
        assert 0 < expected < 1 and torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("rows_per_call", [1, 2, 8])
def test_a_batch_of_prompts_of_different_length_equals_its_rows_in_any_order(speaker, rows_per_call):
    images, _ = pictures(5)
    prompts = ["a cross", "a red square left of a blue circle", "nothing", "two white triangles", "a red square"]
    reward = VqaScore(model=speaker, rows_per_call=rows_per_call)
    together = reward(images, prompts)
    alone = torch.cat([VqaScore(model=speaker)(images[row : row + 1], prompts[row : row + 1]) for row in range(5)])
    order = [3, 0, 4, 2, 1]
    permuted = reward(images[order], [prompts[row] for row in order])
    assert together.shape == (5,) and together.unique().numel() == 5
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(permuted, together[order], atol=1e-5)


def test_a_video_is_asked_about_frame_by_frame(speaker):
    videos, prompts = moving(2, frames=3)
    frames = torch.stack([VqaScore(model=speaker)(videos[:, frame], prompts) for frame in range(3)])
    assert torch.allclose(VqaScore(model=speaker)(videos, prompts), frames.mean(dim=0), atol=1e-5)


def test_pocket_llava_is_sure_of_what_it_sees():
    scenes = [
        world.Scene((world.Thing(shape, "red", 0.5, 0.5, 0.16), world.Thing("circle", "blue", 0.2, 0.2, 0.15)), 3)
        for shape in ("square", "cross", "triangle")
    ]
    images = as_tensor([world.render(scene, 96) for scene in scenes])
    reward = VqaScore(model="pocket-llava", question="what shape is the red thing?", answer="square")
    square, cross, triangle = reward(images, None).tolist()
    assert square > 0.9 and cross < 0.1 and triangle < 0.1
    coloured = VqaScore(model="pocket-llava", question="what colour is the {prompt}?", answer="red")
    assert coloured(images, ["square", "cross", "circle"])[:2].min() > 0.9
    assert coloured(images, ["square", "cross", "circle"])[2] < 0.1


def test_a_vocabulary_without_the_answer_is_refused_with_the_mend():
    images, prompts = pictures(1)
    with pytest.raises(ValueError, match=r"tokenizer of .*pocket-llava has no token for the answer 'yes'; pass a ques"):
        VqaScore(model="pocket-llava")(images, prompts)


def test_a_prompt_is_needed_where_the_question_names_it():
    with pytest.raises(ValueError, match=r"vqa-score compares pictures with their prompts, but row 0 has the .* None"):
        VqaScore(model="pocket-llava")(pictures(1)[0], None)


def test_a_processor_without_a_chat_template_is_refused(speaker, tmp_path):
    release_models()
    folder = shutil.copytree(speaker, tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"a question needs a processor with a chat template; got LlavaProcessor"):
        VqaScore(model=folder)(*pictures(1))


def test_a_folder_of_another_kind_of_model_is_named():
    with pytest.raises(ValueError, match=r"pocket-clip: .*(cannot be read|chat template)"):
        VqaScore(model=pocket.path("pocket-clip"))(*pictures(1))
