"""From video files on a disk to batches for a model, and the miniature world of the tests.

Sections: which frames; reading videos; augmentation; mixing; annotations; protocols; processes;
loaders; the miniature world.

Letters: B videos, T frames, V views, R side in pixels, C classes. Frames are uint8 RGB, channels
first, unless said otherwise.
"""
import atexit
import csv
import ctypes
import errno
import fnmatch
import hashlib
import html
import io
import json
import math
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import stat
import sys
import unicodedata
import uuid
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import chain, islice, permutations
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep
from typing import Callable, NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from av.bitstream import BitStreamFilterContext
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import VideoReformatter
from torch.distributed.rendezvous import rendezvous
from torch.utils.data import BatchSampler, DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
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

    The offsets within a segment are equally spaced and the same at every evaluation. For TSN,
    clip c takes frame floor((i + (2c+1) / (2 clips)) total / frames) of segment i.
    """
    return indices(total, frames * clips).reshape(frames, clips).T


# ---- reading videos ------------------------------------------------------------------------------

MAX_PIXELS = 8192 * 4320  # [ours] 8K cinema, the largest frame in use; decoding one takes 0.3 GB
MAX_ASPECT = 32  # [ours] long side / short side; narrower frames grow too large when resized
MAX_BYTES = 2**28  # [ours] of the frames taken from one video
HELD_BYTES = 2**25  # up to this size a file's packets stay in memory and are not read twice
PAUSES = (0.1, 1.0, 3.0)  # seconds, before a file is tried again after the system has failed
FILE_ERRORS = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EINVAL, errno.EISDIR, errno.ENOTDIR,
               errno.ENAMETOOLONG, errno.ELOOP}  # what is wrong with a file, not with the system
# The formats that a file may have, whatever its suffix. Playlists (hls, dash, concat) are not among
# them: they lead to other files.
CONTAINERS = ("mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,mxf,rm,dv,nut,ivf,h264,hevc,"
              "m4v,mjpeg,vc1,obu,dhav,wtv,yuv4mpegpipe")
# Codecs whose decoders run on several threads and make the same frames; those of the others (HEVC,
# VP8) hide damage, and fill it with what lies in memory.
SIDE_BY_SIDE = ("h264", "mpeg4", "vp9", "av1")
MOST_REORDERED = 16  # frames, between the order of decoding and that of display
PACKED = rb"DivX\d+(b|Build)\d+p"  # [DivX, XviD] says that packets may hold two pictures


class VideoError(ValueError):
    """A video that cannot be read; the message is "<path>: <reason>"."""


class ReadError(OSError):
    """The system failed, not the video: disk, network, memory. The message is "<path>: <reason>".

    Bad videos may be skipped. This must stop the run, so it is no VideoError.
    """


class Video(NamedTuple):
    """An open file, its best video stream, and a decoder for it."""

    container: av.container.InputContainer
    stream: av.VideoStream
    codec: av.VideoCodecContext


class WatchedFile(io.FileIO):
    """A file that keeps the error of a failed read, which FFmpeg may take for the file's end."""

    error = None

    def read(self, size=-1):
        """Read at most `size` bytes; none at the end, or if the system fails."""
        try:
            return super().read(size)
        except OSError as error:
            self.error = error
            return b""


@contextmanager
def open_video(path, max_pixels=MAX_PIXELS, threads=1):
    """Open a Video. Whatever goes wrong with it becomes a VideoError or a ReadError."""
    file = None
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device might block for ever
            raise FileNotFoundError(errno.ENOENT, "no such file")
        with WatchedFile(os.fspath(path)) as file:
            # av.open decodes too, to learn the frame size. Titles need not be UTF-8.
            limit = {"max_pixels": str(max_pixels)}
            options = limit | {"format_whitelist": CONTAINERS}
            with av.open(file, options=options, metadata_errors="replace") as container:
                stream = container.streams.best("video")
                if stream is None or stream.codec_context is None:
                    raise ValueError("no video stream that can be decoded")
                codec = stream.codec_context
                if not 0 < codec.width * codec.height <= max_pixels:
                    raise ValueError(f"frame size unknown or above {max_pixels} pixels")
                codec.options, codec.thread_count = limit, 1
                if threads > 1 and codec.codec.canonical_name in SIDE_BY_SIDE:
                    # a frame may be out before its thread marks it as corrupt: stop at errors
                    codec.options = limit | {"err_detect": "explode"}
                    codec.thread_count, codec.thread_type = threads, "FRAME"
                yield Video(container, stream, codec)
            if file.error:
                raise file.error
    except (VideoError, ReadError):
        raise
    except (av.FFmpegError, OSError, ValueError, LookupError) as error:
        raise what_failed(path, file.error if file and file.error else error) from error


def what_failed(path, cause):
    """The VideoError or ReadError that says what went wrong with a file."""
    number = getattr(cause, "errno", None)
    reason = getattr(cause, "strerror", None) or cause
    if number == errno.ENOENT:
        reason = "no such file"
    elif number == errno.EINVAL:
        reason = "no video, or in a format that is not read"
    elif isinstance(cause, (av.InvalidDataError, av.EOFError)):
        reason = f"{reason} (it is cut short, damaged, or no video)"
    if isinstance(cause, av.FFmpegError):
        of_system = number in (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
    else:
        of_system = isinstance(cause, OSError) and number not in FILE_ERRORS
    return (ReadError if of_system else VideoError)(f"{path}: {reason}")


def demux(video):
    """Iterate over the packets of a Video in decoding order, with one picture in each."""
    packets = (packet for packet in video.container.demux(video.stream) if packet.size)
    if not re.search(PACKED, video.codec.extradata or b""):
        return packets
    unpack = BitStreamFilterContext("mpeg4_unpack_bframes", video.stream)
    return chain.from_iterable(unpack.filter(packet) for packet in chain(packets, [None]))


def decode(codec, packet):
    """The frames that come out for a packet (None: those still held), or None if it is damaged."""
    try:
        return codec.decode(packet)
    except av.InvalidDataError:
        return None


def to_image(reformatter, short_side, frame):
    """Convert a decoded frame to uint8 RGB (1, 3, h, w), resized and upright."""
    short, long = sorted((frame.width, frame.height))
    if long > MAX_ASPECT * short:
        raise ValueError(f"frames of {frame.width}x{frame.height} pixels are too narrow")
    rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()  # (H, W, 3)
    image = torch.from_numpy(rgb)[None].permute(0, 3, 1, 2)  # (1, 3, H, W)
    scale = short_side / short
    image = resize(image, round(frame.height * scale), round(frame.width * scale))  # (1, 3, h, w)
    # not frame.side_data: frame and container would hold each other, and stay in memory for long
    matrix = SideDataContainer(frame).get("DISPLAYMATRIX")
    return image if matrix is None else upright(image, np.frombuffer(matrix, np.int32))


def upright(image, matrix):
    """Turn and mirror an image (..., h, w) as a display matrix says, to the nearest quarter turn.

    The matrix (a b u; c d v; x y w) moves pixel (x, y) to (a x + c y, b x + d y), y downwards
    [ISO 14496-12].
    """
    a, b, _, c, d = matrix[:5].tolist()
    if abs(b) + abs(c) > abs(a) + abs(d):  # x and y change places
        image, a, d = image.mT, c, b
    if a < 0:
        image = image.flip(-1)
    if d < 0:
        image = image.flip(-2)
    return image


def resize(images, height, width):
    """Resize uint8 (N, 3, H, W) to (N, 3, height, width), bilinear and antialiased.

    Without antialiasing, downscaling errs by up to 98 of 255.
    """
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bilinear", antialias=True)


def decode_all(codec, packets, positions, convert):
    """Decode all packets in order: ({position: image}, time stamps of all frames, damaged)."""
    images, wanted, stamps, damaged = {}, set(positions), [], 0
    for packet in chain(packets, [None]):
        frames = decode(codec, packet)
        if frames is None:
            damaged += 1
            continue
        for frame in frames:
            damaged += frame.is_corrupt
            if len(stamps) in wanted:
                images[len(stamps)] = convert(frame)
            stamps.append(frame.pts)
    return images, stamps, damaged


# From here to decode_wanted: finding the packets that the wanted frames need, so that no others are
# decoded and an hour is read in seconds. This may be skipped at first reading; test_video.py shows
# that the frames are those of decode_all.


class Entry(NamedTuple):
    """What is known of a packet before it is decoded.

    picture: I needs no earlier packet, nor does anything shown after it; P may need earlier ones;
    B is needed by none and shown at once; - shows nothing; ? cannot be told.
    """

    picture: str
    stamp: int  # presentation time, or None
    shown: bool  # whether a frame should come out
    mark: tuple  # by which the packet is known again


def nal_units(packet, codec, place):
    """The units of an h264 or HEVC packet: each follows a start code (ts, avi) or its size (mp4,
    mkv), of as many bytes as the header tells at `place`."""
    data, header = bytes(packet), codec.extradata or b""
    if header[:1] != b"\1":
        return data.split(b"\0\0\1")[1:]
    width = (header[place] & 3) + 1
    units, start = [], width
    while start < len(data):
        size = int.from_bytes(data[start - width:start], "big")
        units.append(data[start:start + size])
        start += size + width
    return units


def h264_picture(packet, codec):
    """I is an IDR picture, or a recovery point from which all is exact without further frames."""
    if packet.is_keyframe:
        for unit in nal_units(packet, codec, 4):
            if unit[:1] and unit[0] & 31 == 5:
                return "I"
            if unit[:2] == b"\6\6" and unit[3:4] >= b"\xc0":
                return "I"
    return "P"


def hevc_picture(packet, codec):
    """I is an IDR, CRA or BLA picture."""
    if packet.is_keyframe:
        for unit in nal_units(packet, codec, 21):
            if unit[:1] and 16 <= unit[0] >> 1 <= 21:
                return "I"
    return "P"


def mpeg2_picture(packet, codec):
    """MPEG-1 and MPEG-2 name the type after the start code and ten bits."""
    data = bytes(packet)
    start = data.find(b"\0\0\1\0") + 4
    if not 4 <= start < len(data) - 1:
        return "?"
    return "?IPB????"[data[start + 1] >> 3 & 7]


def mpeg4_picture(packet, codec):
    """MPEG-4 names the type after the start code. Tiny pictures may be marks that show nothing."""
    data = bytes(packet)
    start = data.find(b"\0\0\1\xb6") + 4
    if not 4 <= start < len(data) - 16:
        return "?"
    return "IPBP"[data[start] >> 6]


def vp8_picture(packet, codec):
    """VP8: bit 0 of a frame says that it is no key frame, bit 4 that it is shown."""
    bits = bytes(packet)[0]
    if not bits & 16:
        return "-"
    return "P" if bits & 1 else "I"


def vp9_picture(packet, codec):
    """VP9: bits for "shows an earlier frame", "no key frame" and "is shown".

    Hidden frames come in one packet with a shown one, which the last byte marks.
    """
    data = bytes(packet)
    bits = data[0]
    if bits & 48 == 48:  # profile 3 has one more bit before
        bits <<= 1
    if not bits & 10 and data[-1] & 224 != 192:
        return "-"
    return "P" if bits & 12 else "I"


def av1_picture(packet, codec):
    """AV1: a packet holds one shown frame, and the hidden ones that it needs."""
    return "I" if packet.is_keyframe else "P"


def intra_picture(packet, codec):
    """Every frame is coded by itself."""
    return "I"


PICTURES = {"h264": h264_picture, "hevc": hevc_picture, "mpeg1video": mpeg2_picture,
            "mpeg2video": mpeg2_picture, "mpeg4": mpeg4_picture, "vp8": vp8_picture,
            "vp9": vp9_picture, "av1": av1_picture, "mjpeg": intra_picture,
            "rawvideo": intra_picture, "dvvideo": intra_picture, "prores": intra_picture,
            "dnxhd": intra_picture}
SKIPPING = ("h264", "mpeg1video", "mpeg2video", "mpeg4")  # their decoders can leave out pictures
# that no other needs


class Survey(NamedTuple):
    """A Video whose packets were read once."""

    path: str
    video: Video
    entries: list  # of each packet, in decoding order
    held: list  # the packets; empty if they are large


def survey_packets(path, video):
    """Read all packets of a Video and decode none: a Survey."""
    picture_of = PICTURES.get(video.codec.codec.canonical_name)
    entries, held, size = [], [], 0
    for packet in demux(video):
        picture = picture_of(packet, video.codec) if picture_of else "?"
        shown = picture != "-" and not packet.is_discard
        entries.append(Entry(picture, packet.pts, shown, mark_of(packet)))
        held.append(packet)
        size += packet.size
        if size > HELD_BYTES:
            held.clear()
    return Survey(path, video, entries, held)


def mark_of(packet):
    """What tells a packet from the others of its file."""
    return packet.dts, packet.size, packet.pos


def seek(video, mark):
    """The packets from the one with this mark on; none if the container does not find it."""
    try:
        video.container.seek(mark[0] or 0, stream=video.stream)
    except av.FFmpegError:
        return iter(())
    packets = demux(video)
    for packet in packets:
        if mark_of(packet) == mark:
            return chain([packet], packets)
    return packets


def read_needed(survey, needed):
    """Yield (number, packet) for the numbers `needed`, in order, from memory or from the file."""
    if survey.held:
        for number in sorted(needed):
            yield number, survey.held[number]
        return
    for number in sorted(needed):
        mark = survey.entries[number].mark
        if number - 1 not in needed:
            packets = seek(survey.video, mark)
        packet = next(packets, None)
        if packet is None or mark_of(packet) != mark:
            break  # this container cannot seek
        yield number, packet
    else:
        return
    with open_video(survey.path) as video:
        for again, packet in enumerate(demux(video)):
            if again >= number and again in needed:
                yield again, packet


def display_order(codec, entries):
    """The packets' numbers in the order in which they are shown, or None if that is in doubt."""
    pictures = [entry.picture for entry in entries]
    if "?" in pictures or "I" not in pictures or ("B" in pictures and not codec.has_b_frames):
        return None
    if codec.codec.canonical_name in ("h264", "hevc"):
        stamps = [entry.stamp for entry in entries]
        shown = [entry.stamp for entry in entries if entry.shown]
        if None in stamps or len(set(shown)) < len(shown):
            return None
        if codec.has_b_frames and shown == sorted(shown):
            return None  # the stamps follow the order of decoding
        return sorted(range(len(entries)), key=stamps.__getitem__)
    order, waiting = [], []
    for number, picture in enumerate(pictures):
        if picture == "B":
            order.append(number)
        else:  # is shown when the next one that is no B has been decoded
            order += waiting
            waiting = [number]
    return order + waiting


class Contents(NamedTuple):
    """Which packets show which frames. Packets are numbered in the order of decoding."""

    pictures: list  # of each packet, as in Entry
    rank: list  # of each packet: its place in display order
    frames: list  # the packet of each frame, in display order


def contents_of(survey):
    """The Contents of a file, or None if they are in doubt.

    A video that was cut may begin with pictures that need what was cut off. What is shown before
    the first I is therefore decoded, to see what of it comes out.
    """
    order = display_order(survey.video.codec, survey.entries)
    if order is None:
        return None
    rank = [0] * len(order)
    for place, number in enumerate(order):
        rank[number] = place
    pictures = [entry.picture for entry in survey.entries]
    lost = set(order[:rank[pictures.index("I")]])
    if lost:
        try:
            lost -= {frame.pts for frame in decode_some(survey, range(max(lost) + 1))}
        except av.InvalidDataError:
            return None
    frames = [number for number in order if survey.entries[number].shown and number not in lost]
    return Contents(pictures, rank, frames) if frames else None


def decode_some(survey, needed, whole=None):
    """Decode the packets with the numbers `needed`. A frame's pts becomes its packet's number.

    whole: if given, other packets may be left out where no frame needs them.
    """
    codec = survey.video.codec
    for number, packet in read_needed(survey, needed):
        if whole is not None:
            codec.skip_frame = "DEFAULT" if number in whole else "NONREF"
        packet.pts = number
        yield from codec.decode(packet)
        if number + 1 not in needed:
            yield from codec.decode(None)  # what the decoder still holds
            codec.flush_buffers()


def needed_packets(contents, wanted):
    """The packets that those in `wanted` need: all from the last I before that is shown no later.

    Returns (needed, sound); sound leaves out what is shown before the I at which decoding begins:
    it comes out wrong, if at all.
    """
    pictures, rank, _ = contents
    needed, sound = set(), set()
    for number in sorted(wanted, reverse=True):
        if number in sound:
            continue
        start = number
        while start and (pictures[start] != "I" or rank[start] > rank[number]):
            start -= 1
        first = rank[start] if pictures[start] == "I" else 0
        needed.update(range(start, number + 1))
        sound.update(n for n in range(start, number + 1) if rank[n] >= first)
    return needed, sound


def decode_wanted(survey, contents, positions, convert):
    """Decode what the frames at `positions` need: {position: image}, or None in doubt.

    Damage, and frames that do not come out in the order of display, raise doubt. The first two
    frames are always decoded for that reason.
    """
    skipping = survey.video.codec.codec.canonical_name in SKIPPING
    wanted = {contents.frames[position]: position for position in positions}
    checked = {*wanted, *contents.frames[:2]}
    needed, sound = needed_packets(contents, checked)
    images, came, last = {}, set(), -1
    try:
        for frame in decode_some(survey, needed, checked if skipping else None):
            number = frame.pts
            if number not in sound:
                continue
            if frame.is_corrupt or contents.rank[number] <= last:
                return None
            last = contents.rank[number]
            came.add(number)
            if number in wanted:
                images[wanted[number]] = convert(frame)
    except av.InvalidDataError:
        return None
    due = checked if skipping else sound.intersection(contents.frames)
    return images if due <= came else None


class Reading(NamedTuple):
    """Frames of a video, and what was seen of it on the way."""

    frames: torch.Tensor  # uint8 (..., 3, h, w)
    seconds: np.ndarray | None  # (...) of each since the first frame; None if time stamps fail
    damaged: int  # corrupt frames and packets that do not decode, among those decoded


def seconds_at(index, stamps, time_base):
    """Times of the frames at `index` since the first, or None if the stamps of all do not rise."""
    if None in stamps or stamps != sorted(stamps):
        return None
    return (np.asarray(stamps)[index] - stamps[0]) * float(time_base)


def read_once(path, pick, short_side, max_pixels, threads):
    """Decode what is needed; or all, to count the frames, if their order is in doubt."""
    convert = partial(to_image, VideoReformatter(), short_side)
    images, damaged = None, 0
    with open_video(path, max_pixels, threads) as video:
        time_base = video.stream.time_base
        survey = survey_packets(path, video)
        contents = contents_of(survey)
        found = sum(entry.shown for entry in survey.entries)
        if contents:
            stamps = [survey.entries[number].stamp for number in contents.frames]
            total = found = len(stamps)
            index = choose(path, pick, total, short_side, video.codec)
            images = decode_wanted(survey, contents, index.flat, convert)
    while images is None or found != total:
        total = found
        with open_video(path, max_pixels, threads) as video:
            index = choose(path, pick, total, short_side, video.codec)
            images, stamps, damaged = decode_all(video.codec, demux(video), index.flat, convert)
            if damaged and threads > 1:
                images, threads = None, 1  # several threads make other frames of damage
            elif not stamps:
                raise ValueError("no frame decodes")
            else:
                found = len(stamps)
    height, width = images[index.flat[0]].shape[-2:]
    frames = torch.cat([resize(images[i], height, width) for i in index.flat])  # sizes may change
    frames = frames.view(*index.shape, 3, height, width)
    return Reading(frames, seconds_at(index, stamps, time_base), damaged)


def choose(path, pick, total, short_side, codec):
    """The positions that `pick` takes of `total` frames, unless they need too much memory."""
    if not total:
        raise ValueError("no video frames")
    index = np.asarray(pick(total))
    aspect = max(codec.width, codec.height) / min(codec.width, codec.height)
    size = 3 * short_side**2 * aspect * index.size
    if size > MAX_BYTES:
        raise MemoryError(f"{path}: {index.size} frames with a short side of {short_side} pixels "
                          f"are {size / 1e9:.3g} GB, above the limit of {MAX_BYTES / 1e9:.2g}")
    return index


def inspect_frames(path, pick, short_side, max_pixels=MAX_PIXELS, threads=1):
    """`read_frames` that also tells the times of the frames and the damage it met: a Reading."""
    for pause in PAUSES:
        try:
            return read_once(path, pick, short_side, max_pixels, threads)
        except ReadError:
            sleep(pause)
    return read_once(path, pick, short_side, max_pixels, threads)


def read_frames(path, pick, short_side, max_pixels=MAX_PIXELS, threads=1):
    """Decode the frames that `pick(total)` asks for, upright, with the short side resized.

    pick: number of frames -> integer array (...) with values in [0, total). Positions count the
    frames that decode; if those are fewer than the file claims, `pick` is called again.
    short_side: pixels. threads: the decoder's, which change no frame; a loader's worker needs one.
    Returns uint8 (..., 3, h, w), all of the first one's size. Memory does not grow with the file.
    Raises VideoError if there is no file, no video in it, no frame that decodes, or one above
    `max_pixels`; ReadError if the system fails; MemoryError for more than MAX_BYTES of frames.
    """
    return inspect_frames(path, pick, short_side, max_pixels, threads).frames


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
    return inspect_test(path, views).frames


def inspect_test(path, views, threads=1):
    """`read_test` that also tells times (clips, T) and damage: a Reading."""
    size = views.size
    if views.crops not in (1, 3) or views.short_side < size:
        raise ValueError(f"crops must be 1 or 3 (got {views.crops}), and short_side at least size "
                         f"(got {views.short_side}, {size})")
    pick = partial(view_indices, frames=views.frames, clips=views.clips,
                   indices=SAMPLERS[views.sampling])
    reading = inspect_frames(path, pick, views.short_side, threads=threads)
    video = reading.frames  # (clips, T, 3, h, w)
    height, width = video.shape[-2:]
    top, left = (height - size) // 2, (width - size) // 2
    corners = [(top, left)]
    if views.crops == 3 and height > width:
        corners = [(0, left), (top, left), (height - size, left)]
    elif views.crops == 3:
        corners = [(top, 0), (top, left), (top, width - size)]
    crops = [video[..., y:y + size, x:x + size] for y, x in corners]
    crops = torch.stack(crops, 1).flatten(0, 1).contiguous()  # (V, T, 3, R, R)
    return reading._replace(frames=crops)


def check_video(path):
    """Reads a video as a test does, then decodes all of it: what is wrong with it, or None.

    Damage is wrong, and an end long before the one that the file announces.
    """
    try:
        read_test(path, Views())
        with open_video(path) as video:
            announced = announced_seconds(video)
            _, stamps, damaged = decode_all(video.codec, demux(video), (), None)
            known = [stamp for stamp in stamps if stamp is not None]
            length = float((max(known) - min(known)) * video.stream.time_base) if known else 0.0
    except VideoError as error:
        return str(error)
    if known and length < 0.9 * announced - 1:  # seconds; the last frame's own are not in it
        return f"{path}: its pictures end after {length:.1f} of {announced:.1f} seconds"
    return f"{path}: {damaged} of {len(stamps)} frames are damaged" if damaged else None


def announced_seconds(video):
    """How long a file says that its video is, in seconds; 0 if it does not say."""
    stream, container = video.stream, video.container
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        return float(stream.frames / stream.average_rate)  # its duration is that of what is there
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def read_clip(path, frames=16, size=224, short_side=None):
    """Read the centre crop of a video's TSN middle frames: uint8 (T, 3, size, size).

    short_side: pixels before the crop; None: 256/224 of `size`. Raises VideoError.
    """
    return read_test(path, Views(frames, size, short_side or round(size * 256 / 224)))[0]


def timed_frames(frames, rate):
    """Yields (seconds since the first frame, frame) of frames in order, at last (the end, None).

    Time stamps give the times. Where one is missing or does not rise, a frame begins an average
    frame's duration, 1 / rate, after the one before it.
    """
    step = float(1 / rate) if rate else 0.0  # seconds
    time = None
    for frame in frames:
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


def decoded_frames(path, video, damage):
    """Yield every frame of an open Video that decodes, in order; `damage` counts, see Damage.

    Several threads make other frames of damage. So where the first is met, one thread begins anew
    and yields the frames that are left. Frames are held back meanwhile, since those that need a
    damaged one may be shown before it.
    """
    several, count, held = video.codec.thread_count > 1, 0, deque()
    for packet in chain(demux(video), [None]):
        frames = decode(video.codec, packet)
        bad = 1 if frames is None else sum(frame.is_corrupt for frame in frames)
        if bad and several:
            break
        damage.count += bad
        held.extend(frames or ())
        while len(held) > (MOST_REORDERED if several else 0):
            yield held.popleft()
            count += 1
    else:
        yield from held
        return
    with open_video(path) as again:
        yield from islice(decoded_frames(path, again, damage), count, None)


class Damage:
    """Counts the corrupt frames, and the packets that do not decode, of a video."""

    count = 0


class Thinned:
    """Keeps at most `most` of the items that come, evenly spaced, however many will come."""

    def __init__(self, most):
        self.items, self.most = [], most
        self.seen, self.stride = 0, 1

    def keeps_next(self):
        """Whether the next item that is added will be kept, at first."""
        return self.seen % self.stride == 0

    def add(self, item):
        if self.keeps_next():
            self.items.append(item)
        self.seen += 1
        if len(self.items) == self.most:
            self.items, self.stride = self.items[::2], 2 * self.stride


def windows_at(time, seconds, stride):
    """The numbers i of the windows that hold `time`: i stride <= time < i stride + seconds."""
    rounding = 1e-6  # 0.3 / 0.1 is a little below 3
    last = math.floor(time / stride + rounding)
    first = math.floor((time - seconds) / stride + rounding) + 1
    return range(max(0, first), last + 1)


def centre_crop(image, size):
    """The centre (3, size, size) of an image (3, h, w)."""
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top:top + size, left:left + size]


def places_for(size):
    """Yields places (block, row) to keep frames (3, size, size) in: rows of blocks of 32 MB.

    An array for each frame would lie between decoded frames, and the memory of those could not be
    used again.
    """
    while True:
        block = np.empty((2**25 // (3 * size**2) + 1, 3, size, size), np.uint8)
        for row in range(len(block)):
            yield block, row


def read_windows(path, seconds, frames, size, short_side, indices=frame_indices, stride=None,
                 threads=1, damage=None):
    """Yield windows of `seconds`, a new one every `stride`: (start, end, uint8 (T, 3, size, size)).

    start, end, stride: seconds; without a stride one window follows the other. Of the frames that
    begin in a window, those at `indices` are taken and centre-cropped; a window in which none
    begins is left out. The video is decoded once, in order. At most 1024 small frames of a window
    are in memory: when there are more, every second is dropped. The first window that reaches the
    end is the last one. threads: the decoder's, which
    change no frame. damage: a Damage, which counts what is met. Raises VideoError.
    """
    stride = stride or seconds
    reformatter, free, windows = VideoReformatter(), places_for(size), {}
    with open_video(path, threads=threads) as video:
        found = decoded_frames(path, video, damage or Damage())
        for time, frame in timed_frames(found, video.stream.average_rate):
            now = () if frame is None else windows_at(time, seconds, stride)
            for number in sorted(set(windows) - set(now)):
                kept = windows.pop(number).items
                start = number * stride
                if frame is None and number and start - stride + seconds >= time:
                    continue  # the window before it reached the end
                places = [kept[i] for i in indices(len(kept), frames)]
                clip = np.stack([block[row] for block, row in places])  # (T,3,R,R)
                yield round(start, 6), round(min(start + seconds, time), 6), torch.from_numpy(clip)
            place = None
            for number in now:
                window = windows.setdefault(number, Thinned(1024))  # places of the frames so far
                if place is None and window.keeps_next():
                    place = block, row = next(free)
                    block[row] = centre_crop(to_image(reformatter, short_side, frame)[0], size)
                window.add(place)


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
    """[released] Multi-scale crop: a pair of neighbouring sides, in a corner or the centre.

    All pairs (height, width) are equally likely: of four scales, each of the ten with 10 %.
    """
    *_, height, width = clip.shape
    sides = [round(scale * min(height, width)) for scale in scales]
    numbers = range(len(sides))
    pairs = [(i, j) for i in numbers for j in numbers if abs(i - j) <= 1]
    i, j = pairs[rng.integers(len(pairs))]
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


# ---- annotations: files --------------------------------------------------------------------------

VIDEO_SUFFIXES = {f".{suffix}" for suffix in (
    "mp4 m4v mov qt avi divx mkv webm flv f4v wmv asf mpg mpeg m1v m2v mod tod vob ts mts m2ts mxf "
    "ogv ogm 3gp 3g2 rm rmvb dav dv wtv mjpg mjpeg h264 264 h265 265 hevc ivf y4m gif").split()}
TEXT_SUFFIXES = (".txt", ".csv", ".json")  # of annotations
ARCHIVE_SUFFIXES = (".rar", ".zip", ".tar", ".gz", ".tgz", ".7z")
CLUTTER = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")
SPLITS = ("split1", "split2", "split3")


@dataclass(frozen=True)
class VideoList:
    """Annotated videos: class names, and each video's path and label in [0, C).

    absent: names of annotated videos that are missing from disk. source: the list or folder that
    they come from. notes: lines that the user should read. by_folder: the classes are folder names.
    """

    classes: tuple
    paths: tuple
    labels: tuple
    absent: tuple = ()
    source: str = field(default="", compare=False)
    notes: tuple = field(default=(), compare=False)
    by_folder: bool = field(default=False, compare=False)

    def keep(self, indices):
        """The videos at these indices, classes unchanged."""
        paths = tuple(self.paths[i] for i in indices)
        labels = tuple(self.labels[i] for i in indices)
        return replace(self, paths=paths, labels=labels)

    def only(self, classes):
        """The videos of these labels, which are renumbered from 0 in the order given."""
        new = {label: i for i, label in enumerate(classes)}
        kept = self.keep([i for i, label in enumerate(self.labels) if label in new])
        names = tuple(self.classes[label] for label in classes)
        return replace(kept, classes=names, labels=tuple(new[label] for label in kept.labels))

    def note(self, line):
        """The same videos with one more note."""
        return replace(self, notes=(*self.notes, line))


def quoted(text, most=120):
    """A name from a file, safe to print: no control characters, at most about `most` characters."""
    text = str(text)
    if len(text) > most:
        text = f"{text[:most // 2 - 2]}...{text[-(most // 2 - 2):]}"
    escaped = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    return "".join(escaped)


def some(names, most=3):
    """The first names, for a message: "chew, clap, climb, ..."."""
    names = list(names)
    shown = [quoted(name, 40) for name in names[:most]]
    if len(names) > most:
        shown.append("...")
    return ", ".join(shown)


def counted(count, one, many):
    """A count with its noun: 1 video, 2 videos."""
    return f"{count} {one if count == 1 else many}"


def composed(name):
    """A name in Unicode's composed form (NFC): for "ü", a Mac's disk has "u" and dots apart."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@contextmanager
def expecting(path, what):
    """Turn whatever reading the file `path` raises into a ValueError that names it and `what`."""
    try:
        yield
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError,
            csv.Error) as error:
        if isinstance(error, OSError):
            raise ValueError(f"{quoted(path)}: {error.strerror}; expected {what}") from error
        raise ValueError(f"{quoted(path)}: expected {what} ({quoted(error, 120)})") from error


def files_below(folder):
    """Yield each folder in and below `folder`, sorted, links followed: (path, file names, same).

    Hidden files (._x.mp4 of a Mac is no video) and system folders are left out. A folder that was
    listed before, under another link, has no file names, and `same` is its earlier path; else "".
    A link up to a folder that holds `folder` is not followed. ValueError: one cannot be listed.
    """
    listed = {}  # {real path: path}
    above = {str(parent) for parent in Path(os.path.realpath(folder)).parents}
    waiting = [str(folder)]
    while waiting:
        path = waiting.pop()
        real = os.path.realpath(path)
        if real in above:
            continue
        if real in listed:
            yield path, [], listed[real]
            continue
        listed[real] = path
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{quoted(path)}: {error.strerror}") from error
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        inner = [entry.path for entry in entries if entry.name not in CLUTTER and entry.is_dir()]
        yield path, [entry.name for entry in entries if not entry.is_dir()], ""
        waiting += reversed(inner)


def is_video(name):
    """Whether a file's suffix is a video's."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def videos_below(folder):
    """Paths of all video files below a folder, sorted, links followed."""
    paths = []
    for top, names, _ in files_below(folder):
        paths += [os.path.join(top, name) for name in names if is_video(name)]
    return paths


def passed_over(folder):
    """A line about the files below a folder that are neither videos nor text, or ""."""
    others = []
    for top, names, _ in files_below(folder):
        others += [os.path.join(top, name) for name in names
                   if not is_video(name) and not name.endswith(TEXT_SUFFIXES)]
    if not others:
        return ""
    names = some([os.path.relpath(path, folder) for path in others])
    what = counted(len(others), "file is no known video", "files are no known videos")
    return f"{quoted(folder)}: {what}: {names}"


def class_folders(folder):
    """A VideoList of folder/<class>/<video>; a folder below which there is no video is no class.

    Raises ValueError if there is no video, if a folder cannot be listed or, by a link, lies in two
    classes, or if a class name is not UTF-8.
    """
    start = len(os.path.join(folder, ""))
    videos, loose, others = {}, [], []  # videos: {real path: (path, class)}
    direct = set()  # the classes that hold videos themselves, not only in folders
    for top, files, same in files_below(folder):
        name = top[start:].partition(os.sep)[0]  # the class; "" in the folder itself
        if same[start:].partition(os.sep)[0] not in ("", name):
            raise ValueError(f"{quoted(top)} and {quoted(same)} are one folder: a video has one "
                             "class")
        real_top = os.path.realpath(top)
        for file in files:
            path, real = os.path.join(top, file), os.path.join(real_top, file)
            if not is_video(file):
                others.append(path[start:])
            elif not name:
                loose.append(file)
            else:
                if top[start:] == name:
                    direct.add(name)
                real = os.path.realpath(path) if os.path.islink(path) else real
                first, owner = videos.setdefault(real, (path, name))
                if owner != name:
                    raise ValueError(f"{quoted(path)} and {quoted(first)} are one video, which "
                                     "cannot have two classes")
    if not videos:
        found = counted(len(loose), "video, in no class folder", "videos, in no class folders")
        raise ValueError(f"{quoted(folder)}: {found if loose else 'no videos'}; expected one "
                         "folder per class with videos inside, <class>/<video>.mp4")
    paths, names = zip(*videos.values())
    label = {name: i for i, name in enumerate(sorted({*names}))}
    check_utf8(folder, label)
    return VideoList(tuple(map(composed, label)), paths, tuple(label[name] for name in names),
                     source=f"{quoted(os.path.basename(os.path.normpath(folder)))}/",
                     notes=folder_notes(folder, label, direct, loose, others), by_folder=True)


def check_utf8(folder, names):
    """Raises ValueError if the name of a class folder is not UTF-8."""
    for name in names:
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"{quoted(folder)}: the class folder {quoted(name)} is not named in "
                             "UTF-8: rename it")


def folder_notes(folder, classes, direct, loose, others):
    """Lines about what in a folder of class folders is no class, in no class or no video; and of
    classes that are not `direct`, whose videos all lie in folders of their own."""
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    empty = [name for name in folders if name not in classes and not name.startswith(".")]
    others = [name for name in others if not name.endswith(TEXT_SUFFIXES)]
    deep = [name for name in classes if name not in direct]
    notes = []
    for names, one, many in (
            (empty, "folder without videos is no class", "folders without videos are no classes"),
            (loose, "video lies in no class folder", "videos lie in no class folder"),
            (others, "file is no known video", "files are no known videos"),
            (deep, "class holds only folders; if those are the classes, name it with --data",
             "classes hold only folders; if those are the classes, name one with --data")):
        if names:
            notes.append(f"{quoted(folder)}: {counted(len(names), one, many)} "
                         f"({some(sorted(names))})")
    return tuple(notes)


class Listed(NamedTuple):
    """One set as an annotation file lists it; the videos are not looked for yet."""

    source: str  # the file's name
    videos: list  # [(name, label)]


class Listing(NamedTuple):
    """What the annotation files of a data set say."""

    classes: tuple  # names in the order of their labels
    sets: dict  # {"train" or a test set's name: Listed}


class Files:
    """The files below a data set's folder: videos by name; annotation files by name, which lie at
    most five folders down.

    known: the row of the data set in KNOWN, None for one's own videos. strangers: words that only
    stand in the names of other data sets' folders; annotation files in such folders are left out.
    """

    def __init__(self, root, known=None, strangers=()):
        self.root, self.known = os.path.normpath(root), known
        self.videos = {}  # {name without suffix: [path, ...]}
        self.texts = {}  # {name: (not in a folder of this data set, how far down, path)}
        self.archives = []
        self.leaves_out = known is not None and known.loses_videos
        own = known.words if known else ()
        for top, names, _ in files_below(self.root):
            below = top[len(self.root):]
            depth = below.count(os.sep)
            word = re.sub("[^a-z0-9]", "", below.lower())
            fits = any(part in word for part in own)
            strange = not fits and any(part in word for part in strangers)
            for name in names:
                stem, suffix = os.path.splitext(name)
                suffix = suffix.lower()
                path = os.path.join(top, name)
                if suffix in VIDEO_SUFFIXES:
                    self.videos.setdefault(composed(stem), []).append(path)
                elif suffix in TEXT_SUFFIXES and depth <= 5 and not strange:
                    rank = (not fits, depth, path)
                    self.texts[name] = min(rank, self.texts.get(name, rank))
                elif suffix in ARCHIVE_SUFFIXES:
                    self.archives.append(path)

    def has_folders(self, name):
        """Whether root/name, such as train, has class folders."""
        folder = os.path.join(self.root, name)
        if not os.path.isdir(folder):
            return False
        return self.known is None or any(entry.is_dir() for entry in os.scandir(folder))

    def text(self, *patterns):
        """The path of the annotation file of the first pattern that fits one, else None.

        * stands for any characters. Of several files of one name, the one in a folder that is named
        after the data set is taken, and of these the one nearest to the root.
        """
        for pattern in patterns:
            names = sorted(fnmatch.filter(self.texts, pattern)) if "*" in pattern else [pattern]
            if names and names[0] in self.texts:
                return self.texts[names[0]][-1]
        return None

    def need(self, *patterns):
        """As `text`, but raises a ValueError if there is no such file."""
        path = self.text(*map(os.path.basename, patterns))
        if path is None:
            line = f"{quoted(os.path.join(self.root, patterns[0]))} is missing"
            if self.archives:
                line += f": {self.how_to_unpack()}"
            elif self.known:
                lists = [self.known.labels, *(names[0] for names in self.known.lists.values())]
                line += f": get it from {self.known.page}, or {some(lists, 2)} from "
                line += "github.com/naver-ai/tc-clip"
            raise ValueError(line)
        return path

    def find(self, name):
        """The path of the video that a list calls `[folder/]name[.suffix]`, or None.

        File names of the known data sets are unique: the file is taken wherever it lies. Of several
        one that is not empty is taken, an owner's replacement first.
        """
        name = composed(name)
        path = os.path.join(self.root, name)
        found = self.videos.get(os.path.splitext(os.path.basename(name))[0], [])
        if self.known is None:
            found = self.same_path(found, path, name)
        if len(found) > 1:
            return max(found, key=partial(self.preference, path))
        if found:
            return found[0]
        if os.path.isfile(path):
            return path
        return self.find(name.replace("\\", "/")) if "\\" in name else None

    @staticmethod
    def same_path(found, path, name):
        """Of one's own videos: the one at this path, or the only one that has a bare name."""
        if path in found:
            return [path]
        exact = [other for other in found if composed(other) == composed(path)]
        bare = [other for other in found if composed(os.path.basename(other)) == name]
        return exact or (bare if len(bare) == 1 else [])

    def preference(self, path, other):
        """How much the file `other` is preferred for a video that a list has at `path`."""
        whole = os.path.isfile(other) and os.path.getsize(other) > 0
        return whole, "/replacement" in other[len(self.root):], other == path

    def locate(self, listed, classes):
        """The VideoList of a Listed set. Raises ValueError if videos of a whole class are missing.

        Missing videos of Kinetics are left out and named in `absent`, as thousands have left
        YouTube. Others keep their path below the root: they fail by name when they are read.
        """
        paths, labels, missing = [], [], []
        for name, label in listed.videos:
            path = self.find(name)
            if path is None:
                missing.append((name, label))
                if self.leaves_out:
                    continue
                path = os.path.join(self.root, name)
            paths.append(path)
            labels.append(label)
        absent = tuple(name for name, _ in missing) if self.leaves_out else ()
        videos = VideoList(tuple(classes), tuple(paths), tuple(labels), absent,
                           quoted(listed.source))
        if missing:
            videos = self.note_missing(videos, missing, listed)
        if len({*paths}) < len(paths):
            videos = self.note_second_labels(videos)
        return videos

    def note_missing(self, videos, missing, listed):
        """The VideoList with a note on its missing videos [(name, label)], if they matter."""
        total, name = len(listed.videos), quoted(missing[0][0])
        hint = self.how_to_unpack()
        if re.search(r"\s\d+$", missing[0][0]):
            hint = "a line must be `path label`, without a number of frames"
        if len(missing) == total:
            raise ValueError(f"{videos.source}: none of its {total} videos is below "
                             f"{quoted(self.root)}, such as {name}: {hint}")
        there = Counter(label for _, label in listed.videos)
        there.subtract(label for _, label in missing)
        empty = [label for label, count in sorted(there.items()) if count == 0]
        if empty:
            names = some(videos.classes[label] for label in empty)
            raise ValueError(f"{quoted(self.root)}: {len(empty)} of {len(there)} classes have no "
                             f"videos ({names}), such as {name}: {hint}")
        share = f"{videos.source}: {len(missing)} of {total} videos are missing, such as {name}"
        if not self.leaves_out:
            return videos.note(f"{share}; they count as unreadable")
        if len(missing) > 0.1 * total:
            return videos.note(f"{share}; scores on so few do not compare with others'")
        return videos

    def note_second_labels(self, videos):
        """The VideoList with a note if videos have two labels; ValueError in one's own list."""
        first = {}
        twice = [path for path, label in zip(videos.paths, videos.labels)
                 if first.setdefault(path, label) != label]
        if not twice:
            return videos
        line = (f"{videos.source}: {len(twice)} videos are listed with two labels, such as "
                f"{quoted(twice[0])}")
        if self.known is None:
            raise ValueError(line)
        return videos.note(line)

    def how_to_unpack(self):
        """What to do about videos that are missing."""
        if not self.archives:
            return "unpack them there"
        rars = [path for path in self.archives if path.lower().endswith(".rar")]
        names = some(os.path.relpath(path, self.root) for path in rars or self.archives)
        if not rars:
            return f"unpack {names}"
        return f"unpack {names} with `unrar x`, and then the .rar files that come out, if any"


# ---- annotations: labels and lists ---------------------------------------------------------------

def in_order(names):
    """Class names {id: name} in the order of their ids, which must run from 0, else ValueError."""
    if not names or sorted(names) != list(range(len(names))):
        raise ValueError(f"the ids must run from 0 without gaps; found {sorted(names)[:3]}...")
    return tuple(names[i] for i in range(len(names)))


def read_labels(path):
    """Class names of a labels file in the order of their ids.

    The file is CSV with the header id,name, or JSON {"0": name} or [name]. ValueError: an id has no
    name, an id or a name is there twice, or a line has more cells than the header (a comma that is
    not in quotes).
    """
    with expecting(path, "a labels file, CSV with the header id,name or JSON"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            if str(path).endswith(".json"):
                rows = json.load(file, object_pairs_hook=list)  # keeps a key's second value
                if all(isinstance(row, str) for row in rows):
                    rows = list(enumerate(rows))
            else:
                rows = labels_rows(csv.reader(file))
        names, seen = {}, set()
        for key, name in rows:
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"id {key} has no name: {name!r}")
            if int(key) in names or name in seen:
                raise ValueError(f"id {key} or its name {quoted(name, 40)} is there twice")
            names[int(key)] = name
            seen.add(name)
        return in_order(names)


def labels_rows(lines):
    """[(id, name)] of the lines of a CSV file."""
    header = next(lines, [])
    if not {"id", "name"} <= {*header}:
        raise ValueError(f"its first line is {','.join(header)}")
    key, name = header.index("id"), header.index("name")
    rows = []
    for line in lines:
        if len(line) > len(header):
            raise ValueError(f"line {lines.line_num} has more cells than the header: put a name "
                             "with commas in quotes")
        if line:
            line += [""] * len(header)  # a missing cell is empty
            rows.append((line[key], line[name]))
    return rows


HEADERS = ("class", "classes", "class name", "name", "names", "label", "labels")


def read_class_names(path):
    """Class names of a file: CSV or JSON as `read_labels`, else a name per line.

    Lines that are numbered from 1 or from 0, as in UCF-101's classInd.txt, lose their numbers.
    Raises ValueError.
    """
    if str(path).endswith((".csv", ".json")):
        return read_labels(path)
    with expecting(path, "text in UTF-8, one class per line"):
        lines = Path(path).read_text("utf-8-sig").splitlines()
        names = [line.strip() for line in lines if line.strip()]
        if not names:
            raise ValueError("it is empty")
        if names[0].lower() in HEADERS:
            raise ValueError(f"its first line, {names[0]}, looks like a header: leave it out")
    pairs = [name.split(maxsplit=1) for name in names]
    if all(len(pair) == 2 for pair in pairs):
        numbers = [number for number, _ in pairs]
        counts = list(map(str, range(len(names) + 1)))
        if numbers in (counts[1:], counts[:-1]):
            names = [name for _, name in pairs]
    return tuple(names)


def text_of(name):
    """What CLIP's tokenizer sees of a class name: its words and signs.

    Names of one text cannot be told apart. As in clip_vit: capitals begin words and are lowered.
    """
    name = re.sub("([A-Z])", r" \1", name)
    name = unicodedata.normalize("NFKC", html.unescape(html.unescape(name))).lower()
    return re.findall(r"'(?:s|t|re|ve|m|ll|d)\b|[^\W\d_]+|\d|(?:[^\s\w]|_)+", name)


def check_classes(classes, source):
    """Raises ValueError if two class names are the same text to the model."""
    first = {}
    for name in classes:
        text = tuple(text_of(name))
        if text in first:
            raise ValueError(f"{quoted(source)}: classes {quoted(first[text], 40)!r} and "
                             f"{quoted(name, 40)!r} are the same text to the model: rename one")
        first[text] = name


def read_pairs(path, below):
    """[(name, number)] of a text file with lines `name number`, numbers in [0, below).

    Lines are split at the last space, as names hold spaces. ValueError names the line.
    """
    with expecting(path, "a text file in UTF-8"):
        lines = Path(path).read_text("utf-8-sig").splitlines()
    pairs = []
    for i, line in enumerate(lines, 1):
        parts = line.rsplit(maxsplit=1)
        if not parts:
            continue
        name, number = parts[0].strip(), parts[-1]
        if len(parts) == 1 or not number.isdecimal() or int(number) >= below:
            raise ValueError(f"{quoted(path)}, line {i}: expected `path label` with a label below "
                             f"{below}: {quoted(line)!r}")
        pairs.append((name, int(number)))
    return pairs


def listed_by_name(rows, classes, root):
    """{set: Listed} of {set: (source, [(video, class name)])}."""
    label = {name: i for i, name in enumerate(classes)}
    sets = {}
    with expecting(root, "only classes in its lists that the class names have"):
        for name, (source, videos) in rows.items():
            sets[name] = Listed(source, [(video, label[owner]) for video, owner in videos])
    return sets


# ---- annotations: data sets ----------------------------------------------------------------------

# To add a data set, write a function that reads its owner's files, and a DataSet in KNOWN, below,
# where each field is explained; flags and messages follow from the table. The function gets the
# Files and returns a Listing, or None if the owner's files are not there; they may lie in any
# folder.
#     Listing(classes, {"train": Listed(...), "val": Listed(...)}): any other name than "train" is a
#     test set. Of several splits put split1 first: few-shot training tests on the first one.
#     A video's name is that of the owner's list. It is found by its stem wherever it lies below the
#     root, so stems must be unique in the data set.
# Optional: a recipe of its own (train.DATASET_RECIPES), its zero-shot test after training
# (train.TRANSFER), the paper's numbers (eval.PAPERS), and an imitation of its archive for the tests
# (tests/archives.py, ARCHIVES in tests/test_lists.py).

def read_hmdb51(files):
    """<action>_test_split{1,2,3}.txt with lines `<video>.avi <use>`, for each action.

    use 1: training, of which split 1 is taken; 2: test; 0: neither.
    """
    end = "_test_split1.txt"
    actions = sorted(name.removesuffix(end) for name in files.texts if name.endswith(end))
    if not actions:
        return None
    sets = {}
    for split in SPLITS:
        by_use = {0: [], 1: [], 2: []}
        for label, action in enumerate(actions):
            for name, use in read_pairs(files.need(f"{action}_test_{split}.txt"), 3):
                by_use[use].append((f"{action}/{name}", label))
        sets[split] = Listed(f"*_test_{split}.txt", by_use[2])
        if split == "split1":
            sets["train"] = Listed(f"*_test_{split}.txt", by_use[1])
    return Listing(tuple(action.replace("_", " ") for action in actions), sets)


def read_ucf101(files):
    """classInd.txt with lines `<number from 1> <class>`; trainlist01.txt, testlist0{1,2,3}.txt with
    lines `<class>/<video>.avi`, some followed by a number."""
    if not files.text("testlist01.txt"):
        return None
    names = {"split1": "testlist01.txt", "split2": "testlist02.txt", "split3": "testlist03.txt"}
    if files.text("trainlist01.txt"):
        names["train"] = "trainlist01.txt"
    rows = {}
    for name, file in names.items():
        path = files.need(f"ucfTrainTestlist/{file}")
        with expecting(path, "the owner's list, as distributed"):
            lines = Path(path).read_text("utf-8-sig").splitlines()
            videos = [re.sub(r" \d+$", "", line.strip()) for line in lines if line.strip()]
            rows[name] = file, [(video, video.split("/")[-2]) for video in videos]
    path = files.need("ucfTrainTestlist/classInd.txt")
    with expecting(path, "lines `<number from 1> <class>`"):
        lines = Path(path).read_text("utf-8-sig").splitlines()
        numbered = [line.split(maxsplit=1) for line in lines if line.strip()]
        classes = in_order({int(number) - 1: name.strip() for number, name in numbered})
    return Listing(classes, listed_by_name(rows, classes, files.root))


def read_kinetics(files):
    """train.csv and val.csv with the columns label, youtube_id, time_start, time_end (seconds).

    A video's name is <id>_<start>_<end>, with six digits for each time.
    """
    if not files.text(*KINETICS_VAL):
        return None
    paths = {"val": files.need(*KINETICS_VAL)}
    if files.text(*KINETICS_TRAIN):
        paths["train"] = files.need(*KINETICS_TRAIN)
    rows = {}
    for name, path in paths.items():
        videos = []
        with expecting(path, "the owner's list, as distributed"):
            with open(path, newline="", encoding="utf-8-sig") as file:
                lines = csv.reader(file)
                columns = ("label", "youtube_id", "time_start", "time_end")
                label, video, start, end = map(next(lines, []).index, columns)
                for line in filter(None, lines):
                    times = f"{int(line[start]):06d}_{int(line[end]):06d}"
                    videos.append((f"{line[video]}_{times}", line[label]))
        rows[name] = os.path.basename(path), videos
    classes = set()
    for _, videos in rows.values():
        classes.update(label for _, label in videos)
    classes = tuple(sorted(classes))
    return Listing(classes, listed_by_name(rows, classes, files.root))


def read_kinetics600(files):
    """As Kinetics-400; but class folders win over the CSV files, which are incomplete here."""
    return None if files.has_folders("train") else read_kinetics(files)


def read_ssv2(files):
    """something-something-v2-{labels,train,validation}.json, or without the long prefix.

    A video's class is its template without brackets; labels.json has the ids of the classes.
    """
    prefix, rows = "something-something-v2-", {}
    for name, file in (("val", "validation.json"), ("train", "train.json")):
        path = files.text(prefix + file, file)
        if path is None and name == "val":
            return None
        if path is not None:
            with expecting(path, "the owner's list, as distributed"):
                items = json.loads(Path(path).read_text("utf-8-sig"))
                videos = [(str(item["id"]), re.sub(r"[][]", "", item["template"]))
                          for item in items]
            rows[name] = os.path.basename(path), videos
    path = files.need(f"{prefix}labels.json", "labels.json")
    with expecting(path, 'JSON {"class": "id"}'):
        names = json.loads(Path(path).read_text("utf-8-sig"))
        classes = in_order({int(number): name for name, number in names.items()})
    return Listing(classes, listed_by_name(rows, classes, files.root))


class DataSet(NamedTuple):
    """A known data set: what its files are called, and who reads them."""

    page: str  # where its owner offers it
    classes: int  # how many
    words: tuple  # a folder with one of these in its name belongs to this data set
    read: Callable  # Files -> Listing of the owner's files, None if they are not there
    test_file: str  # of the owner, what messages ask for
    train_file: str
    # files that ViFi-CLIP and TC-CLIP published for it, if they did
    labels: str = "labels.csv"  # the class names
    prefix: str = "labels"  # of more names: <prefix>_{base,novel,llm}_labels
    lists: dict = {}  # {test set: names that its list has}
    train_list: str = ""
    # what is special about it
    loses_videos: bool = False  # YouTube deletes some: those that are missing are left out
    swapped: tuple = ()  # pairs of names that the published labels have the wrong way round
    balanced: bool = False  # all classes have as many training videos
    flips: bool = True  # a mirrored video keeps its class; not if left and right are part of them


KINETICS_TRAIN = ("train.csv", "kinetics*train.csv")
KINETICS_VAL = ("val.csv", "validate.csv", "kinetics*val.csv", "kinetics*validate.csv")
VAL_LISTS = {"split1": ("val1.txt",), "split2": ("val2.txt",), "split3": ("val3.txt",)}
KNOWN = {
    "hmdb51": DataSet(
        page="https://serre-lab.clps.brown.edu/resource/hmdb-a-large-human-motion-database",
        classes=51, words=("hmdb",), read=read_hmdb51,
        test_file="testTrainMulti_7030_splits/*_test_split1.txt",
        train_file="testTrainMulti_7030_splits/*_test_split1.txt",
        labels="hmdb_51_labels.csv", prefix="hmdb_51", lists=VAL_LISTS,
        swapped=(("kick", "kick ball"), ("sword", "sword exercise")), balanced=True),
    "ucf101": DataSet(
        page="https://www.crcv.ucf.edu/data/UCF101.php",
        classes=101, words=("ucf",), read=read_ucf101,
        test_file="ucfTrainTestlist/testlist01.txt", train_file="ucfTrainTestlist/trainlist01.txt",
        labels="ucf_101_labels.csv", prefix="ucf_101", lists=VAL_LISTS),
    "k400": DataSet(
        page="https://github.com/cvdfoundation/kinetics-dataset",
        classes=400, words=("k400", "kinetics400"), read=read_kinetics,
        test_file="val.csv", train_file="train.csv", labels="kinetics_400_labels.csv",
        prefix="kinetics_400", lists={"val": ("val.txt",)}, train_list="train.txt",
        loses_videos=True),
    "k600": DataSet(
        page="https://github.com/cvdfoundation/kinetics-dataset",
        classes=600, words=("k600", "kinetics600"), read=read_kinetics600,
        test_file="val.csv", train_file="train.csv", labels="kinetics_600_labels.csv",
        prefix="kinetics_600", lists={}, loses_videos=True),
    "ssv2": DataSet(
        page="https://www.qualcomm.com/developer/software/something-something-v-2-dataset",
        classes=174, words=("ssv2", "somethingsomething"), read=read_ssv2,
        test_file="something-something-v2-validation.json",
        train_file="something-something-v2-train.json", labels="ssv2_labels.csv",
        prefix="ssv2_174", lists={"val": ("validation.txt", "val.txt")}, train_list="train.txt",
        flips=False)}
DATASETS = ("shapes", *KNOWN, "folder")


# ---- protocols -----------------------------------------------------------------------------------

# From a folder to sets of videos; eval.py calls load_tests and train.py load_protocol, which come
# last. Both go through open_files (what lies there), find_listing (what the annotations say),
# test_sets and training_set (VideoLists), and `named` (other class names).

TEST_FOLDERS = ("base", "novel", "test", "val")
FEW_SHOT = ("fewshot", "base2novel")  # the protocols that draw `shots` videos per class


def open_files(dataset, root, upstream_labels=False):
    """The Files of a data set. Raises ValueError if it is unknown or nothing is there."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset {quoted(dataset)!r} is unknown; known are {', '.join(DATASETS)}")
    known = KNOWN.get(dataset)
    if upstream_labels and not (known and known.swapped):
        raise ValueError("--upstream-labels: only hmdb51's published names differ from its "
                         f"owner's, not {dataset}'s")
    if not os.path.isdir(root) or not os.listdir(root):
        what = "one folder per class, with its videos"
        if known:
            what = f"videos and annotations from {known.page}"
        if dataset == "shapes":
            what = "`python train.py --protocol fewshot` renders it"
        raise ValueError(f"{quoted(root)}: no data there; {dataset} is expected in it, or in the "
                         f"folder that --data names: {what}")
    strangers = []
    for other, row in KNOWN.items():
        if other != dataset:
            strangers += row.words
    return Files(root, known, strangers if known else ())


def put_right(names, known, upstream=False):
    """[ours] The class names with the data set's swapped pairs in the order of the owner's files.

    HMDB-51's published labels have kick and kick ball, and sword and sword exercise, the wrong way
    round. upstream: put them as published instead, to compare with published numbers.
    """
    names = list(names)
    for pair in known.swapped if known else ():
        if {*pair} <= {*names}:
            first, second = sorted([names.index(pair[0]), names.index(pair[1])], reverse=upstream)
            names[first], names[second] = pair
    return tuple(names)


def published_names(files, path):
    """The class names of a published labels file, put right."""
    return put_right(read_labels(path), files.known)


def published_listing(files):
    """The Listing of the published lists of a known data set, or None if they are not there."""
    row = files.known
    if not any(files.text(*names) for names in row.lists.values()):
        return None
    classes = published_names(files, files.need(row.labels))
    paths = {name: files.need(*names) for name, names in row.lists.items()}
    if row.train_list and files.text(row.train_list):
        paths["train"] = files.text(row.train_list)
    sets = {}
    for name, path in paths.items():
        sets[name] = Listed(os.path.basename(path), read_pairs(path, len(classes)))
    return Listing(classes, sets)


def find_listing(files):
    """The Listing of the owner's files, else of the published lists, else None."""
    if files.known is None:
        return None
    return files.known.read(files) or published_listing(files)


def read_list(path, files, listing, labels):
    """The VideoList of a list with lines `path label`.

    Class names: the listing's, else those of the published labels file, else of the file `labels`.
    """
    name = files.known.labels if files.known else "labels.csv"
    if listing:
        classes = listing.classes
    elif files.known and files.text(name):
        classes = published_names(files, files.text(name))
    elif labels in ("", "llm") or files.text(name):
        classes = read_labels(files.need(name))
    else:
        classes = read_labels(labels)
    return files.locate(Listed(os.path.basename(path), read_pairs(path, len(classes))), classes)


def test_sets(files, listing):
    """{name: VideoList} of the test sets that are listed, or else lie in class folders."""
    if listing:
        return {name: files.locate(listed, listing.classes)
                for name, listed in listing.sets.items() if name != "train"}
    names = [name for name in TEST_FOLDERS if files.has_folders(name)]
    if names:
        return {name: class_folders(os.path.join(files.root, name)) for name in names}
    if files.has_folders("train"):
        raise ValueError(f"{quoted(files.root)}: has train/ but no test/ or val/<class>/<video> "
                         "beside it to test on")
    if files.known:
        files.need(files.known.test_file)  # raises, and says where to get it
    return {"test": class_folders(files.root)}


def training_set(protocol, shots, files, listing, labels):
    """The VideoList to train on, or to draw from: the published few-shot list for fewshot, the
    listed training set, or the class folders in train/."""
    few = files.text(f"train1_few_shot_{shots}.txt") if files.known else None
    if few and protocol == "fewshot":
        return read_list(few, files, listing, labels)
    if listing and "train" in listing.sets:
        return files.locate(listing.sets["train"], listing.classes)
    if few and protocol == "base2novel":
        return read_list(few, files, listing, labels)
    if files.has_folders("train"):
        return class_folders(os.path.join(files.root, "train"))
    if files.known:
        files.need(files.known.train_file)  # raises, and says where to get it
    raise ValueError(f"{quoted(files.root)}: no training videos; expected train/<class>/<video>")


def zero_shot_k600(files, labels):
    """The three published lists of 160 classes each out of Kinetics-600, none of them K400's."""
    if labels not in ("", "llm"):
        raise ValueError(f"{quoted(labels)}: k600 is tested on three lists of classes, for which "
                         "one labels file cannot hold; only labels=llm does")
    tests = {}
    for split in SPLITS:
        path = files.need(f"ZS_{split}_K600_eval*.txt")
        classes = read_labels(files.need(f"ZS_{split}_K600.csv"))
        tests[split] = files.locate(
            Listed(os.path.basename(path), read_pairs(path, len(classes))), classes)
        if labels == "llm":
            names = files.need(f"ZS_{split}_K600_llm.json")
            tests[split] = renamed(tests[split], names)
        check_classes(tests[split].classes, path)
    return tests


def plain_key(name):
    """A class name without capitals, spaces and signs, to compare names of two files."""
    return re.sub(r"[\W_]", "", composed(name)).lower()


def renamed(videos, path):
    """The VideoList with the class names of a labels file.

    By name if the file has all classes; its names may go on after a colon, as LLM-rephrased ones
    do: "Kick: a person ...". Else by number, if the folders are named by numbers or a list gives
    the order, and no name that both have stands at another number. Else ValueError.
    """
    names = read_labels(path)
    classes = [plain_key(name) for name in videos.classes]
    keys = [plain_key(name) for name in names]
    heads = [plain_key(name.partition(":")[0]) for name in names]
    for mine, theirs in ((videos.classes, names), (classes, keys), (classes, heads)):
        if {*mine} <= {*theirs} and len({*theirs}) == len(theirs):
            return replace(videos, classes=tuple(names[theirs.index(key)] for key in mine))
    numbers = list(range(len(classes)))
    fits = len(names) == len(classes)
    if videos.by_folder:
        numbers = [int(name) for name in videos.classes if name.isdecimal()]
        fits = len(numbers) == len(classes) and max(numbers) < len(names)
    if fits:
        fits = all(heads[i] == name or name not in heads for i, name in zip(numbers, classes))
    if not fits:
        raise ValueError(f"{quoted(path)}: {len(names)} names, but {videos.source.rstrip('/')} has "
                         f"{len(classes)} classes of other names: {some(names, 2)} there, "
                         f"{some(videos.classes, 2)} here; use the same, or name folders by ids")
    return replace(videos, classes=tuple(names[number] for number in numbers))


def named(videos, files, labels, upstream, half=""):
    """The VideoList with the names of the labels file `labels`, or with HMDB-51's as published.

    labels: "llm" for the published LLM-rephrased names of the data set, or of a `half` of it.
    Raises ValueError if two names are the same text to the model.
    """
    if labels == "llm":
        prefix = files.known.prefix if files.known else "labels"
        path = files.text(f"{prefix}_{half}_llm_labels.json") if half else None
        labels = path or files.need(f"{prefix}_llm_labels.json")
    if labels:
        videos = renamed(videos, labels)
    if upstream:
        videos = replace(videos, classes=put_right(videos.classes, files.known, upstream=True))
    check_classes(videos.classes, labels or files.root)
    return videos


def split_folder(root, shots, seed):
    """One's own class folders: `shots` videos of each class to train on, {"test": the others}."""
    everything = class_folders(root)
    train = draw_shots(everything, shots, seed)
    drawn = {*train.paths}
    rest = [i for i, path in enumerate(everything.paths) if path not in drawn]
    test = replace(everything.keep(rest), notes=())
    empty = {*range(len(train.classes))} - {*test.labels}
    if empty:
        names = some(train.classes[label] for label in sorted(empty))
        raise ValueError(f"{quoted(root)}: shots={shots} takes every video of {names} for training "
                         "and leaves none to test on: give more videos, or lower shots")
    return train, {"test": test}


def draw_shots(videos, shots, seed):
    """`shots` videos of every class, drawn with `seed`. Raises ValueError if a class has fewer."""
    rng, labels = np.random.default_rng(seed), np.asarray(videos.labels)
    drawn = []
    for label, name in enumerate(videos.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < shots:
            raise ValueError(f"class {quoted(name, 40)!r} has {len(members)} training videos, "
                             f"fewer than shots={shots}: choose fewer, such as --set shots="
                             f"{max(1, np.bincount(labels).min() - 1)}, or give more videos")
        drawn += sorted(rng.permutation(members)[:shots])
    if len(drawn) < len(labels):
        videos = replace(videos, source=f"drawn with seed {seed} from {videos.source}")
    return videos.keep(drawn)


def same_classes(train, test, strict=False):
    """The test videos with the training's classes, in its order; classes are matched by name.

    Classes that only the training has get a note. strict: classes that only the test has are a
    ValueError; else such a test keeps its own classes, as base/ and novel/ do.
    """
    if test.source in ("base/", "novel/"):
        return test
    trained = {train.classes[label] for label in {*train.labels}}
    tested = {test.classes[label] for label in {*test.labels}}
    strange = sorted(tested - trained)
    if strange and strict:
        raise ValueError(f"{test.source} has classes that {train.source} has no videos of "
                         f"({some(strange)}): a model cannot learn them")
    if not {*test.classes} <= {*train.classes}:
        return test
    new = [train.classes.index(name) for name in test.classes]
    test = replace(test, classes=train.classes, labels=tuple(new[label] for label in test.labels))
    absent = sorted(trained - tested)
    if absent:
        test = test.note(f"{test.source} has no videos of {len(absent)} of the "
                         f"{len(train.classes)} classes ({some(absent)})")
    return test


def base_and_novel(files, listing, classes, base="", train=None):
    """The labels of the base and of the novel classes.

    base: a file of the base classes' names. Else the published label files of the halves are used.
    Else classes are sorted by how many training videos they have, those that are missing from disk
    included, and equal ones by label; the first half, which is the rarer, is novel [released].
    Raises ValueError if nothing tells.
    """
    prefix = files.known.prefix if files.known else "folder"
    names = [files.text(f"{prefix}_{half}_labels.csv") for half in ("base", "novel")]
    if base:
        chosen = read_base_classes(base, classes)
        return chosen, [label for label in range(len(classes)) if label not in chosen]
    if files.known and any(names):  # one alone would number the classes in another order
        names = [files.need(f"{prefix}_{half}_labels.csv") for half in ("base", "novel")]
        with expecting(names[0], "and in its _novel_ twin, names of the data set's classes"):
            return tuple([classes.index(name) for name in published_names(files, path)]
                         for path in names)
    counted = listing is not None and "train" in listing.sets
    if counted:
        labels = [label for _, label in listing.sets["train"].videos]
    elif train:
        labels = train.labels
    elif files.known or files.has_folders("train"):
        labels = training_set("base2novel", 16, files, listing, "").labels
    else:
        labels = range(len(classes))  # as many are drawn of every class
    count = np.bincount(labels, minlength=len(classes))
    known = files.known
    if known and known.lists and not known.balanced and not counted and len({*count}) == 1:
        raise ValueError(f"{quoted(files.root)}: base2novel needs {prefix}_base_labels.csv and its "
                         "_novel_ twin, or all training videos, to count the frequent classes")
    ranked = np.argsort(count, kind="stable").tolist()
    return ranked[len(ranked) // 2:], ranked[:len(ranked) // 2]


def read_base_classes(path, classes):
    """The labels of the classes that a file names, see `read_class_names`."""
    names = read_class_names(path)
    unknown = [name for name in names if name not in classes]
    if unknown or len({*names}) == len(classes):
        raise ValueError(f"{quoted(path)}: it must name some of the classes ({some(classes)}), not "
                         f"all, and no others ({some(unknown) or 'none'})")
    return [classes.index(name) for name in dict.fromkeys(names)]


def published_half(files, half, *lists):
    """The VideoList of the first of these published lists of a half, or None.

    Their labels count from 0 within the half.
    """
    labels = files.text(f"{files.known.prefix}_{half}_labels.csv") if files.known else None
    path = files.text(*lists)
    if labels is None or path is None:
        return None
    classes = published_names(files, labels)
    return files.locate(Listed(os.path.basename(path), read_pairs(path, len(classes))), classes)


def published_halves(files, shots, seed, listing):
    """{"train", "base" or "novel": VideoList} of the published base-to-novel lists that are there.

    Of 16 shots there are lists for the seeds 1, 2 and 3. Else videos are drawn from the list of all
    of base, unless the whole training set is listed.
    """
    lists = {"base": ["base_val.txt"], "novel": ["novel_val.txt"], "train": ["base_train.txt"]}
    if listing is not None and "train" in listing.sets:
        lists["train"] = []
    if shots == 16:
        lists["train"].insert(0, f"fs_base_s{seed}_train.txt")
    sets = {}
    for name, names in lists.items():
        videos = published_half(files, "novel" if name == "novel" else "base", *names)
        if videos:
            sets[name] = videos
    return sets


def check_lists(protocol, files, train_list, test_list):
    """Raises ValueError if training and test videos of one's own folder are not told apart."""
    trains = train_list or files.has_folders("train")
    tests = test_list or any(files.has_folders(name) for name in TEST_FOLDERS)
    if trains and tests:
        return
    if train_list or test_list:
        one, other, folder = "train", "test", "test"
        if test_list:
            one, other, folder = "test", "train", "train"
        raise ValueError(f"{one}_list={quoted(train_list or test_list)} also needs "
                         f"{other}_list=FILE, or {quoted(files.root)}/{folder}/<class>/<video>")
    if tests:
        raise ValueError(f"{quoted(files.root)}: has folders to test on, but no "
                         "train/<class>/<video>")
    if not trains and protocol not in FEW_SHOT:
        raise ValueError(f"{quoted(files.root)}: {protocol} trains on all training videos: sort "
                         "them into train/<class>/<video> and test/<class>/<video>, or take "
                         "fewshot, which draws them")


def keys_of(videos):
    """Keys that tell videos wherever their folder is moved: the last two parts of the path, and the
    size in bytes. Videos of the same class, name and size count as copies."""
    keys = []
    for path in videos.paths:
        size = os.path.getsize(path) if os.path.isfile(path) else 0
        keys.append(f"{'/'.join(Path(path).parts[-2:])} {size}")
    return keys


def left_out(videos, keys):
    """The videos without those that have one of these `keys_of` videos, with a note."""
    if not keys:
        return videos
    trained = {*keys}
    kept = [i for i, key in enumerate(keys_of(videos)) if key not in trained]
    count = len(videos.paths) - len(kept)
    if count == 0:
        return videos
    return videos.keep(kept).note(f"{count} of {len(videos.paths)} videos are left out: the model "
                                  "was trained on them")


def without_trained(tests, keys):
    """Test sets without the videos that have one of these `keys_of` videos, and without empty sets.

    Raises ValueError if nothing is left.
    """
    rest = {name: left_out(videos, keys) for name, videos in tests.items()}
    gone = [name for name, videos in rest.items() if len(videos.paths) == 0]
    if len(gone) == len(rest):
        raise ValueError(f"the model was trained on all videos of {some(gone)}: none is left")
    tests = {name: videos for name, videos in rest.items() if name not in gone}
    if gone:
        note = f"{some(gone)} is left out: the model was trained on all of its videos"
        tests = {name: videos.note(note) for name, videos in tests.items()}
    return tests


def load_tests(dataset, root, test_list="", labels="", upstream_labels=False, half="", base="",
               leave_out=()):
    """A data set's test sets, {name: VideoList}.

    test_list: a list of one's own instead. labels: a labels file with other names, or "llm", see
    `named`. upstream_labels: HMDB-51's names as published. half: "base" or "novel", only these
    classes of the first test set; base: see `base_and_novel`. leave_out: `keys_of` the videos that
    a model was trained on, which are left out with a note. Raises ValueError.
    """
    files = open_files(dataset, root, upstream_labels)
    if dataset == "k600" and not test_list:
        if half:
            raise ValueError("k600 is tested on lists of its own classes: it has no halves")
        return zero_shot_k600(files, labels)
    listing = find_listing(files)
    tests = {}
    if half and not test_list and not base:
        videos = published_half(files, half, f"{half}_val.txt")
        tests = {half: videos} if videos else {}
    if test_list:
        tests = {Path(test_list).stem: read_list(test_list, files, listing, labels)}
    elif not tests:
        tests = test_sets(files, listing)
        if listing is None and files.has_folders("train"):
            train = class_folders(os.path.join(files.root, "train"))
            tests = {name: same_classes(train, test) for name, test in tests.items()}
    if half in tests:
        tests = {half: named(tests[half], files, labels, upstream_labels, half)}
    elif half:
        whole = next(iter(tests.values()))
        halves = dict(zip(("base", "novel"), base_and_novel(files, listing, whole.classes, base)))
        tests = {half: named(whole, files, labels, upstream_labels).only(halves[half])}
    else:
        tests = {name: named(videos, files, labels, upstream_labels)
                 for name, videos in tests.items()}
    return without_trained(tests, leave_out)


def also_trained_on(train, test):
    """The test videos, with a note if some of them, or copies, are training videos as well."""
    def real_paths(videos):
        folders = {*map(os.path.dirname, videos.paths)}
        real = {folder: os.path.realpath(folder) for folder in folders}
        return [os.path.join(real[os.path.dirname(path)], os.path.basename(path))
                for path in videos.paths]
    paths, keys = {*real_paths(train)}, {*keys_of(train)}
    count = sum(path in paths or key in keys
                for path, key in zip(real_paths(test), keys_of(test)))
    if count:
        return test.note(f"{test.source}: {count} of {len(test.paths)} test videos are training "
                         "videos as well")
    return test


def whole_sets(protocol, files, listing, shots, seed, train_list, test_list, labels):
    """The training set and {name: test set} of a protocol, with all classes."""
    has_folders = any(files.has_folders(name) for name in ("train", *TEST_FOLDERS))
    if files.known is None and not (has_folders or train_list or test_list):
        return split_folder(files.root, shots, seed)
    if test_list:
        tests = {Path(test_list).stem: read_list(test_list, files, listing, labels)}
    else:
        tests = test_sets(files, listing)
    # The training videos are split1's: other splits would test on some of them. Few-shot protocols
    # test on the first set only, as the papers do.
    few_shot = files.known and protocol in FEW_SHOT and "base" not in tests
    if "split2" in tests or few_shot:
        tests = dict([next(iter(tests.items()))])
    if train_list:
        train = read_list(train_list, files, listing, labels)
    else:
        train = training_set(protocol, shots, files, listing, labels)
    if files.known is None:
        tests = {name: also_trained_on(train, test) for name, test in tests.items()}
    return train, tests


def base_to_novel(files, listing, published, whole, base, rename):
    """Training videos of the base classes, and test videos of the base and of the novel classes.

    published: see `published_halves`; whole: computes the `whole_sets`, for what is not there.
    """
    lists = {name: rename(videos, half="novel" if name == "novel" else "base")
             for name, videos in published.items()}
    if lists.keys() == {"train", "base", "novel"}:
        return lists.pop("train"), lists
    train, tests = whole()
    if {"base", "novel"} <= tests.keys():
        return rename(train), {name: rename(videos) for name, videos in tests.items()}
    if {"base", "novel"} & tests.keys():
        raise ValueError(f"{quoted(files.root)}: of base/ and novel/ only one is there; give both, "
                         "or neither")
    base_labels, novel_labels = base_and_novel(files, listing, train.classes, base, train)
    train = rename(train)
    test = same_classes(train, rename(next(iter(tests.values()))))
    if test.classes != train.classes:
        raise ValueError(f"{quoted(files.root)}: base2novel needs the same classes in training and "
                         "test videos")
    tests = {"base": test.only(base_labels), "novel": test.only(novel_labels)}
    return lists.get("train", train.only(base_labels)), tests


def load_protocol(protocol, dataset, root, shots, seed, train_list="", test_list="", labels="",
                  upstream_labels=False, base=""):
    """Training videos and test sets of a protocol, (VideoList, {name: VideoList}).

    fewshot: `shots` videos per class, as published or drawn with `seed`. base2novel: `shots` of
    each base class, tests on base and novel; base: see `base_and_novel`. Others: all training
    videos. Of test splits the first: the others hold training videos. Raises ValueError.
    """
    files = open_files(dataset, root, upstream_labels)
    if dataset == "folder":
        check_lists(protocol, files, train_list, test_list)
    rename = partial(named, files=files, labels=labels, upstream=upstream_labels)
    listing = find_listing(files)
    whole = partial(whole_sets, protocol, files, listing, shots, seed, train_list, test_list,
                    labels)
    if protocol == "base2novel":
        published = {}
        if not (train_list or test_list or base):
            published = published_halves(files, shots, seed, listing)
        train, tests = base_to_novel(files, listing, published, whole, base, rename)
    else:
        train, tests = whole()
        train = rename(train)
        strict = protocol in ("supervised", "fewshot")
        tests = {name: same_classes(train, rename(test), strict) for name, test in tests.items()}
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
        raise ValueError("--device cuda: PyTorch finds no GPU here; leave it out")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and local_world > torch.cuda.device_count():
        raise ValueError(f"{local_world} processes on a node with {torch.cuda.device_count()} "
                         "GPUs: lower --nproc_per_node")
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
    if rank_and_world()[0]:
        settings["disable"] = True  # left out otherwise: then tqdm asks the environment
    return tqdm(*args, **settings)


def gather(items):
    """The lists of all processes joined in the order of ranks, on every process."""
    _, world = rank_and_world()
    if world == 1:
        return items
    lists = [None] * world
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def check_same(what, values, advice):
    """Raises ValueError, on every process, if the `values` of one, {name: value}, are others."""
    first, *others = gather([values])
    for rank, other in enumerate(others, start=1):
        differ = [f"{name} {other.get(name)}, not {value}" for name, value in first.items()
                  if other.get(name) != value]
        if differ:
            raise ValueError(f"rank {rank} has other {what} than rank 0: {'; '.join(differ)}; "
                             f"{advice}")


def check_same_data(description):
    """Raises ValueError, on every process, if one describes its data differently, in a short line.

    Nodes may have copies of the data of their own. If one copy is incomplete, the processes would
    disagree on the number of steps and wait for one another.
    """
    first, *others = gather([description])
    for rank, other in enumerate(others, start=1):
        if other != first:
            raise ValueError(f"rank {rank} sees other data than rank 0: {other}, not {first}; "
                             "give every machine the same videos and lists")


def any_process(flag, device):
    """Whether the flag is set on any process. It sends one number, nothing beside a step."""
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


# ---- loaders -------------------------------------------------------------------------------------

# [released] TC-CLIP, ILA and ViFi-CLIP normalise with ImageNet's constants
MEANS = {"imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
         "clip": ((122.7709383, 116.7460125, 104.09373615), (68.5005327, 66.6321579, 70.32316305)),
         "half": ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),  # Google's and timm's ViT
         "slowfast": ((114.75, 114.75, 114.75), (57.375, 57.375, 57.375))}  # TimeSformer


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


@atexit.register
def end_workers():
    """Kills the loaders' workers that are left when this process ends, as after a traceback.

    multiprocessing would end them by SIGTERM, which they ignore, and wait for them for ever.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class Loader(DataLoader):
    """A DataLoader that says so if there is no shared memory even for its workers' locks."""

    def __iter__(self):
        try:
            return super().__iter__()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                _MultiProcessingDataLoaderIter._shutdown = True  # its destructor asks for it
                raise ValueError("/dev/shm is full: docker run --shm-size=8g, or fewer "
                                 "workers") from error
            raise


def load_batches(dataset, workers, **settings):
    """The loader behind all loaders below; `settings` are its arguments."""
    return Loader(dataset, num_workers=min(workers, os.cpu_count()),
                  pin_memory=torch.cuda.is_available(), worker_init_fn=prepare_worker,
                  collate_fn=dataset.collate, **settings)


def to_share(clips):
    """Clips (b,...) uint8 as a loader's worker sends them: in shared memory if there is room.

    Else they go by value, which costs one more copy; a container's /dev/shm is often 64 MB. PyTorch
    would move the tensors only after this code has run, where a failure loses the batch.
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
        """Batches of this process's share: (indices, views (b,V,T,3,R,R) uint8, [(index, error)]).

        Process r of w reads the videos r, r + w, r + 2w, ..., so every video is read exactly once.
        """
        rank, world = rank_and_world()
        share = BatchSampler(range(rank, len(self), world), batch, drop_last=False)
        return load_batches(self, workers, batch_sampler=share)

    @staticmethod
    def collate(items):
        """Items -> (indices of the readable, their views (b,V,T,3,R,R), [(index, error)])."""
        readable = [i for i, clip, _ in items if clip is not None]
        clips = [clip for _, clip, _ in items if clip is not None]
        errors = [(i, error) for i, clip, error in items if clip is None]
        return readable, to_share(torch.stack(clips)) if clips else None, errors


class CheckedVideos(Dataset):
    """Item i: what is wrong with the video paths[i], or None."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return check_video(self.paths[i])

    @staticmethod
    def collate(items):
        return items


class TrainVideos(Dataset):
    """The videos of a training. Item (epoch, i, weight): an augmented clip of video i.

    All randomness is drawn from (seed, epoch, i). A video that cannot be read is reported, and
    another one takes its place; after ten in a row None does. `augmentation` holds the arguments of
    `augment`.
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
        """Randomly drawn frames of video i, (T,3,h,w) uint8."""
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
        """Items -> a batch; its clips are None if one of them is."""
        clips, labels, weights, errors = zip(*items)
        unreadable = any(clip is None for clip in clips)
        clips = None if unreadable else to_share(torch.stack(clips))
        # numpy's arrays are sent by value
        return clips, np.array(labels), np.array(weights), sum(errors, [])


# ---- the miniature world -------------------------------------------------------------------------

SIDE, CLIP_FRAMES = 32, 8
COLOURS = {"red": (215, 40, 40), "cyan": (60, 205, 215), "purple": (150, 55, 200),
           "yellow": (225, 210, 50), "blue": (45, 75, 225), "green": (45, 170, 60)}
SIZES = {"small": 4.5, "big": 8.0}  # radius in pixels, +- 1
PLACES = {"left": (16, 8), "right": (16, 24), "top": (8, 16), "bottom": (24, 16),
          "middle": (16, 16)}  # (y, x) in pixels, +- 1.5
SHAPES = {  # is the point inside? y downwards and x, in units of the shape's radius
    "circle": lambda y, x: y * y + x * x <= 1,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) <= 0.85,
    "triangle": lambda y, x: (abs(y) <= 0.9) & (abs(x) <= (y + 0.9) / 1.8),
    "cross": lambda y, x: ((np.minimum(abs(y), abs(x)) <= 0.35)
                           & (np.maximum(abs(y), abs(x)) <= 1))}


def shapes_classes():
    """The class names (base, novel): 20 and 10. The novel ones join neighbours in COLOURS."""
    base, novel = [], []
    order = list(COLOURS)
    for a, b in permutations(order, 2):
        neighbours = abs(order.index(a) - order.index(b)) == 1
        (novel if neighbours else base).append(f"{a} to {b}")
    return base, novel


def opposite(name):
    """The class of the reversed clip: "red to blue" -> "blue to red"."""
    return " to ".join(reversed(name.split(" to ")))


def any_of(rng, words):
    """One of the words, each as likely as the others."""
    words = list(words)
    return words[rng.integers(len(words))]


def paint(rng, size, shape, place, colours):
    """Frames of one scene, uint8 (T,32,32,3): the shape on a ground, and noise in every pixel.

    colours (T,3), in [0,255], are the shape's. The shape drifts by up to a pixel; else only the
    noise changes from frame to frame.
    """
    ground = paint_ground(rng)  # (R,R,3)
    radius = SIZES[size] + rng.uniform(-1, 1)
    drift = np.linspace(-0.5, 0.5, len(colours))[:, None] * rng.uniform(-1, 1, 2)  # (T,2)
    centre = PLACES[place] + rng.uniform(-1.5, 1.5, 2) + drift  # (T,2)
    cy, cx = centre.T[..., None, None].astype(np.float32)  # (T,1,1)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)  # (R,R)
    inside = SHAPES[shape]((y - cy) / radius, (x - cx) / radius)  # (T,R,R)
    tint = np.asarray(colours) + rng.uniform(-15, 15, 3)  # (T,3)
    frames = np.where(inside[..., None], tint[:, None, None], ground)  # (T,R,R,3)
    frames = frames + 8 * rng.standard_normal(frames.shape, np.float32)
    return frames.clip(0, 255).astype(np.uint8)


def paint_ground(rng):
    """A greyish ground with stripes and none to two small grey shapes, float (32,32,3)."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)  # (R,R)
    stripes = np.sin(x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1) + rng.uniform(0, 6))
    colour = 0.3 * rng.uniform(70, 185, 3) + 0.7 * rng.uniform(70, 185)
    ground = colour + stripes[..., None] * rng.uniform(5, 25)  # (R,R,3)
    for _ in range(rng.integers(3)):
        shape = rng.choice(list(SHAPES))
        radius = rng.uniform(2, 3.5)
        cy, cx = rng.uniform(2, SIDE - 2, 2)
        ground[SHAPES[shape]((y - cy) / radius, (x - cx) / radius)] = rng.uniform(20, 235)
    return ground


def render_still(rng):
    """A still picture, uint8 (32,32,3), and what is true of it: (size, colour, shape, place)."""
    size, colour = any_of(rng, SIZES), any_of(rng, COLOURS)
    shape, place = any_of(rng, SHAPES), any_of(rng, PLACES)
    picture = paint(rng, size, shape, place, [COLOURS[colour]])[0]
    return picture, (size, colour, shape, place)


def render_clip(rng, name):
    """A clip of class `name`, uint8 (8,32,32,3).

    The colour changes once, about the middle, within up to 3 frames. The first frame has the first
    colour alone, the last frame the last.
    """
    first, last = (np.array(COLOURS[colour]) for colour in name.split(" to "))
    size, shape, place = any_of(rng, SIZES), any_of(rng, SHAPES), any_of(rng, PLACES)
    middle = rng.uniform(2.5, 4.5)
    width = rng.uniform(0.1, 3)
    mix = ((np.arange(CLIP_FRAMES) - middle) / width + 0.5).clip(0, 1)[:, None]  # (T,1)
    return paint(rng, size, shape, place, (1 - mix) * first + mix * last)


def write_clip(path, frames):
    """Writes uint8 frames (T,R,R,3) as h264 in mp4.

    Every frame is an IDR frame of one quantiser. It is coded by itself, so it decodes to the same
    pixels wherever in a video it stands.
    """
    with av.open(str(path), "w") as container:
        options = {"qp": "10", "g": "1", "preset": "ultrafast", "threads": "1"}
        stream = container.add_stream("h264", rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def holds_shapes(folder):
    """Whether a folder holds a whole miniature world; write_shapes leaves no other."""
    return all((folder / split).is_dir() for split in ("train", "base", "novel"))


def write_shapes(folder, seed, shots_max=16, base_clips=10, novel_clips=20):
    """Renders the world into folder/{train,base,novel}/<class>/<number>.mp4, whole or not at all.

    train: `shots_max` clips of each base class. base, novel: `base_clips` and `novel_clips` test
    clips per class, and as many reversed: base/blue to red/003r.mp4 is base/red to blue/003.mp4
    backwards. A clip depends on `seed` and its name alone. A whole world that is there already, or
    that another process finishes first, stays. Raises ValueError if the folder holds other files.
    """
    folder = Path(folder)
    if holds_shapes(folder):
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already and holds no whole miniature world: choose "
                         "another folder with --data; for your own videos add --dataset folder")
    base, novel = shapes_classes()
    splits = ("train", base, shots_max), ("base", base, base_clips), ("novel", novel, novel_clips)
    clips = [(split, name, i) for split, names, count in splits for name in names
             for i in range(count)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own, for two nodes may have processes of one number
    with TemporaryDirectory(prefix=f".{folder.name}.unfinished-", dir=folder.parent) as place:
        unfinished = Path(place, "shapes")
        for split, name, i in tqdm(clips, desc="rendering the miniature world", unit="clip"):
            rng = np.random.default_rng([seed, *f"{split}/{name}/{i}".encode()])
            frames = render_clip(rng, name)
            write_in_class(unfinished / split / name, f"{i:03d}.mp4", frames)
            if split != "train":
                other = unfinished / split / opposite(name)
                write_in_class(other, f"{i:03d}r.mp4", frames[::-1])
        try:
            os.replace(unfinished, folder)
        except OSError:
            if not holds_shapes(folder):  # it holds them if another process was faster
                raise


def write_in_class(folder, name, frames):
    """Writes a clip into a class's folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_clip(folder / name, frames)
