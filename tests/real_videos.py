"""Names of the real videos that decode without an error, below the folder of shared videos."""

from __future__ import annotations

_BY_FOLDER = {
    "real": """bgs__video.avi bgs__video02.avi exo__roadtrip-vp92-10bit.webm
        facenet__video_tracked.mp4 fftut__small_bunny_1080p_60fps.mp4 gpmf__hero7.mp4
        intel__car-detection.mp4 intel__face-demographics-walking.gif
        intel__one-by-one-person-detection.mp4 intel__person-bicycle-car.gif lp__d6.mp4 mb__0.ts
        mb__transparency.webm mb__video-h265.mp4 mdn__flower-fragmented.mp4 mdn__flower.mp4
        mdn__flower.webm mdn__friday.mp4 moviepy__big_buck_bunny_0_30.webm moviepy__chaplin.mp4
        moviepy__fire2.mp4 moviepy__sintel-trailer-480p_second_vid.mp4
        moviepy__video_for_blend_modes.mp4 mp4p__foreman-hevc-384.mp4 mp4p__multiTrack.3gp
        sam2__01_dog.mp4 sam2__05_default_juggle.mp4 sam2__bedroom.mp4 skv__carphone_pristine.mp4
        v2d__test_video.mp4""",
    "truth": """mb__video.mp4 psd__delayed_start.mp4 psd__fades.mp4 psd__testvideo.mp4
        skv__bigbuckbunny.mp4 skv__bikes.mp4""",
    "truth/torchcodec": """bt2020_10bit.mp4 bt601_full_range.mp4 bt601_limited_range.mp4
        bt709_full_range.mp4 nasa_13013.mp4 nasa_13013_hdr.mp4 nasa_13013_mkv_duration_tag.mkv
        nasa_13013_rotated.mp4 nasa_13013_vfr.mp4 testsrc2_odd_height_and_width_mpeg2.mp4
        testsrc2_odd_height_and_width_vp9.mp4 var_fps_video.mp4""",
    "truth/asl": """again.mkv bird.mkv book.mkv brother.mkv eat.mkv help.mkv hungry.mkv learn.mkv
        milk.mkv night.mkv no.mkv please.mkv school.mkv sister.mkv sorry.mkv student.mkv thanks.mkv
        walk.mkv want.mkv yes.mkv""",
    "odd": """-video-with-dash-.mp4 decord__video_270.mov decord__video_90.mov
        exo__bear-vp9-odd-dimensions.webm mb__annex-b-avc.mkv mb__av1-aac.avi
        mb__edit-list-discard.mp4 mb__edts.mp4 mb__entry24-segment3.ts
        mb__missing-keyframe-labels.ts mb__sar_2x1.mp4 mb__test-mkv-ass-fonts.mkv
        mb__transparency-faulty.webm mb__wrong-keyframe-labels.mp4 moviepy__no_duration.webm
        mp4ff__stereo_spatial.mp4 mp4ff__vvc_400kbps_2s.mp4 mp4p__MOV00006.3gp
        mp4p__h265-sample.mp4 mp4rs__metadata.mp4 mp4rs__video_colr_nclx_rgb.mp4 small__mp4.mp4
        tc__frame_exceeds_screen.gif tc__sine_stereo_mp2.mpg vhs__gear4-0.ts""",
}
SOUND = [f"{folder}/{name}" for folder, names in _BY_FOLDER.items() for name in names.split()]
"""All of `real` and `truth`, and those of `odd` that are only odd."""
