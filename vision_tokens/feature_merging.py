"""How merging methods change features: around a projector that works token by token, else behind the encoder.

Features keep their number: the merged ones sit on their seats, until the language input is cut.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vision_tokens.attention_rows import settle
from vision_tokens.language_input import MergingMethod
from vision_tokens.layout import ImageView, Layout

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.encoding import Encoding


class FeatureMerging:
    """A merging method's work on the features of one encoder."""

    def __init__(
        self,
        method: MergingMethod,
        views: Callable[[Encoding], list[ImageView]],
        under_way: Callable[[], Encoding | None],
    ) -> None:
        """views: what the method sees of the images of a call.  under_way: the encoder's call, within one."""
        self.method, self.views, self.under_way = method, views, under_way

    def attach(self, attachment: Attachment, projector: nn.Module) -> None:
        """Registers the hooks around a projector."""
        if not self.method.projected:
            attachment.pre_hook(projector, self.before_projector)
        attachment.hook(projector, self.behind_projector)

    def before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Merges what the projector gets, so that it has less to do."""
        merged = self._merged_tiles(args[0])
        return None if merged is None else ((merged[None], *args[1:]), kwargs)

    def behind_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
        """Puts what the projector gives on its seats, after merging it if that was not done before."""
        call = self.under_way()
        if output is None or call is None:
            return None
        merged = output[0] if call.seats is not None else self._merged_tiles(output)
        return None if merged is None or call.seats is None else torch.cat(_seated(merged, call.seats))

    def _merged_tiles(self, features: Float[Tensor, "tiles _ _"]) -> Float[Tensor, "seats _"] | None:
        """What the method makes of the features of all pictures; None if these are not what the layouts explain."""
        call = self.under_way()
        if call is None:
            return None
        explained = [layout.cells for layout in call.layouts for _ in range(layout.partitions)]
        if explained != [features.shape[1]] * len(features):
            return None
        return self._merged(call, features.split_with_sizes([layout.partitions for layout in call.layouts]))

    def behind_encoder(self, output: Any, call: Encoding) -> None:
        """Merges what the encoder gave, in the form that it has; newline tokens stay as they are.

        Features of other depths (Qwen3-VL) merge alike, as further channels of the same tokens.
        """
        depths = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
        flat = [part.flatten(0, -2) if isinstance(part, Tensor) else torch.cat(list(part)) for part in depths]
        parts = torch.cat(flat, dim=-1).split_with_sizes([len(layout.source) for layout in call.layouts])
        grids = [_on_grid(part, layout) for part, layout in zip(parts, call.layouts, strict=True)]
        seated = _seated(self._merged(call, grids), call.seats or [])
        tokens = [
            torch.where((layout.source >= 0)[:, None], grid.flatten(0, 1)[layout.source.clamp(min=0)], part)
            for grid, part, layout in zip(seated, parts, call.layouts, strict=True)
        ]
        merged = torch.cat(tokens).split_with_sizes([part.shape[-1] for part in flat], dim=-1)
        output.pooler_output, *others = (_in_form(part, form) for part, form in zip(merged, depths, strict=True))
        if others:
            output.deepstack_features = others

    def _merged(self, call: Encoding, features: Sequence[Float[Tensor, "_ _ _"]]) -> Float[Tensor, "seats _"]:
        """What the method makes of each image's features; notes the seats."""
        settle(features[0].device)
        start = time.perf_counter()
        images = [self.method.merge(view, own) for view, own in zip(self.views(call), features, strict=True)]
        merged = torch.cat([image.features for image in images])
        settle(merged.device)
        call.seats = [image.seats for image in images]
        call.merging += time.perf_counter() - start
        return merged


def _on_grid(tokens: Float[Tensor, "tokens _"], layout: Layout) -> Float[Tensor, "partitions cells _"]:
    """The features of an image's tokens on the cells that they come from."""
    content = layout.source >= 0
    cells = tokens.new_zeros(layout.partitions * layout.cells, tokens.shape[-1])
    cells = cells.index_put((layout.source[content],), tokens[content])
    return rearrange(cells, "(parts cells) width -> parts cells width", cells=layout.cells)


def _in_form(tokens: Float[Tensor, "tokens _"], form: Any) -> Any:
    """The tokens of all images as one tensor, or as a list with one for each, like those in `form`."""
    if isinstance(form, Tensor):
        return tokens.view_as(form)
    return type(form)(tokens.split_with_sizes([len(own) for own in form]))


def _seated(features: Float[Tensor, "seats _"], seats: list[Bool[Tensor, "_ _"]]) -> list[Float[Tensor, "_ _ _"]]:
    """The features on their seats, zeros on all other cells: [partitions, cells, channels] for each image."""
    parts = features.split_with_sizes([int(taken.sum()) for taken in seats])
    grids = [features.new_zeros(*taken.shape, features.shape[-1]) for taken in seats]
    for grid, taken, part in zip(grids, seats, parts, strict=True):
        grid[taken.to(grid.device)] = part
    return grids
