"""Small imitations of what people download: datasets as their owners distribute them, with tiny videos in real formats
and layouts, and released checkpoints.

Each function of a dataset fills a folder and returns {set: {video name without suffix: class name}} of the readable videos, with the
sets "train" and those that `data.load_tests` names. `train` and `test` count videos per class (and split). There are
names for 10 classes, of k600 for 4.
"""

import csv
import json
import re
from pathlib import Path

import av
import numpy as np
import torch

import data

SPLITS = ("split1", "split2", "split3")
ACTIONS = ("kick", "kick_ball", "sword", "sword_exercise", "climb", "climb_stairs", "brush_hair", "flic_flac", "wave",
           "run")
UCF = ("HandstandPushups", "ApplyEyeMakeup", "YoYo", "TaiChi", "Archery", "BabyCrawling", "Biking", "Diving", "Punch",
       "Surfing")
KINETICS = ("massaging person's head", "abseiling", "zumba", "air drumming", "passing American football (in game)",
            "tap dancing", "yoga", "archery", "washing dishes", "biking through snow")
ZERO_SHOT = ("fencing (sport)", "acting in play", "wood burning (art)", "yarn spinning", "lock picking", "tie dying",
             "jumping sofa", "ironing hair", "fidgeting", "backflip (human)", "calligraphy", "vacuuming car")
TEMPLATES = ("Pretending to put [something] onto [something]", "Approaching [something] with your camera",
             "Bending [something] so that it deforms",
             "Moving [something] and [something] so they collide with each other",
             "Dropping [something] behind [something]", "Tearing [something] into two pieces", "Folding [something]",
             "Moving [something] up", "Moving [something] down", "Holding [something]")
CODECS = {".avi": ("mpeg4", {}), ".webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
          ".mp4": ("h264", {})}


def write_video(path, name, classes, number):
    """A clip of the miniature world whose content is a class's: that of its place in `classes`."""
    worlds = [world for half in data.shapes_classes() for world in half]
    frames = data.render_clip(np.random.default_rng(number), worlds[sorted(classes).index(name) % len(worlds)])
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, options = CODECS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.bit_rate = 400_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def write_text(path, lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


def in_splits(videos, train, test):
    """(split, {video: use}) of three splits: 1 training, 2 test, 0 unused; the tests differ."""
    for split in range(3):
        order = videos[split * test:] + videos[:split * test]
        uses = [2] * test + [1] * train + [0] * (len(videos) - test - train)
        yield SPLITS[split], dict(sorted(zip(order, uses)))


def hmdb51(root, classes=3, train=2, test=1, folder="testTrainMulti_7030_splits"):
    """One video per class beside those in use; names with brackets, spaces and what else the archive has."""
    root, truth = Path(root), {name: {} for name in ("train", *SPLITS)}
    for action in ACTIONS[:classes]:
        videos = [f"#{i} [a] & (b), c! _{action}_u_nm_np1_fr_goo_{i}" for i in range(train + test + 1)]
        for split, uses in in_splits(videos, train, test):
            lines = [f"{video}.avi {use} " for video, use in uses.items()]
            write_text(root / folder / f"{action}_test_{split}.txt", lines)
            for video, use in uses.items():
                if use == 2 or use == 1 and split == "split1":
                    truth[split if use == 2 else "train"][video] = action.replace("_", " ")
        for number, video in enumerate(videos):
            write_video(root / action / f"{video}.avi", action, ACTIONS[:classes], number)
    return truth


def ucf101(root, classes=3, train=2, test=1, folder="ucfTrainTestlist", labelled_tests=False):
    """Class HandstandPushups has files v_HandStandPushups; lines end in CR LF; class i: i training videos more."""
    root, truth = Path(root), {name: {} for name in ("train", *SPLITS)}
    actions = sorted(UCF[:classes])
    lines = {name: [] for name in ("train1", "train2", "train3", "test1", "test2", "test3")}
    for number, action in enumerate(actions):
        extra = UCF.index(action)
        videos = [f"v_{action.replace('Handstand', 'HandStand')}_g{i:02d}_c01" for i in range(train + extra + test)]
        for split, uses in in_splits(videos, train + extra, test):
            for video, use in uses.items():
                line = f"{action}/{video}.avi"
                labelled = use == 1 or labelled_tests
                lines[f"{'train' if use == 1 else 'test'}{split[-1]}"].append(line + f" {number + 1}" * labelled)
                if use == 2 or split == "split1":
                    truth[split if use == 2 else "train"][video] = action
        for i, video in enumerate(videos):
            write_video(root / "UCF-101" / action / f"{video}.avi", action, actions, i)
    write_text(root / folder / "classInd.txt", [f"{i} {action}" for i, action in enumerate(actions, 1)], "\r\n")
    for name, entries in lines.items():
        write_text(root / folder / f"{name[:-1]}list0{name[-1]}.txt", entries, "\r\n")
    return truth


def clip_id(i):
    """The i-th made-up YouTube id and its seconds: every third begins with a hyphen."""
    return f"{'-' if i % 3 == 0 else 'x'}{i:04d}_aB-9", 7 * i, 7 * i + 10


def k400(root, classes=3, train=2, test=1, absent=1, empty=0, folder="annotations"):
    """Training videos flat, val in class folders. Beside them: `absent` annotated videos per set that are nowhere,
    `empty` files of 0 bytes in val, a training video of 0 bytes that has a replacement, and files ._x.mp4 of a Mac.

    Class i has i training videos more.
    """
    root, names, truth, i = Path(root), KINETICS[:classes], {"train": {}, "val": {}, "empty": {}, "absent": {}}, 0
    for split in ("train", "val"):
        rows = []
        for number, name in enumerate(names):
            count = test if split == "val" else train + number
            for kind in ["good"] * count + ["absent"] * (absent * (number == 0)) + \
                    ["empty"] * (empty * (number == 0 and split == "val")):
                (video, start, end), i = clip_id(i), i + 1
                stem = f"{video}_{start:06d}_{end:06d}"
                truth[split if kind == "good" else kind][stem] = name
                rows.append((name, video, start, end, split, i % 2))
                path = root / split / ("" if split == "train" else name) / f"{stem}.mp4"
                path.parent.mkdir(parents=True, exist_ok=True)
                if kind == "empty" or (split == "train" and len(truth["train"]) == 1):
                    path.touch()
                    path = root / "replacement" / "replacement_for_corrupted_k400" / path.name
                if kind == "good":
                    write_video(path, name, names, i)
                    path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7Mac OS X")
        with open_csv(root / folder / f"{split}.csv") as file:
            csv.writer(file).writerows([("label", "youtube_id", "time_start", "time_end", "split", "is_cc"), *rows])
    write_text(root / folder / "test.csv", ["label,youtube_id,time_start,time_end,split", ",zzzzzzzzzzz,1,11,test"])
    return truth


def open_csv(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "w", newline="")


def k600(root, classes=3, train=2, test=1, absent=1, folder="lists"):
    """Class folders below train/ and val/, test/ flat; the three published lists are of other classes each, with videos
    out of all three. Training classes are the first `classes` of all, `train` in train/ and `test` in val/ each."""
    root, truth, i = Path(root), {name: {} for name in ("train", "val", *SPLITS, "absent")}, 0
    for number, split in enumerate(SPLITS):
        names, lines = sorted(ZERO_SHOT[(number * classes + j) % len(ZERO_SHOT)] for j in range(classes)), []
        for label, name in enumerate(names):
            for part in [*["train"] * train, *["val", "test"] * test, *["gone"] * (absent * (label == 0))]:
                (video, start, end), i = clip_id(i), i + 1
                stem = f"{video}_{start:06d}_{end:06d}"
                lines.append(f"{'train' if part == 'gone' else part}/{stem}.mp4 {label}")
                truth["absent" if part == "gone" else split][stem] = name
                if part != "gone":
                    write_video(root / part / ("" if part == "test" else name) / f"{stem}.mp4", name, names, i)
                if part in ("train", "val"):
                    truth[part][stem] = name
        write_text(root / folder / f"ZS_{split}_K600_eval.txt", lines)
        with open_csv(root / folder / f"ZS_{split}_K600.csv") as file:
            csv.writer(file).writerows([("id", "name"), *enumerate(names)])
    return truth


def ssv2(root, classes=3, train=2, test=1, prefix="something-something-v2-"):
    """WebM files all in one folder; i-th class: i training videos more; label ids are strings; test has no labels."""
    root, truth, sets, i = Path(root), {"train": {}, "val": {}}, {"train": [], "validation": []}, 1000
    names = sorted(template.replace("[", "").replace("]", "") for template in TEMPLATES[:classes])
    for number, template in enumerate(TEMPLATES[:classes]):
        name = template.replace("[", "").replace("]", "")
        for split in ["train"] * (train + number) + ["validation"] * test:
            i += 7
            sets[split].append({"id": str(i), "label": name.replace("something", "a pen"), "template": template,
                                "placeholders": ["a pen"] * template.count("[")})
            truth[split[:5] if split == "train" else "val"][str(i)] = name
            write_video(root / "20bn-something-something-v2" / f"{i}.webm", name, names, i)
    labels = {name: str(number) for number, name in enumerate(names)}
    for name, content in {**sets, "labels": labels, "test": [{"id": "3"}]}.items():
        (root / f"{prefix}{name}.json").write_text(json.dumps(content))
    return truth


# ---- released checkpoints in their own layouts -------------------------------------------------------------------------

TC_NAMES = (("clip.visual.", "image_encoder."), ("clip.logit_scale", "logit_scale"), ("clip.", "text_encoder."),
            ("prompt_layers.", "text_encoder.prompt_generation_layer."), ("vectors", "prompt_learner.ctx"),
            ("vision.local_global_bias.", "image_encoder.transformer.resblocks."))
ILA_NAMES = ((r"^clip\.", ""), (r"^aligners\.(\d+)\.(?=message|temporal)", r"visual.transformer.resblocks.\1."),
             (r"^aligners\.(\d+)\.", r"visual.transformer.resblocks.\1.message_attn."),
             (r"^(video_prompt\.decoder\.\d\.)(?=[qkv]_proj|proj)", r"\1cross_attn."),
             (r"^frame_positions", "mit.positional_embedding"), (r"^integration\.", "mit.resblocks.0."),
             (r"^head\.", "mit.classify_head."), (r"^video_prompt\.patch_norm\.", "prompts_visual_ln."),
             (r"^video_prompt\.patch_proj", "prompts_visual_proj"), (r"^video_prompt\.", "prompts_generator."))


def write_released(path, state):
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 9}, path)


def released_tc(path, model, text_length=77):
    """A TCCLIP's weights as the authors of TC-CLIP publish theirs."""
    state = {}
    for key, value in model.state_dict().items():
        ours, theirs = next(names for names in TC_NAMES if key.startswith(names[0]))
        key = theirs + key.removeprefix(ours)
        if ours.endswith("bias."):
            key, value = f"{key}.attn.local_global_bias_table", value[:, None]
        if ".in_proj_" in key and key.startswith("image_encoder."):
            for part, rows in zip("qkv", value.chunk(3)):
                state[key.replace(".in_proj_", f".{part}_proj.")] = rows
        else:
            state[key] = value
    state.pop("text_encoder.token_embedding.weight")
    words, width = state["prompt_learner.ctx"].shape
    state["prompt_learner.token_suffix"] = torch.zeros(2, text_length - 1 - words, width)
    write_released(path, state)


def released_vifi(path, clip):
    """A CLIP's weights as the authors of ViFi-CLIP publish theirs."""
    state = {"prompt_learner.complete_text_embeddings": torch.zeros(2, 77, clip.token_embedding.weight.shape[1])}
    for key, value in clip.state_dict().items():
        if key != "token_embedding.weight":
            part = "" if key == "logit_scale" else "text_encoder."
            state["image_encoder." + key.removeprefix("visual.") if key.startswith("visual.") else part + key] = value
    write_released(path, state)


def released_ila(path, model):
    """The weights of an ILA in its released form as its authors publish theirs."""
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in ILA_NAMES:
            key = re.sub(ours, theirs, key)
        if key != "delta":
            state[key] = value
    write_released(path, state)
