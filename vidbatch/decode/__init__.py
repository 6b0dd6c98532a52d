"""Clip → Frames: skips what nobody needs, scales, turns upright, counts damage. See `clip`."""

from vidbatch.decode.clip import decode_clip

__all__ = ["decode_clip"]
