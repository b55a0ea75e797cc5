"""Drawings of kept tokens: kept cells show the picture, dropped ones are dimmed, and places are right."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vision_tokens.layout import Layout
from vision_tokens.overlay import DIM, GAP, SIDE, Panel, draw_cells, draw_layouts, encoder_pictures, sheet, stacked

CELL = 12
COLOUR = (200, 100, 40)


def middles(drawn: Image.Image, height: int, width: int) -> np.ndarray:
    """The colour in the middle of every cell, where no line is: [height, width, 3]."""
    pixels = np.asarray(drawn).astype(int)
    return pixels[
        drawn.height // height // 2 :: drawn.height // height, drawn.width // width // 2 :: drawn.width // width
    ]


def plain(colour: tuple[int, int, int] = COLOUR, size: tuple[int, int] = (96, 96)) -> Image.Image:
    return Image.new("RGB", size, colour)


@given(height=st.integers(1, 8), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_kept_cells_show_the_picture_and_dropped_ones_are_dim(height, width, seed):
    keep = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = middles(draw_cells(plain(), keep, side=CELL * max(height, width)), height, width)
    assert (found[keep.numpy()] == COLOUR).all()
    assert (np.abs(found[~keep.numpy()] - np.array(COLOUR) * DIM) <= 1).all()


def test_cells_that_never_reach_the_model_are_black():
    valid = torch.tensor([[True, False], [True, True]])
    found = middles(draw_cells(plain(), valid & torch.eye(2).bool(), valid, side=40), 2, 2)
    assert (found[0, 1] == 0).all()
    assert (found[0, 0] == COLOUR).all()


def test_where_everything_stays_nothing_is_outlined():
    whole = torch.ones(4, 4, dtype=torch.bool)
    drawn = draw_cells(plain(), whole, whole, side=48)
    assert drawn.getpixel((0, 0)) == COLOUR


def test_a_mosaic_puts_every_tile_at_its_place():
    layout = Layout(torch.arange(5 * 4), 5, 2, 2, tiles=(2, 2))
    colours = [(10, 20, 30), (250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]
    drawn = draw_layouts([layout], [torch.ones(5, 4, dtype=torch.bool)], [plain(colour) for colour in colours])
    inner, tile = SIDE // 2 // 4, SIDE // 2 + 2
    assert drawn.getpixel((inner, inner)) == colours[0]
    left = SIDE + 2 + GAP + inner  # the cell is as wide as the mosaic with its gap of 2
    for number, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)], 1):
        assert drawn.getpixel((left + column * tile, inner + row * tile)) == colours[number]


def test_several_layouts_of_one_image_are_drawn_in_rows():
    layouts = [Layout(torch.arange(4), 1, 2, 2) for _ in range(3)]
    drawn = draw_layouts(layouts, [layout.valid() for layout in layouts], [plain()] * 3)
    assert drawn.size == (SIDE + 2, SIDE + 2)


def test_a_picture_for_each_partition_is_required():
    layout = Layout(torch.arange(4), 1, 2, 2)
    with pytest.raises(ValueError, match=r"have 1 partitions, one picture each; got 2 pictures"):
        draw_layouts([layout], [layout.valid()], [plain(), plain()])


class Normalising:
    image_mean, image_std = [0.2, 0.3, 0.4], [0.25, 0.5, 0.5]


def test_what_the_encoder_saw_is_read_back_from_its_input():
    seen = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    mean, spread = np.array(Normalising.image_mean), np.array(Normalising.image_std)
    pixels = torch.from_numpy((seen / 255 - mean) / spread).movedim(-1, 1)[None]
    back = encoder_pictures(Normalising(), pixels, plain(), 3)
    assert all((np.asarray(one) == other).all() for one, other in zip(back, seen, strict=True))


def test_an_input_of_patches_is_drawn_on_the_picture_itself():
    picture = plain()
    assert encoder_pictures(Normalising(), torch.zeros(64, 1176), picture, 1) == [picture]


def test_sheets_hold_all_panels():
    one = sheet("a question", [Panel(plain(), "dense\nred"), Panel(plain(size=(300, 50)), "other")])
    assert one.width >= 96 + 300
    many = sheet("a question", [Panel(plain(size=(600, 60)), "one")] * 3)
    assert 2 * 600 < many.width < 3 * 600
    assert stacked([one, one]).height == 2 * one.height
