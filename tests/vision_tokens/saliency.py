"""What a method is shown of an encoder's attention, and what an outsider computes of it."""

import sys

import torch

import mmaccel
from vision_tokens import HiRED, ImageView

SEEN: list[ImageView] = []


class Watching(HiRED):
    """HiRED that shows what it was shown."""

    def select(self, view):
        SEEN.append(view)
        return super().select(view)


def watched(model, inputs):
    SEEN.clear()
    with mmaccel.applied(model, Watching(budget=0.5)), torch.no_grad():
        model(**inputs)
    return list(SEEN)


def eager_weights(model, module, inputs, monkeypatch):
    """The attention matrices of one module, as the eager kernel of its own file computes them."""
    found, own_file = [], sys.modules[type(module).__module__]
    eager = own_file.eager_attention_forward

    def catch(caller, *args, **kwargs):
        out = eager(caller, *args, **kwargs)
        if caller is module:
            found.append(out[1])
        return out

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(own_file, "eager_attention_forward", catch)
        model(**inputs)
    return found
