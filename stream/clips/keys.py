"""Which units a clip may begin with: those that need none before them. Pure."""

import re

_IDR_BEHIND_START_CODE = re.compile(rb"\x00\x00\x01[\x05\x25\x45\x65]")
_IDR = 5


class Keys:
    """Of one decoder's input.

    GStreamer counts every H.264 picture that holds no other as a key. What follows it may still be made of what lay
    before, unless it is an IDR. Some broadcasters never send one: then there is nothing better.
    """

    def __init__(self) -> None:
        self._has_idr = False  # at all

    def is_key(self, data: bytes, caps: str, *, delta: bool) -> bool:
        """caps: the format of the unit; delta: GStreamer says that it needs others."""
        if delta or not caps.startswith("video/x-h264"):
            return not delta
        is_idr = _holds_idr(data, lengths="stream-format=(string)avc" in caps)
        self._has_idr |= is_idr
        return is_idr or not self._has_idr


def _holds_idr(data: bytes, *, lengths: bool) -> bool:
    """lengths: each part of the unit has its length before it, in 4 bytes; otherwise they begin with a start code."""
    if not lengths:
        return _IDR_BEHIND_START_CODE.search(data) is not None
    at = 0
    while at + 4 < len(data):
        if data[at + 4] & 31 == _IDR:
            return True
        at += 4 + int.from_bytes(data[at : at + 4])
    return False
