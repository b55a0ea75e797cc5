"""The mechanism of methods that make a picture's tokens with the question in view.

When the multimodal model is called with the prompt, the language model reads each row's question alone, a network makes
tokens of the features that waited (`vision_tokens.held_features`), and the model's own projector takes them.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmaccel.flops import count_flops
from mmaccel.reports import Quantity
from vision_tokens.attention_rows import settle
from vision_tokens.encoding import running_dense
from vision_tokens.families import Host
from vision_tokens.gathering import copies_of
from vision_tokens.held_features import Held
from vision_tokens.prefill_cost import prefill_flops
from vision_tokens.prompts import padding_of, placeholders_in


def answered(host: Host, output: Any, inputs: Mapping[str, Any]) -> Any:
    """The encoder's output for these arguments of the multimodal model, with tokens in it that were made for them.

    The given output keeps waiting: another prompt may ask about the same pictures.  Pictures of one row are all made
    for what follows the last of them; `generate` repeats a prompt for beams and samples, which share its tokens.
    """
    encoded = output.mmaccel
    held: Held = encoded.held
    settle(held.features.device)
    start = time.perf_counter()
    places = placeholders_in(host, inputs)
    copies = copies_of(places, encoded)
    pictures = places[::copies].sum(dim=-1) // held.features.shape[1]
    rows = pictures.nonzero().flatten()
    questions = questions_of(host, inputs, places, rows * copies, held.condensing.template)
    states = read_alone(host, questions)
    settle(states.device)
    read = time.perf_counter()
    asked = states.to(held.features).repeat_interleave(pictures[rows].to(states.device), dim=0)
    network = held.condensing.network.to(held.features.device, held.features.dtype)
    made = host.multimodal.get_submodule(str(host.family.image.projector))(network(held.features, held.levels, asked))
    if bool(made.isnan().any()):
        raise ValueError(
            "the tokens that were made for the question hold NaN; look for NaN in pixel_values, and for overflow if "
            "the model runs in float16 (bfloat16 has the range)"
        )
    settle(made.device)
    found, longest = copy.copy(output), max(map(len, questions))
    found.pooler_output = on_seats(made, encoded.keep, pictures.tolist(), copies)
    figures = {
        "question_flops": Quantity(functools.partial(prefill_flops, host.text, len(rows), longest), 0, "FLOP"),
        "compression_flops": Quantity(functools.partial(network_flops, held), 0, "FLOP"),
    }
    seconds = {"question": read - start, "compression": time.perf_counter() - read}
    found["mmaccel"] = replace(encoded, held=None, figures={**encoded.figures, **figures}, phases=seconds)
    return found


def on_seats(
    made: Float[Tensor, "pictures kept width"], seats: list[Bool[Tensor, " _"]], groups: list[int], copies: int
) -> list[Float[Tensor, "_ width"]]:
    """Each picture's tokens on its seats, zeros elsewhere; the pictures of each prompt, by `groups`, so many times."""
    tokens = [made.new_zeros(len(own), made.shape[-1]) for own in seats]
    for picture, own, part in zip(tokens, seats, made, strict=True):
        picture[own] = part
    left = iter(tokens)
    return [picture for count in groups for picture in [next(left) for _ in range(count)] * copies]


def questions_of(
    host: Host,
    inputs: Mapping[str, Any],
    places: Bool[Tensor, "batch new"],
    rows: Int[Tensor, " asked"],
    template: tuple[int, int],
) -> list[Float[Tensor, "length width"]]:
    """For each of these rows the embeddings of what is asked behind its last picture, after the one that begins a text.

    template: how many tokens between the picture and the question, and at the prompt's end, are not the question's.
    Raises ValueError for a row that asks nothing.
    """
    embed: Any = host.text.get_input_embeddings()  # type: ignore[operator]
    embeddings: Tensor = embed(inputs["input_ids"]) if inputs.get("inputs_embeds") is None else inputs["inputs_embeds"]
    real = padding_of(inputs.get("attention_mask"), places.shape[1])
    first, last = template
    begin = getattr(host.text.config, "bos_token_id", None)
    opening = embed(torch.tensor([] if begin is None else [begin], dtype=torch.long, device=embeddings.device))
    questions = []
    for row in rows.tolist():
        shown = torch.ones_like(places[row]) if real is None else real[row].to(places.device)
        behind = shown.clone()
        behind[: int(places[row].nonzero().max()) + 1] = False
        text = embeddings[row][behind]
        question = text[first : len(text) - last]
        if not len(question):
            raise ValueError(
                f"row {row} of the prompt has {len(text)} tokens behind its last picture, of which {first} + {last} "
                "are the template's, so it asks nothing that tokens could be made for; put the question behind the "
                "picture, or say in template= how many tokens around it are not its own"
            )
        questions.append(torch.cat([opening.to(question), question]))
    return questions


def read_alone(host: Host, questions: list[Float[Tensor, "_ width"]]) -> Float[Tensor, "questions width"]:
    """The language model's last hidden state at the end of each text, read without the pictures, all in one forward."""
    lengths = torch.tensor([len(question) for question in questions], device=questions[0].device)
    padded = pad_sequence(questions, batch_first=True)  # on the right, where a causal model does not look
    mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
    with running_dense():
        states: Tensor = host.text(inputs_embeds=padded, attention_mask=mask.long(), use_cache=False).last_hidden_state
    return states[torch.arange(len(states), device=states.device), lengths.to(states.device) - 1]


def network_flops(held: Held) -> int:
    """Floating-point operations of the network on all pictures, counted on a twin on the meta device."""
    twin = copy.deepcopy(held.condensing.network).to("meta")
    shapes = (held.features.shape, held.levels.shape, (len(held.features), held.condensing.network.text))
    with torch.no_grad():
        return count_flops(lambda: twin(*(torch.empty(shape, device="meta") for shape in shapes)))
