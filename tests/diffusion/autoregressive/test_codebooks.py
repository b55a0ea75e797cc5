"""Codebooks: pictures become tokens and come back, also from the files that ImageGPT's checkpoints have."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ImageGPTImageProcessor

from diffusion.autoregressive.codebooks import Codebook, clustered


def random(codes, patch):
    return Codebook(torch.rand(codes, 3 * patch**2, generator=torch.Generator().manual_seed(0)) * 2 - 1)


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_a_picture_made_of_clusters_comes_back_exactly(patch):
    book, tokens = random(9, patch), torch.randint(9, (2, 16))
    pictures = book.decode(tokens)
    assert pictures.shape == (2, 3, 4 * patch, 4 * patch)
    assert torch.equal(book.encode(pictures), tokens)


def test_a_token_is_the_patch_at_its_place():
    book = random(5, 2)
    picture = book.decode(torch.tensor([[0, 1, 2, 3]]))[0]
    assert torch.equal(picture[:, 2:, :2].permute(1, 2, 0).flatten(), book.clusters[2])


def test_a_codebook_comes_back_from_its_folder_to_four_digits(tmp_path):
    book = random(5, 2)
    book.save(tmp_path)
    assert torch.allclose(Codebook.from_pretrained(tmp_path).clusters, book.clusters, atol=5e-5)


def test_clusters_of_image_gpts_own_processor_are_read_and_mean_what_they_mean_there(tmp_path):
    colours = np.random.default_rng(0).uniform(-1, 1, (8, 3)).round(4)
    processor = ImageGPTImageProcessor(clusters=colours.tolist(), size={"height": 4, "width": 4})
    processor.save_pretrained(tmp_path)
    picture = np.random.default_rng(1).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(picture), return_tensors="pt")["input_ids"]
    ours = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(Codebook.from_pretrained(tmp_path).encode(ours), theirs)


def test_k_means_finds_the_patches_that_there_are():
    book = random(4, 2)
    tokens = torch.randint(4, (3, 64), generator=torch.Generator().manual_seed(1))
    found = clustered(book.decode(tokens), 4, 2, seed=0)
    assert torch.allclose(found.decode(found.encode(book.decode(tokens))), book.decode(tokens), atol=1e-6)


def test_what_is_no_codebook_or_no_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a square of pixels, so 3, 12, 27, \.\.\. numbers; got 6"):
        Codebook(torch.zeros(4, 6))
    with pytest.raises(FileNotFoundError, match=r"has no `clusters`, .* save them there with Codebook.save"):
        Codebook.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"clusters": None}))
    with pytest.raises(FileNotFoundError, match="has no `clusters`"):
        Codebook.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a square picture row by row; got 15 a picture"):
        random(4, 1).decode(torch.zeros(1, 15, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the codebook has 4 tokens; got token 4\. Leave the prompt away"):
        random(4, 1).decode(torch.full((1, 4), 4))
