"""The laws of methods that act on the language input, measured against references with no mechanism in them.

Tests hold them on tiny models of every family; `mmaccel check` holds them on the user's own checkpoint.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmaccel.api import applied, report
from mmaccel.checks import LawResult
from mmaccel.methods import Method
from vision_tokens.attention_rows import settle
from vision_tokens.encoding import running_dense
from vision_tokens.families import Host, find_host
from vision_tokens.families.facts import PIXELS
from vision_tokens.gathering import spread_over
from vision_tokens.prompts import placeholders_in
from vision_tokens.question_reading import answered

if TYPE_CHECKING:
    from vision_tokens.language_input import LanguageInputMethod

BARS = {torch.float32: 1e-4, torch.float64: 1e-9, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far logits may differ, as a share of the largest: two orders of summation in the model's own precision."""

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Arguments that tell a model what each token of the prompt is."""

ORACLE_BAR, FORGIVEN = 1.25, 0.003
"""The ratio that `mmaccel check` lets pass on a machine that does other things too, and the seconds it forgives."""


@dataclass(frozen=True)
class Prompt:
    """What a model would read in a dense prefill, and which of it a method keeps.

    inputs: the prompt's tokens, and what says their types.  features: by kind of input, what the encoder made of it,
    as the method changed it.
    """

    inputs: Mapping[str, Tensor]
    features: Mapping[str, Any]
    embeddings: Float[Tensor, "batch tokens width"]
    positions: Int[Tensor, "*axes batch tokens"]
    mask: Bool[Tensor, "batch tokens"]
    keep: Bool[Tensor, "batch tokens"]


def kept_prompt(model: nn.Module, inputs: Mapping[str, Any]) -> Prompt:
    """The prompt of a decorated model's call: features as the method made them, none of them dropped yet."""
    host = find_host(model)
    rest = {name: value for name, value in inputs.items() if name not in PIXELS.values()}
    features, keep = {}, torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    with torch.no_grad():
        for kind in host.tokens:
            if inputs.get(PIXELS[kind]) is not None:
                encode: Any = getattr(host.multimodal, f"get_{kind}_features")
                names = inspect.signature(encode).parameters
                features[kind] = encode(**{name: inputs[name] for name in names if name in inputs}, return_dict=True)
                places = placeholders_in(host, inputs, kind)
                if (encoded := getattr(features[kind], "mmaccel", None)) is not None:
                    if encoded.held:
                        features[kind] = answered(host, features[kind], inputs)
                    keep &= ~places | spread_over(places, encoded)
        with running_dense(), _captured(host) as seen:
            model.generate(**rest, mm_encoder_outputs=dict(features), max_new_tokens=1, do_sample=False)  # type: ignore[operator]
    given, positions = inputs.get("attention_mask"), seen["position_ids"]
    return Prompt(
        {name: inputs[name] for name in ("input_ids", *TOKEN_TYPES) if name in inputs},
        features,
        seen["inputs_embeds"],
        positions.expand(*positions.shape[:-2], *keep.shape),
        torch.ones_like(keep) if given is None else given.bool(),
        keep,
    )


@contextmanager
def _captured(host: Host) -> Iterator[dict[str, Any]]:
    seen: dict[str, Any] = {}

    def capture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update({} if seen else kwargs)

    handle = host.text.register_forward_pre_hook(capture, with_kwargs=True, prepend=True)
    try:
        yield seen
    finally:
        handle.remove()


def masked_logits(
    model: nn.Module,
    prompt: Prompt,
    tokens: Int[Tensor, "batch new"],
    layers: Mapping[int, Bool[Tensor, "batch tokens"] | Bool[Tensor, "batch all all"]] = MappingProxyType({}),
) -> Float[Tensor, "batch new vocabulary"]:
    """The slow reference: the model's own forward on the whole sequence, dropped tokens masked, no cache.

    Logits for each of the next tokens, which may not be placeholders.  layers: by decoder layer, which tokens of the
    prompt it sees, or which of all tokens each of them sees, where that is not all that the method keeps.
    """
    host, new = find_host(model), tokens.shape[1] - 1
    given: dict[str, Any] = {**prompt.inputs, "attention_mask": (prompt.mask & prompt.keep).long()}
    for _ in range(new):  # the family's own rule for the types of new tokens
        given = model._update_model_kwargs_for_generation({}, given)  # type: ignore[operator]
    given["input_ids"] = torch.cat([given["input_ids"], tokens[:, :new]], dim=-1)
    steps = torch.arange(1, new + 1, device=tokens.device).expand(*prompt.positions.shape[:-1], -1)
    with torch.no_grad(), running_dense(), ExitStack() as undo:
        for layer, kept in layers.items():
            shown = kept if kept.dim() == 3 else torch.cat([kept, kept.new_ones(len(kept), new)], dim=-1)[:, None]
            hook = partial(_hide, shown[:, None])
            undo.callback(host.decoder_layers[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
        logits: Tensor = model(
            **given,
            position_ids=torch.cat([prompt.positions, prompt.positions[..., -1:] + steps], dim=-1),
            mm_encoder_outputs=dict(prompt.features),
            use_cache=False,
            logits_to_keep=new + 1,
        ).logits
    return logits


def _hide(shown: Tensor, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hides columns from a layer; without a mask it is causal."""
    mask, tokens = kwargs.get("attention_mask"), shown.shape[-1]
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=shown.device).tril()
    if mask.dtype == torch.bool:
        kwargs["attention_mask"] = mask & shown
    else:
        kwargs["attention_mask"] = mask.masked_fill(~shown, torch.finfo(mask.dtype).min)
    return args, kwargs


def generated(model: nn.Module, inputs: Mapping[str, Any], tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy generation of exactly so many tokens: the tokens, [batch, new], and their logits."""
    with torch.no_grad():
        out = model.generate(  # type: ignore[operator]
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logits = torch.stack(out.logits, dim=1)
    return out.sequences[:, -tokens:], logits


def largest_difference(first: Tensor, second: Tensor) -> float:
    """The largest difference of two sets of logits, as a share of the largest logit."""
    scale = max(float(first.abs().max()), float(second.abs().max()), 1e-12)
    return float((first.float() - second.float()).abs().max()) / scale


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could have changed: classes, instance variables, hooks and configurations.

    Tensors that a model keeps from its last call (Qwen's `rope_deltas`) are its own affair.
    """
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        state = {
            key: list(value) if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules") and not isinstance(value, Tensor)
        }
        config = getattr(module, "config", None)
        found[name] = (type(module), state, repr(vars(config)) if hasattr(config, "__dict__") else None)
    return found


def language_input_laws(
    model: nn.Module, method: LanguageInputMethod, inputs: Mapping[str, Any], tokens: int = 8
) -> Iterator[LawResult]:
    """The laws of exactness of a method that acts on the language input."""

    def reference(chosen: Tensor) -> Tensor:
        return masked_logits(model, kept_prompt(model, inputs), chosen)

    everything = dataclasses.replace(method, budget=1.0)
    references = {"dropping equals masking": reference} if method.positions == "kept" else {}
    yield from exactness_laws(model, method, everything, references, inputs, tokens)


def exactness_laws(
    model: nn.Module,
    method: Method,
    everything: Method,
    references: Mapping[str, Callable[[Tensor], Tensor]],
    inputs: Mapping[str, Any],
    tokens: int,
) -> Iterator[LawResult]:
    """The laws of exactness, one after the other, as they are measured; the plain model is left as it was.

    everything: the method with nothing to drop.  references: by law, what computes the logits of the tokens that the
    decorated model chose, in some slow way; it runs on the decorated model.
    """
    bar = BARS.get(next(model.parameters()).dtype, 1e-1)
    _, dense = generated(model, inputs, tokens)
    before = fingerprint(model)

    with applied(model, everything):
        _, all_kept = generated(model, inputs, tokens)
    yield LawResult("keeping everything is the dense model", largest_difference(all_kept, dense), 0.0)

    with applied(model, method):
        chosen, logits = generated(model, inputs, tokens)
        _, again = generated(model, inputs, tokens)
        for law, reference in references.items():
            yield LawResult(law, largest_difference(logits, reference(chosen)), bar)
    yield LawResult("the second call equals the first", largest_difference(logits, again), 0.0)

    _, undone = generated(model, inputs, tokens)
    yield LawResult("removed, the logits are the dense ones", largest_difference(undone, dense), 0.0)
    yield LawResult("removed, nothing is left behind", float(fingerprint(model) != before), 0.0)


def oracle_law(
    model: nn.Module,
    method: Method,
    inputs: Mapping[str, Any],
    rounds: int = 7,
    cuts: int = 0,
    aside: Sequence[str] = (),
) -> LawResult:
    """Time to first token, over that of an oracle which is handed the kept tokens; medians of interleaved rounds.

    The hooks' Python costs a millisecond or two whatever the model's size, so `FORGIVEN` seconds are taken off first
    for each stage and each cut between layers.  aside: phases of the report that are taken off, too.
    """
    from mmaccel.bench import interleave, timed
    from vision_tokens.oracle import Oracle, read_by, twin

    plain, device = twin(model), next(model.parameters()).device
    set_aside: list[float] = []

    def ours() -> None:
        model.generate(**inputs, max_new_tokens=1)  # type: ignore[operator]
        set_aside.append(sum(report(model).seconds[phase] for phase in aside))

    with applied(model, method), torch.inference_mode():
        oracle = Oracle(plain, read_by(model, inputs))
        found = interleave(
            {
                "ours": timed(ours, lambda: settle(device)),
                "oracle": timed(lambda: oracle.generate(inputs, max_new_tokens=1), lambda: settle(device)),
            },
            rounds,
            warmup=2,
        )
    taken, best = (float(np.median(found[run]["seconds"])) for run in ("ours", "oracle"))
    taken -= FORGIVEN * (len(method.stages) + cuts) + float(np.median(set_aside))
    without = f", {' and '.join(aside)} aside," if aside else ""
    name = f"time to first token{without} over the oracle's"
    return LawResult(name, max(taken, 0.0) / best, ORACLE_BAR)
