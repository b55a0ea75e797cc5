"""CLIP score, encoders, preprocessing on tensors, and aesthetic heads."""

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    BitImageProcessorPil,
    CLIPModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from diffusion.rewards import Aesthetic, ClipScore, SubjectConsistency, release_models
from diffusion.rewards.encoders import REMEMBERED, Encoder
from diffusion.rewards.preprocessing import Preprocessing
from mmaccel import checkpoints, pocket
from tests.diffusion.reward_inputs import moving, pictures

LEVEL = 1 / 255
CPU = torch.device("cpu")


def processed(processor, images):
    """What the real processor makes of pictures, undone to 0..1."""
    files = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    pixels = processor(images=files, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    return pixels * std + mean


@pytest.mark.parametrize("pixels", [32, 96, 100, 128, (48, 80), (130, 70), (67, 45), (201, 99)])
def test_preprocessing_equals_the_checkpoints_processor_to_two_levels(pixels):
    processor = AutoImageProcessor.from_pretrained(pocket.path("pocket-clip"))
    scenes, _ = pictures(3, pixels)
    noise = torch.randint(0, 256, scenes.shape, generator=torch.Generator().manual_seed(0)) / 255
    if not isinstance(pixels, int):
        noise = 0.25 + 0.5 * noise  # no overshoot: Pillow chooses which pass is clipped first
    preprocess = Preprocessing.of(processor)
    for images in (scenes, (noise * 255).round() / 255):
        ours = preprocess(images) * 0.25 + 0.2
        difference = (ours - processed(processor, images)).abs()
        assert difference.max() <= (1e-5 if pixels == 96 else 2 * LEVEL)
        assert difference.mean() <= 0.5 * LEVEL


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 40, "width": 48}, resample=2),
        BitImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 48, "width": 40}, resample=3),
        BitImageProcessorPil(size={"shortest_edge": 33}, crop_size={"height": 32, "width": 32}, resample=2),
    ],
)
def test_preprocessing_serves_the_processors_of_dino_too(processor):
    images, _ = pictures(2, (70, 90))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    ours = Preprocessing.of(processor)(images) * std + mean
    assert (ours - processed(processor, images)).abs().max() <= 2 * LEVEL


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 1},
        {"size": {"shortest_edge": 40, "longest_edge": 80}},
        {"crop_size": {"height": 80, "width": 80}},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
    ],
)
def test_a_processor_that_does_something_else_is_refused(settings):
    with pytest.raises(ValueError, match=r"BitImageProcessorPil does what is not supported here. Supported: a resi"):
        Preprocessing.of(
            BitImageProcessorPil(**{"size": {"shortest_edge": 64}, "crop_size": {"height": 48, "width": 48}} | settings)
        )


def test_clip_score_is_the_cosine_that_transformers_computes():
    images, prompts = pictures(4, 96)
    folder = pocket.path("pocket-clip")
    processor, model = AutoProcessor.from_pretrained(folder), CLIPModel.from_pretrained(folder, dtype=torch.float32)
    files = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        out = model(**processor(images=files, text=prompts, padding=True, return_tensors="pt"))
    expected = (out.image_embeds * out.text_embeds).sum(dim=-1)
    assert torch.allclose(ClipScore()(images, prompts), expected, atol=1e-5)


def test_at_32_pixels_the_score_differs_from_the_processors_by_less_than_a_hundredth():
    images, prompts = pictures(8, 32)
    processor = AutoImageProcessor.from_pretrained(pocket.path("pocket-clip"))
    assert (ClipScore()(images, prompts) - ClipScore()(processed(processor, images), prompts)).abs().max() < 0.01


@pytest.mark.parametrize("reward", [ClipScore(), SubjectConsistency()], ids=lambda reward: reward.name)
def test_a_batch_equals_its_rows_in_any_order(reward):
    images, prompts = pictures(5) if reward.name == "clip-score" else moving(5)
    together = reward(images, prompts)
    alone = torch.cat([reward(images[row : row + 1], prompts[row : row + 1]) for row in range(5)])
    order = [3, 0, 4, 2, 1]
    assert together.shape == (5,) and torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(reward(images[order], [prompts[row] for row in order]), together[order], atol=1e-5)


def test_pocket_clip_prefers_the_right_caption():
    images, prompts = pictures(32, 96)
    right = ClipScore()(images, prompts)
    wrong = ClipScore()(images, prompts[1:] + prompts[:1])
    assert (right > wrong).float().mean() > 0.9 and right.abs().max() <= 1 + 1e-5


def test_the_number_of_pictures_may_exceed_what_the_encoder_sees_at_a_time():
    images, prompts = pictures(3)
    many = ClipScore()(images.repeat(30, 1, 1, 1), prompts * 30)
    assert torch.allclose(many, ClipScore()(images, prompts).repeat(30), atol=1e-5)


def test_prompts_are_encoded_once_and_long_ones_are_cut():
    encoder = Encoder(pocket.path("pocket-clip"), CPU)
    rows = []
    encoder.model.text_model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    first = encoder.texts(["a red square", "a blue circle", "a red square"])
    second = encoder.texts(["a blue circle", "a red square"])
    assert rows == [2] and torch.equal(first[[1, 0]], second)
    assert encoder.texts(["a red square " * 40]).isfinite().all()
    encoder._texts |= {str(number): first[0] for number in range(2 * REMEMBERED)}
    encoder.texts(["two crosses"])
    assert len(encoder._texts) == REMEMBERED and "two crosses" in encoder._texts


def test_a_model_is_loaded_at_the_first_call_once_for_all_rewards_and_threads(monkeypatch):
    release_models()
    loads = []
    real = checkpoints.load_weights
    monkeypatch.setattr(
        "diffusion.rewards.encoders.load_weights", lambda *args, **kwargs: loads.append(args) or real(*args, **kwargs)
    )
    images, prompts = pictures(2)
    reward = ClipScore()
    assert not loads
    threads = [threading.Thread(target=reward, args=(images, prompts)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ClipScore(model=pocket.path("pocket-clip"))(images, prompts)
    SubjectConsistency()(images[None], ["a"])
    assert len(loads) == 1
    assert release_models() == 1 and release_models() == 0


# Other encoders


def save_vit(folder, images=ViTImageProcessorPil, pooler=True):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    images(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_subject_consistency_reads_a_vits_class_token_even_without_a_pooler(tmp_path):
    videos, prompts = moving()
    folder = save_vit(tmp_path, pooler=False)
    model, preprocess = ViTModel.from_pretrained(folder, add_pooling_layer=False), Encoder(folder, CPU).preprocess
    with torch.no_grad():
        tokens = [model(pixel_values=preprocess(video)).last_hidden_state[:, 0] for video in videos]
    features = nn.functional.normalize(torch.stack(tokens), dim=-1)
    cosine = [
        [
            (float(row[frame] @ row[frame - 1]) + float(row[frame] @ row[0])) / 2
            for frame in range(1, videos.shape[1])
        ]
        for row in features
    ]  # fmt: skip
    expected = torch.tensor(cosine).mean(dim=1)
    assert torch.allclose(SubjectConsistency(model=folder)(videos, prompts), expected, atol=1e-5)


# What is wrong with a checkpoint


def test_a_missing_checkpoint_is_named(tmp_path):
    images, prompts = pictures(1)
    with pytest.raises(FileNotFoundError, match=r"clip-score: there is no checkpoint folder 'poket-clip'.*snapshot_"):
        ClipScore(model="poket-clip")(images, prompts)
    with pytest.raises(FileNotFoundError, match=r"did you mean 'pocket-clip'\?"):
        ClipScore(model="poket-clip")(images, prompts)
    with pytest.raises(FileNotFoundError, match=r"holds no config.json; give the folder that model.save_pretrained"):
        ClipScore(model=tmp_path)(images, prompts)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json names no model_type; copy the folder again"):
        ClipScore(model=tmp_path)(images, prompts)
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match=r"checkpoints of the family 'clip'; .* is 'siglip'. For SigLIP .* open-clip"):
        ClipScore(model=tmp_path)(images, prompts)


def test_broken_weights_are_named(tmp_path):
    videos, prompts = moving(1)
    folder = save_vit(tmp_path)
    weights = folder / "model.safetensors"
    from safetensors.torch import load_file

    whole = load_file(weights)
    save_file({key: value for key, value in whole.items() if "layernorm.weight" not in key}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"weights are missing, e.g. layernorm.weight, and would be random; copy"):
        SubjectConsistency(model=folder)(videos, prompts)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the weights cannot be read \(.*\); copy the folder again"):
        SubjectConsistency(model=folder)(videos, prompts)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"holds no .safetensors file, and other formats are not read; save"):
        SubjectConsistency(model=folder)(videos, prompts)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"its processor cannot be read \(.*save it there with processor.save_pr"):
        SubjectConsistency(model=folder)(videos, prompts)


def test_a_prompt_is_needed():
    images, _ = pictures(2)
    with pytest.raises(ValueError, match=r"clip-score compares pictures with their prompts, but row 0 has .*or use "):
        ClipScore()(images, None)


# Aesthetic heads


def chain(*widths: int) -> nn.Sequential:
    """LAION's MLP: linear layers with dropout after the first three."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        layers += [nn.Linear(before, after), *([nn.Dropout(0.2)] if number < 3 else [])]
    return nn.Sequential(*layers).eval()


def test_aesthetic_is_the_head_on_the_clip_embedding(tmp_path):
    images, _ = pictures(4)
    features = Encoder(pocket.path("pocket-clip"), CPU).images(images).detach()
    mlp, linear = chain(96, 32, 16, 8, 4, 1), nn.Linear(96, 1)
    save_file({f"layers.{key}": value for key, value in mlp.state_dict().items()}, tmp_path / "mlp.safetensors")
    save_file(linear.state_dict(), tmp_path / "linear.safetensors")
    for head, file in ((mlp, "mlp.safetensors"), (linear, "linear.safetensors")):
        reward = Aesthetic(model="pocket-clip", head=tmp_path / file)
        assert torch.allclose(reward(images, None), head(features).squeeze(-1).detach(), atol=1e-5)
        assert torch.allclose(reward(images.flip(0), None), reward(images, None).flip(0), atol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": (1, 96)}, r"holds weight; expected `weight` and `bias`, or `layers.N.weight` and `layers.N.bias`"),
        ({"weight": (1, 768), "bias": (1,)}, r"have the shapes \[\[1, 768\]\]; expected a chain .* 96 channels to 1"),
        ({"weight": (2, 96), "bias": (2,)}, r"have the shapes \[\[2, 96\]\]; expected a chain"),
        (
            {"layers.0.weight": (8, 96), "layers.0.bias": (8,), "layers.2.weight": (1, 7), "layers.2.bias": (1,)},
            r"have the shapes \[\[8, 96\], \[1, 7\]\]; .*Give the CLIP checkpoint that the head was trained on",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(tmp_path, weights, message):
    save_file({key: torch.zeros(shape) for key, shape in weights.items()}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=message):
        Aesthetic(model="pocket-clip", head=tmp_path / "head.safetensors")(pictures(1)[0], None)


def test_a_head_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"aesthetic: there is no file '.*'; give a safetensors file with"):
        Aesthetic(model="pocket-clip", head=tmp_path / "none.safetensors")(pictures(1)[0], None)
    torch.save(nn.Linear(96, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"cannot be read as safetensors .*; convert a .pth once with safetensors"):
        Aesthetic(model="pocket-clip", head=tmp_path / "head.pth")(pictures(1)[0], None)


def test_the_embedding_of_a_picture_is_a_unit_vector():
    images, _ = pictures(3)
    features = Encoder(pocket.path("pocket-clip"), CPU).images(images)
    assert np.allclose(features.norm(dim=-1), 1, atol=1e-5)
