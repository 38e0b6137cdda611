"""Nothing is lost at scale: killed workers, two machines, a scheduler's warning, full disks; steps of less memory."""

import contextlib
import copy
import dataclasses
import errno
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_clip
from torch import nn

import data
import eval as evaluation
import train
from clip_vit import Block, read_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TOY = ["epochs=2", "shots=2", "batch=6", "micro_batch=4", "eval_every=1", "lr=1e-3", "jitter=0.5", "mixup=0.8",
       "cutmix=1.0", "save_every=3", "clips=2"]
PER_EPOCH = 7  # steps: 40 videos


def arguments(world, out, *more, method="tc"):
    return ["--protocol", "fewshot", "--method", method, "--data", str(world), "--out", str(out), "--set", *TOY, *more]


def run(world, out, *more, **kind):
    train.main(train.parse_args(arguments(world, out, *more, **kind)))
    return json.loads((out / "results.json").read_text())


def weights(folder, name="last.pt"):
    return read_checkpoint(folder / name)["model"]


def steps(folder):
    return read_checkpoint(folder / "last.pt")["progress"]["step"]


def same(one, two):
    """Whether two run folders hold the same weights, bit by bit, and the same measurements."""
    results = [json.loads((folder / "results.json").read_text())["tests"] for folder in (one, two)]
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (one, two)]
    assert results[0] == results[1] and [line["top1"] for line in logs[0]] == [line["top1"] for line in logs[1]]
    np.testing.assert_allclose(*[[line["loss"] for line in log] for log in logs], rtol=1e-6)  # summed from save to save
    for name in ("last.pt", "best.pt"):
        first, second = weights(one, name), weights(two, name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    return True


# ---- processes -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def started(words, launcher=("--standalone", "--nproc_per_node=2", "--max_restarts=3")):
    """A script under torchrun, or alone without `launcher`; nothing of it is left behind."""
    torchrun = [] if launcher is None else ["-m", "torch.distributed.run", *launcher]
    errors = subprocess.PIPE if launcher is None else subprocess.DEVNULL
    process = subprocess.Popen([sys.executable, *torchrun, *map(str, words)], text=True, stdout=subprocess.PIPE,
                               stderr=errors, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    try:
        yield process
    finally:
        for pid in [*workers(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def workers(process):
    """{process id: rank} of a torchrun's workers."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]) == process.pid:
                words = path.joinpath("environ").read_text().split("\0")
                found |= {int(path.name): int(word[5:]) for word in words if word.startswith("RANK=")}
    return found


def kill(process, rank):
    """Ends one worker as a machine out of memory does; nothing can be cleaned up."""
    os.kill(next(pid for pid, own in workers(process).items() if own == rank), signal.SIGKILL)


def wait_for(condition, process):
    began = time.time()
    while not condition():
        assert process.poll() is None and time.time() - began < 120, "it never came"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    """The folder of a run on two processes that nothing happened to."""
    out = tmp_path_factory.mktemp("scale") / "undisturbed"
    with started([ROOT / "train.py", *arguments(world, out)]) as process:
        assert process.wait(timeout=120) == 0
    return out


@pytest.mark.slow
def test_killed_workers_are_replaced(world, tmp_path, undisturbed):
    """One of two workers is killed in training, later one in the test: both are started anew, and nothing is lost."""
    out = tmp_path / "run"
    with started([ROOT / "train.py", *arguments(world, out)]) as process:
        wait_for((out / "last.pt").exists, process)
        kill(process, 1)
        assert steps(out) % PER_EPOCH and not (log := out / "log.jsonl").exists()
        wait_for(lambda: log.exists() and len(log.read_text().splitlines()) == 2, process)
        kill(process, 0)
        assert not (out / "results.json").exists()
        assert process.wait(timeout=120) == 0
    assert same(out, undisturbed)


@pytest.mark.slow
def test_a_worker_killed_in_an_evaluation(world, undisturbed):
    words = [ROOT / "eval.py", "--zeroshot", "shapes", "--data", world, "--checkpoint", undisturbed / "best.pt"]
    with started(words) as process:
        first = process.stdout.readline()  # of two test sets
        kill(process, 1)
        printed = process.communicate(timeout=120)[0].splitlines()  # ends when no loader's worker is left either
        assert process.returncode == 0
    tests = json.loads((undisturbed / "results.json").read_text())["tests"]
    assert printed[0] == first.strip() and len(printed) == 2
    for line, score in zip(printed, tests.values()):
        assert f"{score['videos']} videos" in line and f"top-1 {100 * score['top1']:.2f}" in line


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def warned(pid):
    """Whether SIGTERM waits for a stopped process."""
    pending = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1]
    return int(pending, 16) >> signal.SIGTERM - 1 & 1


def machine(nnodes, port):
    """torchrun's flags on each of several machines that meet at the port, all of them this one."""
    return [f"--nnodes={nnodes}", "--nproc_per_node=1", "--max_restarts=3", "--rdzv_backend=c10d", "--rdzv_id=scale",
            f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1",
            "--rdzv_conf=last_call_timeout=1,keep_alive_interval=1"]


@pytest.mark.slow
def test_two_launchers_are_as_one(world, tmp_path, undisturbed):
    """Two launchers with a worker each, as on two machines; one loses its worker, and both go on."""
    out, launcher = tmp_path / "run", machine("2", free_port())
    words = [ROOT / "train.py", *arguments(world, out)]
    with started(words, launcher) as one, started(words, launcher) as two:
        wait_for((out / "last.pt").exists, one)
        (pid,) = workers(two)
        os.kill(pid, signal.SIGKILL)
        assert steps(out) % PER_EPOCH
        assert one.wait(timeout=120) == two.wait(timeout=120) == 0
    assert same(out, undisturbed)


@pytest.mark.slow
def test_a_lost_machine_may_come_back(world, tmp_path, monkeypatch):
    """One of two launchers dies with its worker; the other goes on alone, and again with the one that takes its place."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    out, port, more = tmp_path / "run", free_port(), ["epochs=6", "eval_every=6", "save_every=2"]
    words, launcher = [ROOT / "train.py", *arguments(world, out, *more, method="vifi")], machine("1:2", port)
    with started(words, launcher) as one:
        wait_for(lambda: listens(port), one)  # here the others come to: it must stay
        with started(words, launcher) as two:
            wait_for(lambda: workers(one) and workers(two) and (out / "last.pt").exists(), one)
            before = workers(one)
        alone = steps(out)
        wait_for(lambda: steps(out) > alone and not before.keys() & workers(one).keys(), one)
        ((pid, rank),) = workers(one).items()
        os.kill(pid, signal.SIGSTOP)  # lest it be done before the other is back
        together = steps(out)
        with started(words, launcher) as three:
            wait_for(lambda: warned(pid), one)  # its launcher wants to start anew, with the third
            os.kill(pid, signal.SIGCONT)
            wait_for(lambda: sorted([*workers(one).values(), *workers(three).values()]) == [0, 1], one)
            assert one.wait(timeout=120) == three.wait(timeout=120) == 0
    assert rank == 0 and alone < together < steps(out) == 6 * PER_EPOCH
    run(world, tmp_path / "whole", *more, method="vifi")
    logs = [[json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (out, tmp_path / "whole")]
    np.testing.assert_allclose(*logs, rtol=1e-5)  # the number of processes changed twice, and with it the rounding


@pytest.mark.slow
def test_a_warned_launcher_saves_and_goes_on_later(world, tmp_path, undisturbed):
    out = tmp_path / "run"
    with started([ROOT / "train.py", *arguments(world, out, "save_every=1")]) as process:
        wait_for((out / "last.pt").exists, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30)
    assert steps(out) % PER_EPOCH and not (out / "results.json").exists()
    with started([ROOT / "train.py", *arguments(world, out)]) as process:
        assert process.wait(timeout=120) == 0
    assert same(out, undisturbed)


@pytest.mark.slow
def test_a_warning_to_every_process_ends_a_run_after_its_step(world, tmp_path):
    """A scheduler's SIGTERM also reaches the loader's workers, which must live until the step is done."""
    more = ["workers=2", "keep_decoded=false", "save_every=1000", "epochs=1"]
    with started([ROOT / "train.py", *arguments(world, tmp_path / "warned", *more)], launcher=None) as process:
        while "1/7" not in process.stderr.readline(200):  # the progress bar
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGTERM)
        error = process.stderr.read()
        assert process.wait(timeout=60) == 143, error
    step = steps(tmp_path / "warned")
    assert error.splitlines()[-1] == f"stopped by SIGTERM after step {step}; the same command goes on"
    assert 1 <= step < PER_EPOCH
    assert not list((tmp_path / "warned").glob(".*"))
    run(world, tmp_path / "warned", *more)
    run(world, tmp_path / "whole", *more)
    assert same(tmp_path / "warned", tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# ---- disks -----------------------------------------------------------------------------------------------------------

def refused(world, out, capsys, *more):
    """The one line that train.py ends with."""
    status = evaluation.run_command(train.main, lambda: train.parse_args(arguments(world, out, "epochs=1", *more)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_a_full_disk_costs_nothing(world, tmp_path, capsys):
    out, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # room for recipe.json, not for last.pt
        line = refused(world, out, capsys)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        train.save(out / "last.pt", kept := {"step": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="last.pt cannot be written"):
            train.save(out / "last.pt", {"step": 2, "weights": torch.ones(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{out / 'last.pt'} cannot be written" in line and "the same command goes on" in line
    assert read_checkpoint(out / "last.pt") == kept and {p.name for p in out.iterdir()} == {"recipe.json", "last.pt"}
    (out / "last.pt").unlink()
    assert run(world, out, "epochs=1")["tests"]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written_to(world, tmp_path, capsys):
    (tmp_path / "run").mkdir(mode=0o500)
    assert str(tmp_path / "run") in refused(world, tmp_path / "run", capsys)


@pytest.mark.slow
def test_damaged_files_are_named_and_left_alone(world, tmp_path, capsys):
    whole = tmp_path / "whole"
    run(world, whole, "epochs=1")
    (whole / "results.json").unlink()
    for name in (".last.pt.123", ".recipe.json.123"):
        (whole / name).write_bytes(b"left by a write that was killed")
    for name, advice in (("last.pt", "delete it"), ("best.pt", "copy last.pt there"), ("recipe.json", "delete it")):
        out = tmp_path / name
        shutil.copytree(whole, out)
        (out / name).write_bytes((out / name).read_bytes()[:(out / name).stat().st_size // 2])
        before = (out / name).read_bytes()
        line = refused(world, out, capsys)
        assert f"{out / name}" in line and advice in line and (out / name).read_bytes() == before
    assert run(world, whole, "epochs=1")["tests"] and not list(whole.glob(".*"))


# ---- loaders ---------------------------------------------------------------------------------------------------------

class Probe(torch.utils.data.Dataset):
    """A data set whose items tell of the process that reads them."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return os.getpid(), torch.get_num_threads()

    collate = list


def test_loader_workers_outlive_a_schedulers_warning():
    batches = iter(data.load_batches(Probe(), 2, batch_size=1))
    (one, threads), = next(batches)
    assert one != os.getpid() and threads == 1
    os.kill(one, signal.SIGTERM)
    assert [len(batch) for batch in batches] == [1] * 7


@pytest.mark.slow
def test_loader_workers_end_with_a_parent_that_is_killed():
    words = ("import data, test_scale, time\n"
             "batches = iter(data.load_batches(test_scale.Probe(), 2, batch_size=1))\n"
             "print(next(batches)[0][0], next(batches)[0][0], flush=True)\n"
             "time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(set(pids)) == 2 and all(Path(f"/proc/{pid}").exists() for pid in pids)
    process.kill()
    process.communicate()
    began = time.monotonic()
    while any(Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
              for pid in pids):
        assert time.monotonic() - began < 4, "a worker lives on"  # PyTorch's own watch looks every 5 seconds
        time.sleep(0.05)


@pytest.mark.slow
def test_an_error_ends_a_process_that_has_workers():
    """Python keeps the frames of a traceback, and with them the loader, until the process is gone."""
    words = ("import data, test_scale\n"
             "def step():\n"
             "    batches = iter(data.load_batches(test_scale.Probe(), 2, batch_size=1))\n"
             "    next(batches)\n"
             "    raise RuntimeError('a kernel failed')\n"
             "step()")
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == 1 and "a kernel failed" in done.stderr


def videos_of(world):
    """A test's and a training's loader's data sets of the same small folder."""
    video_list, recipe = data.class_folders(world / "base"), train.resolve_recipe("fewshot", "tc", "shapes")
    views = data.Views(frames=8, size=32, short_side=32)
    return (data.TestVideos(video_list, views),
            data.TrainVideos(video_list, views, 0, recipe.augmentation()))


def test_batches_come_by_value_if_shared_memory_is_full(world, monkeypatch):
    tests, training = videos_of(world)
    wanted = [*tests.loader(4, 0)], [*training.loader([[(0, 1, 1.0), (0, 2, 1.0)]], 0)]

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # inherited by the forked workers
    found = [*tests.loader(4, 2)], [*training.loader([[(0, 1, 1.0), (0, 2, 1.0)]], 1)]
    assert all(isinstance(batch[1], np.ndarray) for batch in found[0])
    for one, two in zip(wanted[0] + wanted[1], found[0] + found[1]):
        for a, b in zip(one[:3], two[:3]):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs root and unshare")
def test_a_container_with_little_shared_memory(world):
    """A /dev/shm of 64 kB, of which every batch needs 100: the test goes on, and every video is scored."""
    words = (f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {sys.executable} {ROOT / 'eval.py'} --zeroshot shapes "
             f"--data {world} --clip {world / 'clip.pt'} --workers 2 --batch 4")
    if subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("no private mounts here")
    done = subprocess.run(["unshare", "-m", "sh", "-c", words], text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "shapes base: 40 videos" in done.stdout and "Traceback" not in done.stderr


class Unsendable(Probe):
    @staticmethod
    def collate(items):
        return lambda: items  # no pickle takes it


def test_a_batch_that_cannot_be_sent_ends_its_worker(capfd):
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next(iter(data.load_batches(Unsendable(), 1, batch_size=1)))
    assert "cannot send a batch" in capfd.readouterr().err


def test_no_shared_memory_even_for_the_workers_locks(monkeypatch):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", full)
    with pytest.raises(ValueError, match="/dev/shm is full: docker run --shm-size=8g"):
        iter(data.load_batches(Unsendable(), 1, batch_size=1))


def same_on_all(rank, folder, lines):
    """In a process of its own: what check_same_data says on `rank`, written to folder/rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=len(lines))
    try:
        data.check_same_data(lines[rank])
        said = "the same"
    except ValueError as error:
        said = str(error)
    (folder / str(rank)).write_text(said)
    torch.distributed.destroy_process_group()


def test_processes_compare_their_commands(monkeypatch):
    monkeypatch.setattr(data, "gather", lambda values: [{"batch": "4", "seed": "1"}, *values])
    data.check_same("settings", {"batch": "4", "seed": "1"}, "mend it")
    with pytest.raises(ValueError, match="rank 1 has other settings than rank 0: batch 2, not 4; mend it"):
        data.check_same("settings", {"batch": "2", "seed": "1"}, "mend it")


@pytest.mark.slow
@pytest.mark.parametrize("lines, wanted", [
    (("12 videos", "12 videos"), "the same"),
    (("12 videos", "9 videos"), "rank 1 sees other data than rank 0: 9 videos, not 12 videos; give every machine the same videos and lists")])
def test_processes_compare_their_data(tmp_path, lines, wanted):
    torch.multiprocessing.spawn(same_on_all, (tmp_path, lines), nprocs=2)
    assert {(tmp_path / str(rank)).read_text() for rank in (0, 1)} == {wanted}


def test_loaders_can_be_sent_to_another_process(world):
    """Worker processes that are not forked, as from Python 3.14 on, get the data set and all it needs in a pickle."""
    tests, training = videos_of(world)
    for loader in (training.loader([[(0, 0, 1.0)]], 1), tests.loader(1, 1)):
        dataset, collate, _ = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
        assert len(collate([dataset[(0, 0, 1.0) if isinstance(dataset, data.TrainVideos) else 0]])[1]) == 1


# ---- steps -----------------------------------------------------------------------------------------------------------

METHODS = {"tc": {"prompt": "a pic"}, "ila": {}, "vifi": {"prompt": "a pic"}}


def small(method, dtype=torch.float32, **settings):
    torch.manual_seed(0)
    clip = tiny_clip(dtype, vision_layers=2, text_layers=1)
    model = evaluation.build_model({"method": method, "frames": 8, "model": METHODS[method] | settings}, clip)
    model.set_classes(["red", "green", "blue to red"])
    return model.train()


def gradients(model, video):
    """Logits, the gradient of each parameter, and the state after a forward and a backward pass in training."""
    torch.manual_seed(1)  # of dropout
    logits, aux = model(video)
    (logits.square().sum() + aux).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads | {f"state {name}": value for name, value in model.state_dict().items()}


def kept_bytes(model, video):
    """Bytes that the forward pass keeps for the backward pass, parameters apart."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}
    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(video)
    return sum(kept.values())


@pytest.mark.slow
@pytest.mark.parametrize("method, settings", [
    ("tc", {}), ("tc", {"merge": "random"}), ("tc", {"prompt_blocks": (0,), "context_blocks": (1,)}), ("ila", {}),
    ("ila", {"form": "released"}), ("ila", {"num_classes": 3}), ("ila", {"rival": "shift"}), ("vifi", {})])  # num_classes: with dropout
def test_checkpointing_gives_equal_gradients_from_less_memory(method, settings):
    plain = small(method, torch.float64, **settings)
    lean, video = copy.deepcopy(plain), torch.randn(2, 8, 3, 32, 32, dtype=torch.float64)
    hidden = []  # bytes of each MLP's hidden values; a plain block keeps them on both sides of QuickGELU, and more
    for block in (module for module in lean.modules() if isinstance(module, Block)):
        block.checkpointing = True
        block.mlp.gelu.register_forward_hook(lambda module, inputs, output: hidden.append(output.nbytes))
    lean_bytes, sides = kept_bytes(lean, video), 1 if settings == {"num_classes": 3} else 2  # frozen CLIP keeps one side
    assert kept_bytes(plain, video) - lean_bytes > 1.5 * sides * sum(hidden)
    one, two = gradients(plain, video), gradients(lean, video)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)  # batch norm's state too
    assert torch.equal(plain.eval()(video)[0], lean.eval()(video)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method, backend", [("tc", "aot_eager"), ("ila", "aot_eager"), ("vifi", "inductor")])
def test_compiled_steps_are_the_same(method, backend):
    """torch.compile with its code generator, or, where that takes minutes, its graphs alone (see tests/bench_scale.py)."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    plain = small(method)
    copied, video = copy.deepcopy(plain), torch.randn(2, 8, 3, 32, 32)
    wrapped = torch.compile(copied, backend=backend)
    for epoch in (0, 40):  # ILA's masks change
        for model in (plain, copied):
            if method == "ila":
                model.set_epoch(epoch)
            model.zero_grad()
        wrapped.train()
        one, two = gradients(plain, video), gradients(wrapped, video)
        assert plain.state_dict().keys() == copied.state_dict().keys()
        for name, value in one.items():
            found = two[name.replace("state ", "state _orig_mod.") if name.startswith("state ") else
                        name if name == "logits" else f"_orig_mod.{name}"]
            assert torch.allclose(value, found, rtol=1e-4, atol=1e-5), name
        for model in (plain, copied):  # other classes for a test, which the graphs know nothing of
            model.eval().set_classes(["a", "b", "c", "d"][:3 if method == "ila" else 4])
        assert torch.allclose(plain(video)[0], copied(video)[0], rtol=1e-5, atol=1e-6)
        for model in (plain.train(), copied):
            model.set_classes(["red", "green", "blue to red"])


@pytest.mark.slow
def test_a_run_can_be_compiled_and_checkpointed(world, tmp_path, monkeypatch):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend="aot_eager"))
    run(world, tmp_path / "plain", "epochs=1", "batch=4", method="vifi")
    run(world, tmp_path / "lean", "epochs=1", "batch=4", "compile=true", "checkpointing=true", method="vifi")
    one, two = weights(tmp_path / "plain"), weights(tmp_path / "lean")
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


class Counted(nn.Module):
    """A stand-in for DDP that counts forward passes, and those under no_sync."""

    def __init__(self, model):
        super().__init__()
        self.model, self.passes, self.local, self.quiet = model, 0, 0, False

    @contextlib.contextmanager
    def no_sync(self):
        self.quiet = True
        yield
        self.quiet = False

    def forward(self, video):
        self.passes, self.local = self.passes + 1, self.local + self.quiet
        return self.model(video)


@pytest.mark.slow
def test_512_videos_in_parts_of_8(world, tmp_path, monkeypatch):
    clip = str(world / "clip.pt")
    recipe = train.resolve_recipe("fewshot", "vifi", "shapes", ["batch=512", "micro_batch=8", "precision=fp32"], clip=clip)
    for rank in (0, 1):
        whole, rest = train.epoch_batches(recipe, 512 + 76, 0, rank, 2)
        assert [len(part) for part in whole] == [8] * 32 and [len(part) for part in rest] == [8, 8, 8, 8, 6]
    videos, tests = data.load_protocol("fewshot", "shapes", world, 4, 0)
    videos = dataclasses.replace(videos, paths=videos.paths * 7, labels=videos.labels * 7)  # 560 videos
    run = train.start(recipe, tmp_path, videos, next(iter(tests.values())), torch.device("cpu"))
    monkeypatch.setattr(data, "rank_and_world", lambda: (1, 2))
    run.wrapped = Counted(run.model)
    parts = train.epoch_batches(recipe, 560, 0, 1, 2)[0]
    sums, bad = train.train_step(run, iter(run.training.loader(parts, 0)), parts, 512)
    assert (run.wrapped.passes, run.wrapped.local) == (32, 31)  # the last alone meets the other process
    assert sums[2] == 256 and not bad
