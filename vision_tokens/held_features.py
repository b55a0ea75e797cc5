"""How a method that needs the question holds features back: the encoder runs before anybody has seen the prompt.

Features keep their number on the way out of the encoder and say nothing, since the projector is given none of them;
what it would have been given, and the encoder's hidden states beside it, waits for `vision_tokens.question_reading`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmaccel.methods import Unsupported
from vision_tokens.families import Host
from vision_tokens.families.facts import grid_of
from vision_tokens.families.llava import square_layouts
from vision_tokens.language_input import Condensing, QuestionMethod, evenly_spread
from vision_tokens.layout import Layout

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.encoding import Encoding


@dataclass(frozen=True)
class Held:
    """Pictures that wait for their question, and what makes tokens of them."""

    condensing: Condensing
    features: Float[Tensor, "pictures cells width"]
    levels: Float[Tensor, "pictures cells levels"]


class HeldFeatures:
    """A question method's hooks around one projector.  Holds facts about the model only."""

    def __init__(self, method: QuestionMethod, host: Host, under_way: Callable[[], Encoding | None]) -> None:
        """under_way: the encoder's call, within one."""
        config: Any = host.multimodal.config
        chosen = getattr(config, "vision_feature_layer", None)
        if host.family.image.layouts is not square_layouts or not isinstance(chosen, int):
            raise Unsupported(
                f"{method.name} makes tokens of one hidden state of the encoder on one square grid a picture, as LLaVA "
                f"1.5 reads it; this {config.model_type} reads tiles, videos, several states or the encoder's "
                "output. Use a method that selects tokens, e.g. SparseVLM, which looks at the question, too"
            )
        self.under_way, self.special = under_way, int(host.has_class_token)
        depth = len(host.attention_modules)
        text: Any = host.text.config
        vision = config.vision_config
        self.condensing = method.condensing(grid_of(vision), int(vision.hidden_size), int(text.hidden_size))
        if not all(0 <= level <= depth for level in self.condensing.levels):
            raise Unsupported(
                f"{method.name} reads the encoder's hidden states {', '.join(map(str, self.condensing.levels))}, and "
                f"this one has 0 to {depth}; name others in levels=, or take weights for this model"
            )
        feature = host.family.feature_layer(host.multimodal, depth) + 1
        self.options = {"output_hidden_states": sorted({*self.condensing.levels, feature})}
        """What the encoder is asked for, on top of what the model asks."""

    def attach(self, attachment: Attachment, projector: nn.Module) -> None:
        """Registers the hooks around a projector."""
        attachment.pre_hook(projector, self.before_projector)
        attachment.hook(projector, self.behind_projector)

    def before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Notes what the projector would get, and gives it nothing to do."""
        call = self.under_way()
        if call is None:
            return None
        call.features = args[0]
        return (args[0][:, :0], *args[1:]), kwargs

    def behind_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
        """Puts zeros on the cells."""
        call = self.under_way()
        if output is None or call is None or call.features is None:
            return None
        return output.new_zeros(*call.features.shape[:2], output.shape[-1])

    def held(self, call: Encoding, states: tuple[Tensor, ...]) -> Held:
        """What waits behind one call.  states: the encoder's hidden states."""
        assert call.features is not None
        levels = torch.cat([states[level][:, self.special :] for level in self.condensing.levels], dim=-1)
        return Held(self.condensing, call.features, levels)

    def seats(self, layout: Layout) -> Bool[Tensor, "partitions cells"]:
        """The cells that the tokens of a picture will take."""
        kernel = self.condensing.kernel
        seats = torch.zeros(layout.partitions, layout.cells, dtype=torch.bool, device=layout.source.device)
        seats[:, evenly_spread((layout.height // kernel, layout.width // kernel), (layout.height, layout.width))] = True
        return seats
