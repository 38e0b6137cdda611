"""CPU time to read a clip (16 TSN frames, short side 256, centre crop 224, one thread), beside decord's if installed; and
to read and augment one for training by the papers' recipe.

python tests/bench_reader.py [--runs 15] [VIDEO ...]      # default: the videos in ../shared/videos/real, where present
python tests/bench_reader.py --long [--minutes 60]        # the same of long 720p files of every usual kind, which it makes,
                                                          # with the memory of a process that reads one, and what
                                                          # several threads are worth where one file is read from end to end
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from data import frame_indices, read_clip  # noqa: E402

try:
    if sys.argv[1:3] in (["--one", "here"], ["--one", "1"], ["--one", str(os.cpu_count())]):
        raise ImportError("its memory would count")
    import decord
except ImportError:
    decord = None

REAL = Path(__file__).resolve().parents[2] / "shared" / "videos" / "real"


def decord_clip(path, frames=16, size=224, short_side=256):
    """The same clip read by decord, which decodes straight to the short side."""
    with av.open(path) as container:  # outside the measured time: what the caller must know beforehand
        codec = container.streams.best("video").codec_context
        scale = short_side / min(codec.width, codec.height)
        width, height = round(codec.width * scale), round(codec.height * scale)
    top, left = (height - size) // 2, (width - size) // 2

    def read():
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1, width=width, height=height)
        clip = reader.get_batch(frame_indices(len(reader), frames)).asnumpy()[:, top:top + size, left:left + size]
        return torch.from_numpy(np.ascontiguousarray(clip.transpose(0, 3, 1, 2)))
    return read


def seconds(read):
    start = time.process_time()  # of all threads
    read()
    return time.process_time() - start


# ---- long files ------------------------------------------------------------------------------------------------------

LONG = {  # name: codec and its options
    "h264.mp4": ("libx264", {"preset": "veryfast", "g": "250"}),
    "h264.ts": ("libx264", {"preset": "veryfast", "g": "250"}),
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "g": "250", "x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "b": "1500k", "g": "128"}),
    "mpeg4.avi": ("mpeg4", {"g": "250", "b": "3M"}),
    "raw.avi": ("rawvideo", {}),  # 1080p, of 32 seconds: 2.5 GB
}


def write_piece(path, codec, options, seconds, width, height):
    """A moving pattern with noise, 25 frames a second."""
    rng, y, x = np.random.default_rng(0), *np.mgrid[:height, :width]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, width=width, height=height, pix_fmt="yuv420p", options=options)
        for t in range(25 * seconds):
            grey = ((x + 7 * t) // 5 % 160 + (y + 3 * t) // 9 % 80).astype(np.uint8) + rng.integers(8, size=x.shape, dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.stack([grey, grey.T.reshape(grey.shape), grey], -1), format="rgb24")))
        out.mux(stream.encode())


def repeat_piece(piece, path, times):
    """The piece as often as that, one after the other, not encoded again."""
    with av.open(str(path), "w") as out:
        stream = None
        for i in range(times):
            with av.open(str(piece)) as source:
                stream = stream or out.add_stream_from_template(source.streams.video[0])
                frame = round(1 / (25 * source.streams.video[0].time_base))  # one frame's duration
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.pts, packet.dts = packet.pts + 300 * i * frame, packet.dts + 300 * i * frame
                        packet.stream = stream
                        out.mux(packet)


def write_long(folder, name, minutes):
    """A long file in the folder: 12 seconds, repeated."""
    codec, options = LONG[name]
    if codec == "rawvideo":
        write_piece(folder / name, codec, options, 32, 1920, 1080)
    else:
        write_piece(folder / f"piece-{name}", codec, options, 12, 1280, 720)
        repeat_piece(folder / f"piece-{name}", folder / name, 5 * minutes)
    return folder / name


def measured_alone(words):
    """CPU seconds, wall seconds and peak MB of this script with --one, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--one", *map(str, words)], check=True, text=True, stdout=subprocess.PIPE)
    return [float(word) for word in done.stdout.split()]


def read_one(kind, path):
    """What measured_alone measures: a clip of a test, here or by decord; or all windows of 10 seconds."""
    torch.set_num_threads(1)
    cpu, wall = time.process_time(), time.monotonic()
    if kind == "here":
        read_clip(path)
    elif kind == "decord":
        reader = decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)
        reader.get_batch(frame_indices(len(reader), 16)).asnumpy()
    else:
        for _ in data.read_windows(path, 10, 16, 224, 256, threads=int(kind)):
            pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(time.process_time() - cpu, time.monotonic() - wall, peak)


def long_files(minutes):
    print(f"16 frames of a long file: CPU seconds and the process's peak MB, here and by decord; all windows of 10 seconds of "
          f"{min(minutes, 3)} minutes:\nseconds on the wall with one thread and with {os.cpu_count()}, and peak MB")
    print(f"{'file':10s} {'MB':>6s} {'minutes':>8s} {'here/s':>8s} {'MB':>6s} {'decord/s':>8s} {'MB':>6s} {'ratio':>6s}"
          f" {'windows/s':>10s} {'by threads':>11s} {'MB':>6s}")
    with tempfile.TemporaryDirectory() as folder:
        for name in LONG:
            path = write_long(Path(folder), name, minutes)
            here, _, memory = measured_alone(["here", path])
            line = f"{name:10s} {path.stat().st_size / 1e6:6.0f} {0.53 if name == 'raw.avi' else minutes:8.1f} {here:8.1f} {memory:6.0f}"
            if decord:
                other, _, peak = measured_alone(["decord", path])
                line += f" {other:8.1f} {peak:6.0f} {here / other:6.2f}"
            else:
                line += f" {'-':>8s} {'-':>6s} {'-':>6s}"
            path.unlink()
            path = write_long(Path(folder), name, min(minutes, 3))  # one that is read from end to end
            (_, one, _), (_, several, peak) = (measured_alone([threads, path]) for threads in (1, os.cpu_count()))
            print(f"{line} {one:10.1f} {several:11.1f} {peak:6.0f}", flush=True)
            path.unlink()


# ---- short files -----------------------------------------------------------------------------------------------------

def main(args):
    if args.one:
        return read_one(*args.one)
    if args.long:
        return long_files(args.minutes)
    import train  # only here: its memory is not to count above
    torch.set_num_threads(1)
    paths = args.videos or sorted(str(path) for path in REAL.glob("*.*") if path.suffix != ".csv")
    if not paths:
        sys.exit(f"no videos given, and none in {REAL}")
    augmentation = train.resolve_recipe("zeroshot", "tc", "k400").augmentation()
    print(f"{'video':28s} {'codec':>6s} {'size':>10s} {'frames':>6s} {'train/ms':>8s} {'here/ms':>8s} {'decord':>8s} {'ratio':>6s}")
    for path in paths:
        with av.open(path) as container:
            stream = container.streams.best("video")
            codec = stream.codec_context
            facts = f"{codec.name:>6s} {f'{codec.width}x{codec.height}':>10s} {stream.frames or '?':>6}"
        videos, keys = data.TrainVideos(data.VideoList(("",), (path,), (0,)), data.Views(), 0, augmentation), iter(range(10**9))
        training = median(seconds(lambda: videos[next(keys), 0, 1.0]) for _ in range(args.runs))
        readers = [lambda: read_clip(path)] + ([decord_clip(path)] if decord else [])
        for read in readers:
            read()
        times = [[seconds(read) for read in readers] for _ in range(args.runs)]  # taken in turn
        medians = [1e3 * median(column) for column in zip(*times)]
        other = f"{medians[1]:8.1f} {median(a / b for a, b in times):6.2f}" if decord else f"{'-':>8s} {'-':>6s}"
        print(f"{os.path.basename(path):28s} {facts} {1e3 * training:8.1f} {medians[0]:8.1f} {other}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", nargs="*", help="video files")
    parser.add_argument("--long", action="store_true", help="measure long files, which are made on the spot, instead")
    parser.add_argument("--minutes", type=int, default=60, help="their length")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=15, help="readings per file; their median is printed")
    main(parser.parse_args())
