"""The shapes in annotations are checked while tests run, in the packages themselves."""

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from tests.shapes import checked
from vision_tokens.hired import keep_best


@jaxtyped(typechecker=checked)
def scale(rows: list[Float[Tensor, "length width"]], by: float) -> Float[Tensor, " length"]:
    return torch.stack(rows).sum(dim=(0, 2)) * by


def test_a_wrong_shape_is_found_in_containers_and_results():
    assert scale([torch.ones(2, 3)], 2).tolist() == [6, 6]
    with pytest.raises(TypeCheckError):
        scale([torch.ones(2)], 2)
    with pytest.raises(TypeCheckError):
        scale([torch.ones(2, 3)], torch.ones(2, 1))


def test_the_packages_run_under_the_check():
    with pytest.raises(TypeCheckError):
        keep_best(torch.rand(2, 3), torch.tensor([1, 1, 1]))
