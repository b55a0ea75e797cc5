"""What an outsider counts: FLOPs of a module's calls, bytes of a cache."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils.flop_counter import FlopCounterMode

from mmaccel.flops import FLOP_RULES


@contextmanager
def counted_flops(module) -> Iterator[list[int]]:
    """The FLOPs of each of the module's calls, by PyTorch's counter."""
    counted, plain = [], type(module).forward

    def count(*args, **kwargs):
        with FlopCounterMode(display=False, custom_mapping=FLOP_RULES) as counter:
            out = plain(module, *args, **kwargs)
        counted.append(counter.get_total_flops())
        return out

    module.forward = count
    try:
        yield counted
    finally:
        del module.forward


def bytes_of(cache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
