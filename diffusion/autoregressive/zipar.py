"""ZipAR: rows of a picture of discrete tokens, drawn side by side.  Lossy: the ends of the rows above are missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffusion.autoregressive.token_methods import TokenMethod
from mmaccel.attachment import Attachment
from mmaccel.checks import LawResult
from mmaccel.methods import Unsupported

if TYPE_CHECKING:
    from torch import Tensor

    from diffusion.autoregressive.zipar_loop import ZipDecoding


@dataclass(frozen=True, kw_only=True)
class ZipAR(TokenMethod):
    """Draw a token of several rows of a picture in every pass.  **Lossy**: tokens see less of the rows above them.

    window: a row begins when the row above it has so many tokens; the least, with `adaptive`.  The token of row i and
    column j sees, of row i - 1, the columns before j + window; of row i - 2, those before j + 2 window, and so on.
    From the picture's width on nothing is missing, and it is plain decoding.
    adaptive: the first token of a row is tested against its law given one token more of the row above, and kept or
    redrawn as in speculative decoding, which leaves it with that law; a redrawn one makes its row wait, with a growing
    window, for another test.  The pictures of a batch wait for each other.
    row_length: tokens in a row, words that end it included; None for a square picture.
    end_of_row: the word that ends every row, in models that have one; it stands in, at its place, for the end of a row
    that is not there yet, where the first token of the next row is drawn.  None: the nearest token above does.

    A picture takes `columns + window (rows - 1)` passes in place of `columns * rows`, and what `adaptive` adds: see
    `passes`.  The report says how much was `missing`: of the picture's tokens before a token, the share that it was
    drawn without.

    For models whose `generate` decodes an image, and whose forward takes positions and masks (ImageGPT, and causal
    language models such as Llama and Emu3).  Guidance: pass `guidance_scale` and `negative_prompt_ids` of the prompt's
    length.  Processors that read the tokens so far see the nearest token above in place of one that is missing.
    Where we differ from the released code for LlamaGen: that has no adaptive windows; it draws the first row alone; the
    newest token of the row above stands in; and tokens attend to it, and to places that are still empty, where here no
    token does.  Source: arXiv:2412.04062.
    """

    name: ClassVar[str] = "zipar"

    window: int = 16
    adaptive: bool = True
    row_length: int | None = None
    end_of_row: int | None = None

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(
                f"window is a number of tokens from 1 up; got {self.window!r}. A row's length is plain decoding"
            )
        if self.row_length is not None and self.row_length < 1:
            raise ValueError(f"row_length is a number of tokens from 1 up; got {self.row_length!r}")
        if self.end_of_row is not None and self.end_of_row < 0:
            raise ValueError(f"end_of_row is a word of the model, from 0 up, or None; got {self.end_of_row!r}")

    def decoding(self, negative: Tensor | None, guidance: float) -> ZipDecoding:
        from diffusion.autoregressive.zipar_loop import ZipDecoding

        return ZipDecoding(self, negative, guidance)

    def attach(self, target: Any, attachment: Attachment) -> None:
        from diffusion.autoregressive.visibility import take_masks

        super().attach(target, attachment)
        words = target.config.get_text_config().vocab_size
        if self.end_of_row is not None and self.end_of_row >= words:
            raise Unsupported(
                f"end_of_row={self.end_of_row} is no word of this model, whose words are 0 to {words - 1}; name "
                "the one that its rows end with, or None"
            )
        take_masks(self.name, target, attachment)

    def laws(self, target: Any, inputs: Mapping[str, Any]) -> Iterable[LawResult]:
        """What makes the decoding right, on this model."""
        from diffusion.autoregressive.zipar_laws import zipar_laws

        return zipar_laws(self, target, inputs)

    def example(self, target: Any, processor: Any) -> dict[str, Any]:
        """A picture of three rows, or of five by five tokens."""
        tokens = 25 if self.row_length is None else 3 * self.row_length
        return {**super().example(target, processor), "max_new_tokens": tokens}


def passes(rows: int, columns: int, window: int) -> int:
    """How many passes a picture takes: columns + window (rows - 1).

    Every pass draws a token of each row that has begun and is not full, so a row takes `columns` passes.  Row i begins
    in the pass after that which drew token `window` of row i - 1, so `window` passes after it; a row cannot wait for
    more than the whole row above, so the window is at most `columns`.  The last row begins after window (rows - 1)
    passes.  The first pass reads the prompt.

    With `adaptive` every pass that rejects a token makes its row wait for one more: the sum of the rows' windows stands
    in place of window (rows - 1).  A token is tested in the pass after that which drew it, so windows are at least 2
    then, but for the second row's, and where rows have one token.
    """
    return columns + min(window, columns) * (rows - 1)
