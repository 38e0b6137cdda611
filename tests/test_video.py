"""Positions: released figures and invariants. The reader: equal to plain decoding of every frame; odd files."""
import os
import pickle
import subprocess
import sys
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import VideoError, Views, frame_indices, read_clip, read_frames, read_test, uniform_indices, view_indices

VIDEOS = Path(__file__).resolve().parents[2] / "shared" / "videos"
FIGURES = np.load(Path(__file__).parent / "figures" / "h_sampling.npz")  # what the released code samples
LENGTHS = [int(n) for n in FIGURES["total_frames"]]
counts = st.integers(1, 400)
seeds = st.integers(0, 2**32 - 1)
few = settings(deadline=None, max_examples=60)


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("frames", [8, 16])
def test_positions_are_the_released_ones(frames):
    for row, total in enumerate(LENGTHS):
        np.testing.assert_array_equal(frame_indices(total, frames), FIGURES[f"tsn_test_{frames}"][row])
        np.testing.assert_array_equal(uniform_indices(total, frames), FIGURES[f"uniform_test_{frames}"][row])


@pytest.mark.parametrize("frames", [8, 16])
def test_training_draws_fill_the_released_bounds(frames):
    rng = np.random.default_rng(0)
    for row, total in enumerate(LENGTHS):
        for draw, low, high in (
                (frame_indices, FIGURES[f"tsn_train_low_{frames}"][row], FIGURES[f"tsn_train_high_{frames}"][row]),
                (uniform_indices, *FIGURES[f"uniform_train_bounds_{frames}"][row].T)):
            draws = np.stack([draw(total, frames, train=True, rng=rng) for _ in range(300)])
            assert (draws >= low).all() and (draws <= high).all()
            if (high - low).max() < 20:  # 300 draws of at most 20 values: one of the ends stays out with p < 1e-5
                np.testing.assert_array_equal(draws.min(0), low)
                np.testing.assert_array_equal(draws.max(0), high)


@few
@given(counts, st.integers(1, 64), seeds)
def test_one_position_in_each_segment(total, frames, seed):
    middle, drawn = frame_indices(total, frames), frame_indices(total, frames, True, np.random.default_rng(seed))
    assert middle.shape == drawn.shape == (frames,) and middle.dtype == drawn.dtype == np.int64
    assert (np.diff(middle) >= 0).all() and 0 <= middle[0] and middle[-1] < total
    for i, position in enumerate(middle.tolist()):  # the frame that covers the segment's middle
        assert position <= Fraction((2 * i + 1) * total, 2 * frames) < position + 1
    assert (drawn >= 0).all() and (drawn < total).all()
    if total >= frames:
        np.testing.assert_array_equal(drawn // (total // frames), np.arange(frames))
    np.testing.assert_array_equal(drawn, frame_indices(total, frames, True, np.random.default_rng(seed)))


@few
@given(counts, st.integers(1, 64), seeds)
def test_uniform_positions_cover_the_video(total, frames, seed):
    drawn = uniform_indices(total, frames, True, np.random.default_rng(seed))
    for positions in (uniform_indices(total, frames), drawn):
        assert positions.shape == (frames,) and positions.dtype == np.int64
        assert (np.diff(positions) >= 0).all() and 0 <= positions[0] and positions[-1] < total
        assert (abs(positions - (np.arange(frames) + 0.5) * (total - 1) / frames) <= (total - 1) / frames / 2 + 1).all()


@few
@given(counts, st.integers(1, 32), st.integers(1, 5))
def test_views_are_equally_spaced_within_segments(total, frames, clips):
    views = view_indices(total, frames, clips)
    assert views.shape == (clips, frames)
    for c in range(clips):
        for i in range(frames):
            assert views[c, i] == (i + Fraction(2 * c + 1, 2 * clips)) * total // frames
    np.testing.assert_array_equal(view_indices(total, frames, 1)[0], frame_indices(total, frames))
    np.testing.assert_array_equal(view_indices(total, frames, 1, uniform_indices)[0], uniform_indices(total, frames))


@pytest.mark.parametrize("total, frames", [(0, 8), (8, 0), (-1, 8)])
def test_nothing_to_sample_is_an_error(total, frames):
    for indices in (frame_indices, uniform_indices):
        with pytest.raises(ValueError, match=f"{frames} frames from a video of {total}"):
            indices(total, frames)


# ---------------------------------------------------------------- reading


def write_video(path, codec="libx264", frames=40, size=(64, 48), **options):
    """A moving pattern, another one in each frame; codec options such as bf="3"."""
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no encoder {codec}")
    width, height = size
    y, x = np.mgrid[:height, :width]
    faststart = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", container_options=faststart) as out:
        stream = out.add_stream(codec, rate=25)
        stream.width, stream.height, stream.options = width, height, options
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for t in range(frames):
            image = np.stack([(4 * x + 9 * t) % 256, (5 * y + 5 * t) % 256, (x * y // 8 + 31 * t) % 256], -1)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return path


def decode_all(path, wanted=None):
    """Every frame that decodes, in order and upright, as RGB arrays (H, W, 3), the plain way; None where not wanted."""
    frames = []
    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1  # damaged slices depend on the threads
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.InvalidDataError:
                continue
            for frame in decoded:
                keep = wanted is None or len(frames) in wanted
                frames.append(np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) if keep else None)
    return frames


def asked(positions):
    """A `pick` that notes the totals it is asked for."""
    totals = []
    return totals, lambda total: totals.append(total) or positions(total)


def compare_with_plain_decoding(path, frames=16):
    """At its own size, the reader's frames are the plain decoder's, bit for bit -> (totals, frames decoded, video)."""
    with av.open(str(path)) as container:
        codec = container.streams.best("video").codec_context
        short_side = min(codec.width, codec.height)
    totals, pick = asked(lambda total: frame_indices(total, frames))
    video = read_frames(path, pick, short_side)
    assert video.dtype == torch.uint8 and len(video) == frames
    positions = frame_indices(totals[-1], frames)
    plain = decode_all(path, set(positions))
    for image, position in zip(video, positions):
        if image.shape[1:] == plain[position].shape[:2]:  # else resized, as the size changed in mid-stream
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), plain[position])
    return totals, len(plain), video


FILES = {
    "b_frames.mp4": ("libx264", dict(bf="3", g="12")), "pyramid.mkv": ("libx264", {"bf": "4", "b-pyramid": "normal"}),
    "open.mkv": ("libx264", {"bf": "3", "g": "12", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}),
    "refresh.mp4": ("libx264", {"bf": "0", "g": "12", "x264-params": "intra-refresh=1"}),
    "no_b.mp4": ("libx264", dict(bf="0")), "h264.avi": ("libx264", dict(bf="2")), "ts.ts": ("libx264", dict(bf="2")),
    "xvid.avi": ("mpeg4", dict(bf="2")), "vp9.webm": ("libvpx-vp9", dict(deadline="realtime")),
    "jpeg.avi": ("mjpeg", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_frames_equal_plain_decoding(tmp_path, name):
    codec, options = FILES[name]
    for frames, asked_for in ((40, 16), (40, 5), (3, 8), (1, 2)):
        path = write_video(tmp_path / name, codec, frames, **options)
        totals, count, _ = compare_with_plain_decoding(path, asked_for)
        assert totals[-1] == count == frames


def test_any_positions_in_any_order_and_shape(tmp_path):
    path = write_video(tmp_path / "clip.mp4", bf="3")
    plain = np.stack(decode_all(path))
    for positions in ([39], [0], [20, 3, 3, 38], [[1, 7, 9], [30, 2, 1]]):
        video = read_frames(path, lambda total: np.array(positions), 48)
        np.testing.assert_array_equal(video.movedim(-3, -1).numpy(), plain[np.array(positions)])


def test_a_sound_h264_file_is_skimmed_in_one_pass(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", bf="3")
    monkeypatch.setattr(data, "decode_all", None)  # would be called for anything but a skim
    opened = count_calls(monkeypatch, av, "open")
    read_clip(path, 4, 32)
    assert len(opened) == 1


def count_calls(monkeypatch, module, name):
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or function(*args, **kwargs))
    return calls


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.avi", "clip.webm"])
@pytest.mark.parametrize("part", [0.4, 0.8])
def test_a_truncated_file_gives_the_frames_it_has(tmp_path, name, part):
    codec = {"clip.avi": "mpeg4", "clip.webm": "libvpx-vp9"}.get(name, "libx264")
    path = write_video(tmp_path / name, codec, frames=60, size=(96, 96))
    whole = path.read_bytes()
    path.write_bytes(whole[:int(part * len(whole))])
    totals, count, _ = compare_with_plain_decoding(path)
    assert count < 60 and totals[-1] - count in (0, 1)  # 1: the last packet is cut, and nothing asked for it


@pytest.mark.parametrize("part, bf", [(0.0, "0"), (0.5, "0"), (0.5, "3")])
def test_a_damaged_file_is_sampled_over_what_decodes(tmp_path, part, bf):
    path = write_video(tmp_path / "clip.mp4", frames=60, size=(128, 96), bf=bf)
    whole = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        spots = [(p.pos + int(part * p.size) // 2 * 2 + 4, p.pos + p.size) for p in container.demux(video=0) if p.size]
    for start, end in spots[20:40:4]:
        whole[start:end] = b"\xff" * (end - start)
    path.write_bytes(whole)
    totals, count, _ = compare_with_plain_decoding(path)
    assert totals[0] == 60 and totals[-1] == count and len(totals) > 1  # not skimmed: counted


@pytest.mark.parametrize("name, codec", [("a.mp4", "libx264"), ("a.mkv", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.ts", "mpeg2video")])
def test_frames_come_with_their_times(tmp_path, name, codec):
    """25 frames a second; an AVI with B-frames has no rising stamps that could be trusted."""
    path = write_video(tmp_path / name, codec, frames=50, size=(64, 64), bf="0" if name == "a.avi" else "2")
    index = np.array([[0, 10], [20, 49]])
    reading = data.inspect_frames(path, lambda total: index, 64)
    np.testing.assert_allclose(reading.seconds, index / 25, atol=2e-3)
    assert data.seconds_at(index, [0, None, 2], 1) is None and data.seconds_at(index, [0, 2, 1], 1) is None


def test_a_file_cut_before_its_first_key_frame(tmp_path):
    """A cut without re-encoding leaves pictures that need what was cut off: they have time stamps but do not decode."""
    options = {"bf": "3", "g": "12", "x264-params": "open-gop=1:scenecut=0:b-adapt=0"}
    whole = write_video(tmp_path / "whole.mp4", frames=60, **options)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mkv"), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        second = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
        for packet in packets[second:]:
            packet.stream = stream
            out.mux(packet)
    totals, count, _ = compare_with_plain_decoding(tmp_path / "cut.mkv", frames=2)  # positions far from these pictures
    assert totals == [count] and count == 60 - second - 3  # three leading B-frames


def test_size_changes_in_mid_stream(tmp_path):
    first, second = write_video(tmp_path / "a.ts", size=(64, 48)), write_video(tmp_path / "b.ts", size=(64, 96))
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    plain = decode_all(both)
    assert {frame.shape for frame in plain} == {(48, 64, 3), (96, 64, 3)}
    video = read_frames(both, lambda total: np.arange(total), 48)
    assert video.shape == (80, 3, 48, 64)
    np.testing.assert_array_equal(video[:40].permute(0, 2, 3, 1).numpy(), np.stack(plain[:40]))
    assert (video[40:].float().std((1, 2, 3)) > 10).all()
    assert len(read_frames(both, lambda total: np.arange(total), 48, max_pixels=64 * 80)) == 40


# Display matrices (a, b, c, d) as in ISO 14496-12, where the frame's top left corner is seen, as (row, column), and how
# numpy would turn it. The corner follows from (x, y) -> (a x + c y, b x + d y) with y downwards.
TURNS = {(0, 1, -1, 0): ((0, -1), -1), (0, -1, 1, 0): ((-1, 0), 1), (-1, 0, 0, -1): ((-1, -1), 2)}


@pytest.mark.parametrize("turn", TURNS)
def test_rotation_is_applied(tmp_path, turn):
    path = write_video(tmp_path / "phone.mp4")
    plain = decode_all(path)

    def matrix(a, b, c, d):
        return np.array([a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30], dtype=">i4").tobytes()

    whole = path.read_bytes()
    head = whole.index(b"tkhd")
    assert matrix(1, 0, 0, 1) in whole[head:head + 100]
    path.write_bytes(whole[:head] + whole[head:].replace(matrix(1, 0, 0, 1), matrix(*turn), 1))
    (row, column), quarter_turns = TURNS[turn]
    video = read_frames(path, lambda total: np.arange(total), 48).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(video[:, row, column], np.stack(plain)[:, 0, 0])
    np.testing.assert_array_equal(video, np.rot90(np.stack(plain), quarter_turns, (1, 2)))


def test_short_side_and_antialiasing(tmp_path):
    path = write_video(tmp_path / "clip.mp4", size=(128, 96))
    assert read_frames(path, lambda total: [0], 24).shape == (1, 3, 24, 32)
    assert read_frames(path, lambda total: [0], 111).shape == (1, 3, 111, 148)
    stripes = torch.zeros(1, 3, 96, 96, dtype=torch.uint8)
    stripes[..., ::3] = 255
    assert (data.resize(stripes, 24, 24).float() - 85).abs().max() <= 43  # without antialiasing: 0 or 255


@pytest.mark.parametrize("name", ["a:b.mp4", "-w0_start.mp4", "kick [x] & (y), 1!.mp4", "ümlaut file.mp4", "%d.mp4"])
def test_any_file_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "plain.mp4").rename(name)
    assert read_clip(name, 2, 32).shape == (2, 3, 32, 32)


def test_a_title_that_is_not_utf8_does_not_matter(tmp_path):
    path = write_video(tmp_path / "clip.mkv")
    whole = path.read_bytes()
    assert b"Lavf" in whole
    path.write_bytes(whole.replace(b"Lavf", b"\xe9\xe8\xfc\xff"))
    read_clip(path, 2, 32)


# ---------------------------------------------------------------- refusals


def refused(path, reason, **limits):
    with pytest.raises(VideoError) as caught:
        read_frames(path, lambda total: frame_indices(total, 8), 32, **limits)
    assert str(caught.value).startswith(f"{path}: ") and reason in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # on its way out of a loader's worker


def test_what_is_no_video_is_refused(tmp_path):
    for name, content in (("empty.mp4", b""), ("page.mp4", b"<html>404</html>" * 300), ("noise.avi", os.urandom(9000))):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "")
    refused(tmp_path / "absent.mp4", "no such file")
    refused(tmp_path, "no such file")
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    refused(tmp_path / "pipe.mp4", "no such file")
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    refused(tmp_path / "sound.wav", "no video")


def test_headers_without_frames_are_refused(tmp_path):
    whole = write_video(tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "head.mp4").write_bytes(whole[:whole.index(b"mdat")])
    refused(tmp_path / "head.mp4", "no video frames")
    (tmp_path / "alien.mp4").write_bytes(whole.replace(b"avc1", b"zzzz"))
    refused(tmp_path / "alien.mp4", "")
    (tmp_path / "dark.mp4").write_bytes(whole[:whole.index(b"mdat") + 4] + b"\xff" * 9000)
    refused(tmp_path / "dark.mp4", "no frame decodes")


@pytest.mark.parametrize("name, codec", [("big.mp4", "libx264"), ("big.ts", "libx264"), ("big.avi", "mjpeg")])
def test_frames_above_the_pixel_limit_are_refused(tmp_path, name, codec):
    path = write_video(tmp_path / name, codec, frames=4, size=(320, 240))
    refused(path, "above 76799 pixels", max_pixels=320 * 240 - 1)
    # A codec works on whole blocks of up to 64 pixels, and these count.
    read_frames(path, lambda total: frame_indices(total, 8), 32, max_pixels=384 * 256)


def test_a_very_narrow_frame_is_refused(tmp_path):
    refused(write_video(tmp_path / "thread.avi", "mjpeg", frames=2, size=(1040, 16)), "1040x16 pixels are too narrow")


# ---------------------------------------------------------------- views


def test_a_frame_of_the_wanted_size_passes_through(tmp_path):
    path = write_video(tmp_path / "tiny.mp4", size=(32, 32))
    clip = read_clip(path, 8, 32, short_side=32)
    assert clip.shape == (8, 3, 32, 32) and clip.dtype == torch.uint8 and clip.is_contiguous()
    np.testing.assert_array_equal(clip.permute(0, 2, 3, 1).numpy(), np.stack(decode_all(path))[frame_indices(40, 8)])


@pytest.mark.parametrize("size", [(96, 64), (64, 96)])
def test_views_are_crops_of_the_decoded_frames(tmp_path, monkeypatch, size):
    path = write_video(tmp_path / "clip.mp4", size=size)
    opened = count_calls(monkeypatch, av, "open")
    views = read_test(path, Views(4, 56, 64, clips=2, crops=3))
    assert views.shape == (6, 4, 3, 56, 56) and views.is_contiguous() and len(opened) == 1
    video = read_frames(path, lambda total: view_indices(total, 4, 2), 64)  # (clips, T, 3, h, w)
    offsets = {(96, 64): [(4, 0), (4, 20), (4, 40)], (64, 96): [(0, 4), (20, 4), (40, 4)]}[size]
    wanted = [video[c, ..., y:y + 56, x:x + 56] for c in range(2) for y, x in offsets]
    assert torch.equal(views, torch.stack(wanted))
    centre = read_test(path, Views(4, 56, 64, clips=2))
    assert torch.equal(centre, views[1::3])
    assert torch.equal(read_test(path, Views(4, 56, 64))[0], read_clip(path, 4, 56))  # 64 = 56 * 256 / 224
    uniform = read_test(path, Views(4, 64, 64, "uniform"))[0]
    whole = read_frames(path, lambda total: uniform_indices(total, 4), 64)
    assert torch.equal(uniform, whole[..., 16:80, :] if size[1] == 96 else whole[..., 16:80])


def test_impossible_views_are_refused(tmp_path):
    path = write_video(tmp_path / "clip.mp4", frames=2)
    with pytest.raises(ValueError, match="crops must be 1 or 3"):
        read_test(path, Views(4, 32, 32, crops=2))
    with pytest.raises(ValueError, match="short_side at least size"):
        read_clip(path, 4, 32, short_side=31)


# ---------------------------------------------------------------- real and odd files


def shared_files(folder):
    files = sorted(path for path in (VIDEOS / folder).glob("*.*") if path.suffix != ".csv")
    return files or [pytest.param(None, marks=pytest.mark.skip(reason=f"no videos in {VIDEOS / folder}"))]


@pytest.mark.slow
@pytest.mark.parametrize("path", shared_files("real"), ids=lambda path: getattr(path, "name", "none"))
def test_real_videos_equal_plain_decoding(path):
    totals, count, _ = compare_with_plain_decoding(path)
    assert totals == [count]


# What becomes of each file: (frames it is sampled over, frames that decode, height and width), or why it is refused.
ODD = {
    "gen_127x255_444.mp4": (56, 56, (255, 127)), "gen_16k_mjpeg.avi": "frame size unknown or above 35389440 pixels",
    "gen_1frame.mp4": (1, 1, (256, 340)), "gen_2frame.mp4": (2, 2, (256, 340)), "gen_audio_only.mp4": "no video stream",
    "gen_av1.mp4": (28, 28, (256, 340)), "gen_bitrot400.mp4": (279, 279, (256, 340)),
    "gen_editlist_cut.mp4": (58, 58, (256, 340)), "gen_fragmented.mp4": (84, 84, (256, 340)),
    "gen_hevc10.mp4": (56, 56, (256, 340)), "gen_moovonly.mp4": "no video frames",
    "gen_reschange.ts": (56, 56, (256, 340)),  # the second half is 160x120
    "gen_rot180.mp4": (56, 56, (256, 340)), "gen_rot90.mp4": (56, 56, (340, 256)), "gen_text.mp4": "Invalid data found",
    "gen_trunc50.avi": (77, 77, (240, 320)), "gen_trunc50.mkv": (150, 150, (240, 426)),
    "gen_trunc50_faststart.mp4": (140, 139, (256, 340)),  # the last packet is cut, and no position falls on it
    "gen_vfr.mp4": (56, 56, (256, 340)), "gen_vp9.webm": (56, 56, (256, 340)),
    "gen_wrongext_avi.mp4": (164, 164, (240, 320)), "gen_xvid_bf2.avi": (110, 110, (240, 320)),
    "gen_zero.mp4": "no video", "real_corrupted.mp4": (49, 49, (720, 1280)),
    "real_nasa_multi.mp4": (390, 390, (270, 480)),  # the larger of two streams
    "real_rot90.mov": (3, 3, (568, 320)), "real_unordered.mov": (4, 4, (50, 50)),
}


@pytest.mark.parametrize("path", shared_files("odd"), ids=lambda path: getattr(path, "name", "none"))
def test_odd_files_are_read_or_refused(path):
    expected = ODD[path.name]
    if isinstance(expected, str):
        refused(path, expected)
        return
    totals, count, video = compare_with_plain_decoding(path)
    assert (totals[-1], count, tuple(video.shape[-2:])) == expected
    assert len(totals) == (3 if path.name in ("gen_bitrot400.mp4", "real_corrupted.mp4") else 1)  # passes over the file
    assert (video.amax((1, 2, 3)) > 32).all()  # no frame is black


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path):
    """Huge frames are refused before one is decoded: av.open does not either, to learn about the stream."""
    program = """if True:
        import re, sys, data
        peak = lambda: int(re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\t", " "))[1])
        before = peak()
        for path in sys.argv[2:]:
            try:
                data.read_frames(path, lambda total: [0], 32, max_pixels=int(sys.argv[1]))
            except data.VideoError:
                print((peak() - before) // 1024)"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self/status")
    path = tmp_path / "large.ts"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 4096, 4096, "yuv420p", {"preset": "ultrafast"}
        for _ in range(2):
            out.mux(stream.encode(av.VideoFrame(4096, 4096, "yuv420p")))
        out.mux(stream.encode())
    paths = [path, *(VIDEOS / "odd").glob("gen_16k_mjpeg.avi")]
    done = subprocess.run([sys.executable, "-c", program, "16000000", *map(str, paths)], capture_output=True, text=True,
                          timeout=60, cwd=Path(__file__).resolve().parents[1])
    peaks = [int(line) for line in done.stdout.split()]  # MB
    # Unbounded, these files take 640 MB and more; bounded it was 20 to 110, with what is loaded at the first call.
    assert len(peaks) == len(paths) and max(peaks) < 200, (peaks, done.stderr)
