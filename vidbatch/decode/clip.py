"""decode_clip: one clip from bytes to Frames, skipping what can be proven unneeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from vidbatch.data import (
    ByteSource,
    Clip,
    ClipEnd,
    DecodeEvent,
    DecodeLimits,
    Geometry,
    Sample,
    VideoInfo,
)
from vidbatch.decode.inorder import CountedPlaces, TablePlaces, decode_in_order
from vidbatch.decode.pixels import Scaler, orientation
from vidbatch.decode.planned import Plan, Planned, number_packets
from vidbatch.decode.rows import RowBuffer
from vidbatch.decode.skipping import Runner, choose, read_gops
from vidbatch.decode.tally import (
    ContextLostError,
    IndexMismatchError,
    Selection,
    Shown,
    SkippingFailedError,
    Tally,
)
from vidbatch.decode.verdict import gather, judge, nothing_decoded
from vidbatch.errors import MediaError
from vidbatch.media import (
    OpenVideo,
    PacketTable,
    inspector,
    open_video,
    promised_packets,
    read_packet_table,
)
from vidbatch.sampling import Clock, Sampler


def decode_clip(
    source: ByteSource,
    clip: Clip,
    *,
    sample: Sample,
    geometries: Sequence[Geometry],
    context: bool,
    limits: DecodeLimits,
    halo: int = 0,
    following: Clip | None = None,
) -> Iterator[DecodeEvent]:
    """Decodes one clip: yields one VideoInfo, then Frames in display order, then one ClipEnd.

    Args:
        source: The video's object, pinned to the version that was planned.
        clip: Which keyframes of it; anything but the whole video needs a trusted packet table.
        sample: Which frames become rows, anchored at the video.
        geometries: One array per distinct one; none gives rows without pixels.
        context: Whether each chunk but the video's first begins with the sampled frame before it.
        limits: Bounds of one chunk and of one picture.
        halo: Sampled frames after the clip's end that come too, as far as the video goes.
        following: The clip of this video that is decoded next, if one is: its first bytes are
            wanted behind those of this one.

    Raises:
        MediaError: no row can come of this clip (kinds in `media`, and `index_mismatch`).
        StoreError: the bytes could not be had.
    """
    table = _table(source, clip, limits)
    if table is None and not clip.whole:
        raise MediaError(
            "the clip is a part of a video whose index cannot be trusted; it is not written",
            kind="index_mismatch",
            advice="plan the video again",
        )
    plan = None if table is None else Plan(table, clip, sample, context, halo)
    rows = RowBuffer(
        Scaler(geometries),
        limits,
        first=clip.start_frame,
        context=context,
        end=plan.end_frame if plan and halo else None,
        ordinals=plan.ordinals if plan else None,
    )
    skip, fallback = True, None
    while True:
        source.want(plan.extents(source.size_bytes, following, skip=skip) if plan else [])
        with open_video(source, max_pixels=limits.max_pixels) as video:
            if plan is None:
                source.want([(0, source.size_bytes)])  # now that it is a video: in order, all of it
            work = _Pass(source, video, sample, rows, plan)
            try:
                yield from work.skipping() if skip else work.in_order()
                yield from work.finish(fallback)
                return
            except SkippingFailedError as error:
                if not (error.by_codec and sample.kind == "all"):
                    fallback = str(error)
                skip = False
            except ContextLostError:
                if plan is not None and not plan.look_back():
                    plan.context = []
            except IndexMismatchError as error:
                if not clip.whole or plan is None:
                    raise MediaError(
                        "packets are not where the container's index says; the clip is not written",
                        kind="index_mismatch",
                        advice="nothing: the file contradicts itself",
                    ) from error
                plan, skip, fallback = None, True, "packets are not where the index says"
        rows.start_over(planned=plan is not None)


_latest: tuple[tuple[str, int], PacketTable] | None = None
"""The packet table of the video whose part was decoded last: its other parts come next."""


def _table(source: ByteSource, clip: Clip, limits: DecodeLimits) -> PacketTable | None:
    global _latest
    known, key = _latest, (clip.video.video_id, source.size_bytes)
    if known is not None and known[0] == key:
        return known[1]
    table, _ = read_packet_table(source, max_pixels=limits.max_pixels)
    if table is not None and not clip.whole:
        _latest = (key, table)
    return table


class _Pass:
    """One way through the clip's packets."""

    def __init__(
        self,
        source: ByteSource,
        video: OpenVideo,
        sample: Sample,
        rows: RowBuffer,
        plan: Plan | None,
    ) -> None:
        self._source = source
        self._video = video
        self._reopen = partial(open_video, source, max_pixels=video.max_pixels)
        self._sample = sample
        self._rows = rows
        self._plan = plan
        self._tally = Tally()
        self._start_pts = None if plan is None else plan.origin_pts
        self._clock = Clock(video.time_base, video.rate, self._start_pts)
        self._inspector = inspector(video.codec, video.stream.codec_context.extradata)
        self._upright: tuple[int, int, int] | None = None
        self._expected = None if plan is not None else promised_packets(source, video)

    def skipping(self) -> Iterator[DecodeEvent]:
        """Decodes what rows need. Raises SkippingFailedError."""
        video = self._video
        inspect, why = self._inspector
        if inspect is None:
            raise SkippingFailedError(why, by_codec=True)
        plan = self._plan
        runner = Runner(
            video,
            self._reopen,
            self._tally,
            tabled=plan is not None,
            proven=plan is not None and plan.reorders,
        )
        sampler = Sampler(self._sample)
        if plan:
            self._rows.settle(list(plan.covers.items()))
        for run in plan.segments() if plan else [None]:
            packets = number_packets(video, plan.table if plan else None, run)
            gops = read_gops(packets, inspect, self._tally, tabled=plan is not None)
            chosen = (
                ((gop, plan.wanted(gop)) for gop, _ in gops)
                if plan
                else choose(gops, sampler, self._clock, self._tally)
            )
            for gop, wanted in chosen:
                for shown in runner.decode(gop, wanted):
                    yield from self._row(shown)
                    self._rows.settle(sampler.settle())
                    yield from self._rows.chunks()
        self._rows.settle(sampler.settle())

    def in_order(self) -> Iterator[DecodeEvent]:
        """Decodes everything from the first packet of the video to the last of the clip."""
        plan = self._plan
        inspect, _ = self._inspector
        places = TablePlaces(plan.table, plan.last_frame) if plan else CountedPlaces(inspect)
        packets = slice(0, plan.stop) if plan else None
        selection: Selection = Planned(plan) if plan else Sampler(self._sample)
        clock = self._clock
        numbered = number_packets(self._video, plan.table if plan else None, packets)
        held: dict[int, Shown] = {}
        for shown in decode_in_order(self._video, numbered, places, clock, self._tally):
            held[shown.index] = shown
            for index in selection.push(shown.time, shown.key):
                yield from self._row(held[index])
            held = {i: held[i] for i in selection.held}
            self._rows.settle(selection.settle())
            yield from self._rows.chunks()
        for index in selection.finish(clock.largest + clock.frame_s):
            yield from self._row(held[index])
        tally = self._tally
        if self._video.is_mp4 and inspect is not None:
            tally.silent = max(0, tally.shown - tally.frames - tally.errors)
        elif isinstance(places, CountedPlaces):
            tally.silent = max(0, len(places.due) - tally.errors)
        self._rows.settle(selection.settle())

    def _row(self, shown: Shown) -> Iterator[DecodeEvent]:
        """Adds a row; the first frame says how large the video is and which way up."""
        frame = shown.frame
        if frame is not None and not self._rows.announced:
            turn = orientation(frame)
            self._upright = (*turn.size(frame.width, frame.height), turn.rotation_deg)
            if self._start_pts is None and shown.index == 0:
                self._start_pts = shown.pts
            yield self._info()
        plan = self._plan
        if plan and plan.context and frame is not None and shown.index >= plan.first_frame:
            self._rows.require_context()
        self._rows.add(shown, self._tally)

    def _info(self) -> VideoInfo:
        self._rows.announced = True
        return self._video.info(upright=self._upright, start_pts=self._start_pts)

    def finish(self, fallback: str | None) -> Iterator[DecodeEvent]:
        """The last rows and how it went. Raises MediaError if there are none but should be."""
        tally, plan, clock = self._tally, self._plan, self._clock
        end = clock.largest + clock.frame_s
        evidence = gather(
            self._source,
            self._video,
            tally,
            expected_packets=self._expected,
            whole=plan is None,
            clock=clock,
        )
        if not self._rows.found and (plan is None or plan.rows):
            raise nothing_decoded(evidence, self._video.codec)
        if not self._rows.consistent:
            raise MediaError(
                "decoding the clip twice gave different rows; the clip is not written",
                kind="inconsistent",
                advice="nothing: the file is damaged beyond a stable answer",
            )
        if not self._rows.announced:
            yield self._info()
        yield from self._rows.chunks(end=True)
        if clock.discontinuities:
            fallback = f"timestamps step back {clock.discontinuities} times"
        elif clock.missing_pts:
            fallback = f"{clock.missing_pts} timestamps are missing"
        verdict = judge(evidence)
        yield ClipEnd(
            status="partial" if verdict else "ok",
            reason=verdict.reason if verdict else None,
            kind=verdict.kind if verdict else None,
            start_s=plan.time_of(plan.first_frame) if plan else 0.0,
            end_s=plan.time_of(plan.end_frame) if plan else float(end),
            start_frame=plan.first_frame if plan else 0,
            end_frame=plan.end_frame if plan else tally.places,
            frames_decoded=tally.frames,
            decode_errors=tally.errors,
            corrupt_frames=tally.corrupt,
            fallback=fallback,
            samples=self._rows.samples,
        )
