"""Does the recipe for one's own folder learn? Real clips, cut into pieces, before and after the default training.

    python tests/bench_folder.py [VIDEO ...]      # default: the clips in ../shared/videos/real

A class is the file's name without its ending. Each piece has 24 frames; a clip of fewer than 6 pieces is left out. The model is the miniature's tiny CLIP, which has
never seen such pictures, so that it begins near chance. Training and test pieces come from the same recordings: the table
shows that the recipe learns, and not how well it would do on others.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import av  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402

REAL = ROOT.parent / "shared" / "videos" / "real"
PIECE = 24  # frames


def cut(path, folder):
    """Writes pieces of a video, the middle 128 x 128 pixels of each frame, to folder/<its name>/."""
    frames = data.read_frames(path, lambda total: range(total - total % PIECE), 128)  # (n,3,h,w) uint8
    if len(frames) < 6 * PIECE:
        return
    top, left = (frames.shape[2] - 128) // 2, (frames.shape[3] - 128) // 2
    frames = frames[:, :, top:top + 128, left:left + 128]
    target = folder / Path(path).stem.replace("_", " ")
    target.mkdir(parents=True)
    for number, piece in enumerate(frames.split(PIECE)):
        data.write_clip(target / f"{number:02d}.mp4", piece.permute(0, 2, 3, 1).numpy())


def run(script, *words):
    subprocess.run([sys.executable, ROOT / script, *map(str, words)], check=True)


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for path in args.videos:
            cut(path, folder / "clips")
        train.prepare_miniature(folder / "shapes", "cpu")
        clip = folder / "shapes" / "clip.pt"
        own = ["--data", folder / "clips", "--clip", clip]
        run("eval.py", "--test", "folder", *own, "--json", folder / "before.json")
        run("train.py", "--protocol", "fewshot", "--dataset", "folder", *own, "--out", folder / "run", "--set", "shots=4")
        before = json.loads((folder / "before.json").read_text())
        after = json.loads((folder / "run" / "results.json").read_text())["tests"]
    for name, tests in (("before", before), ("after", after)):
        for scores in tests.values():
            print(f"{name}: top-1 {100 * scores['top1']:.1f} on {scores['videos']} pieces of {scores['classes']} classes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", default=sorted(path for path in REAL.glob("*.*") if path.suffix != ".csv"))
    main(parser.parse_args())
