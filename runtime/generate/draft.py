"""Drafts for speculative decoding by prompt lookup: what followed the last few tokens earlier in the text.

Saxena, "Prompt Lookup Decoding" (2023). No second model: where a text quotes, edits or repeats itself,
several tokens are read in one pass, which costs little more than one. Drafts never change the text, only its
pace.
"""

from __future__ import annotations

from array import array

import numpy as np

LONGEST_DRAFT = 16  # by default
MOST_DRAFTED = 32

_REACH = 1 << 16  # tokens before the end that are looked at
_LEAST_MATCH, _MOST_MATCH = 2, 16
_MOST_UNREAD = 8
# In steps of one token: reading a token more in a pass, and a pass on trial beside a plain one. Measured with
# this package's own operators; onnxruntime's take almost twice as long, so that the share below is small.
_TOKEN, _TRIAL = 0.09, 0.05
# What drafts may cost a text in which nothing repeats: so much at once, and this share of its steps.
_AT_ONCE, _SHARE = 0.8, 0.015
_MOST_SAVED = 3.0


class Drafter:
    """Proposes tokens for one text, as many as pays.

    Drafts live on an account in steps: what is accepted is paid in, what is read in vain is taken out, and a
    small share of every step is lent. So a text in which nothing repeats loses no more than that share, and
    one that repeats is drafted from at once.
    """

    def __init__(self, longest: int = LONGEST_DRAFT) -> None:
        self.longest = longest
        self._length = min(3, longest)
        self._account = _AT_ONCE

    def propose(self, tokens: array[int], unread: int, room: int) -> list[int]:
        """Up to `room` tokens that may follow `tokens`, of which the model has still to read `unread`."""
        self._account = min(self._account + _SHARE, _MOST_SAVED)
        length = min(self._length, room)
        while length > 0 and _cost(length, 0) > self._account:
            length -= 1
        if length <= 0 or unread > _MOST_UNREAD:
            return []
        return following(tokens, length)

    def report(self, drafted: int, accepted: int) -> None:
        self._account = min(self._account + accepted - _cost(drafted, accepted), _MOST_SAVED)
        self._length = min(2 * drafted, self.longest) if accepted == drafted else max(1, accepted)


def _cost(drafted: int, accepted: int) -> float:
    """Steps that a draft costs beside the step that would have been made without it."""
    again = _TRIAL + _TOKEN * (accepted + 1) if accepted < drafted else 0.0
    return _TRIAL + _TOKEN * drafted + again


def following(tokens: array[int], count: int) -> list[int]:
    """The `count` tokens after the place that the end of `tokens` is most like, [] if none is.

    The longest match wins, of equals the last; where a text repeats itself its period is gone on with.
    """
    text = np.frombuffer(tokens, np.uint32)[-_REACH:]
    ends = np.flatnonzero(text[:-1] == text[-1])
    matched = 1
    while ends.size and matched < _MOST_MATCH:
        longer = ends[ends >= matched]
        longer = longer[text[longer - matched] == text[-1 - matched]]
        if not longer.size:
            break
        ends, matched = longer, matched + 1
    if not ends.size or matched < _LEAST_MATCH:
        return []
    found: list[int] = np.resize(text[ends[-1] + 1 :][:count], count).tolist()
    return found
