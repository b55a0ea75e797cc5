"""ToMe: merge similar tokens inside the vision encoder, a few in every block.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023 (arXiv:2210.09461), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Bool
from torch import Tensor, nn

from mmaccel.budgets import Budget, keeps_all, kept_count
from mmaccel.methods import Unsupported
from vision_tokens.encoder_merging import EncoderMerging
from vision_tokens.encoding import is_running_dense
from vision_tokens.families import find_host
from vision_tokens.language_input import SelectingMethod
from vision_tokens.layout import ImageView
from vision_tokens.prompts import refuse_places

if TYPE_CHECKING:
    from mmaccel.attachment import Attachment


@dataclass(frozen=True, kw_only=True)
class ToMe(SelectingMethod):
    """Merge similar visual tokens inside the encoder, which gets cheaper, too.

    budget: fraction of a picture's tokens that leaves the encoder, in (0, 1], or their number; of a tiled image, each
        tile's.  The paper's r, merges per block, is (1 - budget) * tokens / blocks.
    inflection: in [-1, 1]; below 0 early blocks merge more (at -1 the last none), above 0 late ones.
    proportional: whether attention counts a token as often as the patches that it stands for.
    Merging ends at the block whose output the language model reads.  A token sits on the first of its cells; families
    that shuffle patches into tokens (SmolVLM, Idefics3) save encoder time alone.

    With a method for the language input, ToMe only makes the encoder cheaper, and the other chooses among the tokens
    left: its fraction is one of these.  What it reads of the encoder is un-merged to the grid: a cell has an equal
    share of the attention that its token gets, and a copy of its key and feature.
    """

    name: ClassVar[str] = "tome"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "llava-1.5-64": {"budget": 64},
        "llava-1.5-128": {"budget": 128},
        "llava-1.5-192": {"budget": 192},
    }
    stages: ClassVar[tuple[str, ...]] = ("vision",)

    budget: Budget = 0.5
    inflection: float = 0.0
    proportional: bool = True
    positions: Literal["kept", "packed"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.inflection <= 1:
            raise ValueError(f"the inflection lies in [-1, 1]; got {self.inflection!r}. The paper's are 0 and -1")

    def attach(self, target: Any, attachment: Attachment) -> None:
        if not keeps_all(self.budget):
            host = find_host(target)
            blocks = host.family.feature_layer(host.multimodal, len(host.attention_modules)) + 1

            def counts(patches: int) -> list[int]:
                return merges(patches, kept_count(self.budget, patches), blocks, self.inflection)

            EncoderMerging(self.name, host, counts, self.proportional).attach(attachment)
        if not any("prefill" in method.stages for method in attachment.methods):
            super().attach(target, attachment)
        elif not keeps_all(self.budget):
            attachment.pre_hook(target, self._refuse_places)

    def _refuse_places(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """As the method for the language input does, which may keep all that is left and so have no reason to."""
        if not is_running_dense():
            refuse_places(self, kwargs)

    def select(self, view: ImageView) -> Bool[Tensor, "partitions cells"]:
        return view.layout.valid()


def merges(patches: int, kept: int, blocks: int, inflection: float = 0.0) -> list[int]:
    """How many tokens each block merges away, so that `kept` of `patches` are left.

    What rounding leaves over goes to the first blocks.  A block can merge half of its tokens away: what is too much
    goes to the next, and what would be too much for those that follow is merged before.  Raises Unsupported if
    the blocks cannot merge so many.
    """
    if kept < (fewest := -(-patches // 2**blocks)):
        raise Unsupported(
            f"tome: {blocks} blocks, each of which can merge half of its tokens away, cannot bring {patches} tokens "
            f"down to {kept}; ask for at least {fewest}"
        )
    planned = schedule(blocks, (patches - kept) / blocks, inflection)
    over = patches - kept - sum(planned)
    planned = [count + over // blocks + (block < over % blocks) for block, count in enumerate(planned)]
    counts: list[int] = []
    left = patches
    for block in range(blocks):
        due, needed = sum(planned[: block + 1]) - sum(counts), left - kept * 2 ** (blocks - block - 1)
        counts.append(min(max(due, needed, 0), left // 2))
        left -= counts[-1]
    return counts


def schedule(blocks: int, merged: float, inflection: float = 0.0) -> list[int]:
    """The released code's counts: linear over the blocks around a mean of `merged`, rounded down.

    The first block merges merged * (1 - inflection), the last as much more than the mean as the first does less.
    """
    first = int(merged * (1 - inflection))
    step = (2 * merged - 2 * first) / max(1, blocks - 1)
    return [int(first + step * block) for block in range(blocks)]
