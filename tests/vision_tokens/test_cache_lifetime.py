"""A cache behind a cut lives exactly as long as its user holds it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

import mmaccel
from tests.vision_tokens.tiny import Prompts, build, inputs_for
from vision_tokens import HiRED
from vision_tokens.kept_columns import KeptColumns


@pytest.fixture
def cache() -> DynamicCache:
    model = build("llava_next")
    with mmaccel.applied(model, HiRED(budget=0.2)), torch.no_grad():
        output = model.generate(
            **inputs_for("llava_next", Prompts(), model),
            max_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
        )
    found = output.past_key_values
    assert isinstance(found, DynamicCache)
    return found


def test_a_cache_is_freed_as_soon_as_nobody_holds_it() -> None:
    model = build("llava_next")
    inputs = inputs_for("llava_next", Prompts(), model)
    with mmaccel.applied(model, HiRED(budget=0.2)), torch.no_grad():
        gc.collect()
        gc.disable()
        try:
            output = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
            keys = weakref.ref(output.past_key_values.layers[0].keys)
            del output
            assert keys() is None
        finally:
            gc.enable()


def test_a_copied_cache_keeps_its_own_account(cache: DynamicCache) -> None:
    twin = copy.deepcopy(cache)
    held = cache.layers[0].keys.shape[2]
    assert twin.get_seq_length() == cache.get_seq_length() > held
    twin.crop(-1)
    assert twin.get_seq_length() == cache.get_seq_length() - 1


def test_what_was_dropped_from_a_cache_cannot_be_cropped(cache: DynamicCache) -> None:
    with pytest.raises(ValueError, match=r"only the \d+ tokens behind the last dropped one can be cropped.*got -90"):
        cache.crop(-90)


def test_columns_that_follow_one_to_one_are_trimmed():
    index = torch.tensor([[0, 1, 4, 7, 8, 9], [-1, 2, 3, 7, 8, 9]])
    trimmed = KeptColumns(index, seen=10, padded=True).trimmed()
    assert torch.equal(trimmed.index, index[:, :3]) and trimmed.seen == 7
    assert torch.equal(trimmed.extended(6), index)
