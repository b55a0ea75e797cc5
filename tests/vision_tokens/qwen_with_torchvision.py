"""Run in a process of its own, with a torchvision on its path: Qwen2.5-VL through its real processor.

Usage: python qwen_with_torchvision.py TORCHVISION_FOLDER CHECKPOINT_FOLDER
"""

import json
import sys
from pathlib import Path

import torch

# A torchvision that was built for another torch still imports if the operators that it registers fakes for exist.
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.path.insert(0, sys.argv[1])

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

import mmaccel  # noqa: E402
from tests.vision_tokens.tiny import IMAGE, VIDEO, build  # noqa: E402
from vision_tokens import HiRED  # noqa: E402
from vision_tokens.loading import load  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
)


def save(folder: Path) -> None:
    """A tiny random model and a processor of the real classes, as a checkpoint folder."""
    words = {"<pad>": 0, "<|vision_start|>": 5, "<|vision_end|>": 6, "<unk>": 7, "answer": 8}
    words |= {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
    words |= {f"word{number}": number for number in range(100) if number not in words.values()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": [word for word in words if word.startswith("<|")]})
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64 * 64, "max_pixels": 160 * 160}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), fast, Qwen2VLVideoProcessor(**sizes), chat_template=TEMPLATE
    ).save_pretrained(folder)
    build("qwen2_5_vl").save_pretrained(folder)


folder = Path(sys.argv[2])
save(folder)
model, processor = load(folder)
model.generation_config.eos_token_id = None
report = mmaccel.check(model, HiRED(budget=0.2), processor)
print(json.dumps({law.law: law.measured for law in report.laws}))
