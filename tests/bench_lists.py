"""Speed and memory of listing annotated videos: python tests/bench_lists.py (260 000 empty files, then deleted)."""

import csv
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data


def resident():
    """MB of memory that this process holds now, and has held at most."""
    now = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def touch(path):
    os.close(os.open(path, os.O_CREAT))


def hmdb(root, classes=100, videos=100):
    """10 000 videos by default in the HMDB-51 format: three splits, a folder of videos per action."""
    (root / "splits").mkdir()
    for c in range(classes):
        names = [f"video [{i}] & (x)_action_{c:03d}_{i}.avi" for i in range(videos)]
        for split in (1, 2, 3):
            lines = "".join(f"{name} {1 + (i % 3 == split - 1)} \n" for i, name in enumerate(names))
            (root / "splits" / f"action_{c:03d}_test_split{split}.txt").write_text(lines)
        (root / f"action_{c:03d}").mkdir()
        for name in names:
            touch(root / f"action_{c:03d}" / name)


def kinetics(root, classes=400, videos=600, tests=25):
    """Training: 240 000 videos by default in class folders; validation: 10 000 more."""
    for split, count in (("train", videos), ("val", tests)):
        with open(root / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("label", "youtube_id", "time_start", "time_end", "split", "is_cc"))
            for c in range(classes):
                folder = root / split / f"class of videos {c:03d}"
                folder.mkdir(parents=True)
                for i in range(count):
                    video = f"{split[0]}{c:03d}_{i:05d}-"
                    writer.writerow((folder.name, video, i, i + 10, split, 0))
                    touch(folder / f"{video}_{i:06d}_{i + 10:06d}.mp4")


if __name__ == "__main__":
    for dataset, write in (("hmdb51", hmdb), ("k400", kinetics)):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            before, start = resident()[0], time.perf_counter()
            train, tests = data.load_protocol("supervised", dataset, folder, 16, 0)
            seconds, (now, most) = time.perf_counter() - start, resident()
            print(f"{dataset}: {len(train.paths)} training and {sum(len(v.paths) for v in tests.values())} test videos "
                  f"in {seconds:.2f} s; memory +{now - before:.0f} MB, +{most - before:.0f} at most, to {most:.0f} MB")
            del train, tests
