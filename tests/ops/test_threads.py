"""The threads of the CPU kernels: their number, their results, and what becomes of them in a forked process."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from support.transformers_models import make_model, search

from treedecode import ops
from treedecode.models.transformers import TransformersModel

ROOT = "sys/fs/cgroup"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="affinity and control groups of Linux")


@pytest.fixture
def adapter():
    adapter = TransformersModel(make_model("llama", torch.bfloat16, hidden_size=256, intermediate_size=1024))
    assert adapter.optimizations[-1] == "all layers and the head in one op"
    return adapter


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def team_size() -> int:
    """Counts the threads of the kernels in this process."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as file:
            names.append(file.read().strip())
    return names.count("treedecode")


def logits_of(adapter) -> list[torch.Tensor]:
    return [logits for _, logits in search(adapter)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_any_number_of_threads_gives_the_same_bits(adapter, set_threads, count):
    set_threads(1)
    want = logits_of(adapter)
    set_threads(count)
    for _ in range(20):
        assert all(map(torch.equal, logits_of(adapter), want))
    if sys.platform == "linux":
        assert team_size() >= count - 1


def test_a_mode_of_floating_point_holds_on_all_threads(adapter, set_threads):
    # with numbers this small every product is denormal, and flushed to 0 where the caller asks for it
    with torch.no_grad():
        adapter.model.model.embed_tokens.weight.mul_(1e-38)
    set_threads(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        want = logits_of(adapter)
        set_threads(4)
        for _ in range(10):
            assert all(map(torch.equal, logits_of(adapter), want))
    finally:
        torch.set_flush_denormal(False)


def test_callers_at_the_same_time(adapter, set_threads):
    set_threads(3)
    want = logits_of(adapter)
    results = {}

    def work(index):
        results[index] = [all(map(torch.equal, logits_of(adapter), want)) for _ in range(10)]

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [True] * 10 for i in range(4)}


# Only the op runs with several threads: torch's own loops do not survive a fork.
FORK = """
import os, numpy, torch
from support.transformers_models import make_model, search
from treedecode import ops
from treedecode.models.transformers import TransformersModel
calls, op = [], ops.decoder_forward
ops.decoder_forward = lambda *args: calls.append(args) or op(*args)
for _ in search(TransformersModel(make_model("llama", torch.bfloat16, hidden_size=256, intermediate_size=1024))):
    pass
def forward():
    with torch.inference_mode():
        return op(*calls[0])[0].view(torch.int16).numpy()
torch.set_num_threads(3)
want = forward()
child = os.fork()
same = all(numpy.array_equal(forward(), want) for _ in range(10))
threads = open("/proc/self/status").read().split("Threads:")[1].split()[0]
if child == 0:
    os._exit(0 if same and threads == "3" else 1)
assert same and os.waitpid(child, 0)[1] == 0
"""


@linux_only
def test_a_forked_process_has_threads_of_its_own():
    run(FORK, OMP_NUM_THREADS="1")


def run(code: str, **variables: str) -> str:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment | variables
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COUNT = "import torch; from treedecode import ops; print(torch.get_num_threads(), ops.cpu_threads())"


def test_the_users_number_counts():
    assert run(COUNT, OMP_NUM_THREADS="1").split() == ["1", "1"]
    assert run("import torch; torch.set_num_threads(6);" + COUNT).split() == ["6", "6"]
    assert run("from treedecode import ops; import torch; torch.set_num_threads(6);" + COUNT).split() == ["6", "6"]


@linux_only
def test_an_affinity_mask_counts():
    mask = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
    assert run(mask + COUNT).split()[1] == "1"


def available(root) -> int:
    return torch.ops.treedecode._cpu_threads(str(root))[1]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@linux_only
@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"proc/self/cgroup": "0::/\n", f"{ROOT}/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", f"{ROOT}/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", f"{ROOT}/a/cpu.max": "9000 10000", f"{ROOT}/a/b/cpu.max": "max 100000"}, 1),
        ({"proc/self/cgroup": "4:memory:/x\n3:cpu,cpuacct:/y\n", f"{ROOT}/cpu,cpuacct/y/cpu.cfs_quota_us": "100000",
          f"{ROOT}/cpu,cpuacct/y/cpu.cfs_period_us": "100000"}, 1),
        # a container sees its own group as the root
        ({"proc/self/cgroup": "0::/docker/1234\n", f"{ROOT}/cpu.max": "90000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", f"{ROOT}/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "3:cpu:/\n", f"{ROOT}/cpu/cpu.cfs_quota_us": "-1",
          f"{ROOT}/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"proc/self/cgroup": "0::/\n", f"{ROOT}/cpu.max": "100000000 100000\n"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_a_quota_of_the_control_group_counts(tmp_path, files, cpus):
    for name, text in files.items():
        write(tmp_path / name, text)
    assert available(tmp_path) == (cpus or len(os.sched_getaffinity(0)))


@linux_only
def test_a_quota_is_rounded_up(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / ROOT / "cpu.max", "110000 100000\n")
    assert available(tmp_path) == 2


def test_ops_follow_the_forward_before_them(adapter, set_threads):
    set_threads(2)
    want = ops.sample(torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)), **sampling(64))
    logits_of(adapter)
    got = ops.sample(torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)), **sampling(64))
    assert all(map(torch.equal, got, want))


def sampling(rows: int) -> dict:
    rows = torch.arange(rows)
    return {"temperature": 0.8, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "seed": rows, "position": rows}
