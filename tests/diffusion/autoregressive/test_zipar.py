"""ZipAR: plain decoding where nothing is missing, laws by definition where something is, and the passes it says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Emu3Config, Emu3ForConditionalGeneration

import mmaccel
from diffusion.autoregressive import ZipAR
from diffusion.autoregressive.zipar import passes
from diffusion.autoregressive.zipar_loop import Front, filled
from mmaccel.checks import check
from tests.diffusion.autoregressive.test_jacobi import HEADS, MODELS, SIZES, WORDS, every_model, llama, wide
from tests.diffusion.autoregressive.zipar_reference import recorded, reference

ROWS, COLUMNS = 4, 5
PROMPTS = torch.tensor([[1, 2], [3, 4], [5, 5]])
every_way = pytest.mark.parametrize("adaptive", [False, True], ids=["fixed", "adaptive"])


def zipar(window=2, **settings):
    return ZipAR(**{"window": window, "row_length": COLUMNS, "adaptive": False, **settings})


def painted(model, prompts=PROMPTS, seed=0, **more):
    torch.manual_seed(seed)
    found = model.generate(inputs=prompts, **{"max_new_tokens": ROWS * COLUMNS, "do_sample": True, **more})
    assert torch.equal(found[:, :2], prompts)
    return found[:, 2:]


@every_model
@every_way
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_k": 5, "repetition_penalty": 1.5}, {"do_sample": False}],
    ids=["plain", "processed", "greedy"],
)
def test_a_window_of_a_whole_row_is_plain_decoding_with_the_same_seed(family, adaptive, settings):
    model = MODELS[family]()
    plain = painted(model, **settings)
    for window in (COLUMNS, 99):
        with mmaccel.applied(model, zipar(window, adaptive=adaptive)) as run:
            assert torch.equal(painted(model, **settings), plain)
        assert run.report["passes"] == ROWS * COLUMNS and run.report["missing"] == 0


@every_model
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize("end_of_row", [None, 7])
def test_every_tokens_law_is_that_of_what_it_sees(family, window, end_of_row, monkeypatch):
    model = MODELS[family]()
    laws = recorded(monkeypatch)
    with mmaccel.applied(model, zipar(window, end_of_row=end_of_row)):
        grid = painted(model)
        wanted = reference(model, PROMPTS, grid, COLUMNS, [window] * (ROWS - 1), end_of_row=end_of_row).softmax(-1)
    assert (torch.stack([laws[place] for place in range(ROWS * COLUMNS)], dim=1) - wanted).abs().max() < 1e-5


@every_model
def test_with_adaptive_windows_it_is_too(family, monkeypatch):
    model, widest = MODELS[family](), set()
    laws = recorded(monkeypatch)
    for seed, images in enumerate((1, 1, 1, 1, 3)):
        prompts = PROMPTS[:images]
        with mmaccel.applied(model, zipar(1, adaptive=True)) as run:
            grid = painted(model, prompts, seed)
            windows = run.report.facts["windows"]
            wanted = reference(model, prompts, grid, COLUMNS, windows, tested=True).softmax(-1)
        assert (torch.stack([laws[place] for place in range(ROWS * COLUMNS)], dim=1) - wanted).abs().max() < 1e-5
        assert run.report["passes"] == COLUMNS + sum(windows)
        widest.add(max(windows))
    assert max(widest) == COLUMNS and len(widest) > 1


@every_model
def test_what_is_missing_changes_laws_and_less_of_it_changes_them_less(family):
    model, found = MODELS[family](), []
    with mmaccel.applied(model, zipar()):
        grid = torch.randint(WORDS, (3, ROWS * COLUMNS), generator=torch.Generator().manual_seed(0))
        laws = [
            reference(model, PROMPTS, grid, COLUMNS, [window] * (ROWS - 1)).softmax(-1) for window in (1, 3, COLUMNS)
        ]
    found = [float((law - laws[-1]).abs().sum(-1).mean() / 2) for law in laws]
    assert found[0] > found[1] > 0.01


@given(rows=st.integers(1, 7), columns=st.integers(1, 9), window=st.integers(1, 12))
def test_a_front_reaches_the_end_in_as_many_passes_as_the_formula_says(rows, columns, window):
    front, count, order = Front(rows, columns), 1, [0]
    while not front.done:
        count += 1
        cells, row = front.unread(), front.opening(window)
        assert cells == sorted(cells)
        if row is not None:
            assert front.drawn[row - 1] >= min(window, columns)
            front.drawn[row] = 1
            order.append(row * columns)
        for place in cells:
            front.read[place // columns] += 1
            if (place + 1) % columns:
                front.drawn[place // columns] += 1
                order.append(place + 1)
    assert count == passes(rows, columns, window) and sorted(order) == list(range(rows * columns))


@every_model
def test_the_report_says_what_was_saved_and_what_was_missing(family):
    model, calls = MODELS[family](), []
    plain = painted(model)
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    with mmaccel.applied(model, zipar(2)) as run:
        del calls[:]
        first, count = painted(model), len(calls)
        assert torch.equal(painted(model), first)
    report = run.report
    assert report["passes"] == count == COLUMNS + 2 * (ROWS - 1) and report["tokens_a_pass"] == ROWS * COLUMNS / count
    assert report.facts == {"picture_rows": ROWS, "row_length": COLUMNS, "windows": [2] * (ROWS - 1)}
    drawn_in = [2 * row + column for row in range(ROWS) for column in range(COLUMNS)]
    pairs = [(drawn_in[before], now) for place, now in enumerate(drawn_in) for before in range(place)]
    assert report["missing"] == sum(before >= now for before, now in pairs) / len(pairs)
    handle.remove()
    assert torch.equal(painted(model), plain) and "generate" not in vars(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


@every_model
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 5}], ids=["plain", "processed"])
def test_a_batch_has_the_laws_of_its_rows(family, settings, monkeypatch):
    model, laws = MODELS[family](), recorded(monkeypatch)
    monkeypatch.setattr("diffusion.autoregressive.zipar_loop.drawn", lambda law: law.argmax(dim=-1))
    with mmaccel.applied(model, zipar(2)):
        together = painted(model, **settings)
        batch = torch.stack(list(laws.values()), dim=1)
        for row in range(3):
            assert torch.equal(painted(model, PROMPTS[row : row + 1], **settings)[0], together[row])
            assert (torch.stack(list(laws.values()), dim=1)[0] - batch[row]).abs().max() < 1e-5


def test_a_padded_prompt_has_the_laws_of_the_bare_one(monkeypatch):
    model, laws = llama(), recorded(monkeypatch)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), PROMPTS], dim=1)
    mask = (torch.arange(4) > 1).long().expand(3, -1)
    with mmaccel.applied(model, zipar(2)):
        torch.manual_seed(0)
        found = model.generate(inputs=padded, attention_mask=mask, max_new_tokens=ROWS * COLUMNS, do_sample=True)
        with_padding = torch.stack(list(laws.values()), dim=1)
        assert torch.equal(painted(model), found[:, 4:])
    assert (torch.stack(list(laws.values()), dim=1) - with_padding).abs().max() < 1e-5


@every_model
def test_guidance_goes_through_the_model_in_one_pass_and_means_what_it_means_to_transformers(family, monkeypatch):
    model, negative = MODELS[family](), torch.tensor([[6, 7]]).expand(3, -1)
    guided = {"guidance_scale": 2.5, "negative_prompt_ids": negative}
    plain, laws = painted(model, **guided, do_sample=False), recorded(monkeypatch)
    with mmaccel.applied(model, zipar(COLUMNS)):
        assert torch.equal(painted(model, **guided, do_sample=False), plain)
    with mmaccel.applied(model, zipar(2)) as run:
        grid = painted(model, **guided)
        told, untold = (
            reference(model, prompts, grid, COLUMNS, [2] * (ROWS - 1)).log_softmax(-1)
            for prompts in (PROMPTS, negative)
        )
    assert run.report["passes"] == passes(ROWS, COLUMNS, 2)
    wanted = (untold + 2.5 * (told - untold)).softmax(-1)
    assert (torch.stack([laws[place] for place in range(ROWS * COLUMNS)], dim=1) - wanted).abs().max() < 1e-5


def test_what_is_missing_is_filled_from_above():
    grid = torch.tensor([[1, 2, 3, 4, 5, 6, 0, 0, 7, 0, 0, 0]])
    assert filled(grid, torch.tensor([4, 2, 1]), None).tolist() == [[1, 2, 3, 4, 5, 6, 3, 4, 7, 6, 3, 4]]
    assert filled(grid, torch.tensor([4, 2, 1]), 9).tolist() == [[1, 2, 3, 4, 5, 6, 3, 9, 7, 6, 3, 9]]
    assert filled(grid, torch.tensor([3, 0, 0]), None).tolist() == [[1, 2, 3, 3] * 3]


def whole_emu3():
    """With its vision tower: the class that draws."""
    tower = {
        "codebook_size": 8, "embed_dim": 4, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1,
        "attn_resolutions": [], "hidden_size": 32, "num_attention_heads": 1, "temporal_downsample_factor": 1,
    }  # fmt: skip
    words = {f"<|visual token {number:06d}|>": number for number in range(8)}
    config = Emu3Config(text_config={**SIZES, **HEADS}, vq_config=tower, vocabulary_map={"<image>": 10, **words})
    model = wide(Emu3ForConditionalGeneration(config))
    model.generation_config.eos_token_id = None
    return model


def test_processors_that_read_places_see_every_place_before():
    """As Emu3's own, which asks where the row ends by how many tokens there are."""
    model, lengths = whole_emu3(), []

    def allowed(row, read):
        lengths.append(len(read) - 2)
        return [9] if (len(read) - 2) % COLUMNS == COLUMNS - 1 else list(range(9))

    plain = painted(model, prefix_allowed_tokens_fn=allowed)
    with mmaccel.applied(model, zipar(COLUMNS, end_of_row=9)):
        assert torch.equal(painted(model, prefix_allowed_tokens_fn=allowed), plain)
        del lengths[:]
        mmaccel.apply(model, zipar(2, end_of_row=9))
        grid = painted(model, prefix_allowed_tokens_fn=allowed).reshape(3, ROWS, COLUMNS)
    assert bool((grid[:, :, -1] == 9).all()) and bool((grid[:, :, :-1] < 9).all())
    assert set(lengths) >= set(range(ROWS * COLUMNS))


@every_model
def test_check_finds_every_law_kept(family):
    inputs = {"inputs": PROMPTS[:1], "max_new_tokens": ROWS * COLUMNS, "do_sample": True}
    report = check(MODELS[family](), zipar(2, adaptive=True), inputs=inputs)
    assert report.passed and len(report.laws) == 4, str(report)
