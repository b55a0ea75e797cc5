"""The language-input mechanism: how chosen visual tokens are cut out of a running transformers model.

Vision-language models compute visual features (`get_image_features`), scatter them over placeholder tokens and call
their language model with embeddings, positions and a mask.  `get_image_features` records what the encoder looked at
and decides what stays; a hook on the multimodal model finds the placeholders; a hook on its language model gathers
embeddings, positions and masks, in the prefill and, with what the cache remembers, in every later step.
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
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmaccel.budgets import keeps_all
from mmaccel.methods import Unsupported
from mmaccel.reports import Report
from vision_tokens.attention_rows import Wanted, listen, recording
from vision_tokens.families import Host
from vision_tokens.kept_columns import KeptColumns, held_length, kept_columns, remember
from vision_tokens.layout import ImageView, Layout
from vision_tokens.prefill_cost import prefill_flops

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


@dataclass
class Call:
    """One forward of the multimodal model that reads images."""

    report: Report
    keep: Bool[Tensor, "batch new"]


@dataclass
class Step:
    """One forward of the language model behind a cut: what its cache holds afterwards."""

    started: float
    report: Report | None = None
    columns: KeptColumns | None = None
    lengths: tuple[int, int] = (0, 0)  # held and original length of what went in


_call: ContextVar[Call | None] = ContextVar("call", default=None)
_step: ContextVar[Step | None] = ContextVar("step", default=None)
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


class Cutter:
    """A method's hooks on one model.  Holds facts about the model only: what belongs to a call lives in its context."""

    def __init__(self, method: LanguageInputMethod, host: Host, attachment: Attachment) -> None:
        self.method, self.host, self.attachment = method, host, attachment
        self.encode_plain: Callable[..., Any] = host.multimodal.get_image_features  # type: ignore[assignment]
        self.encode_parameters = inspect.signature(self.encode_plain)
        self.forward_names = list(inspect.signature(host.multimodal.forward).parameters)
        self.text_names = list(inspect.signature(host.text.forward).parameters)
        modules = host.attention_modules
        kind: Wanted = "class" if host.has_class_token else "received"
        layers = {"first": 0, "feature": host.family.feature_layer(host.multimodal, len(modules))}
        self.read_from = {name: modules[layers[name]] for name in method.attention}
        self.wanted: Mapping[nn.Module, Wanted] = dict.fromkeys(self.read_from.values(), kind)
        self.kernel = host.tower.config._attn_implementation  # type: ignore[union-attr]

    def attach(self, target: nn.Module) -> None:
        """Registers every hook, through the attachment.  Raises `Unsupported` if another decoration is there."""
        host, attachment = self.host, self.attachment
        hooks = host.multimodal._forward_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Cutter) for hook in hooks):
            raise Unsupported(
                f"this {type(host.multimodal).__name__} is decorated already, through an object that wraps it or that "
                "it wraps (PEFT, a task head); call mmaccel.remove or mmaccel.apply on that object"
            )
        listen(attachment, list(self.wanted))
        # `generate` reads the signature to find its arguments
        encode = functools.wraps(self.encode_plain)(lambda *args, **kwargs: self.encode(*args, **kwargs))
        attachment.set_attribute(host.multimodal, "get_image_features", encode)
        attachment.pre_hook(target, self.refuse_places)
        attachment.pre_hook(host.multimodal, self.begin)
        attachment.hook(host.multimodal, self.end)
        attachment.pre_hook(host.text, self.cut)
        attachment.hook(host.text, self.account)
        if host.family.projector:
            projector = host.multimodal.get_submodule(host.family.projector)
            attachment.pre_hook(projector, self.before_projector)
            attachment.hook(projector, self.behind_projector)

    # The encoder: what it looked at, and what stays

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """`get_image_features`, with the decision on every image added to its output."""
        if _dense.get():
            return self.encode_plain(*args, **kwargs)
        start = time.perf_counter()
        inputs = self.encode_parameters.bind(*args, **kwargs).arguments
        self._refuse_what_changed(inputs)
        described = self.host.family.layouts(self.host.multimodal, inputs)
        layouts = [layout for layout, _ in described]
        token = _layouts.set(layouts)
        try:
            with recording(self.wanted) as rows:
                output = self.encode_plain(*args, **{**kwargs, "return_dict": True})
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

    # The multimodal model: where the placeholders are

    def refuse_places(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Arguments that speak of places in the whole prompt would meet the logits of the kept tokens."""
        if keeps_all(self.method.budget) or _dense.get():
            return
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise Unsupported(
                f"{self.method.name} drops tokens, so places in the prompt do not index its logits; pass "
                "logits_to_keep as a number of last tokens"
            )
        if kwargs.get("labels") is not None:
            raise Unsupported(
                f"{self.method.name} drops tokens, so labels for the whole prompt do not fit its logits; compute the "
                "loss on mmaccel.remove(model), or take the logits without labels"
            )

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Encodes images that came as pixels, and marks which tokens of the prompt stay."""
        _call.set(None)
        if _dense.get():
            return None
        kwargs = {**dict(zip(self.forward_names, args, strict=False)), **kwargs}
        outputs = {} if kwargs.get("mm_encoder_outputs") is None else kwargs["mm_encoder_outputs"]
        if isinstance(outputs, Tensor):
            outputs = {"image": outputs}  # an old spelling; refused below
        if kwargs.get("pixel_values_videos") is not None or outputs.get("video") is not None:
            raise Unsupported(f"{self.method.name} acts on images; video input of this family is not supported yet")
        if kwargs.get("pixel_values") is not None:
            outputs = kwargs["mm_encoder_outputs"] = {"image": self._encode_from(kwargs)}
            kwargs["pixel_values"] = None
        images = outputs.get("image")
        if images is None:
            if (cache := kwargs.get("past_key_values")) is None or cache.get_seq_length() == 0:
                self._new_report([])
            return (), kwargs
        encoded = getattr(images, "mmaccel", None)
        if not isinstance(encoded, Encoded):
            raise Unsupported(
                "these visual features were computed without the method: encode the images after mmaccel.apply, and "
                "leave generate's prefill_chunk_size unset (a chunk holds part of an image only)"
            )
        placeholders = placeholders_in(self.host, kwargs)
        report = self._new_report(encoded.layouts)
        report.seconds["encode"] = encoded.seconds
        report.details["cells"] = encoded.cells
        report.details["layouts"] = encoded.layouts
        _call.set(Call(report, ~placeholders | spread_over(placeholders, encoded)))
        return (), kwargs

    def end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Forgets the call, also when it raised."""
        _call.set(None)

    def _encode_from(self, kwargs: dict[str, Any]) -> Any:
        names = [name for name in self.encode_parameters.parameters if kwargs.get(name) is not None]
        return self.encode(**{name: kwargs[name] for name in names}, return_dict=True)

    def _new_report(self, layouts: list[Layout]) -> Report:
        report = self.attachment.start_report()
        report.record("images", len(layouts))
        return report

    # The language model: cut what comes in, and keep account in its cache

    def cut(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Gathers embeddings, positions and masks of the tokens that stay."""
        _step.set(None)
        if _dense.get():
            return None
        kwargs = {**dict(zip(self.text_names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        call, columns = _call.get(), kept_columns(cache)
        embeddings: Tensor = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, new = embeddings.shape[:2]
        if call is not None:
            settle(embeddings.device)
        step = Step(time.perf_counter(), call.report if call else None, columns, (new, new))
        _step.set(step)
        if columns is None and (call is None or bool(call.keep.all())):
            return (), kwargs
        mask = kwargs.get("attention_mask")
        if call is None and mask is None and columns is not None and self._needs_nothing(columns):
            return (), kwargs
        self._refuse_what_cannot_be_cut(cache, mask, new)
        past = columns.extended(held_length(cache)) if columns else self._past_columns(cache, batch, embeddings.device)
        seen = columns.seen + past.shape[1] - columns.index.shape[1] if columns else past.shape[1]
        mask = None if mask is None else mask.bool().to(embeddings.device)
        positions = self._positions(kwargs.get("position_ids"), seen, batch, new, embeddings.device)
        if self.method.positions == "packed":
            real = seen if mask is None else mask[:, :seen].sum(dim=-1, keepdim=True)
            positions = positions - (real - (past >= 0).sum(dim=-1, keepdim=True))
        if call is not None:
            index = rows_to_gather(call.keep, None if mask is None else mask[:, -new:])
            positions = self._gather_positions(positions, index)
            kwargs["inputs_embeds"] = gather(embeddings, index)
            held = torch.where(index >= 0, index + seen, -1)
            past_and_held = torch.cat([past, held], dim=-1)
            step.columns = KeptColumns(past_and_held, seen + new, padded=bool((past_and_held < 0).any()))
        else:
            held = torch.arange(seen, seen + new, device=past.device).expand(batch, -1)
        step.lengths = (held.shape[1], new)
        kwargs["position_ids"] = positions
        kwargs["attention_mask"] = mask_for(torch.cat([past, held], dim=-1), mask, cache is not None)
        return (), kwargs

    def _needs_nothing(self, columns: KeptColumns) -> bool:
        """Without padding and with positions kept, later steps are right as they come: the cache says what was seen."""
        return not columns.padded and self.method.positions == "kept"

    def _refuse_what_cannot_be_cut(self, cache: Any, mask: Any, new: int) -> None:
        if getattr(cache, "is_compileable", False):
            raise Unsupported(
                f"{self.method.name} shortens the prompt, which a static cache cannot follow; leave "
                "cache_implementation unset (a dynamic cache)"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise Unsupported(
                f"{self.method.name} takes attention masks of shape [batch, tokens]; got "
                f"{'a mapping of masks' if isinstance(mask, dict) else f'{mask.dim()} dimensions'}"
            )
        config: Any = self.host.text.config
        window = getattr(config, "sliding_window", None)
        if window and "sliding_attention" in (getattr(config, "layer_types", None) or []) and new > window:
            raise Unsupported(
                f"{self.method.name}: layers with a sliding window ({window}) shorter than the prompt ({new} tokens) "
                "would see other tokens once some are dropped"
            )

    @staticmethod
    def _past_columns(cache: Any, batch: int, device: torch.device) -> Int[Tensor, "batch held"]:
        held = 0 if cache is None else held_length(cache)
        return torch.arange(held, device=device).expand(batch, -1)

    def _positions(self, given: Tensor | None, seen: int, batch: int, new: int, device: torch.device) -> Tensor:
        if given is None:
            given = torch.arange(seen, seen + new, device=device)[None]
        return given.expand(*given.shape[:-2], batch, new)

    def _gather_positions(self, positions: Tensor, index: Int[Tensor, "batch held"]) -> Tensor:
        if self.method.positions == "packed":
            first = positions.min(dim=-1, keepdim=True).values
            return first + (index >= 0).cumsum(dim=-1).sub(1).clamp(min=0)
        return positions.gather(-1, index.clamp(min=0).expand(*positions.shape[:-1], -1))

    def account(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """After the language model ran: what its cache holds, and the figures of the report."""
        step = _step.get()
        _step.set(None)
        if step is None or output is None:
            return
        cache = getattr(output, "past_key_values", None)
        if step.columns is not None and cache is not None and step.columns is not kept_columns(cache):
            remember(cache, step.columns)
        if step.report is not None:
            settle(output.last_hidden_state.device)
        seconds = time.perf_counter() - step.started
        if step.report is None:
            if (report := self.attachment.current_report()) is not None:
                report.seconds["decode"] = report.seconds.get("decode", 0.0) + seconds
            return
        step.report.seconds["prefill"] = seconds
        self._record(step.report, step, len(output.last_hidden_state), cache)

    def _record(self, report: Report, step: Step, batch: int, cache: Any) -> None:
        held, original = step.lengths
        layouts, cells = report.details["layouts"], report.details["cells"]
        report.record(
            "visual_tokens",
            lambda: sum(int(layout.tokens_of(mask).sum()) for layout, mask in zip(layouts, cells, strict=True)),
            sum(len(layout.source) for layout in layouts),
            "tokens",
        )
        report.record("prompt_tokens", held, original, "tokens a row")
        text = self.host.text
        report.record(
            "prefill_flops",
            lambda: prefill_flops(text, batch, held),
            lambda: prefill_flops(text, batch, original),
            "FLOP",
        )
        if cache is not None:
            layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
            size = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
            columns = held_length(cache)
            report.record("kv_bytes", size, size // columns * int(cache.get_seq_length()), "B")


def placeholders_in(host: Host, inputs: Mapping[str, Any]) -> Bool[Tensor, "batch new"]:
    """The places of a prompt that visual tokens take."""
    if (tokens := inputs.get("input_ids")) is not None:
        return torch.as_tensor(tokens == host.image_token)
    embeddings: Tensor = inputs["inputs_embeds"]
    token = torch.tensor(host.image_token, device=embeddings.device)
    return torch.as_tensor((embeddings == host.text.get_input_embeddings()(token)).all(dim=-1))  # type: ignore[operator]


def spread_over(placeholders: Bool[Tensor, "batch new"], encoded: Encoded) -> Bool[Tensor, "batch new"]:
    """The images' decisions at their placeholders, False elsewhere.

    `generate` repeats a prompt for beams and samples: each group of equal rows holds the images of one prompt.
    Raises `Unsupported` if the prompt does not have a place for every visual token.
    """
    found = int(placeholders.sum())
    copies = found // encoded.tokens
    if copies == 0 or found % encoded.tokens or len(placeholders) % copies:
        raise Unsupported(
            f"the prompt has {found} places for visual tokens, its images have {encoded.tokens}; chunked prefill "
            "(prefill_chunk_size) is not supported"
        )
    out = placeholders.clone()
    by_prompt = torch.cat(encoded.keep).to(out.device).split_with_sizes(placeholders[::copies].sum(dim=-1).tolist())
    for row in range(len(out)):
        out[row, placeholders[row]] = by_prompt[row // copies]
    return out


def rows_to_gather(
    keep: Bool[Tensor, "batch new"], mask: Bool[Tensor, "batch new"] | None
) -> Int[Tensor, "batch held"]:
    """Per row the places of the tokens that stay and are not padding; rows are filled up with -1 to equal length.

    Rows are filled on the left, or on the right if the prompt is padded there.
    """
    keep = keep if mask is None else keep & mask
    lengths = keep.sum(dim=-1, keepdim=True)
    width = int(lengths.max())
    places = keep.logical_not().int().argsort(dim=-1, stable=True)[:, :width]  # kept ones first, in order
    places = torch.where(torch.arange(width, device=keep.device) < lengths, places, -1)
    padded_right = mask is not None and not bool(mask[:, -1].all())
    if padded_right or bool((lengths == width).all()):
        return places
    shift = (torch.arange(width, device=keep.device) - (width - lengths)) % width
    return places.gather(-1, shift)


def gather(rows: Tensor, index: Int[Tensor, "batch held"]) -> Tensor:
    """The rows at the given places: [batch, new, width] -> [batch, held, width]; padding repeats place 0."""
    return rows.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, rows.shape[-1]))


def mask_for(
    index: Int[Tensor, "batch held"], mask: Bool[Tensor, "batch seen"] | None, has_cache: bool
) -> Int[Tensor, "batch held"] | None:
    """The attention mask of the held columns, from the mask of the original sequence.

    None where nothing is masked, so that fused kernels stay on their fast path; but explicit without a cache, where
    transformers would read gaps in the positions as several packed sequences.
    """
    held = index >= 0
    if mask is not None:
        held = held & mask.gather(-1, index.clamp(min=0))
    return None if has_cache and bool(held.all()) else held.long()


def settle(device: torch.device) -> None:
    """Waits for a GPU to finish what it was given, so that a clock beside it tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
