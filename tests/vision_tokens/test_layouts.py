"""Where each token comes from, and what each token is worth, by experiment: in every family, for images and videos."""

import inspect
import re

import pytest
import torch
from einops import reduce
from torch import nn

import mmaccel
from mmaccel import Unsupported
from tests.vision_tokens.saliency import eager_weights, watched
from tests.vision_tokens.tiny import FAMILIES, VIDEO_FAMILIES, Prompts, build, inputs_for, llava
from vision_tokens import HiRED, Layout, PooledTokens, VisionZip
from vision_tokens.families import find_host
from vision_tokens.families.facts import PIXELS
from vision_tokens.laws import language_input_laws

IMAGES = Prompts((((96, 70), (64, 96)),), (7,))
IMAGE = Prompts((((96, 70),),), (7,))
VIDEO = Prompts(((),), (7,), videos=((4,),))
PLACES = [pytest.param("image", family, prompts, id=f"{family}-{len(prompts.flat)}")
          for family in FAMILIES if family not in ("fast_vlm", "molmo2") for prompts in (IMAGE, IMAGES)]  # fmt: skip
PLACES += [
    pytest.param("video", family, VIDEO, id=f"{family}-video") for family in VIDEO_FAMILIES if family != "molmo2"
]


@pytest.mark.parametrize(("kind", "family", "prompts"), PLACES)
def test_each_token_comes_from_the_cell_that_its_layout_says(kind, family, prompts):
    """In an encoder whose blocks add nothing, other pixels under one cell change that cell's token and no other."""
    model = build.__wrapped__(family)
    host, inputs = find_host(model), inputs_for(family, prompts, model)
    silence(host.tower)
    described = host.family.packings[kind].layouts(host.multimodal, inputs)
    before, sizes = tokens_of(host, kind, inputs), [len(layout.source) for layout, _ in described]
    for number, (layout, _) in enumerate(described):
        for cell in range(0, layout.partitions * layout.cells, 5):
            moved = (tokens_of(host, kind, touched(host, kind, inputs, number, cell)) != before).any(dim=-1)
            of_images = moved.split_with_sizes(sizes)
            assert torch.equal(of_images[number], layout.source == cell)
            assert int(moved.sum()) == int((layout.source == cell).sum()) == int(layout.valid().flatten()[cell])


def silence(tower: nn.Module) -> None:
    """Makes every block of an encoder add nothing to what goes through it."""
    ends = r"(blocks|layers?)\.\d+\..*(out_proj|o_proj|projection_layer|attn\.proj|fc2|down_proj)\."
    silenced = [parameter for name, parameter in tower.named_parameters() if re.search(ends, name)]
    assert len(silenced) >= 6
    with torch.no_grad():
        for parameter in silenced:
            parameter.zero_()


def tokens_of(host, kind, inputs):
    encode = getattr(host.multimodal, f"get_{kind}_features")
    names = inspect.signature(encode).parameters
    with torch.no_grad():
        output = encode(**{name: inputs[name] for name in names if name in inputs}, return_dict=True)
    return torch.cat(list(output.pooler_output))


def touched(host, kind, inputs, number, cell):
    """The inputs, with other pixels under one cell of one image or video."""
    pixels = inputs[PIXELS[kind]].clone()
    given = {**inputs, PIXELS[kind]: pixels}
    layout, own = host.family.packings[kind].layouts(host.multimodal, given)[number]
    before = pixels.sum()
    if own.dim() == 2:  # Qwen's: one row of patches, four to a cell
        own[4 * cell : 4 * cell + 4] += 1
        return given
    partition, row, column = cell // layout.cells, cell % layout.cells // layout.width, cell % layout.width
    picture = own[partition] if own.dim() == 4 else own
    height, width = picture.shape[1] // layout.height, picture.shape[2] // layout.width
    picture[:, row * height : (row + 1) * height, column * width : (column + 1) * width] += 1
    if pixels.sum() == before:  # a copy, where pictures that fill up a batch were left out
        pixels[0, number] = own
    return given


# What a token is worth, from the full matrices of the eager kernel


def squares(attention, tokens, patches):
    factor = patches // tokens
    return reduce(attention, "... (r a c b) -> ... (r c)", "mean", r=tokens, a=factor, c=tokens, b=factor)


BY_HAND = {
    "internvl": lambda matrix: [one[None, :, 0, 1:] for one in matrix],
    "gemma3": lambda matrix: [one[None].mean(dim=2) for one in matrix],
}


@pytest.mark.parametrize("family", BY_HAND)
def test_saliency_of_squares_of_patches_is_their_mean(family, monkeypatch):
    model = build(family, "eager")
    inputs = inputs_for(family, IMAGES, model)
    views = watched(model, inputs)
    (matrix,) = eager_weights(model, find_host(model).attention_modules[-1], inputs, monkeypatch)
    for view, rows in zip(views, BY_HAND[family](matrix), strict=True):
        torch.testing.assert_close(view.attention["feature"], squares(rows, 3, 6), rtol=1e-5, atol=1e-7)


def test_saliency_of_images_in_one_row_of_patches_is_that_of_their_squares(monkeypatch):
    """Mistral 3: images of different grids, one of them with a column of patches too many for whole squares."""
    model = build("mistral3", "eager")
    inputs = inputs_for("mistral3", Prompts((((96, 72), (64, 96)),), (7,)), model)
    views = watched(model, inputs)
    (matrix,) = eager_weights(model, find_host(model).attention_modules[-1], inputs, monkeypatch)
    start = 0
    for view, (height, width) in zip(views, ((12, 9), (8, 12)), strict=True):
        own = slice(start, start + height * width)  # no patch sees those of another image
        grid = matrix[0][:, own, own].mean(dim=1).view(4, height, width)[:, :, : width // 2 * 2]
        by_hand = reduce(grid, "heads (r a) (c b) -> heads (r c)", "mean", a=2, b=2)
        torch.testing.assert_close(view.attention["feature"][0], by_hand, rtol=1e-5, atol=1e-7)
        start += height * width


@pytest.mark.parametrize("family", ["llava_onevision", "llava_next_video", "qwen3_vl"])
def test_saliency_of_a_video_is_that_of_its_frames(family, monkeypatch):
    model = build(family, "eager")
    inputs = inputs_for(family, VIDEO, model)
    (view,) = watched(model, inputs)
    modules = find_host(model).attention_modules
    matrices = eager_weights(model, modules[-2 if family == "llava_next_video" else -1], inputs, monkeypatch)
    if family == "qwen3_vl":
        frames = torch.cat(matrices).mean(dim=2)  # one call a frame
        by_hand = reduce(frames, "frames heads (cells patches) -> frames heads cells", "mean", patches=4)
    elif family == "llava_onevision":
        by_hand = squares(matrices[0].mean(dim=2), 3, 6)
    else:
        by_hand = squares(matrices[0][:, :, 0, 1:], 3, 6)
    torch.testing.assert_close(view.attention["feature"], by_hand, rtol=1e-5, atol=1e-7)


def test_molmo_s_tokens_stand_on_two_grids_and_are_worth_the_mean_of_the_patches_they_pool(monkeypatch):
    model = build("molmo2", "eager")
    inputs = inputs_for("molmo2", IMAGES, model)
    views = watched(model, inputs)
    (matrix,) = eager_weights(model, find_host(model).attention_modules[-1], inputs, monkeypatch)
    got = matrix.mean(dim=2).movedim(0, 1).flatten(1)  # [heads, patches of all crops]
    pooling = inputs["image_token_pooling"]
    for view, own in zip(views, pooling.split(15), strict=True):
        assert view.layout.tiles == (1, 1) and view.layout.valid().sum(dim=-1).tolist() == [9, 6]
        assert view.layout.source.tolist() == [*range(9), 9, 10, 12, 13, 15, 16]
        by_hand = torch.stack([got[:, patches[patches >= 0]].mean(dim=-1) for patches in own], dim=-1)
        attention = view.attention["feature"].movedim(0, 1).flatten(1)
        torch.testing.assert_close(attention[:, view.layout.source], by_hand, rtol=1e-5, atol=1e-7)
        assert (view.attention["feature"].movedim(1, 2)[~view.layout.valid()] == 0).all()


# Videos: each frame is a partition


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_a_budget_is_shared_by_a_video_s_frames_and_the_report_counts_them(family):
    model = build(family)
    images = ((), ()) if family == "molmo2" else (((96, 70),), ())  # which reads images or videos
    prompts = Prompts(images, (7, 9), videos=((4,), (4,)))
    with mmaccel.applied(model, HiRED(budget=0.5)) as run, torch.no_grad():
        model(**inputs_for(family, prompts, model))
        frames = 2 if "qwen" in family else 4
        assert [run.report[name] for name in ("images", "videos", "frames")] == [len(images[0]), 2, 2 * frames]
        for layout, cells in list(zip(run.report.details["layouts"], run.report.details["cells"], strict=True))[-2:]:
            assert layout.partitions == frames
            kept = cells.sum(dim=-1)
            assert int(kept.sum()) == frames * layout.cells // 2 and int(kept.max() - kept.min()) <= 1


def test_the_newline_of_a_video_stays_with_any_of_its_tokens():
    layout = Layout(torch.tensor([*range(8), -1]), 2, 2, 2)
    first = torch.zeros(2, 4, dtype=torch.bool)
    assert layout.tokens_of(first).sum() == 0
    first[0, 1] = True
    assert layout.tokens_of(first).nonzero().flatten().tolist() == [1, 8]


def test_video_input_of_a_family_that_reads_none_is_refused():
    model = build("llava")
    inputs = inputs_for("llava", Prompts(), model)
    with mmaccel.applied(model, HiRED()), pytest.raises(Unsupported, match="video input of this family is not supp"):
        model.model(input_ids=inputs["input_ids"], pixel_values_videos=inputs["pixel_values"])


# LLaVA-OneVision's planes of tiles, interpolated


@pytest.fixture(scope="module")
def blending():
    torch.manual_seed(0)
    model = llava.llava_onevision("sdpa", "anyres_max_1").eval()
    model.generation_config.eos_token_id = None
    return model


def test_a_token_of_an_interpolated_plane_comes_from_the_cell_under_its_middle(blending):
    inputs = inputs_for("llava_onevision", Prompts((((96, 96),),), (7,)), blending)
    ((layout, _),) = find_host(blending).family.image.layouts(blending.model, inputs)
    assert layout.blended and layout.tiles == (2, 2) and len(layout.source) == 36 + 6 * 7
    plane = layout.source[36:].view(6, 7)
    assert (plane[:, -1] == -1).all()
    for row in range(6):  # 12 x 12 cells become 6 x 6: the middles lie between cells, and the even one is taken
        for column in range(6):
            y, x = (round(2 * place + 0.5) for place in (row, column))
            assert int(plane[row, column]) == (1 + y // 6 * 2 + x // 6) * 36 + y % 6 * 6 + x % 6


def test_selecting_holds_the_laws_on_an_interpolated_plane_and_merging_refuses_it(blending):
    inputs = inputs_for("llava_onevision", Prompts((((96, 96),),), (7,)), blending)
    laws = list(language_input_laws(blending, HiRED(budget=0.3), inputs, 4))
    assert all(law.passed for law in laws), "\n".join(map(str, laws))
    for method in (PooledTokens(), VisionZip()):
        with (
            mmaccel.applied(blending, method),
            pytest.raises(Unsupported, match=r"makes tokens of such an image across its"),
        ):
            blending(**inputs)
