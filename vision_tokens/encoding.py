"""The vision side of the mechanism: what the encoder looked at, and what stays of each image or video.

`get_image_features` and `get_video_features` of the model that was given are replaced, on that instance, by ones that
record the attention and keys that a method reads, let the method decide, and send the decision along with the features,
which keep their number: what a merging method makes of them sits on some of the cells until the language input is cut.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.budgets import keeps_all
from mmaccel.methods import Unsupported
from mmaccel.reports import Quantity
from mmaccel.scoped import within
from vision_tokens.attention_rows import (
    Reader,
    Recorded,
    class_attention,
    heads_joined,
    listen,
    mean_keys,
    patch_keys,
    received_attention,
    recording,
    settle,
)
from vision_tokens.families import Host
from vision_tokens.families.facts import PIXELS
from vision_tokens.feature_merging import FeatureMerging
from vision_tokens.held_features import Held, HeldFeatures
from vision_tokens.language_input import LanguageInputMethod, MergingMethod, QuestionMethod, SelectingMethod
from vision_tokens.layout import ImageView, Layout
from vision_tokens.matching import Grouping, spread

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment


@dataclass(frozen=True)
class Encoded:
    """What one call of the encoder decided about its images or videos; it travels on the output object."""

    layouts: list[Layout]
    cells: list[Bool[Tensor, "_ _"]]  # [partitions, cells] of each image
    seconds: float
    selection: float = 0.0  # seconds of these: reading attention and choosing
    figures: dict[str, Quantity] = field(default_factory=dict)  # for the report of the call that reads them
    held: Held | None = None  # what tokens are still to be made of, once the prompt is there
    phases: dict[str, float] = field(default_factory=dict)  # seconds that making them took

    @property
    def keep(self) -> list[Bool[Tensor, " _"]]:
        """Per image, which of its tokens stay."""
        return [layout.tokens_of(cells) for layout, cells in zip(self.layouts, self.cells, strict=True)]

    @property
    def tokens(self) -> int:
        """Tokens of all images, as the prompt holds places for."""
        return sum(len(layout.source) for layout in self.layouts)


@dataclass
class Encoding:
    """One call under way: its images or videos with their parts of the input, and what was recorded."""

    encoder: Encoder
    inputs: Mapping[str, Any]
    layouts: list[Layout]
    pixels: list[Tensor]
    attention: Recorded = field(default_factory=Recorded)
    keys: Recorded = field(default_factory=Recorded)
    merging: float = 0.0  # seconds
    seats: list[Bool[Tensor, "_ _"]] | None = None  # of each image, once a merging method chose them
    features: Tensor | None = None  # that were held back from the projector
    groupings: dict[nn.Module, list[Grouping]] = field(default_factory=dict)  # in an encoder that merges, by attention
    figures: dict[str, Quantity] = field(default_factory=dict)


_encoding: ContextVar[Encoding | None] = ContextVar("encoding", default=None)
_dense: ContextVar[bool] = ContextVar("dense", default=False)


def note_grouping(attention: nn.Module, grouping: Grouping) -> None:
    """Tells the call under way what the tokens of this attention module stand for, in an encoder that merges them."""
    if (call := _encoding.get()) is not None:
        call.groupings.setdefault(attention, []).append(grouping)


def note_figure(name: str, quantity: Quantity) -> None:
    """Gives the report of the call under way a figure of the encoder."""
    if (call := _encoding.get()) is not None:
        call.figures[name] = quantity


def note_merging(seconds: float) -> None:
    """Adds what merging took to the call under way."""
    if (call := _encoding.get()) is not None:
        call.merging += seconds


def note_merged(into: Int[Tensor, "pictures patches"]) -> None:
    """Tells the call under way which patches of each picture left the encoder as one token.

    Where cells are patches, each token keeps one; families that make a cell of several patches keep them all.
    """
    call = _encoding.get()
    if call is None or any(layout.blended for layout in call.layouts):
        return
    if into.numel() == sum(layout.partitions * layout.cells for layout in call.layouts):
        parts = into.split_with_sizes([layout.partitions for layout in call.layouts])
        call.layouts = [layout.merged(part) for layout, part in zip(call.layouts, parts, strict=True)]


def running_dense() -> AbstractContextManager[None]:
    """Within the block, this thread's forwards of decorated models run as if nothing were applied."""
    return within(_dense, True)


def is_running_dense() -> bool:
    """Whether this thread is within `running_dense`."""
    return _dense.get()


class Encoder:
    """A method's hooks on the vision side of one model, for images or for videos.  Holds facts about the model only."""

    def __init__(self, method: LanguageInputMethod, host: Host, kind: str = "image") -> None:
        self.method, self.host, self.packing = method, host, host.family.packings[kind]
        self.name, self.pixels = f"get_{kind}_features", PIXELS[kind]
        self.merging = None
        if isinstance(method, MergingMethod) and not keeps_all(method.budget):
            self.merging = FeatureMerging(method, self._views, self._own_call)
        self.holding = None
        if isinstance(method, QuestionMethod) and not keeps_all(method.budget):
            self.holding = HeldFeatures(method, host, self._own_call)
        self.plain: Callable[..., Any] = getattr(host.multimodal, self.name)
        self.signature = inspect.signature(self.plain)
        modules = host.attention_modules
        if not modules and (method.attention or method.keys):
            raise Unsupported(
                f"{method.name} reads the encoder's attention, and the encoder of this "
                f"{host.multimodal.config.model_type} has none that can be read; "  # type: ignore[union-attr]
                "methods that rank by nothing, or resample, work (uniform, random, pooled, fourier-vlm)"
            )
        if modules:
            feature = host.family.feature_layer(host.multimodal, len(modules))
            self.layers = {"first": modules[0], "feature": modules[feature], "last": modules[-1]}
        read: Reader = class_attention if host.has_class_token else received_attention
        read_keys: Reader = patch_keys if host.has_class_token else mean_keys
        if method.joined_heads:
            read, read_keys = heads_joined(read), heads_joined(read_keys)
        self.attention_readers = {self.layers[name]: read for name in method.attention}
        self.key_readers = {self.layers[name]: read_keys for name in method.keys}
        self.kernel = host.tower.config._attn_implementation  # type: ignore[union-attr]

    def attach(self, attachment: Attachment) -> None:
        """Registers the hooks."""
        listen(attachment, list({**self.attention_readers, **self.key_readers}))
        # `generate` reads the signature to find its arguments
        encode = functools.wraps(self.plain)(lambda *args, **kwargs: self.encode(*args, **kwargs))
        attachment.set_attribute(self.host.multimodal, self.name, encode)
        if self.merging and self.packing.projector:
            self.merging.attach(attachment, self.host.multimodal.get_submodule(self.packing.projector))
        if self.holding and self.packing.projector:
            self.holding.attach(attachment, self.host.multimodal.get_submodule(self.packing.projector))

    def encode_from(self, inputs: Mapping[str, Any]) -> Any:
        """Encodes the images, or the videos, among the arguments of a forward."""
        names = [name for name in self.signature.parameters if inputs.get(name) is not None]
        return self.encode(**{name: inputs[name] for name in names}, return_dict=True)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own encoding, with the decision on every image or video added to its output."""
        if _dense.get() or _encoding.get() is not None:  # some families encode videos as images
            return self.plain(*args, **kwargs)
        start = time.perf_counter()
        inputs = self.signature.bind(*args, **kwargs).arguments
        self._refuse_what_changed(inputs)
        described = self.packing.layouts(self.host.multimodal, inputs)
        call = Encoding(self, inputs, [layout for layout, _ in described], [own for _, own in described])
        self._refuse_blended(call.layouts)
        with (
            within(_encoding, call),
            recording(self.attention_readers) as call.attention,
            recording(self.key_readers) as call.keys,
        ):
            options = self.holding.options if self.holding else {}
            output = self.plain(*args, **{**kwargs, **options, "return_dict": True})
        self._check_sizes(output.pooler_output, call.layouts)
        if self.merging and not self.packing.projector:
            self.merging.behind_encoder(output, call)
        settle(output.pooler_output[0].device)
        chosen = time.perf_counter()
        cells = self._cells(call)
        settle(cells[0].device)
        selection = time.perf_counter() - chosen + call.merging + call.attention.seconds + call.keys.seconds
        if kwargs.get("return_dict") is False:
            return output.to_tuple()
        # as an item, since accelerate hands on a rebuilt output: an attribute would be lost
        held = self.holding.held(call, output.hidden_states) if self.holding else None
        output["mmaccel"] = Encoded(call.layouts, cells, time.perf_counter() - start, selection, call.figures, held)
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

    def _refuse_blended(self, layouts: list[Layout]) -> None:
        if self.merging and any(layout.blended for layout in layouts):
            raise Unsupported(
                f"{self.method.name} changes features tile by tile, and this {self.host.multimodal.config.model_type} "  # type: ignore[union-attr]
                "makes tokens of such an image across its tiles; use a method that selects, or smaller images"
            )

    def _cells(self, call: Encoding) -> list[Bool[Tensor, "partitions cells"]]:
        """The cells of each image that stay."""
        if self.holding:
            call.seats = [self.holding.seats(layout) for layout in call.layouts]
        if call.seats is not None:
            reached = [layout.reached() for layout in call.layouts]
            return [seats.to(own.device) & own for seats, own in zip(call.seats, reached, strict=True)]
        if keeps_all(self.method.budget):
            return [layout.valid() for layout in call.layouts]
        assert isinstance(self.method, SelectingMethod)
        return [self.method.select(view) for view in self._views(call)]

    def _own_call(self) -> Encoding | None:
        """The call under way, if it is this encoder's: images and videos may share a projector."""
        call = _encoding.get()
        return None if call is None or call.encoder is not self else call

    def _views(self, call: Encoding) -> list[ImageView]:
        attention = self._on_cells(call, self.method.attention, call.attention, shared=True)
        keys = self._on_cells(call, self.method.keys, call.keys, shared=False)
        return [
            ImageView(layout, found, {name: part.mT for name, part in own_keys.items()}, own)
            for layout, found, own_keys, own in zip(call.layouts, attention, keys, call.pixels, strict=True)
        ]

    def _check_sizes(self, features: Any, layouts: list[Layout]) -> None:
        given, explained = sum(len(tokens) for tokens in features), sum(len(layout.source) for layout in layouts)
        if given != explained:
            kind = self.host.multimodal.config.model_type  # type: ignore[union-attr]
            raise Unsupported(
                f"this {kind} gives {given} visual tokens where the layout of its images explains {explained}; "
                "supported are encoders with a square grid whose features leave out the class token, on images of the "
                "encoder's own size"
            )

    def _on_cells(
        self, call: Encoding, names: Sequence[str], recorded: Recorded, shared: bool
    ) -> list[dict[str, Tensor]]:
        """Per image, by name, what was read of its cells: [partitions, rows, cells].

        shared: whether, of tokens that the encoder merged, each patch gets a share or all.
        """
        per_image: list[dict[str, Tensor]] = [{} for _ in call.layouts]
        sizes = [layout.partitions * layout.cells for layout in call.layouts]
        for name in names:
            rows = recorded[self.layers[name]]
            if groupings := call.groupings.get(self.layers[name]):
                rows = [spread(own, grouping, shared) for own, grouping in zip(rows, groupings, strict=True)]
            flat = self.packing.saliency(self.host.multimodal, call.inputs, rows)
            if bool(flat.isnan().any()):
                raise ValueError(
                    f"the vision encoder's attention holds NaN, so {self.method.name} cannot rank tokens; look for NaN "
                    "in pixel_values, and for overflow if the model runs in float16 (bfloat16 has the range)"
                )
            for found, part, layout in zip(per_image, flat.split_with_sizes(sizes, dim=-1), call.layouts, strict=True):
                found[name] = rearrange(part, "rows (parts cells) -> parts rows cells", cells=layout.cells)
        return per_image
