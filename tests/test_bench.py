"""The benchmarks run, and their tables say what they should."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import need_merges, save_clip, tiny_clip

import bench_speed
from eval import run_command


def bench(*words):
    """Exit status of bench_speed.py with these arguments."""
    return run_command(bench_speed.main, lambda: bench_speed.parse_args(list(map(str, words))))


@pytest.mark.slow
def test_the_benchmark_stands_beside_the_papers(tmp_path, capsys, monkeypatch):
    save_clip(tmp_path / "clip.pt", vision_layers=5)
    monkeypatch.setattr(bench_speed, "memory_of", lambda name, args: 2.0)
    words = ("--clip", tmp_path / "clip.pt", "--frames", "2", "--batch", "1", "--num-classes", "3",
             "--repeats", "1")
    assert bench(*words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:22].strip() for line in lines[2:6]] == list(bench_speed.VARIANTS)[:4]
    assert len(lines) == 7
    assert all("2.00" in line and float(line[22:31]) >= float(line[33:40]) > 0 for line in lines[2:6])
    assert float(lines[4][22:31]) > float(lines[4][33:40])  # ILA does not train the text tower
    column = lines[1].index("paper G")
    assert not "".join(line[column:column + 7].strip() for line in lines[2:6])
    monkeypatch.setattr(bench_speed, "PAPER_COSTS", {("ILA", str(tmp_path / "clip.pt"), 2): 295})
    assert bench(*words) == 0
    assert [line[column:column + 7].strip() for line in capsys.readouterr().out.splitlines()[2:6]] == ["", "", "295", ""]
    assert bench("--clip", "nowhere.pt") == 2
    assert bench(*words, "--device", "cpu") == 0 and "fp32, CPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(*words, "--device", "cuda") == 2 and "finds no GPU" in capsys.readouterr().err


@pytest.mark.slow
def test_the_published_form_stands_beside_ours(tmp_path, capsys, monkeypatch):
    """Its text is computed for every video: its cost per video grows with the classes, ours hardly."""
    torch.save(tiny_clip(vision_layers=5).state_dict(), tmp_path / "clip.pt")
    monkeypatch.setattr(bench_speed, "memory_of", lambda name, args: 2.0)
    words = ("--clip", tmp_path / "clip.pt", "--frames", "2", "--batch", "1", "--repeats", "1", "--published")
    costs = {}
    for classes in ("3", "300"):
        assert bench(*words, "--num-classes", classes) == 0
        lines = capsys.readouterr().out.splitlines()
        column = lines[1].index("G per video") + len("G per video")
        for line in lines[2:7]:
            costs[line[:22].strip(), classes] = float(line[:column].split()[-1])
    assert costs["TC-CLIP as published", "300"] > costs["TC-CLIP as published", "3"] + 1
    assert costs["TC-CLIP", "300"] < costs["TC-CLIP", "3"] + 0.2


def test_the_parts_of_a_forward_pass(tmp_path, capsys):
    torch.save(tiny_clip(vision_layers=5).state_dict(), tmp_path / "clip.pt")
    words = ("--clip", tmp_path / "clip.pt", "--frames", "2", "--batch", "1", "--num-classes", "3", "--repeats", "1")
    assert bench(*words, "--parts") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:26].strip(): line[26:].split() for line in lines[2:]}
    assert set(bench_speed.Stopwatch.PARTS.values()) | set(bench_speed.Stopwatch.NAMES.values()) <= rows.keys()
    assert rows["merging"][0] == rows["scores of the seeds"][0] == "0" and list(rows)[-1] == "all"
    assert bench(*words, "--parts", "--train") == 2 and "leave out --train" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(world):
    args = bench_speed.parse_args(["--clip", str(world / "clip.pt"), "--frames", "2", "--num-classes", "3"])
    args.batch = 1
    assert 0.1 < bench_speed.memory_of("TC-CLIP", args) < 3
    args.batch = 10**9  # 98 TB
    with pytest.raises(ValueError, match="lower --batch"):
        bench_speed.memory_of("TC-CLIP", args)


@pytest.mark.parametrize("words, said", [
    (("--frames", "0"), "--frames 0"), (("--clip", "nowhere.pt"), "nowhere.pt: no such file or folder"),
    (("--json", "a.json"), "unrecognized arguments: --json")])
def test_wrong_use_is_told_in_one_line(words, said, capsys):
    assert bench(*words) == 2
    assert said in capsys.readouterr().err


def run_bench(script, *words):
    done = subprocess.run([sys.executable, Path(__file__).with_name(script), *words], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_exactness_is_printed():
    need_merges()
    lines = run_bench("bench_exactness.py").splitlines()
    assert len(lines) == 4 and all("logits" in line for line in lines)
    printed = [float(number) for line in lines for number in re.findall("[0-9]+e-[0-9]+", line)]
    assert len(printed) == 6 and max(printed) < 1e-11


@pytest.mark.slow
def test_the_page_of_a_gpu_is_written_on_a_cpu_too():
    """The parts that need little time; where there is no GPU the CPU stands in."""
    page = run_bench("bench_gpu.py", "--tiny", "--parts", "exactness", "profile", "runs")
    assert "TC-CLIP" in page and "killed with -9 at step" in page and "done in" in page
