"""pocket-imagegpt's recipe: its codebook keeps what the judge reads, and its run writes a checkpoint that draws."""

import pytest
import torch
from transformers import AutoConfig, ImageGPTForCausalImageModeling

from diffusion.autoregressive import image_gpt_training as training
from diffusion.autoregressive.codebooks import Codebook
from mmaccel.pocket import train, world


@pytest.fixture
def small(monkeypatch):
    """A narrow model, a few pictures, and no figures."""
    from transformers import ImageGPTConfig

    config = ImageGPTConfig(
        vocab_size=training.ANY + 1, n_positions=training.PLACES, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3
    )
    monkeypatch.setattr(training, "make_model", lambda: ImageGPTForCausalImageModeling(config))
    monkeypatch.setattr(training, "CLUSTERED", 40)
    monkeypatch.setattr(training, "figures", lambda weights: {"right": 0.0})


def test_the_run_writes_a_checkpoint_that_draws_pictures_of_codes(small, tmp_path):
    weights = train.train("pocket-imagegpt", tmp_path, steps=2)
    assert AutoConfig.from_pretrained(weights).model_type == "imagegpt"
    model = ImageGPTForCausalImageModeling.from_pretrained(weights).eval()
    assert model.dtype == torch.float32
    tokens = model.generate(torch.cat([training.prompt(3), training.prompt(None)]))
    assert tokens.shape == (2, 1 + training.PLACES)
    assert int(tokens[:, 1:].max()) < training.CODES  # the words of labels are never drawn
    assert Codebook.from_pretrained(weights).decode(tokens[:, 1:]).shape == (2, 3, 32, 32)


def test_a_prompt_is_a_word_of_its_own():
    prompts = [int(training.prompt(label)) for label in (*range(len(training.LABELS)), None)]
    assert prompts == list(range(training.CODES, training.ANY + 1))


def test_the_codebook_keeps_what_the_judge_reads(small, monkeypatch):
    monkeypatch.setattr(training, "CLUSTERED", 200)
    book = Codebook(training.Run().clusters)
    pictures, labels = training.sample_pictures(world.train_rng(1), 32)
    drawn = ((book.decode(book.encode(pictures)) + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    for picture, label in zip(drawn.numpy(), labels, strict=True):
        assert [(thing.shape, thing.colour) for thing in world.parse(picture).things] == [training.LABELS[label]]


def test_the_recipes_model_has_the_size_that_it_says():
    assert training.make_model().num_parameters() == pytest.approx(2.8e6, rel=0.01)
