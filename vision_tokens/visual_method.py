"""What the methods for vision-language models have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from mmaccel.methods import Method


class VisualMethod(Method):
    """Base of the methods for vision-language models: their example is a question about a picture."""

    ranks_by_all: ClassVar[bool] = False  # whether `score` reads whole matrices, O(n^2) time, and not a few rows

    def example(self, target: Any, processor: Any) -> dict[str, Any]:
        """A picture and a question about it, as the processor prepares them for the model."""
        from PIL import Image

        from mmaccel.pocket.world import held_out

        pixels, _ = next(iter(held_out(1)))
        picture = Image.fromarray(pixels).resize((448, 336))
        conversation = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]}
        ]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = processor(images=[picture], text=text, return_tensors="pt")
        weights = next(target.parameters())
        return {
            name: value.to(weights.device, weights.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
