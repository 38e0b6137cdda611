"""CPU time to read a clip (16 TSN frames, short side 256, centre crop 224, one thread), beside decord's if installed; and
to read and augment one for training by the papers' recipe.

python tests/bench_reader.py [--runs 15] [VIDEO ...]      # default: the videos in ../shared/videos/real, where present
"""
import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import frame_indices, read_clip  # noqa: E402

try:
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


def main(args):
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
    parser.add_argument("--runs", type=int, default=15, help="readings per file; their median is printed")
    main(parser.parse_args())
