"""Checkpoints of tiny models as painters read them: a model with its draft, and one with its codebook."""

import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from diffusion.autoregressive.codebooks import Codebook
from tests.diffusion.autoregressive.tiny import near, tiny

CODES, CLASSES, SIDE = 6, 3, 3


def continuous(folder, distance=0.02, **settings):
    """A `MARModel` of ten classes, some with names, and its draft."""
    model = tiny(**settings)
    model.config.id2label = {number: f"thing {number}" for number in range(10)}
    model.save_pretrained(folder)
    near(model, distance).save_pretrained(folder / "draft")
    return folder


def discrete(folder):
    """An ImageGPT of nine tokens a picture and three classes."""
    torch.manual_seed(0)
    config = ImageGPTConfig(
        vocab_size=CODES + CLASSES + 1, n_positions=SIDE**2, n_embd=16, n_layer=2, n_head=2, initializer_range=0.4,
        id2label={0: "red circle", 1: "blue square", 2: "white cross"},
    )  # fmt: skip
    model = ImageGPTForCausalImageModeling(config)
    settings = model.generation_config
    settings.do_sample, settings.max_new_tokens, settings.top_k = True, SIDE**2, 0
    settings.suppress_tokens = list(range(CODES, CODES + CLASSES))
    model.save_pretrained(folder)
    Codebook(torch.rand(CODES, 12) * 2 - 1).save(folder)
    return folder
