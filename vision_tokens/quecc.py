"""QueCC: a few visual tokens for each question, made by a small trained network from cells of the picture's grid.

Source: Li et al., "Inference Optimal VLMs Need Fewer Visual Tokens and More Parameters", ICLR 2025 (arXiv:2411.03312),
section 4, and its released code.  The network itself is `vision_tokens.query_compressor`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mmaccel import pocket
from mmaccel.budgets import Budget, kept_count
from mmaccel.methods import Unsupported
from vision_tokens.language_input import Condensing, QuestionMethod

if TYPE_CHECKING:
    from mmaccel.checks import LawResult

SHIPPED = "pocket-llava"
SHIPPED_TOKENS = (36, 16, 9)  # of its 144, by the weights that ship
LEVELS = (12, 16, 22, 23)  # of CLIP ViT-L, in the released code
TEMPLATE = (1, 5)  # LLaVA 1.5's newline, and "ASSISTANT:" in Llama's tokens


@dataclass(frozen=True, kw_only=True)
class QueCC(QuestionMethod):
    """Make, by a trained network, one visual token of each square of a picture's cells, for the question asked.

    weights: a safetensors file with the release's parameters (mm_projector.0.*), or "pocket-llava" for those that
        ship, trained for that model alone.  No released weights were published; the paper trains the projector and
        the language model along, and what ships was trained with both as they are.
    budget: the most tokens a picture may keep, as a fraction or a number.  The network makes
        (side / kernel)^2 of side^2; of those that ship, the largest that fits is taken: 36, 16 or 9 of 144.
    levels: the encoder's hidden states that keys and values are made of, 0 for what enters its first layer; None: as
        the file says, else the release's 12, 16, 22 and 23.
    template: how many of the prompt's tokens stand between the picture and the question, and how many behind the
        question, e.g. a newline and "ASSISTANT:"; None: as the file says, else LLaVA 1.5's (1, 5).
    The language model reads each row's question alone, all behind its last picture, and every picture of the row is
    made for it.  A later turn on the same cache sees the tokens that the first question made.  A token takes the
    position of the cell in the middle of its square; positions="packed" numbers them anew, as the release does.  The
    question's tokens are read as they stand in the prompt, where the release tokenises its text once more.
    """

    name: ClassVar[str] = "quecc"

    weights: str = SHIPPED
    budget: Budget = 0.25
    levels: tuple[int, ...] | None = None
    template: tuple[int, int] | None = None
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("levels", "template"):
            if (numbers := getattr(self, name)) is not None and (not numbers or min(numbers) < 0):
                raise ValueError(f"quecc's {name} names whole numbers from 0 up; got {numbers!r}")

    def condensing(self, side: int, width: int, text: int) -> Condensing:
        from vision_tokens.query_compressor import QueryCompressor
        from vision_tokens.weights import numbers_in

        total = side**2
        most = kept_count(self.budget, total)
        file = self._file(most)
        network, noted = QueryCompressor.load(file), numbers_in(file)
        levels = self.levels or noted.get("levels", LEVELS)
        before, behind = self.template or noted.get("template", TEMPLATE)
        other = f"the compressor in {self.weights!r} is for another model: it reads"
        if network.width != width or network.text != text:
            raise Unsupported(
                f"{other} features of width {network.width} and a language model's of {network.text}; this model's are "
                f"{width} and {text} wide"
            )
        if network.levels != width * len(levels):
            raise Unsupported(
                f"{other} {network.levels / width:g} hidden states of the encoder, and levels= names "
                f"{len(levels)}: {', '.join(map(str, levels))}"
            )
        if side % network.kernel:
            raise Unsupported(
                f"{other} squares of {network.kernel} x {network.kernel} cells, which do not tile this model's grid of "
                f"{side} x {side}"
            )
        if (made := (side // network.kernel) ** 2) > most:
            raise Unsupported(
                f"the compressor in {self.weights!r} makes {made} tokens of a picture's {total}, and the budget "
                f"{self.budget!r} has room for {most}; say budget={made}"
            )
        return Condensing(network, levels, (before, behind))

    def _file(self, most: int) -> Path:
        """The weights' file; of those that ship, the one that makes the most tokens within the budget."""
        if self.weights != SHIPPED:
            return Path(self.weights)
        fitting = [tokens for tokens in SHIPPED_TOKENS if tokens <= most]
        return pocket.path(SHIPPED) / f"quecc-{max(fitting, default=min(SHIPPED_TOKENS))}.safetensors"

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        from vision_tokens.laws import language_input_laws, oracle_law

        yield from language_input_laws(target, self, inputs)
        yield oracle_law(target, self, inputs, aside=("question", "compression"))
