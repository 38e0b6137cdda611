"""From video files on a disk to batches for a model, and the miniature world of the tests.

Sections: which frames; reading videos; augmentation; mixing; annotations; protocols; processes;
loaders; the miniature world.

Letters: B videos, T frames, V views, R side in pixels, C classes. Frames are uint8 RGB, channels
first, unless said otherwise.
"""
import csv
import ctypes
import fnmatch
import hashlib
import json
import multiprocessing
import multiprocessing.queues
import os
import re
import shutil
import signal
import sys
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import permutations
from pathlib import Path

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info
from tqdm import tqdm

# ---- which frames --------------------------------------------------------------------------------


def frame_indices(total, frames, train=False, rng=None):
    """TSN positions: one frame in each of `frames` equal segments of a video of `total` frames.

    Testing takes the middle of each segment. Training draws from segments of total // frames frames
    with the numpy Generator `rng` (None: a fresh one), so the last total % frames are never drawn
    [released]. Returns (frames,) int64 in [0, total), with repeats if total < frames.
    Raises ValueError if either is below 1.
    """
    check_counts(total, frames)
    i = np.arange(frames)
    if not train:
        return (2 * i + 1) * total // (2 * frames)
    if total < frames:  # [released] too short to draw from; the end wraps to 0
        return np.rint(i * total / frames).astype(np.int64) % total
    length = total // frames
    rng = rng or np.random.default_rng()
    return i * length + rng.integers(length, size=frames)


def uniform_indices(total, frames, train=False, rng=None):
    """ILA's positions on SSv2, with the arguments and results of `frame_indices`.

    Segment i is [round(s i), round(s (i+1))] with s = (total - 1) / frames. Testing takes its
    middle, training any frame of it, both ends included.
    """
    check_counts(total, frames)
    edges = np.rint(np.arange(frames + 1) * (total - 1) / frames).astype(np.int64)
    first, last = edges[:-1], edges[1:]
    if not train:
        return (first + last) // 2
    rng = rng or np.random.default_rng()
    return rng.integers(first, last, endpoint=True)


def check_counts(total, frames):
    """Raise ValueError unless there is something to sample, and something to sample from."""
    if total < 1 or frames < 1:
        raise ValueError(f"cannot take {frames} frames from a video of {total}: "
                         "both must be at least 1")


SAMPLERS = {"tsn": frame_indices, "uniform": uniform_indices}


def view_indices(total, frames, clips, indices=frame_indices):
    """[ours] (clips, frames) positions: each of `frames` segments gives one frame to every clip.

    The clips' offsets within a segment are equally spaced and the same at every evaluation. For TSN,
    clip c takes frame floor((i + (2c+1) / (2 clips)) total / frames) of segment i.
    """
    return indices(total, frames * clips).reshape(frames, clips).T


# ---- reading videos ------------------------------------------------------------------------------

MAX_PIXELS = 8192 * 4320  # [ours] 8K cinema, the largest frame in use; decoding one takes 0.3 GB
MAX_ASPECT = 32  # [ours] long side / short side; narrower frames grow too large when resized


class VideoError(ValueError):
    """A video that cannot be read; the message is "<path>: <reason>"."""


def read_frames(path, pick, short_side, max_pixels=MAX_PIXELS):
    """Decode the frames that `pick(total)` asks for, upright, with their short side at `short_side` pixels.

    pick: number of frames -> integer array (...) with values in [0, total). It is asked again where a damaged file
    holds other than the frames that it claims: positions refer to those that decode.
    Returns uint8 (..., 3, h, w), all of the first one's size. The compressed file is held in memory meanwhile.
    VideoError: file absent or unreadable, no video stream, no frame that decodes, frames above `max_pixels` pixels.
    """
    frames, total = read_pass(path, pick, short_side, max_pixels, None)
    while frames is None:  # a third pass at most: the second has counted
        frames, total = read_pass(path, pick, short_side, max_pixels, total)
    return frames


@contextmanager
def open_video(path, max_pixels):
    """An open (container, video stream, its codec); whatever goes wrong with them becomes a VideoError."""
    try:
        if not os.path.isfile(path):  # a pipe or a device might block for ever
            raise ValueError("no such file")
        limit = {"max_pixels": str(max_pixels)}  # both decode: av.open to learn the frame size, then the codec
        # "file:" as a name may look like an address; a title that is not UTF-8 does not matter.
        with av.open(f"file:{path}", options=limit, metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise ValueError("no video stream that can be decoded")
            codec = stream.codec_context
            if not 0 < codec.width * codec.height <= max_pixels:
                raise ValueError(f"frame size unknown or above {max_pixels} pixels")
            codec.options, codec.thread_count = limit, 1  # loaders have workers; threads decode damage differently
            yield container, stream, codec
    except (av.FFmpegError, OSError, ValueError, LookupError) as error:
        raise VideoError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def read_pass(path, pick, short_side, max_pixels, total):
    """One pass over a file -> (frames, total), or (None, a better total). `total`: what the pass before has counted,
    None in the first, which believes in one frame per packet."""
    with open_video(path, max_pixels) as (container, stream, codec):
        packets = [packet for packet in container.demux(stream) if packet.size]
        stamps = [packet.pts for packet in packets if not packet.is_discard]
        believed = total is None
        ranked = believed and codec.name == "h264" and None not in stamps
        ranked = ranked and len(set(stamps)) == len(stamps)
        ranked = ranked and container.format.name.startswith(("mov", "matroska"))
        total = total or len(stamps)
        if not total:
            raise ValueError("no video frames")
        index = np.asarray(pick(total))
        wanted, convert = set(index.flat), partial(to_image, VideoReformatter(), short_side)
        if ranked:
            images, found = skim(codec, packets, sorted(stamps), wanted, convert), total
        else:
            images, found = count(codec, packets, wanted, convert, total if believed else None)
        if images is None or found != total:
            return None, found
        first = images[index.flat[0]]
        frames = torch.cat([resize(images[i], *first.shape[-2:]) for i in index.flat])  # sizes may change midway
        return frames.view(*index.shape, *first.shape[1:]), total


def restarts(packet):
    """Whether an h264 packet (units, each after 4 bytes of size) has an IDR picture (type 5): none refers past it."""
    data, start = bytes(packet) if packet.is_keyframe else b"", 0
    while start + 4 < len(data):
        if data[start + 4] & 31 == 5:
            return True
        start += 4 + int.from_bytes(data[start:start + 4], "big")
    return False


def decode(codec, packet):
    """The frames that a packet decodes to (None: those that the decoder still holds), or None where it is damaged."""
    try:
        return codec.decode(packet)
    except av.InvalidDataError:
        return None


def skim(codec, packets, stamps, wanted, convert):
    """Decode h264 without the frames that neither `wanted` nor the decoder needs -> {position: image}; None if damaged.

    A frame's position is the rank of its time stamp, known before anything is decoded. The decoder needs what other
    frames refer to, from the last restart (IDR picture) to the last wanted frame before the next.
    """
    rank = {stamp: position for position, stamp in enumerate(stamps)}
    missing, images = wanted | {0}, {}  # 0: where the first pictures do not decode, ranks are not positions
    chosen, needed = [], False
    for packet in reversed(packets):
        keep = rank.get(packet.pts) in missing
        needed = needed or keep
        if needed:
            chosen.append((packet, keep))
        needed = needed and not restarts(packet)
    for packet, keep in [*reversed(chosen), (None, True)]:
        codec.skip_frame = "DEFAULT" if keep else "NONREF"
        decoded = decode(codec, packet)
        if decoded is None or any(frame.is_corrupt or frame.pts not in rank for frame in decoded):
            return None
        for frame in decoded:
            position = rank[frame.pts]
            missing.discard(position)
            if position in wanted:
                images[position] = convert(frame)
    return None if missing else images


def count(codec, packets, wanted, convert, total=None):
    """Decode in order -> ({position: image}, total). Stops at the last of `wanted` if a `total` is given and no packet
    is bad; else goes on to the end, to count what decodes."""
    images, seen = {}, 0
    for packet in [*packets, None]:
        decoded = decode(codec, packet)
        total = None if decoded is None else total
        for frame in decoded or ():
            if seen in wanted:
                images[seen] = convert(frame)
            seen += 1
        if total and len(images) == len(wanted):
            return images, total
    if not seen:
        raise ValueError("no frame decodes")
    return images, seen


def to_image(reformatter, short_side, frame):
    """A decoded frame -> uint8 (1, 3, h, w): to RGB at its own size, then resized, then turned upright."""
    if max(frame.width, frame.height) > MAX_ASPECT * min(frame.width, frame.height):
        raise ValueError(f"frames of {frame.width}x{frame.height} pixels are too narrow")
    rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
    scale = short_side / min(frame.width, frame.height)
    image = torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)
    image = resize(image, round(frame.height * scale), round(frame.width * scale))  # (1, 3, h, w)
    return torch.rot90(image, round(frame.rotation / 90), (2, 3)) if frame.rotation else image


def resize(images, height, width):
    """uint8 (N, 3, H, W) -> (N, 3, height, width): bilinear, antialiased (else downscaling errs by up to 98 of 255)."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class Views:
    """How a video becomes a model's input at test time."""

    frames: int = 16  # T
    size: int = 224  # R in pixels
    short_side: int = 256  # pixels, before the crop
    sampling: str = "tsn"  # tsn: the middles of T equal segments; uniform: fixed intervals
    clips: int = 1  # views in time
    crops: int = 1  # views in space: 1 is the centre; 3 are the ends and centre of the long side
    pixels: str = "imagenet"  # whose mean and deviation normalise the pixels, see MEANS


def read_test(path, views):
    """Read the test-time views of a video: uint8 (V, T, 3, R, R), V = clips x crops.

    The crops of the first clip come first. The video is decoded once. Raises VideoError, and
    ValueError for impossible views.
    """
    size = views.size
    if views.crops not in (1, 3) or views.short_side < size:
        raise ValueError(f"crops must be 1 or 3 (got {views.crops}), and short_side at least size "
                         f"(got {views.short_side}, {size})")
    pick = partial(view_indices, frames=views.frames, clips=views.clips,
                   indices=SAMPLERS[views.sampling])
    video = read_frames(path, pick, views.short_side)  # (clips, T, 3, h, w)
    height, width = video.shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    corners = [(top, left)]
    if views.crops == 3 and height > width:
        corners = [(0, left), (top, left), (height - size, left)]
    elif views.crops == 3:
        corners = [(top, 0), (top, left), (top, width - size)]
    crops = [video[..., y:y + size, x:x + size] for y, x in corners]
    return torch.stack(crops, 1).flatten(0, 1).contiguous()  # (V, T, 3, R, R)


def read_clip(path, frames=16, size=224, short_side=None):
    """Read the centre crop of a video's TSN middle frames: uint8 (T, 3, size, size).

    short_side: pixels before the crop; None: 256/224 of `size`. Raises VideoError.
    """
    return read_test(path, Views(frames, size, short_side or round(size * 256 / 224)))[0]


def timed_frames(container, stream, codec):
    """Decode in order: yields (seconds since the first frame, frame), at last (the end, None).

    Time stamps give the times. Where one is missing or does not rise, a frame begins an average
    frame's duration after the one before it.
    """
    step = float(1 / stream.average_rate) if stream.average_rate else 0.0  # seconds
    time = None
    for frame in decoded_frames(container, stream, codec):
        if time is None:
            time, origin = 0.0, frame.time or 0.0
        elif frame.time is not None and frame.time - origin > time:
            time = frame.time - origin
        elif step:
            time += step
        else:
            raise ValueError("neither rising time stamps nor a frame rate: times are unknown")
        yield time, frame
    if time is None:
        raise ValueError("no frame decodes")
    yield time + step, None


def decoded_frames(container, stream, codec):
    """Yield every frame that decodes, in order."""
    for packet in container.demux(stream):
        if packet.size:
            yield from decode(codec, packet) or ()
    yield from decode(codec, None) or ()


def read_windows(path, seconds, frames, size, short_side, indices=frame_indices):
    """Yield windows of `seconds`, one after the other: (start, end, uint8 (T, 3, size, size)).

    start, end: seconds. Of the frames that begin in a window, those at `indices` are taken and
    centre-cropped; a window in which none begins is left out. The video is decoded once, in order.
    At most 1024 small frames are in memory: when there are more, every second is dropped.
    Raises VideoError.
    """
    reformatter, kept = VideoReformatter(), []
    with open_video(path, MAX_PIXELS) as opened:
        for time, frame in timed_frames(*opened):
            number = int(time / seconds + 1e-6)  # 0.3 / 0.1 is a little below 3
            if kept and (frame is None or number != window):
                end = min((window + 1) * seconds, time)
                clip = np.stack([kept[i] for i in indices(len(kept), frames)])
                yield round(window * seconds, 6), round(end, 6), torch.from_numpy(clip)
                kept = []
            if not kept:
                window, seen, stride = number, 0, 1
            if frame is not None and seen % stride == 0:
                image = to_image(reformatter, short_side, frame)[0].numpy()  # (3, h, w)
                top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
                kept.append(image[:, top:top + size, left:left + size].copy())
            if len(kept) == 1024:
                kept, stride = kept[::2], 2 * stride
            seen += 1


# ---- augmentation --------------------------------------------------------------------------------

SCALES = (1, 0.875, 0.75, 0.66)  # [released] multi-scale crop
JITTER = (0.4, 0.4, 0.2, 0.1)  # [ours] brightness, contrast, saturation: 1 +- this; hue: +- turns
LUMA = (0.299, 0.587, 0.114)  # brightness of R, G, B [ITU-R BT.601]
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5))  # [TSN] where a crop lies, (down, right)


def augment(clip, size, rng, scales=SCALES, flip=0.0, jitter=0.0, grey=0.0, shift=0.0,
            strengths=JITTER):
    """uint8 (T, 3, H, W) -> (T, 3, size, size): one random transform for all frames.

    scales: a crop's height and width as parts of the short side, equal or neighbours in this list.
    flip, jitter, grey: probabilities. strengths: see JITTER. shift: the clip moves by up to this
    part of each side, and its border is repeated. rng: a numpy Generator.
    """
    if shift:
        clip = move(move(clip, -2, shift, rng), -1, shift, rng)
    clip = resize(random_crop(clip, scales, rng), size, size)  # (T, 3, size, size)
    if rng.random() < flip:
        clip = clip.flip(-1)
    if rng.random() < jitter:
        brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4) * strengths
        clip = recolour(clip, 1 + brightness, 1 + contrast, 1 + saturation, hue)
    if rng.random() < grey:
        clip = recolour(clip, saturation=0)
    return clip


def move(clip, axis, shift, rng):
    """Move a clip along an axis by a random number of pixels, up to `shift` times the side."""
    side = clip.shape[axis]
    reach = int(shift * side)
    offset = rng.integers(-reach, reach, endpoint=True)
    return clip.index_select(axis, (torch.arange(side) + offset).clamp(0, side - 1))


def random_crop(clip, scales, rng):
    """[released] Multi-scale crop: one of the pairs of sides, in a corner or the centre."""
    *_, height, width = clip.shape
    sides = [round(scale * min(height, width)) for scale in scales]
    i = rng.integers(len(sides))
    j = rng.integers(max(i - 1, 0), min(i + 2, len(sides)))
    down, right = CORNERS[rng.integers(len(CORNERS))]
    top, left = int((height - sides[i]) * down), int((width - sides[j]) * right)
    return clip[..., top:top + sides[i], left:left + sides[j]]


def recolour(clip, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    """rgb' = brightness (contrast S(saturation) R(hue) rgb + (1 - contrast) m), m the mean grey.

    [ours] The four colour changes as one linear map: S blends with grey, R turns about the grey
    axis by `hue` turns; m is the mean over the whole clip.
    """
    turn, third = 2 * np.pi * hue, 2 * np.pi / 3
    a = (1 + 2 * np.cos(turn)) / 3
    b = (1 + 2 * np.cos(turn + third)) / 3
    c = (1 + 2 * np.cos(turn - third)) / 3
    rotate = torch.tensor([[a, b, c], [c, a, b], [b, c, a]], dtype=torch.float32)
    luma = torch.tensor(LUMA)
    blend = saturation * torch.eye(3) + (1 - saturation) * luma  # every row of the last is luma
    pixels = clip.float().flatten(2)  # (T, 3, H*W)
    mean = luma @ pixels.mean((0, 2))
    pixels = brightness * contrast * (blend @ rotate) @ pixels + brightness * (1 - contrast) * mean
    return pixels.round_().clamp_(0, 255).byte().view(clip.shape)


# ---- mixing --------------------------------------------------------------------------------------


def mix_draw(rng, size, mixup=0.8, cutmix=1.0, switch=0.5):
    """How two neighbours are mixed: (R,R) float32, the share that a clip keeps of each own pixel.

    mixup keeps the same share everywhere, lambda ~ Beta(a, a) with a = `mixup`. cutmix keeps all
    but a box whose area is 1 - lambda, a = `cutmix`; the border may cut some of it off. 0 is never;
    `switch` is the probability of cutmix if both are on. rng: a numpy Generator; size: R.
    """
    if cutmix and (not mixup or rng.random() < switch):
        half = size * np.sqrt(1 - rng.beta(cutmix, cutmix)) / 2
        centre = rng.integers(size, size=2)
        top, left = np.rint(centre - half).clip(0, size).astype(int)
        bottom, right = np.rint(centre + half).clip(0, size).astype(int)
        own = torch.ones(size, size)
        own[top:bottom, left:right] = 0
        return own
    share = rng.beta(mixup, mixup) if mixup else 1.0
    return torch.full((size, size), share)


def mix_pairs(video, targets, own):
    """Mixes each clip x_i with its neighbour x_j, j = i^1: own x_i + (1 - own) x_j.

    video (B,T,3,R,R) float, targets (B,C), own (ceil(B/2),R,R): `mix_draw`'s, one for each pair.
    Targets are mixed by the mean of `own`. Returns both in the same shapes; a last odd clip stays
    as it is. [ours] Neighbours are mixed instead of random partners [released], so that a batch
    cut into parts of even length, for processes or micro-batches, gives the same data.
    """
    B = len(video)
    partner = (torch.arange(B, device=video.device) ^ 1).clamp(max=B - 1)
    own = own.to(video.device).repeat_interleave(2, dim=0)[:B]  # (B,R,R)
    share = own.double().mean(dim=(1, 2)).to(targets)[:, None]  # (B,1)
    mixed = torch.lerp(video[partner], video, own[:, None, None].to(video))
    return mixed, torch.lerp(targets[partner], targets, share)


def soft_targets(labels, classes, smoothing=0.0):
    """labels (B,) -> (B,C) float: 1 - smoothing on the label, and `smoothing` spread over all."""
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


# ---- annotations -----------------------------------------------------------------------------------------------------

VIDEO_SUFFIXES = {f".{suffix}" for suffix in "mp4 avi mkv webm mov m4v mpg mpeg ts gif flv wmv 3gp".split()}
PAGES = {"hmdb51": "https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database",
         "ucf101": "https://www.crcv.ucf.edu/data/UCF101.php",
         "k400": "https://github.com/cvdfoundation/kinetics-dataset",
         "k600": "https://github.com/cvdfoundation/kinetics-dataset",
         "ssv2": "https://www.qualcomm.com/developer/software/something-something-v-2-dataset"}
DATASETS = ("shapes", *PAGES, "folder")
CLASS_COUNTS = {"hmdb51": 51, "ucf101": 101, "k400": 400, "k600": 600, "ssv2": 174}
SPLITS = "split1", "split2", "split3"
KINETICS = {"train": ("train.csv", "kinetics*train.csv"),
            "val": ("val.csv", "validate.csv", "kinetics*val.csv", "kinetics*validate.csv")}
# The owners' annotation files (* stands for any characters) of each set. The folder is where they come in: any will do.
OWNERS = {"hmdb51": {split: (f"testTrainMulti_7030_splits/*_test_{split}.txt",) for split in SPLITS},
          "ucf101": {split: (f"ucfTrainTestlist/{name}.txt",) for split, name in
                     zip(("train", *SPLITS), ("trainlist01", "testlist01", "testlist02", "testlist03"))},
          "k400": KINETICS, "k600": KINETICS,
          "ssv2": {split: (f"something-something-v2-{name}.json", f"{name}.json")
                   for split, name in (("train", "train"), ("val", "validation"))}}
TEST_FOLDERS = ("base", "novel", "test", "val")
# The published lists (ViFi-CLIP, TC-CLIP): the labels file, and the list of each test set.
PUBLISHED = {"hmdb51": ("hmdb_51_labels.csv", dict(zip(SPLITS, ("val1.txt", "val2.txt", "val3.txt")))),
             "ucf101": ("ucf_101_labels.csv", dict(zip(SPLITS, ("val1.txt", "val2.txt", "val3.txt")))),
             "k400": ("kinetics_400_labels.csv", {"val": "val.txt"}),
             "k600": ("ZS_split1_K600.csv", {split: f"ZS_{split}_K600_eval*.txt" for split in SPLITS}),
             "ssv2": ("ssv2_labels.csv", {"val": "val.txt"}),
             "folder": ("labels.csv", {}), "shapes": ("labels.csv", {})}


@dataclass(frozen=True)
class VideoList:
    """Annotated videos: class names, each video's path and label in [0, C), and names of videos that are nowhere."""

    classes: tuple
    paths: tuple
    labels: tuple
    absent: tuple = ()

    def keep(self, indices):
        """The videos at these indices, classes unchanged."""
        return replace(self, paths=tuple(self.paths[i] for i in indices), labels=tuple(self.labels[i] for i in indices))

    def only(self, classes):
        """The videos of these labels, which are numbered anew from 0 in the order given."""
        new = {label: i for i, label in enumerate(classes)}
        kept = self.keep([i for i, label in enumerate(self.labels) if label in new])
        return replace(kept, classes=tuple(self.classes[c] for c in classes), labels=tuple(new[c] for c in kept.labels))


def files_below(folder):
    """Each folder in and below `folder`, sorted, links followed, with its sorted file names; none of what is hidden."""
    seen = set()
    for top, folders, files in os.walk(folder, followlinks=True):
        new = os.path.realpath(top) not in seen  # a link may lead back up
        seen.add(os.path.realpath(top))
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        yield top, sorted(name for name in files if new and not name.startswith("."))  # ._x.mp4 of a Mac is no video


def videos_below(folder):
    """Paths of all video files below a folder, sorted, links followed."""
    return [os.path.join(top, name) for top, names in files_below(folder) for name in names
            if os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES]


def class_folders(folder):
    """A VideoList of folder/<class>/<video>. Raises ValueError where there is none."""
    start = len(os.path.join(folder, ""))
    found = [(path, path[start:].partition(os.sep)[0]) for path in videos_below(folder) if os.sep in path[start:]]
    if not found:
        raise ValueError(f"{folder}: no videos; expected one folder per class with videos inside, <class>/<video>.mp4")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    label = {name: i for i, name in enumerate(classes)}
    return VideoList(tuple(classes), tuple(path for path, _ in found), tuple(label[name] for _, name in found))


class Files:
    """What lies below a dataset's folder: `videos` {name without suffix: [path, ...]} and, at most three folders down,
    annotation files `texts` {name: (how far down, path)}."""

    def __init__(self, dataset, root):
        self.dataset, self.root, self.videos, self.texts = dataset, os.path.normpath(root), {}, {}
        for top, names in files_below(self.root):
            depth = top.count(os.sep) - self.root.count(os.sep)
            for name in names:
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in VIDEO_SUFFIXES:
                    self.videos.setdefault(stem, []).append(os.path.join(top, name))
                elif depth <= 3 and suffix in (".txt", ".csv", ".json"):
                    self.texts[name] = min(self.texts.get(name, (9, "")), (depth, os.path.join(top, name)))

    def has_folders(self, name):
        """Whether root/name, such as train, has class folders."""
        folder = os.path.join(self.root, name)
        return os.path.isdir(folder) and (self.dataset not in PAGES or any(map(os.DirEntry.is_dir, os.scandir(folder))))

    def text(self, *patterns):
        """The path of the annotation file of the first pattern that fits any, whatever its folder; None without."""
        for pattern in map(os.path.basename, patterns):
            for name in [pattern] if pattern in self.texts else sorted(fnmatch.filter(self.texts, pattern)):
                return self.texts[name][1]
        return None

    def need(self, *patterns):
        """As `text`, but a ValueError without."""
        if self.text(*patterns):
            return self.text(*patterns)
        labels, lists = PUBLISHED[self.dataset]
        source = (f" The owner's videos and annotations: {PAGES[self.dataset]}. Or use the lists of https://github.com/"
                  f"naver-ai/tc-clip: {', '.join([labels, *lists.values()])}") if self.dataset in PAGES else ""
        raise ValueError(f"{os.path.join(self.root, patterns[0])} is missing, there and up to three folders below: "
                         f"put it there, and the videos anywhere below {self.root}.{source}")

    def find(self, name):
        """The path of the video that a list calls `[folder/]name[.suffix]`, or None.

        The known datasets' file names are unique: the file is taken wherever it lies; of several one that is not empty,
        an owner's replacement first. Others: the path below root, or for a bare name the one file that has it.
        """
        path = os.path.join(self.root, name)
        found = self.videos.get(os.path.splitext(os.path.basename(name))[0], ())
        if self.dataset not in PAGES:
            same = [other for other in found if os.path.basename(other) == name]
            found = [path] if path in found else same if len(same) == 1 else ()
        if len(found) > 1:
            return max(found, key=lambda other: (os.path.isfile(other) and os.path.getsize(other) > 0,
                                                 "/replacement" in other[len(self.root):], other == path))
        return found[0] if found else path if os.path.isfile(path) else None

    def locate(self, classes, entries, source):
        """A VideoList of (name, label) pairs. ValueError that names the list `source` where no video is there at all.

        Videos that are nowhere: of Kinetics they are `absent`, as thousands have left YouTube; others keep their path
        below the root, and fail by name when they are read.
        """
        found = [(self.find(name), name, label) for name, label in entries]
        if not any(path for path, _, _ in found):
            raise ValueError(f"{source}: none of its {len(entries)} videos is below {self.root}; unpack them there")
        absent = tuple(name for path, name, _ in found if not path) if self.dataset in ("k400", "k600") else ()
        kept = [(path or os.path.join(self.root, name), label) for path, name, label in found if path or not absent]
        return VideoList(tuple(classes), *zip(*kept), absent)


@contextmanager
def expecting(path, what):
    """Turns whatever reading the file `path` raises into a ValueError that names it and what was expected."""
    try:
        yield
    except (OSError, ValueError, LookupError, AttributeError, TypeError, csv.Error) as error:
        raise ValueError(f"{path}: expected {what} ({getattr(error, 'strerror', None) or repr(error):.200})") from error


def in_order(names):
    """Class names {id: name} in the order of their ids. ValueError where these do not run from 0 without gaps."""
    if not names or sorted(names) != list(range(len(names))):
        raise ValueError(f"the ids must run from 0 without gaps; found {sorted(names)[:3]}...")
    return tuple(names[i] for i in range(len(names)))


def read_labels(path):
    """Class names of a labels file, CSV with the header `id,name` or JSON {"0": "name"}, in the order of their ids."""
    with expecting(path, "a labels file, CSV with the header id,name or JSON"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(json.load(file).items()) if str(path).endswith(".json") else \
                [(row["id"], row["name"]) for row in csv.DictReader(file)]
        names = {int(key): name for key, name in rows}
        for key, name in rows:
            if not isinstance(name, str) or not name.strip() or names[int(key)] != name:
                raise ValueError(f"id {key} has no name, or several: {name!r}")
        return in_order(names)


def put_right(dataset, names, upstream=False):
    """[ours] HMDB-51's published labels have two pairs of names the wrong way round against the owner's files: they
    are put right, or with `upstream` put as published, for comparison with published numbers."""
    names = list(names)
    for pair in (("kick", "kick ball"), ("sword", "sword exercise")) if dataset == "hmdb51" else ():
        if {*pair} <= {*names}:
            first, second = sorted(map(names.index, pair), reverse=upstream)
            names[first], names[second] = pair
    return tuple(names)


def read_pairs(path, below):
    """[(name, number)] of a text file with lines `name number`, split at the last space, numbers in [0, below)."""
    with expecting(path, "a text file in UTF-8"):
        lines = Path(path).read_text("utf-8-sig").splitlines()
    pairs = [(i, line, *line.strip().rpartition(" ")[::2]) for i, line in enumerate(lines, 1) if line.strip()]
    for i, line, name, number in pairs:
        if not name or not number.isdecimal() or int(number) >= below:
            raise ValueError(f"{path}, line {i}: expected `path label` with a label below {below}: {line!r}")
    return [(name, int(number)) for _, _, name, number in pairs]


def read_hmdb(files):
    """As `read_owners`. Lines `<video>.avi <use>`, use 1: training (of split 1 here), 2: test, 0: neither."""
    actions = sorted(name.removesuffix("_test_split1.txt") for name in files.texts if name.endswith("_test_split1.txt"))
    uses = {split: [(f"{action}/{name}", label, use) for label, action in enumerate(actions)
                    for name, use in read_pairs(files.need(f"{action}_test_{split}.txt"), 3)] for split in SPLITS}
    sets = {split: [(name, label) for name, label, use in uses[split] if use == 2] for split in SPLITS}
    sets["train"] = [(name, label) for name, label, use in uses["split1"] if use == 1]
    return [action.replace("_", " ") for action in actions], sets


def read_rows(path):
    """[(video, class name)] of a list in Kinetics' CSV, SSv2's JSON or UCF's lines `<class>/<video>.avi[ <number>]`."""
    with expecting(path, "the owner's list, as distributed"), open(path, newline="", encoding="utf-8-sig") as file:
        if path.endswith(".csv"):
            rows = csv.reader(file)
            label, video, start, end = map(next(rows, []).index, ("label", "youtube_id", "time_start", "time_end"))
            return [(f"{row[video]}_{int(row[start]):06d}_{int(row[end]):06d}", row[label]) for row in rows if row]
        if path.endswith(".json"):
            return [(str(item["id"]), re.sub(r"[][]", "", item["template"])) for item in json.load(file)]
        names = [re.sub(r" \d+$", "", line.strip()) for line in file if line.strip()]
        return [(name, name.split("/")[-2]) for name in names]


def read_owners(files):
    """Class names and {set: [(video, label)]} from the owner's files, see OWNERS; ((), {}) where there are none, and
    where Kinetics-600, whose CSVs are incomplete, has class folders."""
    sets = OWNERS.get(files.dataset, {})
    test = [patterns for name, patterns in sets.items() if name != "train"]
    if not test or not files.text(*test[0]) or files.dataset == "k600" and files.has_folders("train"):
        return (), {}
    if files.dataset == "hmdb51":
        return read_hmdb(files)
    rows = {name: read_rows(files.need(*patterns)) for name, patterns in sets.items()
            if name != "train" or files.text(*patterns)}
    classes = sorted({name for entries in rows.values() for _, name in entries})
    if files.dataset == "ucf101":
        path = files.need("ucfTrainTestlist/classInd.txt")
        with expecting(path, "lines `<number from 1> <class>`"):
            lines = [line.strip().partition(" ") for line in Path(path).read_text("utf-8-sig").splitlines()]
            classes = in_order({int(i) - 1: name for i, _, name in lines if i})
    elif files.dataset == "ssv2":
        path = files.need("something-something-v2-labels.json", "labels.json")
        with expecting(path, 'JSON {"class": "id"}'):
            classes = in_order({int(i): name for name, i in json.loads(Path(path).read_text("utf-8-sig")).items()})
    ids = {name: i for i, name in enumerate(classes)}
    with expecting(files.root, "only classes in its lists that the class names have"):
        return classes, {name: [(video, ids[label]) for video, label in entries] for name, entries in rows.items()}


def draw_shots(videos, shots, seed):
    """`shots` videos of every class, drawn with `seed`. Raises ValueError where a class has fewer."""
    rng, drawn, labels = np.random.default_rng(seed), [], np.asarray(videos.labels)
    for label, name in enumerate(videos.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise ValueError(f"class {name!r} has {len(members)} training videos, fewer than shots={shots}")
        drawn += sorted(rng.permutation(members)[:shots])
    return videos.keep(drawn)


def base_and_novel(classes, files, owned, train):
    """Labels of the base and of the novel classes, by training split 1: the owner's, or the VideoList `train`.

    [released] ascending in the number of training videos, ties in label order, the first half is novel. The published
    label files of both halves are used where they are. A few-shot list, equal in all classes, cannot tell: ValueError.
    """
    file = PUBLISHED[files.dataset][0]
    halves = [file.replace("_labels", f"_{half}_labels") for half in ("base", "novel")]
    if "_labels" in file and all(map(files.text, halves)):  # of k600 there are none
        with expecting(halves[0], f"and in {halves[1]}, names of {file}"):
            return [[classes.index(name) for name in read_labels(files.text(half))] for half in halves]
    labels = [label for _, label in owned["train"]] if "train" in owned else train.labels
    count = np.bincount(labels, minlength=len(classes))
    # HMDB-51 has 70 of every class, and of k600 and one's own folders there are no such lists
    if "train" not in owned and files.dataset in ("ucf101", "k400", "ssv2") and len(set(count)) == 1:
        raise ValueError(f"{files.root}: base2novel needs {halves[0]} and its _novel_ twin there, or training videos "
                         "from which the frequent classes can be counted")
    ranked = np.argsort(count, kind="stable").tolist()
    return ranked[len(ranked) // 2:], ranked[:len(ranked) // 2]


FEW_SHOT = ("fewshot", "base2novel")  # the protocols that draw `shots` videos per class


def check_root(dataset, root, upstream_labels):
    """The data folder's path. Raises ValueError where the dataset is unknown or nothing is there."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset {dataset!r} is unknown; known are {', '.join(DATASETS)}")
    if upstream_labels and dataset != "hmdb51":
        raise ValueError(f"upstream labels: only hmdb51's published names differ from its owner's, not {dataset}'s")
    if not os.path.isdir(root) or not os.listdir(root):
        where = {"shapes": "`python train.py --protocol fewshot` renders it",
                 "folder": "one folder per class, with its videos"}
        raise ValueError(f"{root}: no data there; {dataset} is expected in it, or in the folder that --data names: "
                         + (where.get(dataset) or f"videos and annotations from {PAGES[dataset]}"))
    return root


def read_list(path, files, owned, labels, split="split1"):
    """A VideoList from a list, lines `path label`. Classes: the owner's, else the published, else the file `labels`."""
    name = PUBLISHED[files.dataset][0].replace("split1", split)
    classes = owned[0] or read_labels(files.text(name) or (labels if labels != "llm" else "") or files.need(name))
    return files.locate(classes, read_pairs(path, len(classes)), path)


def test_sets(files, owned, test_list, labels, training):
    """{name: VideoList} from a list of one's own, the owner's files, the published lists, or class folders."""
    if test_list:
        return {Path(test_list).stem: read_list(test_list, files, owned, labels)}
    if owned[0]:
        return {name: files.locate(owned[0], entries, f"{files.root}, {name}")
                for name, entries in owned[1].items() if name != "train"}
    lists = {} if files.dataset == "k600" and training else PUBLISHED[files.dataset][1]  # those are of other classes
    if lists and files.dataset == "k600" or any(map(files.text, lists.values())):
        return {name: read_list(files.need(file), files, owned, labels, name) for name, file in lists.items()}
    folders = [name for name in TEST_FOLDERS if files.has_folders(name)]
    if folders:
        return {name: class_folders(os.path.join(files.root, name)) for name in folders}
    if files.has_folders("train"):
        raise ValueError(f"{files.root}: has train/ but no test/ or val/<class>/<video> beside it to test on")
    if files.dataset in PAGES:
        files.need(*next(patterns for name, patterns in OWNERS[files.dataset].items() if name != "train"))
    return {"test": class_folders(files.root)}


def training_set(protocol, files, owned, shots, train_list, labels):
    """A VideoList from a list of one's own, the published few-shot list, the owner's files, other lists or folders."""
    few = f"train1_few_shot_{shots}.txt"
    lists = (*("train.txt",) * (files.dataset not in ("hmdb51", "ucf101")), *(few,) * (protocol in FEW_SHOT))
    path = train_list or (files.text(few) if protocol == "fewshot" and files.dataset in PAGES else None)
    if not path and owned[0]:
        source = "its training split 1" if "train" in owned[1] else files.need(*OWNERS[files.dataset]["train"])
        return files.locate(owned[0], owned[1]["train"], f"{files.root}, {source}")
    lists_first = files.dataset in PAGES and files.dataset != "k600"  # whose own train.txt is no such list
    if not path and files.has_folders("train") and not (lists_first and files.text(*lists)):
        return class_folders(os.path.join(files.root, "train"))
    return read_list(path or files.need(*(lists or OWNERS[files.dataset].get("train", OWNERS[files.dataset]["split1"]))),
                     files, owned, labels)


def check_lists(protocol, files, train_list, test_list):
    """Of one's own folder: whether what is trained on and what is tested on are told apart. ValueError where not."""
    trains = train_list or files.has_folders("train")
    tests = test_list or any(map(files.has_folders, TEST_FOLDERS))
    if files.dataset != "folder" or trains and tests:
        return
    if train_list or test_list:
        one, other, folder = ("train", "test", "test") if train_list else ("test", "train", "train")
        raise ValueError(f"{one}_list={train_list or test_list} also needs {other}_list=FILE, or {files.root}/{folder}/"
                         "<class>/<video>")
    if not trains and not tests and protocol not in FEW_SHOT:
        raise ValueError(f"{files.root}: {protocol} trains on all training videos: sort them into train/<class>/<video> "
                         "and test/<class>/<video>, or take fewshot, which draws them")


def named(sets, files, labels, upstream):
    """The VideoLists {name: videos} with HMDB-51's names put right, or with the names of the labels file `labels`.

    labels: "llm" for the published LLM-rephrased names, <dataset>_llm_labels.json, looked for as other annotations are.
    """
    result = {}
    for name, videos in sets.items():
        path, names = labels, videos.classes
        if labels == "llm":
            file = PUBLISHED[files.dataset][0].replace("split1", name)
            path = files.need(file.removesuffix(".csv").removesuffix("_labels") + "_llm_labels.json")
        if path:
            names = read_labels(path)
            same = labels == "llm" or videos.classes == next(iter(sets.values())).classes
            if len(names) != len(videos.classes) or not same:
                raise ValueError(f"{path}: {len(names)} names, but {name} has {len(videos.classes)} classes; a labels "
                                 "file is for one list of classes, the same in all sets")
        result[name] = replace(videos, classes=put_right(files.dataset, names, upstream))
    return result


def load_tests(dataset, root, test_list="", labels="", upstream_labels=False):
    """A dataset's test sets, {name: VideoList}; see `test_sets`, `named`, and for `upstream_labels`, `put_right`."""
    files = Files(dataset, check_root(dataset, root, upstream_labels))
    owned = read_owners(files) if dataset != "k600" else ((), {})  # that is tested on published lists
    tests = test_sets(files, owned, test_list, labels, False)
    return named(tests, files, labels, upstream_labels)


def load_protocol(protocol, dataset, root, shots, seed, train_list="", test_list="", labels="", upstream_labels=False):
    """Training videos and test sets of a protocol, (VideoList, {name: VideoList}).

    fewshot: `shots` videos per class, as published or drawn with `seed`. base2novel: `shots` of each base class, drawn,
    tests on base and novel. Others: all training videos. Of test splits the first: the others hold training videos.
    """
    files = Files(dataset, check_root(dataset, root, upstream_labels))
    check_lists(protocol, files, train_list, test_list)
    owned = read_owners(files)
    if dataset == "folder" and not train_list and not files.has_folders("train"):
        everything = class_folders(root)  # one's own class folders: what is not drawn for training is the test
        train = draw_shots(everything, shots, seed)
        drawn = set(train.paths)
        tests = {"test": everything.keep([i for i, path in enumerate(everything.paths) if path not in drawn])}
        for label in {*range(len(train.classes))} - {*tests["test"].labels}:
            raise ValueError(f"{root}: shots={shots} takes every video of {train.classes[label]!r} for training and "
                             "leaves none to test on: give it more videos, or lower shots")
    else:
        tests = test_sets(files, owned, test_list, labels, True)
        train = training_set(protocol, files, owned, shots, train_list, labels)
    if "split2" in tests or protocol in FEW_SHOT and dataset != "folder" and "base" not in tests:
        tests = dict([next(iter(tests.items()))])
    halves = []
    if protocol == "base2novel" and len({"base", "novel"} & tests.keys()) == 1:
        raise ValueError(f"{root}: of base/ and novel/ only one is there; give both, or neither")
    if protocol == "base2novel" and "novel" not in tests:
        halves = base_and_novel(put_right(dataset, train.classes, upstream_labels), files, owned[1], train)
    tests = named({"the training set": train} | tests, files, labels, upstream_labels)
    train = tests.pop("the training set")
    if halves:
        whole = next(iter(tests.values()))
        if whole.classes != train.classes:
            raise ValueError(f"{root}: base2novel needs the same classes in training and test videos")
        train, tests = train.only(halves[0]), dict(zip(("base", "novel"), (whole.only(half) for half in halves)))
    if protocol in FEW_SHOT and not train_list:
        train = draw_shots(train, shots, seed)
    return train, tests


# ---- processes -----------------------------------------------------------------------------------

def rank_and_world():
    """(rank of this process, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_processes(kind=None):
    """Joins the other processes of a torchrun, if there are any, and returns this process's device.

    kind: "cuda" or "cpu"; None takes a GPU if there is one. Raises ValueError if there are too few
    GPUs.
    """
    cuda = torch.cuda.is_available() and kind != "cpu"
    if kind == "cuda" and not cuda:
        raise ValueError("--device cuda: PyTorch finds no GPU here")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and local_world > torch.cuda.device_count():
        raise ValueError(f"{local_world} processes on a node with {torch.cuda.device_count()} GPUs: "
                         "lower --nproc_per_node")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True  # for what autocast leaves in fp32
    if "RANK" in os.environ and not dist.is_initialized():
        # long enough for rank 0 to prepare the data; also how long a lost peer goes unnoticed
        timeout = timedelta(hours=1)
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group("nccl" if cuda else "gloo", store=fresh_store(store, rank, world),
                                rank=rank, world_size=world, timeout=timeout)
    return device


def fresh_store(store, rank, world):
    """The part of torchrun's store that belongs to this attempt of the job.

    torchrun keeps one store over all restarts. A process that finds the address of a killed one
    there waits for it in vain. So every process posts a new name, reads everybody's, and waits
    for the others under a key made of all names. Only processes that read the same names meet;
    a process that read an old name meets nobody and reads again.
    """
    store.set(f"name {rank}", uuid.uuid4().hex)
    while True:
        names = [store.get(f"name {i}").decode() for i in range(world)]
        attempt = hashlib.sha256(" ".join(names).encode()).hexdigest()
        store.set(f"{attempt} {rank}", "")
        try:
            store.wait([f"{attempt} {i}" for i in range(world)], timedelta(seconds=1))
            return dist.PrefixStore(attempt, store)
        except dist.DistStoreError:  # some name was from an earlier attempt: read again
            continue


def progress_bar(*args, **settings):
    """tqdm's progress bar, on rank 0 only; TQDM_DISABLE=1 in the environment turns it off there."""
    hidden = True if rank_and_world()[0] else None  # None: tqdm asks the environment
    return tqdm(*args, disable=hidden, **settings)


def gather(items):
    """The lists of all processes joined in the order of ranks, on every process."""
    _, world = rank_and_world()
    if world == 1:
        return items
    lists = [None] * world
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def check_same_data(description):
    """Raises ValueError, on every process, if the processes describe their data differently."""
    described = gather([description])
    for rank, other in enumerate(described):
        if other != described[0]:
            raise ValueError(f"process {rank} sees other data than process 0: {other}, not "
                             f"{described[0]}; give every machine the same videos and lists")


def any_process(flag, device):
    """Whether the flag is set on any process. It costs one number, nothing beside a training step."""
    if rank_and_world()[1] == 1:
        return flag
    count = torch.tensor(float(flag), device=device)
    dist.all_reduce(count)
    return bool(count)


def node_leader_first(call):
    """call() on every process, on each node's first one before the others: it downloads for all."""
    leader = os.environ.get("LOCAL_RANK", "0") == "0"
    result = call() if leader else None
    gather([])  # the others wait here
    return result if leader else call()


def on_rank_zero(call):
    """call() on rank 0 while the others wait. If it fails there, every process raises its error."""
    error = None
    if rank_and_world()[0] == 0:
        try:
            call()
        except (ValueError, OSError) as caught:
            error = caught
    for caught in gather([error]):
        if caught is not None:
            raise caught


def check_same_on_all(description):
    """Compares what the processes say of their data, a short line. Raises ValueError if one differs.

    Nodes may have copies of the data of their own. If one copy is incomplete, the processes would
    disagree on the number of steps and wait for one another.
    """
    first, *others = gather([description])
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(f"rank {rank} sees other data than rank 0: {other}, not {first}")


# ---- loaders -------------------------------------------------------------------------------------

# [released] TC-CLIP, ILA and ViFi-CLIP normalise with ImageNet's constants
MEANS = {"imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
         "clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
         "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5))}  # Google's and timm's ViT


def normalise(video, pixels="imagenet"):
    """uint8 (...,3,R,R) -> float32 (x - mean) / deviation, per channel, see MEANS."""
    mean, deviation = MEANS[pixels]
    mean = torch.tensor(mean, device=video.device).view(3, 1, 1)
    deviation = torch.tensor(deviation, device=video.device).view(3, 1, 1)
    return (video.float() - mean) / deviation


def prepare_worker(_):
    """Runs at the start of a loader's worker, which lives exactly as long as its parent wants.

    It ignores SIGTERM, which a scheduler sends to every process of a job: its parent still needs
    batches to finish the step. It dies with its parent, however that ends.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG, see man 2 prctl
        if os.getppid() != multiprocessing.parent_process().pid:  # it died before the call above
            os._exit(1)
    # A batch that cannot be sent is lost, and the parent would wait for it for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)


def end_worker(error, _):
    """Called in a worker's sending thread after an error; the parent notices a worker that ends."""
    print(f"a loader's worker cannot send a batch ({error}) and ends", file=sys.stderr)
    os._exit(1)


def load_batches(dataset, workers, **settings):
    """The DataLoader behind both loaders below; `settings` are its arguments."""
    return DataLoader(dataset, num_workers=min(workers, os.cpu_count()),
                      pin_memory=torch.cuda.is_available(), worker_init_fn=prepare_worker,
                      collate_fn=dataset.collate, **settings)


def to_share(clips):
    """Clips (b,...) uint8 as a loader's worker sends them: in shared memory, or if it is full by value.

    A container's /dev/shm is often 64 MB. PyTorch moves tensors there after the data set's own code
    has run, where a failure loses the batch; so it is done here. By value costs one more copy.
    """
    if get_worker_info() is None:  # no worker, nothing to send
        return clips
    try:
        return clips.share_memory_()
    except RuntimeError:  # PyTorch's word for no space left
        return clips.numpy()


class TestVideos(Dataset):
    """The videos of a test. Item i: (i, views uint8 (V,T,3,R,R) or None, what is wrong or None)."""

    def __init__(self, video_list, views, keep=False):
        self.video_list = video_list
        self.views = views
        self.kept = {} if keep else None  # decoded items, for worlds that fit into memory

    def __len__(self):
        return len(self.video_list.paths)

    def __getitem__(self, i):
        if self.kept is not None and i in self.kept:
            return self.kept[i]
        try:
            item = i, read_test(self.video_list.paths[i], self.views), None
        except VideoError as error:
            item = i, None, str(error)
        if self.kept is not None:
            self.kept[i] = item
        return item

    def loader(self, batch, workers):
        """Batches of (indices, views (b,V,T,3,R,R) uint8, [(index, error)]) of this process's share.

        The processes take turns: process r of w reads the videos r, r + w, r + 2w, ..., so that every
        video is read exactly once.
        """
        rank, world = rank_and_world()
        share = range(rank, len(self), world)
        return load_batches(self, workers, batch_sampler=BatchSampler(share, batch, drop_last=False))

    @staticmethod
    def collate(items):
        """Items -> (indices of the readable, their views (b,V,T,3,R,R), [(index, error)])."""
        readable = [i for i, clip, _ in items if clip is not None]
        clips = [clip for _, clip, _ in items if clip is not None]
        errors = [(i, error) for i, clip, error in items if clip is None]
        return readable, to_share(torch.stack(clips)) if clips else None, errors


class TrainVideos(Dataset):
    """The videos of a training. Item (epoch, i, weight): an augmented clip of video i.

    All randomness is drawn from (seed, epoch, i). A video that cannot be read is replaced by another
    one and reported; after ten in a row by None. `augmentation` holds the arguments of `augment`.
    """

    def __init__(self, video_list, views, seed, augmentation, keep=False):
        self.video_list = video_list
        self.views = views
        self.seed = seed
        self.augmentation = augmentation
        self.kept = {} if keep else None  # decoded clips, for worlds whose clips are read whole

    def __len__(self):
        return len(self.video_list.paths)

    def __getitem__(self, key):
        epoch, i, weight = key
        rng = np.random.default_rng([self.seed, epoch, i])
        errors = []
        while len(errors) < 10:
            try:
                clip = augment(self.read(i, rng), self.views.size, rng, **self.augmentation)
                return clip, self.video_list.labels[i], weight, errors
            except VideoError as error:
                errors.append(str(error))
                i = int(rng.integers(len(self)))
        return None, 0, weight, errors  # give up; the caller decides

    def read(self, i, rng):
        """Randomly drawn frames of video i, (T,3,h,w) uint8; if clips are kept, they are kept whole."""
        sampler = SAMPLERS[self.views.sampling]
        sample = partial(sampler, frames=self.views.frames, train=True, rng=rng)
        if self.kept is None:
            return read_frames(self.video_list.paths[i], sample, self.views.short_side)
        if i not in self.kept:
            path = self.video_list.paths[i]
            self.kept[i] = read_frames(path, np.arange, self.views.short_side)
        clip = self.kept[i]
        return clip[torch.from_numpy(sample(len(clip)))]

    def loader(self, batches, workers):
        """Batches of (clips (b,T,3,R,R) uint8 or None, labels (b,), weights (b,), errors).

        `batches` yields lists of (epoch, i, weight), of as many epochs as wanted: the workers then
        go on from one epoch to the next without a new start.
        """
        return load_batches(self, workers, batch_sampler=batches)

    @staticmethod
    def collate(items):
        """Items -> a batch; its clips are None if one of them is. Small arrays are sent by value."""
        clips, labels, weights, errors = zip(*items)
        unreadable = any(clip is None for clip in clips)
        clips = None if unreadable else to_share(torch.stack(clips))
        return clips, np.array(labels), np.array(weights), sum(errors, [])


# ---- the miniature world ---------------------------------------------------------------------------------------------

SIDE, CLIP_FRAMES = 32, 8
COLOURS = {"red": (215, 40, 40), "cyan": (60, 205, 215), "purple": (150, 55, 200),
           "yellow": (225, 210, 50), "blue": (45, 75, 225), "green": (45, 170, 60)}
SIZES = {"small": 4.5, "big": 8.0}  # radius in pixels, +- 1
PLACES = {"left": (16, 8), "right": (16, 24), "top": (8, 16), "bottom": (24, 16), "middle": (16, 16)}  # (y, x), +- 1.5
SHAPES = {  # is the point inside? y downwards and x, in units of the shape's radius
    "circle": lambda y, x: y * y + x * x <= 1,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) <= 0.85,
    "triangle": lambda y, x: (abs(y) <= 0.9) & (abs(x) <= (y + 0.9) / 1.8),
    "cross": lambda y, x: (np.minimum(abs(y), abs(x)) <= 0.35) & (np.maximum(abs(y), abs(x)) <= 1)}


def shapes_classes():
    """The class names (base, novel): 20 and 10."""
    order = list(COLOURS)
    pairs = [(abs(order.index(a) - order.index(b)) == 1, f"{a} to {b}") for a, b in permutations(order, 2)]
    return [name for novel, name in pairs if not novel], [name for novel, name in pairs if novel]


def opposite(name):
    """The class of the reversed clip: "red to blue" -> "blue to red"."""
    return " to ".join(reversed(name.split(" to ")))


def paint(rng, size, shape, place, colours):
    """Frames of one scene: a striped ground, 0 to 2 grey distractors, the shape, pixel noise -> uint8 (T,32,32,3).

    colours (T,3), in [0,255], are the shape's. It drifts by up to a pixel; only the noise is new in each frame.
    """
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)  # (R,R)
    stripes = np.sin(x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1) + rng.uniform(0, 6))
    ground = 0.3 * rng.uniform(70, 185, 3) + 0.7 * rng.uniform(70, 185)  # greyish
    canvas = ground + stripes[..., None] * rng.uniform(5, 25)  # (R,R,3)
    for _ in range(rng.integers(3)):
        kind, radius, (cy, cx) = rng.choice(list(SHAPES)), rng.uniform(2, 3.5), rng.uniform(2, SIDE - 2, 2)
        canvas[SHAPES[kind]((y - cy) / radius, (x - cx) / radius)] = rng.uniform(20, 235)
    radius = SIZES[size] + rng.uniform(-1, 1)
    drift = np.linspace(-0.5, 0.5, len(colours))[:, None] * rng.uniform(-1, 1, 2)  # (T,2)
    centre = PLACES[place] + rng.uniform(-1.5, 1.5, 2) + drift  # (T,2)
    cy, cx = centre.T[..., None, None].astype(np.float32)  # (T,1,1)
    inside = SHAPES[shape]((y - cy) / radius, (x - cx) / radius)  # (T,R,R)
    tint = np.asarray(colours) + rng.uniform(-15, 15, 3)  # (T,3)
    frames = np.where(inside[..., None], tint[:, None, None], canvas)  # (T,R,R,3)
    frames = frames + 8 * rng.standard_normal(frames.shape, np.float32)
    return frames.clip(0, 255).astype(np.uint8)


def render_still(rng):
    """A still picture uint8 (32,32,3), and what is true of it: a word each for size, colour, shape and place."""
    truth = tuple(words[rng.integers(len(words))] for words in map(list, (SIZES, COLOURS, SHAPES, PLACES)))
    size, colour, shape, place = truth
    return paint(rng, size, shape, place, [COLOURS[colour]])[0], truth


def render_clip(rng, name):
    """A clip of class `name` -> uint8 (8,32,32,3): the colour changes once, about the middle, within up to 3 frames."""
    first, last = (np.array(COLOURS[colour]) for colour in name.split(" to "))
    size, shape, place = (words[rng.integers(len(words))] for words in map(list, (SIZES, SHAPES, PLACES)))
    middle, width = rng.uniform(2.5, 4.5), rng.uniform(0.1, 3)  # so that frame 0 is all `first`, frame 7 all `last`
    mix = ((np.arange(CLIP_FRAMES) - middle) / width + 0.5).clip(0, 1)[:, None]  # (T,1)
    return paint(rng, size, shape, place, (1 - mix) * first + mix * last)


def write_clip(path, frames):
    """Write uint8 frames (T,R,R,3) as h264 in mp4. Every frame is an IDR frame of one quantiser: coded by itself alone,
    it decodes to the same pixels wherever in a video it stands."""
    with av.open(str(path), "w") as container:
        options = {"qp": "10", "g": "1", "preset": "ultrafast", "threads": "1"}
        stream = container.add_stream("h264", rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def write_shapes(folder, seed, shots_max=16, base_clips=10, novel_clips=20):
    """Render the world into folder/{train,base,novel}/<class>/<number>.mp4; a clip depends on `seed` and name alone.

    train: `shots_max` clips of each base class. base, novel: `base_clips` and `novel_clips` test clips per class, and
    as many reversed: base/blue to red/003r.mp4 is base/red to blue/003.mp4 backwards. The folder appears when it is
    complete. Raises ValueError if it holds anything.
    """
    folder, (base, novel) = Path(folder), shapes_classes()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and holds no whole miniature world: choose another folder with "
                         "--data; for your own videos add --dataset folder")
    splits = ("train", base, shots_max), ("base", base, base_clips), ("novel", novel, novel_clips)
    clips = [(split, name, i) for split, names, count in splits for name in names for i in range(count)]
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        for split, name, i in tqdm(clips, desc="rendering the miniature world", unit="clip"):
            rng = np.random.default_rng([seed, *f"{split}/{name}/{i}".encode()])
            frames, targets = render_clip(rng, name), [(name, f"{i:03d}.mp4", 1), (opposite(name), f"{i:03d}r.mp4", -1)]
            for owner, file, step in targets[:1 if split == "train" else 2]:
                (unfinished / split / owner).mkdir(parents=True, exist_ok=True)
                write_clip(unfinished / split / owner / file, frames[::step])
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
