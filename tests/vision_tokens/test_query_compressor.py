"""QueCC's compressor reproduces the released one, and reads its weights or says why not."""

import pytest
import torch
from safetensors.torch import save_file

from mmaccel import Unsupported
from tests.vision_tokens.golden import FOLDER, load
from vision_tokens.query_compressor import QueryCompressor


@pytest.mark.parametrize("kernel", [3, 4])
def test_the_compressed_tokens_are_the_released_code_s(kernel):
    tensors, _ = load(f"quecc/kernel_{kernel}")
    compressor = QueryCompressor.load(FOLDER / f"quecc/kernel_{kernel}.safetensors")
    assert compressor.kernel == kernel
    with torch.no_grad():
        made = compressor(tensors["features"], tensors["levels"], tensors["question"][:, 0])
    torch.testing.assert_close(made, tensors["compressed"], rtol=1e-5, atol=1e-6)


def test_a_token_sees_its_own_cell_and_the_question_alone():
    tensors, _ = load("quecc/kernel_3")
    compressor = QueryCompressor.load(FOLDER / "quecc/kernel_3.safetensors")
    features, levels, question = tensors["features"].clone(), tensors["levels"].clone(), tensors["question"][:, 0]
    features[:, 0], levels[:, 13] = 0, 0  # both in the first cell of 3 x 3 on a grid of 12 x 12
    with torch.no_grad():
        plain = compressor(tensors["features"], tensors["levels"], question)
        other, asked = compressor(features, levels, question), compressor(features, levels, question.flip(0))
    changed = (plain != other).any(dim=-1)
    assert changed[:, 0].all() and not changed[:, 1:].any()
    assert (asked != other).any(dim=-1).all()


def test_grids_that_do_not_tile_and_files_without_a_compressor_are_refused(tmp_path):
    compressor = QueryCompressor(16, 64, 32, kernel=5)
    with pytest.raises(ValueError, match=r"cells of 5 x 5 tokens tile square grids.*got 144 tokens"):
        compressor(torch.zeros(1, 144, 16), torch.zeros(1, 144, 64), torch.zeros(1, 32))
    file = tmp_path / "w.safetensors"
    save_file({"mm_projector.0.q_proj.0.weight": torch.ones(2, 2)}, file)
    with pytest.raises(Unsupported, match=r"holds no QueCC compressor: it lacks mm_projector.0.k_proj.0.weight"):
        QueryCompressor.load(file)
    whole = {f"mm_projector.0.{name}": value for name, value in compressor.state_dict().items()}
    save_file({name: value for name, value in whole.items() if not name.endswith("out_proj.bias")}, file)
    with pytest.raises(Unsupported, match=r"holds no whole QueCC compressor: .*Missing key"):
        QueryCompressor.load(file)
