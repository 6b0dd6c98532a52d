"""What is known of one clip while its task runs, and how it ended in each output."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vidbatch.data import AudioEnd, Clip, ClipEnd, Failure, Outcome, Output, VideoInfo
from vidbatch.tables import redact


@dataclass(slots=True)
class ClipState:
    """Facts that gather clip by clip."""

    clip: Clip
    end: ClipEnd | None = None
    sound: AudioEnd | None = None
    """Null where no model of the task is of sound."""
    failure: Failure | None = None
    model_failures: dict[str, Failure] = field(default_factory=dict)
    """By fingerprint of the output."""
    frames: int = 0
    attempts: int = 1
    seconds: float = 0.0
    """Of reading and decoding, all attempts."""
    bytes_read: int = 0
    gets: int = 0
    """Those for the beginning of the next clip are among them."""

    def forget(self) -> None:
        """The clip is decoded again from its beginning."""
        self.frames, self.end, self.sound = 0, None, None
        self.model_failures.clear()

    def outcome(self, output: Output, *, info: VideoInfo | None, device: str) -> Outcome:
        """How it ended in an output.

        Args:
            info: of its video, where the headers could be read.
            device: that models ran on.
        """
        clip, end = self.clip, self.end
        failure = self.failure or self.model_failures.get(output.fingerprint)
        if end is None:
            known_end = info.duration_s if info and info.duration_s else clip.start_s
            end_s = clip.end_s if clip.end_s is not None else max(known_end, clip.start_s)
            end_frame = clip.end_frame if clip.end_frame is not None else clip.start_frame
            end = ClipEnd(
                status="ok", reason=None, kind=None, start_s=clip.start_s, end_s=end_s,
                start_frame=clip.start_frame, end_frame=end_frame, frames_decoded=0,
                decode_errors=0, corrupt_frames=0, fallback=None,
            )  # fmt: skip
        facts: dict[str, Any] = {
            "clip": clip, "start_s": end.start_s, "end_s": end.end_s,
            "start_frame": end.start_frame, "end_frame": end.end_frame,
            "frames_decoded": end.frames_decoded, "decode_errors": end.decode_errors,
            "corrupt_frames": end.corrupt_frames, "fallback": end.fallback,
            "device": "cpu" if output.spec is None else device,
            "attempts": self.attempts,
        }  # fmt: skip
        if failure is not None:
            return Outcome(
                status="failed", frames=0, reason=failure.message, stage=failure.stage,
                kind=failure.kind, advice=failure.advice, retryable=failure.retryable, **facts,
            )  # fmt: skip
        sound = self.sound if output.spec is not None and output.spec.audio else None
        if sound is not None and sound.reason is not None:
            return Outcome(
                status="partial", frames=self.frames, reason=redact(sound.reason), stage="decode",
                kind=sound.kind, advice="its good sound is kept; final until the object changes",
                **facts,
            )  # fmt: skip
        if end.status == "partial":
            return Outcome(
                status="partial", frames=self.frames, reason=redact(end.reason or ""),
                stage="decode", kind=end.kind,
                advice="its good frames are kept; final until the object changes", **facts,
            )  # fmt: skip
        return Outcome(status="ok", frames=self.frames, **facts)
