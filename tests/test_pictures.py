"""Pictures: what is drawn is where it belongs, and says what it should."""

import numpy as np
import pytest
import torch
from helpers import tiny_clip
from PIL import Image
from test_eval import evaluate

import data
import eval as evaluation
from clip_vit import FramePool
from ila import ILA, ILAConfig
from video_prompt import TCCLIP, TCConfig

BLUE, ORANGE = evaluation.COLOURS
NAMES = ["red to blue", "blue to red", "red to green"]


@pytest.fixture
def words(monkeypatch):
    """All words that are drawn, with the width that they take in pixels, and that they may take."""
    drawn, write = [], evaluation.ImageDraw.ImageDraw.text

    def text(self, xy, words, *rest, **settings):
        drawn.append((words, settings["font"].getlength(words) if "\n" not in words else 0))
        return write(self, xy, words, *rest, **settings)
    monkeypatch.setattr(evaluation.ImageDraw.ImageDraw, "text", text)
    return drawn


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def area(image, colour):
    """How many pixels have just this colour."""
    return int((image == np.array(colour)).all(-1).sum())


def clip_of(name="red to blue", frames=8):
    return torch.from_numpy(data.render_clip(np.random.default_rng(0), name)).permute(0, 3, 1, 2)[:frames].contiguous()


# ---- curves, and what the model saw ----------------------------------------------------------------------------------

def test_curves_have_round_ticks_and_a_point_for_each_epoch(tmp_path, words):
    history = [{"epoch": i + 1, "loss": loss, **({"top1": 0.5} if i == 2 else {})} for i, loss in enumerate((1.7, 0.9, 0.4))]
    evaluation.draw_curves(history, tmp_path / "curves.png")
    ticks = [word for word, _ in words if word.replace(".", "").isdigit()]
    assert ticks == ["0", "0.5", "1", "1.5", "2", "0", "25", "50", "75", "100"]
    assert "validation top-1 %: best 50.0, epoch 3" in [word for word, _ in words]
    image = pixels(tmp_path / "curves.png")
    for x, y, colour in ((70, 60 + 290 * 0.3 / 2, BLUE), (460, 60 + 290 * 0.8, BLUE), (960, 60 + 145, ORANGE)):
        assert area(image[int(y) - 4:int(y) + 5, x - 4:x + 5], colour) > 30
    evaluation.draw_curves([], tmp_path / "empty.png")
    assert area(pixels(tmp_path / "empty.png"), evaluation.PAPER) == 1000 * 400
    evaluation.draw_curves([{"epoch": 1, "loss": 0.0, "top1": 0.0}], tmp_path / "one.png")


@pytest.mark.parametrize("model, rows", [
    (lambda clip: FramePool(clip), 1), (lambda clip: TCCLIP(clip, TCConfig(frames=8, context_tokens=4, prompt="a")), 4),
    (lambda clip: TCCLIP(clip, TCConfig(frames=8, reference="none", prompting="none", prompt="a")), 1),
    (lambda clip: ILA(clip, ILAConfig(frames=8)), 2), (lambda clip: ILA(clip, ILAConfig(frames=8, rival="none")), 1)])
def test_every_model_shows_its_frames_and_what_it_has(tmp_path, words, model, rows):
    model, clip = model(tiny_clip()).eval(), clip_of()
    evaluation.draw_clip(model, clip, tmp_path / "seen.png", ["a", "b" * 200], [0.75, -0.1])
    image = pixels(tmp_path / "seen.png")
    side = 1400 // 8 - 6
    assert image.shape == (104 + rows * (side + 6) + 36 + 68, 1600, 3)
    if rows != 2:  # ILA draws its points into the frames
        for t in range(8):
            left = 190 + t * (side + 6)
            drawn = image[80:80 + side, left:left + side]
            np.testing.assert_array_equal(drawn, np.asarray(evaluation.frame_image(clip[t], side)))
    assert area(image[104 + rows * (side + 6) + 5], BLUE) == 782 and area(image[104 + rows * (side + 6) + 39], BLUE) == 2
    assert [word for word, _ in words if word in ("frame", "mask", "frame, point\nand box")] == (
        ["frame, point\nand box", "mask"] if rows == 2 else ["frame"])
    name, length = next((word, length) for word, length in words if word.startswith("bb"))
    assert name.endswith("...") and 400 < length <= 430


# ---- what happens when -----------------------------------------------------------------------------------------------

def test_clock():
    for seconds, words in ((0, "0:00"), (2, "0:02"), (0.5, "0:00.5"), (59.999, "1:00"), (61.25, "1:01.25"), (600, "10:00"),
                           (3723, "1:02:03"), (36000.1, "10:00:00.1")):
        assert evaluation.clock(seconds) == words


def test_a_strip_has_a_band_for_each_class_as_high_as_its_value(tmp_path, words):
    windows = [(0, 2, np.array([0.9, 0.1, 0], np.float32)), (2, 4, np.array([0.5, 0.5, 0], np.float32)),
               (8, 9, np.array([0, 1, 0.01], np.float32))]
    frames = [(start, torch.full((3, 32, 32), shade, dtype=torch.uint8)) for start, shade in ((0, 10), (2, 20), (8, 30))]
    evaluation.draw_strip(tmp_path / "strip.png", "a.mp4", windows, NAMES, frames)
    image, top = pixels(tmp_path / "strip.png"), 130 + 240
    for seconds, values in ((1, (0.9, 0.1)), (3, (0.5, 0.5)), (6, (0, 0)), (8.5, (0, 1))):
        column = image[top:, int(330 + 1190 * seconds / 9)]
        for value, colour in zip(values, (BLUE, ORANGE)):
            assert abs((column == np.array(colour)).all(-1).sum() - 50 * value) <= 1.5
    drawn = [word for word, _ in words]
    assert drawn.pop(1).startswith("Probabilities, a full band is 1. Of 3 classes the 2 that reach highest")
    assert drawn[:4] == ["a.mp4", "0:00", "0:02", "0:08"] and drawn[-5:] == ["0:00", "0:02.25", "0:04.5", "0:06.75", "0:09"]
    assert {"max 0.90", "max 1.00", "red to blue"} <= set(drawn)
    evaluation.draw_strip(tmp_path / "one.png", "a", [(0, 2, np.array([0.2])), (2, 4, np.array([0.1]))], ["a"], frames)
    image = pixels(tmp_path / "one.png")[top:]  # a similarity fills its band where it is highest
    assert abs(area(image[:, 500], BLUE) - 50) <= 1.5 and abs(area(image[:, 1400], BLUE) - 25) <= 1.5


def test_a_strip_shows_six_of_many_classes_and_eight_of_many_windows(tmp_path, words):
    rng = np.random.default_rng(0)
    windows = [(i, i + 1, rng.dirichlet(np.ones(50))) for i in range(3000)]
    frames = [(i, torch.zeros(3, 32, 32, dtype=torch.uint8)) for i in range(0, 3000, 50)]
    evaluation.draw_strip(tmp_path / "strip.png", "a.mp4", windows, [f"class {i}" for i in range(50)], frames)
    best = np.argsort(-np.max([values for *_, values in windows], axis=0))[:6]
    assert sorted(word for word, _ in words if word.startswith("class ")) == sorted(f"class {i}" for i in best)
    assert len([word for word, _ in words if ":" in word]) == 8 + 5 and "50:00" in dict(words)


# ---- confusion and reversal ------------------------------------------------------------------------------------------

def test_windows_that_overlap_meet_half_way(tmp_path):
    windows = [(0, 2, np.array([1, 0.0])), (1, 3, np.array([0.5, 0.5])), (2, 4, np.array([0, 1.0]))]
    frames = [(0, torch.zeros(3, 32, 32, dtype=torch.uint8))]
    evaluation.draw_strip(tmp_path / "a.png", "a", windows, ["a", "b"], frames)
    image = pixels(tmp_path / "a.png")[130 + 240:]
    for seconds, height in ((0.5, 50), (1.4, 50), (1.6, 25), (2.4, 25), (2.6, 0), (3, 0)):
        assert abs(area(image[:64, int(330 + 1190 * seconds / 4)], BLUE) - height) <= 1.5


def test_the_curve_over_weights_has_round_ticks(tmp_path, words):
    evaluation.draw_ensembles([(0, 0.521), (0.5, 0.632), (1, 0.587)], tmp_path / "w.png")
    ticks = [float(word) for word, _ in words if word.replace(".", "").isdigit()]
    assert ticks == [0.5, 0.55, 0.6, 0.65, 0.7]
    image = pixels(tmp_path / "w.png")
    for w, top1 in ((0, 0.521), (0.5, 0.632), (1, 0.587)):
        x, y = 70 + 390 * w, 60 + 290 * (1 - (top1 - 0.5) / 0.2)
        assert area(image[int(y) - 4:int(y) + 5, int(x) - 4:int(x) + 5], BLUE) > 30
    for points in ([(0, 0.0), (1, 1.0)], [(0, 1.0), (1, 1.0)], [(0.7, 0.0)]):
        evaluation.draw_ensembles(points, tmp_path / "w.png")


def test_a_clip_has_its_name_and_times(tmp_path, words):
    model = FramePool(tiny_clip()).eval()
    evaluation.draw_clip(model, clip_of(), tmp_path / "a.png", ["a"], [1.0], name="a.mp4", times=[i / 2 for i in range(8)])
    drawn = [word for word, _ in words]
    assert "a.mp4" in drawn and "1:  0:00" in drawn and "8:  0:03.5" in drawn


def test_confusion_is_drawn_where_it_is(tmp_path, words):
    probabilities = np.eye(4, dtype=np.float32)[[0, 0, 2, 2, 2, 3, 3]]
    labels = (0, 0, 1, 1, 2, 3, 3)
    probabilities[-1] = np.nan  # unreadable: in no cell, and wrong
    evaluation.draw_confusion(probabilities, labels, ["run", "walk", "ride", "a" * 60], tmp_path / "c.png")
    drawn = [word for word, _ in words]
    assert "2 of 2:  walk  ->  ride" in drawn and sum("->" in word for word in drawn) == 1
    assert drawn.count("run") == drawn.count("walk") == 2 and "top-1 57.1%" in drawn[0]
    assert [word for word in drawn if word.isdigit()] == ["2", "2", "1", "1"]  # videos in each cell
    image, cell = pixels(tmp_path / "c.png"), 36
    left, top = 20 + 250, 70 + 250  # the longest name has its full room
    for row in range(4):
        for column in range(4):
            middle = image[top + cell * row + 4, left + cell * column + 4]  # beside the number
            expected = BLUE if row == column != 1 else ORANGE if (row, column) == (1, 2) else evaluation.PAPER
            assert tuple(middle) == expected, (row, column)


def test_confusion_of_many_classes_has_no_names_but_the_worst_pairs(tmp_path, words):
    rng = np.random.default_rng(0)
    probabilities, labels = rng.random((3000, 400)).astype(np.float32), rng.integers(400, size=3000)
    labels[:40], probabilities[:40, 7] = 5, 2
    evaluation.draw_confusion(probabilities, labels, [f"class {i}" for i in range(400)], tmp_path / "c.png")
    assert len(words) == 1 + 10 and words[1][0].startswith("4") and words[1][0].endswith(":  class 5  ->  class 7")
    evaluation.draw_confusion(probabilities, labels, [f"class {i}" + 90 * "o" for i in range(400)], tmp_path / "c.png")
    assert words[12][0].endswith("o...") and words[12][1] <= 1000 - 30 - 20
    assert pixels(tmp_path / "c.png").shape[0] < 1300
    evaluation.draw_confusion(np.eye(2), (0, 1), ["a", "b"], tmp_path / "perfect.png")  # nothing is confused
    evaluation.draw_confusion(np.full((2, 2), np.nan), (0, 1), ["a", "b"], tmp_path / "unread.png")


def test_a_reversal_looks_alike_to_frame_pooling_and_not_to_what_sees_time(tmp_path, words):
    class SeesTime(FramePool):
        def forward(self, video):
            red = video[:, 0, 0].mean((1, 2)) - video[:, -1, 0].mean((1, 2))
            return torch.stack([red, -red], dim=1) * 100, None
    models = {"frame pooling": FramePool(tiny_clip()), "sees time": SeesTime(tiny_clip())}
    evaluation.draw_reversal(models, clip_of(), ("red to blue", "blue to red"), tmp_path / "r.png")
    image, drawn = pixels(tmp_path / "r.png"), [word for word, _ in words]
    rows = image[110:240], image[250:380]
    start = 190 + 8 * 99 + 20
    np.testing.assert_array_equal(rows[0][:, start:start + 300], rows[1][:, start:start + 300])
    bars = [[area(row[:, start + 310:], colour) for colour in (BLUE, ORANGE)] for row in rows]
    assert bars[0][0] > 50 * bars[0][1] and bars[1][1] > 50 * bars[1][0]
    assert drawn[:3] == ["One clip, forwards and backwards", "forwards:\nred to blue", "backwards:\nblue to red"]
    assert drawn.count("red to blue  1.000") == drawn.count("blue to red  1.000") == 1
    np.testing.assert_array_equal(rows[0][:95, 190:285], rows[1][:95, 190 + 7 * 99:285 + 7 * 99])  # first frame, last frame
