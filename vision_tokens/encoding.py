"""The vision side of the mechanism: what the encoder looked at, and what stays of each image.

`get_image_features` of the model that was given is replaced, on that instance, by one that records the attention a
method reads, lets the method decide, and sends the decision along with the features, which keep their number: what a
resampling method makes of a tile's grid sits on some of its cells until the language input is cut.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor, nn

from mmaccel.budgets import keeps_all
from mmaccel.methods import Unsupported
from vision_tokens.attention_rows import Wanted, listen, recording
from vision_tokens.families import Host
from vision_tokens.layout import ImageView, Layout

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment
    from vision_tokens.language_input import LanguageInputMethod


@dataclass(frozen=True)
class Encoded:
    """What one `get_image_features` call decided about its images; it travels on the output object."""

    layouts: list[Layout]
    cells: list[Bool[Tensor, "_ _"]]  # [partitions, cells] of each image
    seconds: float

    @property
    def keep(self) -> list[Bool[Tensor, " _"]]:
        """Per image, which of its tokens stay."""
        return [layout.tokens_of(cells) for layout, cells in zip(self.layouts, self.cells, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens of all images, as the prompt holds places for."""
        return sum(len(layout.source) for layout in self.layouts)


_layouts: ContextVar[list[Layout] | None] = ContextVar("layouts", default=None)
_dense: ContextVar[bool] = ContextVar("dense", default=False)


@contextmanager
def running_dense() -> Iterator[None]:
    """Within the block, this thread's forwards of decorated models run as if nothing were applied."""
    token = _dense.set(True)
    try:
        yield
    finally:
        _dense.reset(token)


def is_running_dense() -> bool:
    """Whether this thread is within `running_dense`."""
    return _dense.get()


class Encoder:
    """A method's hooks on the vision side of one model.  Holds facts about the model only."""

    def __init__(self, method: LanguageInputMethod, host: Host) -> None:
        self.method, self.host = method, host
        self.plain: Callable[..., Any] = host.multimodal.get_image_features  # type: ignore[assignment]
        self.signature = inspect.signature(self.plain)
        modules = host.attention_modules
        kind: Wanted = "class" if host.has_class_token else "received"
        layers = {"first": 0, "feature": host.family.feature_layer(host.multimodal, len(modules))}
        self.read_from = {name: modules[layers[name]] for name in method.attention}
        self.wanted: Mapping[nn.Module, Wanted] = dict.fromkeys(self.read_from.values(), kind)
        self.kernel = host.tower.config._attn_implementation  # type: ignore[union-attr]

    def attach(self, attachment: Attachment) -> None:
        """Registers the hooks."""
        listen(attachment, list(self.wanted))
        # `generate` reads the signature to find its arguments
        encode = functools.wraps(self.plain)(lambda *args, **kwargs: self.encode(*args, **kwargs))
        attachment.set_attribute(self.host.multimodal, "get_image_features", encode)
        if self.method.resamples and self.host.family.projector:
            projector = self.host.multimodal.get_submodule(self.host.family.projector)
            attachment.pre_hook(projector, self.before_projector)
            attachment.hook(projector, self.behind_projector)

    def encode_from(self, inputs: Mapping[str, Any]) -> Any:
        """Encodes the images among the arguments of a forward."""
        names = [name for name in self.signature.parameters if inputs.get(name) is not None]
        return self.encode(**{name: inputs[name] for name in names}, return_dict=True)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """`get_image_features`, with the decision on every image added to its output."""
        if _dense.get():
            return self.plain(*args, **kwargs)
        start = time.perf_counter()
        inputs = self.signature.bind(*args, **kwargs).arguments
        self._refuse_what_changed(inputs)
        described = self.host.family.layouts(self.host.multimodal, inputs)
        layouts = [layout for layout, _ in described]
        token = _layouts.set(layouts)
        try:
            with recording(self.wanted) as rows:
                output = self.plain(*args, **{**kwargs, "return_dict": True})
        finally:
            _layouts.reset(token)
        self._check_sizes(output.pooler_output, layouts)
        if not keeps_all(self.method.budget) and not self.host.family.projector:
            output.pooler_output = self._resampled_behind(output.pooler_output, layouts)
        attention = self._attention(inputs, rows, layouts)
        cells = [
            self._select(ImageView(layout, attention[index], pixels))
            for index, (layout, pixels) in enumerate(described)
        ]
        settle(cells[0].device)
        if kwargs.get("return_dict") is False:
            return output.to_tuple()
        # as an item, since accelerate hands on a rebuilt output: an attribute would be lost
        output["mmaccel"] = Encoded(layouts, cells, time.perf_counter() - start)
        return output

    def _refuse_what_changed(self, inputs: Mapping[str, Any]) -> None:
        """A method reads the encoder's attention as it was configured when the method was applied."""
        config: Any = self.host.multimodal.config
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            if inputs.get(name) not in (None, getattr(config, name, None)):
                raise Unsupported(
                    f"{self.method.name} was applied to a model with {name} {getattr(config, name)!r}; this call asks "
                    f"for {inputs[name]!r}. Set model.config.{name}, then call mmaccel.apply again"
                )
        if (kernel := self.host.tower.config._attn_implementation) != self.kernel:  # type: ignore[union-attr]
            raise Unsupported(
                f"the encoder's attention implementation was {self.kernel!r} when {self.method.name} was applied, and "
                f"is {kernel!r} now; call mmaccel.apply again"
            )

    def _select(self, view: ImageView) -> Bool[Tensor, "partitions cells"]:
        return view.layout.valid() if keeps_all(self.method.budget) else self.method.select(view)

    def _check_sizes(self, features: Any, layouts: list[Layout]) -> None:
        given, explained = sum(len(tokens) for tokens in features), sum(len(layout.source) for layout in layouts)
        if given != explained:
            kind = self.host.multimodal.config.model_type  # type: ignore[union-attr]
            raise Unsupported(
                f"this {kind} gives {given} visual tokens where the layout of its images explains {explained}; "
                "supported are encoders with a square grid whose features leave out the class token, on images of the "
                "encoder's own size"
            )

    def _attention(self, inputs: Any, rows: Any, layouts: list[Layout]) -> list[dict[str, Tensor]]:
        """Per image and name, what its cells got: [partitions, heads, cells]."""
        per_image: list[dict[str, Tensor]] = [{} for _ in layouts]
        sizes = [layout.partitions * layout.cells for layout in layouts]
        for name, module in self.read_from.items():
            flat = self.host.family.saliency(self.host.multimodal, inputs, rows[module])
            if bool(flat.isnan().any()):
                raise ValueError(
                    f"the vision encoder's attention holds NaN, so {self.method.name} cannot rank tokens; look for NaN "
                    "in pixel_values, and for overflow if the model runs in float16 (bfloat16 has the range)"
                )
            for found, part, layout in zip(per_image, flat.split_with_sizes(sizes, dim=-1), layouts, strict=True):
                found[name] = rearrange(part, "heads (parts cells) -> parts heads cells", cells=layout.cells)
        return per_image

    # Resampling methods change features: before a projector that works token by token, else behind the encoder

    def before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layouts = self._resampled_layouts()
        if layouts is None:
            return None
        tiles = args[0].split_with_sizes([layout.partitions for layout in layouts])
        small = [self.method.shrink(part, layout) for part, layout in zip(tiles, layouts, strict=True)]
        return (torch.cat([part.flatten(0, 1) for part in small])[None], *args[1:]), kwargs

    def behind_projector(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
        layouts = self._resampled_layouts()
        if layouts is None or output is None:
            return None
        seats = torch.stack([seat for layout in layouts for seat in self.method.seats(layout)]).to(output.device)
        spread = output.new_zeros(*seats.shape, output.shape[-1])
        spread[seats] = output[0]
        return spread

    def _resampled_layouts(self) -> list[Layout] | None:
        return _layouts.get() if self.method.resamples and not keeps_all(self.method.budget) else None

    def _resampled_behind(self, features: Any, layouts: list[Layout]) -> Any:
        if not self.method.resamples:
            return features
        flat = torch.cat(list(features))
        small = []
        for part, layout in zip(
            flat.split_with_sizes([len(layout.source) for layout in layouts]), layouts, strict=True
        ):
            tiles = rearrange(part, "(parts cells) width -> parts cells width", cells=layout.cells)
            small.append(self.method.shrink(tiles, layout).flatten(0, 1))
        spread = torch.zeros_like(flat)
        seats = torch.cat([self.method.seats(layout).flatten() for layout in layouts])
        spread[seats.to(flat.device)] = torch.cat(small)
        return type(features)(spread.split_with_sizes([len(tokens) for tokens in features]))


def settle(device: torch.device) -> None:
    """Waits for a GPU to finish what it was given, so that a clock beside it tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
