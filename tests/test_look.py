"""Own videos: windows over time, the command line of `eval.py --video`, its JSON, bad files among good ones."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from figures import weights
from helpers import MERGES, SHARED
from PIL import Image
from test_eval import ROOT, evaluate
from test_video import VIDEOS, write_video

import data
import eval as evaluation
import train
from clip_vit import CLIP, FramePool, load_clip
from video_prompt import TCCLIP

NAMES = "red to blue, blue to red, a dog"


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A checkpoint of TC-CLIP as train.py writes it, of random weights."""
    recipe = train.resolve_recipe("fewshot", "tc", "shapes")
    model = evaluation.build_model(vars(recipe), load_clip(world / "clip.pt"))
    path = tmp_path_factory.mktemp("tuned") / "best.pt"
    torch.save({"recipe": dataclasses.asdict(recipe), "classes": ["a"], "model": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """2.5 seconds, 20 frames: "red to blue", then "green to red", then half a "blue to green"."""
    path, rng = tmp_path_factory.mktemp("long") / "long.mp4", np.random.default_rng(0)
    clips = [data.render_clip(rng, name) for name in ("red to blue", "green to red", "blue to green")]
    data.write_clip(path, np.concatenate(clips)[:20])
    return path


# ---- windows ---------------------------------------------------------------------------------------------------------

def test_windows_hold_the_middle_frames_of_their_time(long):
    everything = data.read_frames(long, np.arange, 32)
    for seconds, spans in ((1, [(0, 8), (8, 16), (16, 20)]), (0.3, [(0, 3), (3, 5), (5, 8), (8, 10), (10, 12), (12, 15),
                                                                   (15, 17), (17, 20)]), (60, [(0, 20)])):
        windows = list(data.read_windows(long, seconds, 4, 32, 32))
        assert len(windows) == len(spans)
        for number, ((start, end, clip), (first, last)) in enumerate(zip(windows, spans)):
            assert start == pytest.approx(number * seconds) and end == pytest.approx(min(start + seconds, 2.5))
            assert torch.equal(clip, everything[first + data.frame_indices(last - first, 4)])


def write_stamped(path, stamps, rate=25):
    """A video whose frame i is shown from stamps[i] milliseconds on; the frames grow brighter."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("h264", rate=rate, options={"g": "1", "preset": "ultrafast", "tune": "zerolatency"})
        stream.width = stream.height = 32
        stream.pix_fmt, stream.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        for i, stamp in enumerate(stamps):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8))
            frame.pts, frame.time_base = stamp, Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def test_time_is_that_of_the_stamps_and_not_the_frame_number(tmp_path):
    path = write_stamped(tmp_path / "vfr.mkv", [0, 100, 200, 3000, 3100, 3900, 5500])
    windows = list(data.read_windows(path, 1, 3, 32, 32))
    assert [start for start, _, _ in windows] == [0, 3, 5]  # nothing begins in the others
    grey = [clip.float().mean((1, 2, 3)).round().int().tolist() for _, _, clip in windows]
    np.testing.assert_allclose(grey, [[0, 10, 20], [30, 40, 50], [60, 60, 60]], atol=3)


def test_without_stamps_frames_are_counted_and_without_a_rate_it_is_an_error(long, tmp_path):
    def frames(count, rate, time=None):  # as a decoder might give them
        return [time for time, _ in data.timed_frames([type("Frame", (), {"time": time})] * count, rate)]
    assert frames(4, Fraction(10)) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert frames(3, Fraction(2), time=7.0) == [0, 0.5, 1.0, 1.5]  # stamps that stand still
    with pytest.raises(ValueError, match="stamps"):
        frames(2, None)
    with pytest.raises(ValueError, match="no frame"):
        frames(0, Fraction(10))
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    with pytest.raises(data.VideoError, match="bad.mp4"):
        next(data.read_windows(tmp_path / "bad.mp4", 1, 4, 32, 32))


def damage_some(path):
    """Overwrites a part of every fourth packet in the middle of a video."""
    whole = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        spots = [(packet.pos + packet.size // 4 * 2, packet.pos + packet.size) for packet in container.demux(video=0) if packet.size]
    for start, end in spots[20:40:4]:
        whole[start:end] = b"\xff" * (end - start)
    path.write_bytes(whole)
    return path


@pytest.mark.parametrize("codec, damaged", [("libx264", False), ("libx264", True), ("libx265", True), ("mpeg4", True),
                                            ("libvpx-vp9", True)])
def test_threads_change_no_window_and_no_count_of_damage(tmp_path, codec, damaged):
    path = write_video(tmp_path / "clip.mkv", codec, frames=60, size=(128, 96), g="15")
    if damaged:
        damage_some(path)
    found = []
    for threads in (1, 2, 4):
        damage = data.Damage()
        windows = list(data.read_windows(path, 0.3, 4, 32, 32, threads=threads, damage=damage))
        found.append(([window[:2] for window in windows], torch.stack([clip for _, _, clip in windows]), damage.count))
    assert all(times == found[0][0] and torch.equal(clips, found[0][1]) and count == found[0][2] for times, clips, count in found)
    assert (found[0][2] > 0) == damaged or codec in ("libx265", "libvpx-vp9")  # their decoders do not notice this damage


def test_threads_change_no_frame_of_a_whole_video(tmp_path):
    for number, codec in enumerate(("libx264", "libx265", "mpeg4", "libvpx-vp9", "mpeg2video")):
        path = write_video(tmp_path / f"{number}.mkv", codec, frames=60, size=(128, 96), g="15")
        for file in (path, damage_some(path)):
            one, four = (data.inspect_test(file, data.Views(8, 64, 73), threads) for threads in (1, 4))
            assert torch.equal(one.frames, four.frames) and one.damaged == four.damaged


@pytest.mark.parametrize("codec, suffix", [("libx264", "ts"), ("libx264", "avi"), ("mpeg4", "avi")])
def test_threads_see_the_damage_of_a_last_frame(tmp_path, codec, suffix):
    """A frame that is cut short may have left the decoder before the thread that works on it notices."""
    path = write_video(tmp_path / f"cut.{suffix}", codec, frames=12, size=(640, 480), g="15")
    whole = path.read_bytes()
    for part in (3, 6, 9):
        path.write_bytes(whole[:len(whole) * part // 10])
        one = data.inspect_test(path, data.Views(4, 64, 73))
        for _ in range(5):
            two = data.inspect_test(path, data.Views(4, 64, 73), threads=2)
            assert torch.equal(one.frames, two.frames) and one.damaged == two.damaged


def test_damage_is_told(tmp_path, tuned, capsys):
    (tmp_path / "videos").mkdir()
    good, bad = (write_video(tmp_path / "videos" / name, frames=60, size=(128, 96)) for name in ("good.mp4", "bad.mp4"))
    damage_some(bad)
    assert evaluate("--check", tmp_path / "videos", "--workers", "1") == 1
    out = capsys.readouterr().out
    assert re.search(r"bad\.mp4: \d+ of \d+ frames are damaged", out) and "good.mp4" not in out
    for every in ((), ("--every", "1s")):
        evaluate("--video", tmp_path / "videos", "--checkpoint", tuned, "--classes", NAMES, *every, "--json", tmp_path / "a.json")
        err = capsys.readouterr().err
        assert re.search(r"warning: .*bad\.mp4: \d+ of the frames that were decoded are damaged", err)
        first, second = json.loads((tmp_path / "a.json").read_text())
        assert first["damaged"] > 0 == second["damaged"] and "good.mp4:" not in err


@pytest.mark.parametrize("suffix, options", [("mkv", {}), ("avi", {}), ("ts", {}), ("mp4", {"movflags": "faststart"})])
def test_check_names_a_file_that_is_cut_short(tmp_path, suffix, options):
    """A container that announces its length; a transport stream does not."""
    path = tmp_path / f"clip.{suffix}"
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("h264", rate=10, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(100):
            noise = np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
        container.mux(stream.encode())
    assert data.check_video(path) is None
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    found = data.check_video(path)
    if suffix == "ts":
        assert found is None or "are damaged" in found
    else:
        assert re.search(r"pictures end after [345]\.\d of (9\.9|10\.0) seconds", found)


def test_pictures_of_somebody_else_stay(tmp_path, tuned, capsys):
    video = write_video(tmp_path / "clip.mp4", frames=4, size=(64, 48))
    words = ("--video", video, "--checkpoint", tuned, "--classes", NAMES, "--picture")
    for name in ("a.png", "a.jpg", "pictures"):
        assert evaluate(*words, tmp_path / name) == evaluate(*words, tmp_path / name) == 0  # its own is drawn anew
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "clip.png")
    assert evaluate(*words, tmp_path / "pictures") == 2 and "was not drawn" in capsys.readouterr().err
    assert Image.open(tmp_path / "pictures" / "clip.png").size == (9, 9)


def test_windows_are_decoded_one_at_a_time(long, monkeypatch):
    seen, convert = [], data.to_image
    monkeypatch.setattr(data, "to_image", lambda *arguments: seen.append(0) or convert(*arguments))
    windows = data.read_windows(long, 0.5, 2, 32, 32)
    next(windows)
    assert len(seen) == 4
    next(windows)
    assert len(seen) == 8


def test_a_window_of_many_frames_is_thinned(tmp_path, monkeypatch):
    seen, convert = [], data.to_image
    monkeypatch.setattr(data, "to_image", lambda *arguments: seen.append(0) or convert(*arguments))
    path = write_video(tmp_path / "many.mp4", frames=2100, size=(32, 32), g="50", preset="ultrafast")
    (_, _, clip), = data.read_windows(path, 1000, 4, 32, 32)
    assert len(seen) == 1024 + 512 + 13  # all, then every second, then every fourth
    near = data.frame_indices(2100, 4)[:, None] + np.arange(-4, 5)
    close = data.read_frames(path, lambda total: near, 32)
    assert all(any(torch.equal(frame, other) for other in others) for frame, others in zip(clip, close))


@pytest.mark.slow
@pytest.mark.skipif(not VIDEOS.is_dir(), reason="the videos (../shared/videos) are not here")
@pytest.mark.parametrize("path", sorted(p for p in VIDEOS.glob("*/*.*") if p.suffix != ".csv"), ids=lambda p: p.name)
def test_real_and_odd_files(path):
    """One window over everything is the reader's clip, for what the reader reads; what it refuses, windows refuse."""
    try:
        expected = data.read_clip(path, 4, 64)
    except data.VideoError:
        with pytest.raises(data.VideoError, match=re.escape(str(path))):
            next(data.read_windows(path, 1e6, 4, 64, 73))
        return
    (start, end, clip), = data.read_windows(path, 1e6, 4, 64, 73)
    assert start == 0 < end < 20
    if path.name == "gen_reschange.ts":  # each frame is cropped at its own size, the reader's all at the first one's
        assert clip.shape == expected.shape
    elif path.name != "gen_trunc50_faststart.mp4":  # its last frame does not decode; the reader stops before and believes it
        assert torch.equal(clip, expected)


# ---- the command line ------------------------------------------------------------------------------------------------

def test_windows_as_lines_json_and_a_strip(world, long, tuned, tmp_path, capsys):
    words = "--video", long, "--classes", NAMES, "--checkpoint", tuned, "--every", "1s"
    assert evaluate(*words, "--json", tmp_path / "a.json", "--picture", tmp_path / "strip.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(long) and len(lines) == 4
    for line, times in zip(lines[1:], ("0:00-0:01", "0:01-0:02", "0:02-0:02.5")):
        assert re.fullmatch(rf"  {times}(  [01]\.\d\d [a-z ]+){{3}}", line), line
    (record,), content = json.loads((tmp_path / "a.json").read_text()), (tmp_path / "strip.png").read_bytes()
    assert (record["video"], record["measure"]) == (str(long), "probability") and content.startswith(b"\x89PNG")
    assert [(w["start"], w["end"]) for w in record["windows"]] == [(0, 1), (1, 2), (2, 2.5)]
    model, recipe = evaluation.load_model(tuned)
    model.set_classes(NAMES.split(", "))
    for window, first in zip(record["windows"], (0, 8, 16)):  # as if the window were a video
        clip = data.read_frames(long, lambda total: first + data.frame_indices(min(8, 20 - first), 8), 32)
        with torch.no_grad():
            expected = model(data.normalise(clip)[None])[0].softmax(-1)[0].tolist()
        np.testing.assert_allclose([window["classes"][name] for name in NAMES.split(", ")], expected, atol=2e-6)
        assert list(window["classes"].values()) == sorted(window["classes"].values(), reverse=True)
    assert evaluate(*words, "--batch", "1", "--json", "-") == 0  # windows do not see one another
    captured = capsys.readouterr()
    (again,) = json.loads(captured.out)
    for one, other in zip(record["windows"], again["windows"]):
        assert one["classes"] == pytest.approx(other["classes"], abs=2e-6)
    assert captured.err.splitlines()[2] == str(long)  # the table is there too


def test_a_folder_with_a_broken_video_among_good_ones(world, tmp_path, capsys):
    below = tmp_path / "videos" / "deeper"
    below.mkdir(parents=True)
    for name in ("a.mp4", "c.mp4"):
        (below / name).write_bytes(Path(data.videos_below(world / "base")[0]).read_bytes())
    (below / "b.mp4").write_bytes(b"broken")
    words = "--classes", NAMES, "--clip", world / "clip.pt", "--json", tmp_path / "out.json"
    for every in ((), ("--every", "0.5")):
        assert evaluate("--video", tmp_path / "videos", *words, *every) == 1
        out, err = capsys.readouterr()
        assert f"unreadable: {below / 'b.mp4'}: " in err
        named = [line for line in out.splitlines() if not line.startswith(" ")]
        assert named == [str(below / "a.mp4"), str(below / "c.mp4")]
        a, b, c = json.loads((tmp_path / "out.json").read_text())
        assert a["windows"] == c["windows"] and len(a["windows"]) == (2 if every else 1)
        assert b["windows"] == [] and "b.mp4" in b["error"] and "error" not in a
        assert a["windows"][-1]["end"] == (1 if every else None)
    assert evaluate("--video", below / "b.mp4", *words) == 2  # alone, it is the whole task
    assert "b.mp4" in capsys.readouterr().err


def test_a_name_that_no_encoding_has_and_a_video_of_one_picture(world, tmp_path, capsys):
    path = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    path.write_bytes(Path(data.videos_below(world / "base")[0]).read_bytes())
    words = "--classes", NAMES, "--clip", world / "clip.pt", "--json", tmp_path / "out.json"
    assert evaluate("--video", path, *words) == 0
    assert r"caf\udce9.mp4" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())[0]["video"].endswith("caf\udce9.mp4")
    Image.new("RGB", (64, 64), (200, 30, 10)).save(tmp_path / "one.gif")
    assert evaluate("--video", tmp_path / "one.gif", *words, "--every", "1s", "--picture", tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").is_file()


def test_a_strip_of_many_windows_shows_all_of_the_time(world, tmp_path, monkeypatch):
    pictures = [np.full((32, 32, 3), i % 256, np.uint8) for i in range(700)]
    data.write_clip(tmp_path / "long.mp4", np.stack(pictures))
    shown = []
    monkeypatch.setattr(evaluation, "draw_text", lambda draw, xy, words, *rest, **more: shown.append((xy[1], words)))
    assert evaluate("--video", tmp_path / "long.mp4", "--classes", NAMES, "--clip", world / "clip.pt", "--every", "0.5",
                    "--picture", tmp_path / "p.png") == 0
    duration = 700 / 8
    minutes = [words.split(":") for _, words in shown[2:10]]
    times = [60 * int(minute) + float(second) for minute, second in minutes]
    np.testing.assert_allclose(times, (np.arange(8) + 0.5) / 8 * duration, atol=duration / 32)


def test_one_class_alone_has_a_similarity(world, capsys):
    video = data.videos_below(world / "base")[0]
    model = FramePool(load_clip(world / "clip.pt")).eval()
    model.set_classes(["red to blue"])
    with torch.no_grad():
        clips = data.normalise(data.read_test(video, data.Views(16, 32, 37, clips=2)), "clip")
        expected = (model(clips)[0] / model.clip.logit_scale.exp()).mean().item()
    assert evaluate("--video", video, "--classes", "red to blue", "--clip", world / "clip.pt", "--json", "-") == 0
    out, err = capsys.readouterr()
    (record,) = json.loads(out)
    assert record["measure"] == "cosine similarity"
    assert record["windows"][0]["classes"]["red to blue"] == pytest.approx(expected, abs=2e-6)
    assert f"{expected:.3f}  red to blue (cosine similarity)" in err


@pytest.mark.parametrize("which, owner, name", [("clip", CLIP, "encode_text"), ("tuned", TCCLIP, "class_side")])
def test_hundreds_of_classes_cost_one_text_pass(world, long, tuned, tmp_path, monkeypatch, capsys, which, owner, name):
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: calls.append(0) or original(*arguments))
    (tmp_path / "classes.csv").write_text("id,name\n" + "".join(f"{i},class {i}\n" for i in range(300)))
    model = ("--clip", world / "clip.pt") if which == "clip" else ("--checkpoint", tuned)
    assert evaluate("--video", long, "--every", "250ms", "--batch", "2", "--classes", tmp_path / "classes.csv", *model) == 0
    assert len(calls) == 1 and len(capsys.readouterr().out.splitlines()) == 11


def test_classes_from_words_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("a dog\n\nriding, fast\na dog\n")
    (tmp_path / "names.json").write_text('{"1": "b", "0": "a: as it is described, at length"}')
    (tmp_path / "classInd.txt").write_bytes(b"1 ApplyEyeMakeup\r\n2 Archery\r\n3 Baby Crawling\r\n")
    (tmp_path / "plain").write_text("a\nb\n")
    for words, names in (
            (["names.txt"], ["a dog", "riding, fast"]), (["names.json"], ["a: as it is described, at length", "b"]),
            (["classInd.txt"], ["ApplyEyeMakeup", "Archery", "Baby Crawling"]), (["plain"], ["a", "b"]),
            (["plain", "c"], ["a", "b", "c"]), (["a man runs across a field"], ["a man runs across a field"]),
            (["a, b,c,a"], ["a", "b", "c"]), (["a, b", "c"], ["a, b", "c"]), (["red", "blue"], ["red", "blue"]),
            (["red", "to", "blue,", "blue", "to", "red"], ["red to blue", "blue to red"]),  # quotes were forgotten
            (["sit/stand"], ["sit/stand"]), (["node.js,"], ["node.js"])):
        assert evaluation.named_classes(words) == names
    assert len(evaluation.named_classes([",".join(map(str, range(400)))])) == 400  # too long for a file's name
    for word, said in ((" , ", "--classes"), ("absent.txt", "absent.txt"), (str(tmp_path), "no such file"),
                       (str(tmp_path / "nmes"), "no such file"), ("names.tsv", "no such file"), ("/dev/null", "no such file")):
        with pytest.raises(ValueError, match=said):
            evaluation.named_classes([word])


def test_a_checkpoint_knows_its_classes_and_words(world, long, tuned, capsys):
    assert evaluate("--video", long, "--checkpoint", tuned) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1:] == ["  1.000  a"] or "a (cosine similarity)" in out
    assert "warning" not in err and "TC-CLIP on the CPU, 1 thread, fp32; 1x1 views of 8 frames, 32 pixels" in err
    assert evaluate("--video", long, "--checkpoint", tuned, "--classes", "tai chi, a") == 0
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith("warning: ") and "never trained on words such as chi, tai: " in warning


def test_top_k_and_several_classes(world, long, capsys):
    words = "--video", long, "--classes", "red to blue", "a dog, running", "cat", "--clip", world / "clip.pt"
    assert evaluate(*words, "--top", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert evaluate(*words, "--every", "1s", "--top", "1") == 0
    assert all(len(line.split("  ")) == 3 for line in capsys.readouterr().out.splitlines()[1:])


def test_features_of_videos_and_windows(world, long, tmp_path, capsys):
    """What is written is encode_video, averaged over the views, and can be read without pickles."""
    model = FramePool(load_clip(world / "clip.pt")).eval()
    words = "--video", long, data.videos_below(world / "base")[0], "--clip", world / "clip.pt", "--features", tmp_path / "f.npz"
    assert evaluate(*words) == 0
    with np.load(tmp_path / "f.npz") as file:
        assert list(file["names"]) == ["long.mp4", "000.mp4"] and file["paths"][0] == str(long)
        assert not file["normalised"] and file["features"].dtype == np.float32 and np.isnan(file["end"]).all()
        with torch.no_grad():
            views = data.read_test(long, evaluation.eval_views(evaluation.VANILLA, model))
            expected = model.encode_video(data.normalise(views, "clip")).mean(0)
        np.testing.assert_allclose(file["features"][0], expected, atol=1e-5)
    assert evaluate(*words, "--every", "1s", "--classes", "a,b", "--batch", "2") == 0
    assert "0:02-0:02.5" in capsys.readouterr().out
    with np.load(tmp_path / "f.npz") as file:
        assert file["start"].tolist() == [0, 1, 2, 0] and file["end"].tolist() == [1, 2, 2.5, 1]
        assert file["features"].shape == (4, 128) and list(file["names"]) == ["long.mp4"] * 3 + ["000.mp4"]


def test_windows_that_overlap(world, long, tmp_path, capsys):
    words = "--video", long, "--classes", NAMES, "--clip", world / "clip.pt", "--every", "1s"
    assert evaluate(*words, "--stride", "500ms", "--json", tmp_path / "a.json", "--picture", tmp_path / "a.png") == 0
    windows = json.loads((tmp_path / "a.json").read_text())[0]["windows"]
    assert [(w["start"], w["end"]) for w in windows] == [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.5)]  # the last one reaches the end
    assert evaluate(*words, "--json", tmp_path / "b.json") == 0
    alone = json.loads((tmp_path / "b.json").read_text())[0]["windows"]
    for one, other in zip(windows[::2], alone[:2], strict=True):
        assert one["classes"] == pytest.approx(other["classes"], abs=2e-6)


def test_a_picture_of_each_video_of_a_folder(world, tmp_path):
    words = "--classes", NAMES, "--clip", world / "clip.pt", "--picture", tmp_path / "pictures"
    first, second = (world / "base" / name for name in ("red to blue", "blue to red"))
    assert evaluate("--video", first, second, *words) == 0
    expected = {f"{folder}-{name}.png" for folder in ("red to blue", "blue to red") for name in ("000", "000r")}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == expected
    assert evaluate("--video", first, *words, "--every", "1s") == 0
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == expected | {"000.png", "000r.png"}


@pytest.mark.slow
@pytest.mark.parametrize("disabled", [True, False])
def test_the_bar_over_many_videos_can_be_left_out(world, disabled):
    settings = os.environ | {"OMP_NUM_THREADS": "1"} | ({"TQDM_DISABLE": "1"} if disabled else {})
    done = subprocess.run([sys.executable, str(ROOT / "eval.py"), "--video", str(world / "novel" / "red to cyan"),
                           data.videos_below(world / "base")[0], "--classes", "a,b", "--clip", str(world / "clip.pt")],
                          text=True, capture_output=True, env=settings)
    assert done.returncode == 0 and ("videos: " in done.stderr) != disabled, done.stderr


def test_files_that_are_no_known_videos_are_told(world, tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(Path(data.videos_below(world / "base")[0]).read_bytes())
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "B.MTS").write_bytes((tmp_path / "a.mp4").read_bytes())
    assert evaluate("--check", tmp_path) == 0
    out, err = capsys.readouterr()
    assert "0 of 2 videos" in out and "notes.docx" in err


@pytest.mark.parametrize("words, value", [("2s", 2), ("2", 2), ("500ms", 0.5), (".5", 0.5), ("1.5min", 90)])
def test_times(words, value):
    assert evaluation.parse_args(["--video", "a", "--classes", "b", "--every", words]).every == pytest.approx(value)


@pytest.mark.slow
def test_windows_with_a_released_checkpoint(tmp_path, capsys):
    from test_tc import released_state
    state, openai = released_state(weights, "tiny", 1)
    state["prompt_learner.ctx"] = np.zeros((4, 512))
    torch.save({"model": {key: torch.as_tensor(value).float() for key, value in state.items()}}, tmp_path / "released.pth")
    torch.save({key: torch.as_tensor(value).float() for key, value in openai.items()}, tmp_path / "clip.pt")
    video = SHARED / "videos" / "real" / "cleaning_pool_short32.mp4"
    assert evaluate("--video", video, "--classes", "juggling,running", "--checkpoint", tmp_path / "released.pth", "--clip",
                    tmp_path / "clip.pt", "--merges", MERGES, "--every", "1s") == 0
    assert [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()[1:]] == ["0:00-0:01", "0:01-0:01.07"]
