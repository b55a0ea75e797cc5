"""Painters draw with models of both kinds, and show where tokens come from."""

import pytest
import torch

import mmaccel
from diffusion.autoregressive.origins import BONUS, KEPT, PLAIN, REDRAWN, SHOWN, coloured
from diffusion.autoregressive.painters import load_painter
from mmaccel.plots import COLOURS
from tests.diffusion.autoregressive import folders


@pytest.fixture(scope="module", params=["continuous", "discrete"])
def painter(request, tmp_path_factory):
    return load_painter(getattr(folders, request.param)(tmp_path_factory.mktemp(request.param)))


def test_a_picture_of_each_label_is_drawn_and_shown(painter):
    shown = painter.shown(painter.draw([1, 2], seed=0))
    assert shown.shape[:2] == (2, 3) and shown.min() >= 0 and shown.max() <= 1


def test_the_seed_decides_and_the_global_generator_is_left_alone(painter):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (painter.draw([1], seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_guidance_changes_the_picture(painter):
    labels = [0, 1, 2]
    assert not torch.equal(painter.draw(labels, 0, guidance=20.0), painter.draw(labels, 0))


def test_its_speculation_fits_its_model_and_names_every_token(painter):
    with mmaccel.applied(painter.model, painter.speculation) as run:
        painter.draw([0, 1], 0)
    origins = run.report.details["origins"]
    assert origins.shape == (2, 3, 3) and set(origins.flatten().tolist()) <= {PLAIN, KEPT, REDRAWN, BONUS}
    assert bool((origins != PLAIN).any())


def test_labels_are_names_or_numbers(tmp_path):
    painter = load_painter(folders.discrete(tmp_path))
    assert [painter.label(text) for text in ("a blue square", "White cross ", "0")] == [1, 2, 0]
    with pytest.raises(ValueError, match=r"draws the classes 0 to 2; got 'blue squares'; did you mean 'blue square'"):
        painter.label("blue squares")
    with pytest.raises(ValueError, match="draws the classes 0 to 2; got '3'"):
        painter.label("3")


def test_a_model_without_a_draft_draws_and_says_what_speculation_lacks(tmp_path):
    folders.continuous(tmp_path / "mar")
    (tmp_path / "mar" / "draft").rename(tmp_path / "elsewhere")
    painter = load_painter(tmp_path / "mar")
    assert painter.draw([0], 0).shape == (1, 2, 3, 3)
    with pytest.raises(FileNotFoundError, match="no folder `draft` with a small MARModel, which speculation needs"):
        _ = painter.speculation


def test_each_tokens_colour_lies_over_its_place():
    picture = coloured(torch.tensor([[[PLAIN, KEPT], [REDRAWN, BONUS]]]), torch.zeros(1, 3, 8, 8))[0]
    for row, column, kind in ((0, 0, PLAIN), (0, 7, KEPT), (7, 0, REDRAWN), (7, 7, BONUS)):
        wanted = torch.tensor(list(bytes.fromhex(SHOWN[kind][1][1:]))) / 255
        assert torch.allclose(picture[:, row, column], 0.65 * wanted)
    assert SHOWN[KEPT][1] == COLOURS[2]


def test_origins_of_discrete_tokens_say_what_the_passes_committed(tmp_path):
    """Every pass but those of single tokens ends with one token that no draft was."""
    from diffusion.autoregressive.jacobi import SpeculativeJacobi

    painter = load_painter(folders.discrete(tmp_path))
    for redraw in ("independent", "coupled", "gumbel"):
        with mmaccel.applied(painter.model, SpeculativeJacobi(window=4, redraw=redraw)) as run:
            painter.draw([0], 3)
        origins = run.report.details["origins"].flatten().tolist()
        assert len([kind for kind in origins if kind != KEPT]) == run.report["passes"]
        with mmaccel.applied(painter.model, SpeculativeJacobi(window=1, redraw=redraw)) as run:
            painter.draw([0], 3)
        assert set(run.report.details["origins"].flatten().tolist()) == {PLAIN}
