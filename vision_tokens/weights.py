"""Trained parameters that a method brings along, from the user's safetensors files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from mmaccel.methods import Unsupported


def tensors_under(prefix: str, file: Path | str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names have this prefix, perhaps behind another, by the rest of the name.

    Raises `Unsupported` if there is no such file, or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(file).is_file():
        raise Unsupported(f"there is no file {str(file)!r}; weights= names a safetensors file")
    try:
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if prefix in name]  # noqa: SIM118  # no mapping
            return {name.split(prefix, 1)[1]: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise Unsupported(f"{str(file)!r} is no safetensors file ({error}); convert it first") from None


def numbers_in(file: Path | str) -> dict[str, tuple[int, ...]]:
    """The whole numbers that a safetensors file's metadata notes with spaces between, by name."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        noted = {name: text.split() for name, text in (opened.metadata() or {}).items()}
    return {name: tuple(map(int, parts)) for name, parts in noted.items() if all(map(str.isdecimal, parts))}


def fill(module: nn.Module, tensors: dict[str, Tensor], kind: str, file: Path | str) -> None:
    """Loads all parameters of a module, which is then ready for inference.

    kind: what the file should hold, for the message.  Raises `Unsupported` if a tensor lacks, is one too many, has
    another shape, or holds a value that is no finite number.
    """
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise Unsupported(
            f"{str(file)!r} holds NaN or infinite numbers in {broken[0]} of its {kind}; its training diverged, or the "
            "file was converted to a type too narrow for it"
        )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise Unsupported(f"{str(file)!r} holds no whole {kind}: {' '.join(str(error).split())}") from None
    module.requires_grad_(False).eval()
