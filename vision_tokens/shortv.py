"""ShortV and NAAViT: in some decoder layers, visual tokens do not query; text attends to them as ever.

Sources: Yuan et al., "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective
Layers", ICCV 2025 (arXiv:2504.00502), sections 3 and 4; Yuan et al., "SAISA: Towards Multimodal Large Language Models
with Both Training and Inference Efficiency" (arXiv:2502.02458), section 3, whose pilot NAAViT keeps the FFN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor

from mmaccel.methods import Unsupported
from vision_tokens.families import find_host
from vision_tokens.freezing import Freezer
from vision_tokens.visual_method import VisualMethod

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from mmaccel.checks import LawResult

LLAVA_7B = (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)
LLAVA_13B = (39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17)
NEXT_7B = (31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2)
NEXT_13B = (39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17)


@dataclass(frozen=True, kw_only=True)
class ShortV(VisualMethod):
    """Let visual tokens rest in the layers that hardly need them: there they attend to nothing and stay as they are.

    budget: the share of the decoder's layers in which visual tokens still work; None freezes all that `layers` names,
        or, if it names none, leaves them 40 % of the layers, about what the paper does.
    layers: which layers to freeze, the first one first: from a preset, or `ShortV.calibrated` on your model.  None
        begins with the deepest, as all published orders nearly do; that rule is ours.
    ffn: whether visual tokens pass the FFN of a frozen layer nevertheless.  With all layers frozen this is NAAViT,
        which its authors fine-tune: without training it is a limit, and no recommendation.

    Only the reading of a prompt gets cheaper: the cache holds every token, and decoding is the model's own.  Padding
    rests too.
    """

    name: ClassVar[str] = "shortv"
    stages: ClassVar[tuple[str, ...]] = ("decoder",)
    beside: ClassVar[tuple[str, ...]] = ("decoder",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-1.5-7b": {"layers": LLAVA_7B},
        "llava-1.5-13b": {"layers": LLAVA_13B},
        "llava-next-7b": {"layers": NEXT_7B},
        "llava-next-13b": {"layers": NEXT_13B},
        "naavit-7b": {"layers": tuple(range(32)), "ffn": True},
    }

    budget: float | None = None
    layers: tuple[int, ...] | None = None
    ffn: bool = False

    def __post_init__(self) -> None:
        if self.budget is not None and (not isinstance(self.budget, float) or not 0 <= self.budget <= 1):
            raise ValueError(
                f"the share of layers in which visual tokens work lies in [0, 1]; got {self.budget!r}. For all of them "
                "say 1.0"
            )
        if self.layers is not None and (len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0):
            raise ValueError(f"shortv's layers are numbers from 0 up, each once; got {self.layers!r}")

    def frozen(self, layers: int) -> list[int]:
        """The layers to freeze in a decoder of so many, ascending.

        Raises `Unsupported` if it has not all those layers, or the budget needs more than are named.
        """
        order = self.layers if self.layers is not None else tuple(reversed(range(layers)))
        if max(order, default=0) >= layers:
            raise Unsupported(f"shortv freezes layer {max(order)}, and this decoder has the layers 0..{layers - 1}")
        budget = 0.4 if self.budget is None and self.layers is None else self.budget
        count = len(order) if budget is None else round((1 - budget) * layers)
        if count > len(order):
            raise Unsupported(
                f"a budget of {budget:.3g} freezes {count} of {layers} layers, and only {len(order)} are named; raise "
                f"it to {1 - len(order) / layers:.3g}, or calibrate an order of all layers"
            )
        return sorted(order[:count])

    def with_budget(self, budget: float) -> Self:
        """The same method with another share of layers."""
        return dataclasses.replace(self, budget=budget)

    def attach(self, target: Any, attachment: Attachment) -> None:
        Freezer(self, find_host(target), attachment).attach()

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from vision_tokens.freezing_laws import freezing_laws

        yield from freezing_laws(target, self, inputs)

    @classmethod
    def calibrated(cls, model: Any, samples: Iterable[Mapping[str, Any]], **settings: Any) -> Self:
        """The method with the model's layers in ascending order of what freezing each costs in these prompts."""
        order = torch.tensor(layer_contributions(model, samples, **settings)).argsort(stable=True)
        return cls(layers=tuple(order.tolist()), **{"budget": 0.4, **settings})


def layer_contributions(model: Any, samples: Iterable[Mapping[str, Any]], ffn: bool = False, **_: Any) -> list[float]:
    """By layer, how much the next token's distribution changes if visual tokens are frozen in that layer alone.

    The mean over the samples, arguments of the model's call, of each row's `divergence`; 0 for the last layer, whose
    visual tokens nobody reads.  Raises ValueError without samples.
    """
    from mmaccel.api import applied

    layers, found = len(find_host(model).decoder_layers), []
    for inputs in samples:
        with torch.no_grad():
            plain = model(**inputs, logits_to_keep=1).logits[:, -1]
            changed = []
            for layer in range(layers):
                with applied(model, ShortV(layers=(layer,), ffn=ffn)):
                    changed.append(divergence(model(**inputs, logits_to_keep=1).logits[:, -1], plain))
        found.append(torch.stack(changed).mean(dim=-1))
    if not found:
        raise ValueError("a calibration needs at least one prompt; pass samples=[{'input_ids': ..., ...}]")
    means: list[float] = torch.stack(found).mean(dim=0).tolist()
    return means


def divergence(
    frozen: Float[Tensor, "batch vocabulary"], plain: Float[Tensor, "batch vocabulary"]
) -> Float[Tensor, " batch"]:
    """KL(frozen || plain) of the distributions behind these logits, in nats; ShortV's LC, section 3.2.

    The paper writes it the other way round; this is what the released code computes.
    """
    ours, theirs = frozen.float().log_softmax(dim=-1), plain.float().log_softmax(dim=-1)
    return (ours.exp() * (ours - theirs)).sum(dim=-1)
