"""Models that tests decorate, and find plain again."""

import pytest

import mmaccel
from tests.vision_tokens.deep import build_deep
from tests.vision_tokens.tiny import build


def lent(model):
    yield model
    if "_mmaccel_attachment" in vars(model):
        mmaccel.remove(model)


@pytest.fixture
def llava():
    yield from lent(build("llava"))


@pytest.fixture
def deep():
    """LLaVA with a decoder deep enough to cut several times."""
    yield from lent(build_deep("llava"))
