"""What ZipAR's laws are by definition: the plain model, place by place, without a cache, on what each token sees."""

import itertools

import torch

from diffusion.autoregressive.visibility import visible
from diffusion.autoregressive.zipar_loop import ZipDecoding


def reference(model, prompts, grid, columns, windows, tested=False, end_of_row=None):
    """The logits of every place, [images, places, words].

    windows: by how many passes each row but the first began after the one above.  tested: whether first tokens were
    kept by a test one pass later, unless the row above was whole before.
    """
    starts = [0, *itertools.accumulate(windows)]
    drawn_in = torch.tensor([start + column for start in starts for column in range(columns)])
    found = []
    for place in range(grid.shape[1]):
        row, column = divmod(place, columns)
        now = starts[row] + column - 1 + int(tested and row > 0 and column == 0 and windows[row - 1] < columns)
        words = grid[:, :place].clone()
        if place and drawn_in[place - 1] > now:
            words[:, -1] = stand_in(grid, columns, drawn_in, row - 1, now) if end_of_row is None else end_of_row
        order = torch.arange(place)
        seen = (order <= order[:, None]) & (drawn_in[:place] <= drawn_in[:place, None])
        seen[-1:] = drawn_in[:place] <= now
        seen[-1:, -1:] = True
        found.append(seeing(model, torch.cat([prompts, words], dim=1), seen))
    return torch.stack(found, dim=1)


def stand_in(grid, columns, drawn_in, row, now):
    """The nearest token above the end of this row, or the first row's newest."""
    for above in range(row, -1, -1):
        if drawn_in[(above + 1) * columns - 1] <= now:
            return grid[:, (above + 1) * columns - 1]
    return grid[:, int((drawn_in[:columns] <= now).sum()) - 1]


def seeing(model, words, seen):
    """The last logits, where each token of the picture sees those, and all see the prompt."""
    whole = torch.ones(words.shape[1], words.shape[1], dtype=torch.bool).tril()
    whole[words.shape[1] - len(seen) :, words.shape[1] - len(seen) :] = seen
    with visible(model, whole.expand(len(words), -1, -1)) as mask, torch.no_grad():
        places = torch.arange(words.shape[1])[None].expand(len(words), -1)
        output = model(input_ids=words, attention_mask=mask, position_ids=places, use_cache=False)
    return output.logits[:, -1]


def recorded(monkeypatch):
    """The laws that each place's token was drawn by, or tested last, by place, once pictures are drawn."""
    laws, first, laws_of, tried = {}, ZipDecoding._first, ZipDecoding._laws, ZipDecoding._redrawn

    def _first(self):
        laws.clear()
        laws[0] = first(self)[:, 0]
        return laws[0][:, None]

    def _laws(self, places, seen):
        found = laws_of(self, places, seen)
        for at, place in enumerate(places):
            laws.setdefault(place + 1, found[:, at])
        return found

    def _redrawn(self, row, p, fresh, known):
        laws[row * self.columns] = p
        redrawn = tried(self, row, p, fresh, known)
        if redrawn:
            laws.pop(row * self.columns + 1)
        return redrawn

    for one in (_first, _laws, _redrawn):
        monkeypatch.setattr(ZipDecoding, one.__name__, one)
    return laws
