"""Run in a process of its own, with a torchvision on its path: pi0 through its real processor.

Usage: python pi0_with_torchvision.py TORCHVISION_FOLDER
"""

import json
import sys

import torch

# A torchvision that was built for another torch still imports if the operators that it registers fakes for exist.
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.insert(0, sys.argv[1])

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PI0ImageProcessor, PI0Processor, PreTrainedTokenizerFast  # noqa: E402

import mmaccel  # noqa: E402
from robotics import PI0Inputs, PI0Policy, VLAPruner  # noqa: E402
from tests.robotics.tiny import CAMERAS, DIMS, PATCHES, build_pi0, observation  # noqa: E402
from tests.vision_tokens.tiny import IMAGE  # noqa: E402


def processor() -> PI0Processor:
    """The real classes around a tokenizer of a hundred words."""
    words = {"<pad>": 0, "<bos>": 1, "<unk>": 7, "<image>": IMAGE}
    words |= {f"word{number}": number for number in range(100) if number not in words.values()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = PI0ImageProcessor(
        size={"max_height": 48, "max_width": 48}, pad_size={"height": 48, "width": 48}, image_seq_length=PATCHES
    )
    return PI0Processor(
        images, fast, state_mean=[0.0] * 5, state_std=[1.0] * 5, max_state_dim=5, chunk_size=6,
    )  # fmt: skip


def main() -> None:
    policy = PI0Policy(build_pi0(), PI0Inputs(processor(), CAMERAS), cameras=CAMERAS, dims=DIMS)
    policy.reset()
    padded = {"wrist": torch.tensor([False, True])}
    with mmaccel.applied(policy, VLAPruner(kept_share=0.25, layer=2, window=1)):
        for step in range(2):
            inputs = policy.observe(observation(2, step, padded=padded))
            chunk = policy.act(inputs, torch.Generator().manual_seed(0))
        steps = mmaccel.report(policy).facts["steps"]
    seen = observation(2, 1, padded=padded)
    given = inputs.model["pixel_values"]
    made = given[0, 1] * 0.5 + 0.5
    refused = ""
    try:
        policy.observe(observation(2, padded={"top": torch.tensor([True, False])}))
    except ValueError as error:
        refused = str(error)
    print(
        json.dumps(
            {
                "pictures": float((made - seen.images["wrist"][0]).abs().max()),
                "shown": inputs.model["pixel_attention_mask"].tolist(),
                "state": float((inputs.model["state"] - seen.state).abs().max()),
                "actions": list(chunk.actions.shape),
                "kept": [row["kept"] for row in steps],
                "refused": refused,
            }
        )
    )


main()
