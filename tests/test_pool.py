"""Are leased rows viewed without a copy, never handed out twice, and never left behind?"""

import ctypes
import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import fake_gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import bridge.hidden_pool
import bridge.pool_rows
from benchmarks.pool import canary, faults, under_fire
from benchmarks.pool_side import checksum as summed
from bridge.cuda import gpus
from bridge.dlpack import DLPackView, _held
from bridge.errors import EngineError
from bridge.hidden_pool import Block, HiddenPool, PoolSpec
from bridge.leaving import FOLDER_PREFIX
from bridge.pool_rows import PoolRows, assigned
from bridge.segments import SHARED, sweep
from kdjax.sharding import make_mesh
from kdjax.training.teacher import TeacherEngine, _gpus_of_shards


@pytest.fixture
def pool():
    with HiddenPool.create(rows=256, width=64, dtype="float32") as pool:
        yield pool


def segment(pool: HiddenPool) -> torch.Tensor:
    """a second mapping of the pool's rows, as an engine has"""
    spec = pool.spec
    rows = torch.frombuffer(spec.map(), dtype=getattr(torch, spec.dtype), count=spec.rows * spec.width)
    return rows.view(spec.rows, spec.width)


def on_one_device(view: DLPackView) -> jax.Array:
    return jax.dlpack.from_dlpack(view, copy=False)


@pytest.mark.parametrize("given", ["float32", "bfloat16", "transposed", "strided"])
@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_rows_are_written_as_they_are_whatever_their_layout(kept, given):
    hidden = torch.randn(7, 64)
    if given == "bfloat16":
        hidden = hidden.bfloat16()
    elif given == "transposed":
        hidden = hidden.T.contiguous().T
    elif given == "strided":
        hidden = torch.randn(14, 64)[::2]
    with HiddenPool.create(rows=32, width=64, dtype=kept) as pool, pool.lease([7], timeout=1) as lease:
        writer = PoolRows(pool.spec)
        writer.write(lease.starts[0], hidden)
        writer.finish()
        found = torch.from_numpy(np.array(on_one_device(lease.view(0)).astype(jnp.float32)))
        assert torch.equal(found, hidden.to(getattr(torch, kept)).float())


def test_jax_reads_the_segment_itself(pool):
    with pool.lease([5, 9], timeout=1) as lease:
        rows = segment(pool)
        rows[lease.starts[1]] = 3.0
        array = on_one_device(lease.view(1))
        assert array.shape == (9, 64) and array.dtype == jnp.float32
        offset = array.unsafe_buffer_pointer() - pool._address
        assert offset == lease.starts[1] * pool.spec.row_bytes and 0 <= offset < pool.spec.bytes
        assert float(array[0, 0]) == 3.0
        rows[lease.starts[1]] = 4.0  # another mapping of the same memory: a copy would not see it
        assert float(array[0, 0]) == 4.0


def test_a_jitted_step_is_given_the_segment_itself(pool):
    """a custom call inside the compiled step reports the address that it reads"""
    seen = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p))
    def record(out, inputs):
        seen.append(inputs[0])

    new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new_capsule(("PyCapsule_New", ctypes.pythonapi))(
        ctypes.cast(record, ctypes.c_void_p), b"xla._CUSTOM_CALL_TARGET", None
    )
    jax.ffi.register_ffi_target("record_address", capsule, platform="cpu", api_version=0)
    report = jax.ffi.ffi_call(
        "record_address", jax.ShapeDtypeStruct((1,), jnp.float32), custom_call_api_version=1, has_side_effect=True
    )
    step = jax.jit(lambda x: (report(x), x.sum()))
    with pool.lease([4, 16], timeout=1) as lease:
        segment(pool).fill_(2.0)
        _, total = step(on_one_device(lease.view(1)))
        assert float(total) == 2.0 * 16 * 64
        assert seen == [pool._address + lease.starts[1] * pool.spec.row_bytes]


def test_bfloat16_rows_are_the_same_bits():
    with HiddenPool.create(rows=32, width=48, dtype="bfloat16") as pool, pool.lease([7, 3], timeout=1) as lease:
        values = torch.randn(7, 48).to(torch.bfloat16)
        segment(pool)[lease.starts[0] : lease.starts[0] + 7] = values
        array = on_one_device(lease.view(0))
        assert array.dtype == jnp.bfloat16
        assert (np.asarray(array).view(np.uint16) == values.view(torch.uint16).numpy()).all()
        assert torch.equal(torch.from_dlpack(lease.view(0)), values)


@pytest.mark.parametrize(("width", "dtype"), [(1, "float32"), (24, "bfloat16"), (100, "float32"), (64, "float32")])
def test_every_run_starts_aligned(width, dtype):
    with HiddenPool.create(rows=300, width=width, dtype=dtype) as pool, pool.lease([1, 2, 33, 7], timeout=1) as lease:
        for shard, count in enumerate(lease.counts):
            array = on_one_device(lease.view(shard))
            assert array.unsafe_buffer_pointer() % 64 == 0 and array.shape == (count, width)


def test_unaligned_memory_raises_instead_of_copying(pool):
    with pytest.raises(ValueError, match="4 bytes past a 64-byte boundary"):
        DLPackView(pool._memory, pool._address + 4, (1, 4), "float32")
    with pool.lease([4], timeout=1) as lease, pytest.raises(BufferError, match="no copy"):
        lease.view(0).__dlpack__(copy=True)


def test_an_array_outlives_lease_pool_and_segment():
    pool = HiddenPool.create(rows=16, width=16, dtype="float32")
    lease = pool.lease([16], timeout=1)
    segment(pool).fill_(5.0)
    array = on_one_device(lease.view(0))
    path = pool.spec.path
    lease.release()
    pool.close()
    del lease, pool
    assert not Path(path).exists()
    assert float(array.sum()) == 5.0 * 256


def test_capsules_are_let_go(pool):
    with pool.lease([4], timeout=1) as lease:
        before = len(_held)
        array, tensor = on_one_device(lease.view(0)), torch.from_dlpack(lease.view(0))
        unused = lease.view(0).__dlpack__()
        assert len(_held) == before + 3
        del array, tensor, unused
        assert len(_held) == before


def test_release_twice_and_view_after_release_raise(pool):
    lease = pool.lease([4], timeout=1)
    lease.release()
    with pytest.raises(ValueError, match="released twice"):
        lease.release()
    with pytest.raises(ValueError, match="is released"):
        lease.view(0)


def test_a_full_pool_waits_for_a_release(pool):
    held = pool.lease([256], timeout=1)
    threading.Timer(0.2, held.release).start()
    began = time.monotonic()
    with pool.lease([10], timeout=5):
        assert 0.15 < time.monotonic() - began < 2
    assert pool.usage().waited >= 0.15


def test_a_full_pool_gives_up_and_says_why(pool):
    with pool.lease([200], timeout=1), pool.lease([16], timeout=1):
        with pytest.raises(EngineError, match=r"waited 0.1 s .* 40 of 256 rows are free .* 2 leases"):
            pool.lease([100], timeout=0.1)
        with pool.lease([30], timeout=0.1):  # the failed wait is out of the queue
            pass


def test_a_lease_no_pool_can_give_is_refused_at_once(pool):
    for counts in ([257], [200, 100], [], [0]):
        with pytest.raises(ValueError, match="needs at least one row"):
            pool.lease(counts)


def test_waiting_is_first_come_first_served(pool):
    held = pool.lease([200], timeout=1)
    order = []

    def take(name: str, rows: int) -> None:
        with pool.lease([rows], timeout=5):
            order.append(name)

    threads = []
    for name, rows in (("large", 256), ("small", 1)):
        threads.append(threading.Thread(target=take, args=(name, rows)))
        threads[-1].start()
        while pool.usage().waiting < len(threads):
            time.sleep(0.005)
    held.release()  # rows for "small" were free all along: it must not overtake
    for thread in threads:
        thread.join()
    assert order == ["large", "small"]


def test_closing_the_pool_wakes_who_waits(pool):
    pool.lease([256], timeout=1)
    threading.Timer(0.1, pool.close).start()
    with pytest.raises(EngineError, match="closed"):
        pool.lease([1], timeout=5)


def test_usage_counts_rows(pool):
    with pool.lease([100], timeout=1), pool.lease([1, 2], timeout=1):
        pass
    usage = pool.usage()
    assert (usage.rows, usage.used, usage.free, usage.peak, usage.leases) == (256, 0, 256, 103, 0)


def test_missing_rows_are_counted(pool):
    with pool.lease([10], timeout=1) as lease:
        ranges = [(lease.starts[0], 4), (lease.starts[0] + 4, 6)]
        pool.expect(ranges)
        stamps = np.frombuffer(pool.spec.map(), np.uint8, pool.spec.rows, pool.spec.stamps_at)
        stamps[lease.starts[0] : lease.starts[0] + 5] = 1
        assert pool.missing(ranges) == [0, 5]
        pool.expect(ranges)
        assert pool.missing(ranges) == [4, 6]


def test_200_leases_under_threads_never_share_a_row(pool):
    """every lease fills its rows with a number of its own through the engine's mapping and finds them untouched"""
    rows, stray = segment(pool), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for turn in range(25):
            lease = pool.lease([rng.randint(1, 40) for _ in range(rng.randint(1, 3))], timeout=20)
            mark = float(1000 * seed + turn)
            for start, count in zip(lease.starts, lease.counts, strict=True):
                rows[start : start + count] = mark
            time.sleep(rng.random() * 0.003)
            for shard in range(len(lease.counts)):
                if not (np.from_dlpack(lease.view(shard)) == mark).all():
                    stray.append((seed, turn, shard))
            lease.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not stray
    assert pool.usage().free == 256 and pool._runs == [(0, 256)]


def test_1000_batches_from_another_process_are_read_as_they_were_written():
    """random sizes, canaries around every run, checksums on both sides, twice, in a pool that is always full"""
    with HiddenPool.create(rows=400, width=40, dtype="bfloat16") as pool:
        found = under_fire(pool, 1000, most=60)
        assert pool._runs == [(0, 400)]
    assert found["wrong"] == 0, found
    assert found["runs"] > 1500 and found["fullest"] > 0.9


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_goes_wrong_in_a_pool_is_seen(dtype):
    number, count = 7, 9
    rows = np.random.default_rng(0).standard_normal((count, 40)).astype(dtype)
    rows[[0, -1]] = canary(number)
    expected = summed(torch.from_numpy(rows[1:-1].view(np.uint16).copy()).view(torch.int16))
    assert not faults(rows, number, expected).total()
    assert faults(rows, number + 1, expected) == {"changed": 0, "canaries": 1}
    for place in ((0, 3), (-1, 39)):
        torn = rows.copy()
        torn[place] = 0
        assert faults(torn, number, expected) == {"changed": 0, "canaries": 1}
    assert faults(rows[[0, 2, 1, *range(3, count)]], number, expected) == {"changed": 1, "canaries": 0}
    torn = rows.copy()
    torn[4, 20] *= 1.01
    assert faults(torn, number, expected) == {"changed": 1, "canaries": 0}


def test_a_pool_that_does_not_fit_says_so():
    free = os.statvfs(SHARED)
    rows = free.f_bavail * free.f_frsize // 4096 + 2**20
    before = set(SHARED.glob("kdjax-*"))
    with pytest.raises(EngineError, match="GiB of hidden rows do not fit into /dev/shm .*use fewer rows, or"):
        HiddenPool.create(rows=rows, width=1024, dtype="float32")
    assert set(SHARED.glob("kdjax-*")) <= before


def test_dtypes_that_do_not_travel_are_refused():
    with pytest.raises(ValueError, match="'float16': one of float32, bfloat16"):
        HiddenPool.create(rows=8, width=8, dtype="float16")


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)


MAKE = """
    import os, signal
    from bridge.hidden_pool import HiddenPool
    pool = HiddenPool.create(rows=8, width=16, dtype="float32")
    print(pool.spec.path, flush=True)
"""


def test_the_segment_goes_when_the_interpreter_does():
    done = run(MAKE)
    assert done.returncode == 0 and not Path(done.stdout.strip()).exists()


def test_a_fork_that_exits_leaves_the_segments_alone():
    done = run(
        MAKE
        + """
    from bridge.weight_sync import WeightBucket
    bucket = WeightBucket(64)
    if os.fork() == 0:
        raise SystemExit
    os.wait()
    print(os.path.exists(pool.spec.path), os.path.exists(bucket.spec.path))
"""
    )
    assert done.stdout.split()[1:] == ["True", "True"]


def test_what_a_killed_owner_left_is_swept_and_nothing_else(pool):
    done = run(MAKE + "    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert done.returncode == -signal.SIGKILL
    orphan = Path(done.stdout.strip())
    assert orphan.exists()
    with HiddenPool.create(rows=8, width=8, dtype="float32"):
        assert not orphan.exists()
        assert Path(pool.spec.path).exists() and pool.spec.path not in sweep()


def test_an_engines_folder_in_shared_memory_is_left_alone(monkeypatch):
    """With TMPDIR there, an engine's temporary folder has a segment's place and the beginning of its name."""
    monkeypatch.setattr(tempfile, "tempdir", str(SHARED))
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as folder:
        assert Path(folder).parent == SHARED and folder not in sweep() and Path(folder).exists()


def test_arrays_alive_at_exit_do_no_harm():
    done = run(
        """
        import jax, jax.numpy as jnp
        from bridge.hidden_pool import HiddenPool
        jax.config.update("jax_platforms", "cpu")
        pool = HiddenPool.create(rows=2048, width=256, dtype="float32")
        lease = pool.lease([2048], timeout=1)
        array = jax.dlpack.from_dlpack(lease.view(0), copy=False)
        pending = [jax.jit(lambda x: (x @ x.T).sum())(array) for _ in range(8)]
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_each_run_lies_in_its_own_part():
    """a pool for four data shards: run i lies in part i, aligned; freed runs merge again, never over a border"""
    with HiddenPool.create(rows=50, width=24, dtype="bfloat16", parts=4) as pool:
        part = pool.spec.part_rows
        assert part >= 50 and pool.spec.rows == 4 * part
        rng = random.Random(0)
        held = []
        for _ in range(300):
            if held and (len(held) == 3 or rng.random() < 0.4):
                held.pop(rng.randrange(len(held))).release()
            lease = pool.lease([rng.randint(1, 10) for _ in range(rng.randint(1, 4))], timeout=1)
            for index, (start, count) in enumerate(zip(lease.starts, lease.counts, strict=True)):
                assert index * part <= start and start + count <= (index + 1) * part
                assert lease.view(index).address % 64 == 0
            held.append(lease)
        taken = [row for lease in held for start, n in zip(lease.starts, lease.counts, strict=True)
                 for row in range(start, start + n)]  # fmt: skip
        assert len(taken) == len(set(taken))
        for lease in held:
            lease.release()
        assert pool._runs == [(index * part, part) for index in range(4)]
        with pool.lease([part] * 4, timeout=1), pytest.raises(EngineError, match="waited"):
            pool.lease([1], timeout=0.05)
        with pytest.raises(ValueError, match="needs at least one row"):
            pool.lease([1] * 5)


def test_any_cpu_device_views_the_segment_itself():
    with HiddenPool.create(rows=8, width=16, dtype="float32", parts=8) as pool, pool.lease([8] * 8, timeout=1) as lease:
        for number, device in enumerate(jax.local_devices()):
            array = jax.dlpack.from_dlpack(lease.view(number, (2, 4), device.local_hardware_id), copy=False)
            assert array.devices() == {device} and array.shape == (2, 4, 16)
            assert array.unsafe_buffer_pointer() == pool._address + lease.starts[number] * pool.spec.row_bytes


def test_ranks_write_the_blocks_on_their_own_gpus():
    blocks = [Block(part, gpu, "") for part, gpu in ((0, "a"), (0, "b"), (1, "c"), (1, "d"))]
    spec = PoolSpec("path", 64, 8, "float32", 2, tuple(blocks))
    assert PoolSpec.of(asdict(spec)) == spec and spec.copies == 2 and spec.part_rows == 32
    assert assigned(blocks, 0, ["c", "a"]) == [(blocks[2], 0)]  # and d, the fourth, is dealt to rank 3 % 2
    assert assigned(blocks, 1, ["c", "a"]) == [(blocks[0], 0), (blocks[1], 1), (blocks[3], 1)]
    alone = assigned(blocks, 0, ["x"])
    assert [block for block, _ in alone] == blocks and [number for _, number in alone] == [0, 1, 0, 1]


def test_rows_on_gpus_lie_where_they_are_read_and_count_once_they_are_there(monkeypatch):
    """data 2 × tensor 2: each shard's rows on two GPUs, written by ranks on the first of each, in the host's memory"""
    names, mesh, waits = ["a", "b", "c", "d"], make_mesh(2, 1, 2, devices=jax.devices()[:4]), []
    for module in (bridge.hidden_pool, bridge.pool_rows):
        fake_gpu.play(monkeypatch, module, names)
    monkeypatch.setattr("kdjax.training.teacher.jax.default_backend", lambda: "gpu")
    on = _gpus_of_shards(mesh, 2)
    assert on == [[0, 1], [2, 3]]
    counts, rows = (5, 8), [torch.randn(count, 16) for count in (5, 8)]
    with HiddenPool.create(rows=64, width=16, dtype="float32", parts=2, on=on) as pool:
        stream = SimpleNamespace(synchronize=lambda: waits.append(int(pool._stamps.sum())))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        assert [(block.part, block.gpu) for block in pool.spec.blocks] == [(0, "a"), (0, "b"), (1, "c"), (1, "d")]
        with pool.lease([8], timeout=1), pool.lease([8, 8], timeout=1) as lease:
            ranges = list(zip(lease.starts, counts, strict=True))
            pool.expect(ranges)
            for rank, missing in ((0, [5, 8]), (1, [0, 0])):  # of a, and of b, c and d
                writer = PoolRows(PoolSpec.of(asdict(pool.spec)), rank, ["a", "c"])
                for start, piece in zip(lease.starts, rows, strict=True):
                    writer.write(start, piece)
                writer.finish()
                assert pool.missing(ranges) == missing
            assert waits == [0, 5]  # what a rank has written counts only behind its wait
            array = TeacherEngine.view(SimpleNamespace(mesh=mesh, pool=pool), lease, (1, 2, 8))
            for piece in array.addressable_shards:
                home = pool._allocations[piece.device.local_hardware_id]
                offset = piece.data.unsafe_buffer_pointer() - home.address
                assert 0 <= offset and offset + piece.data.nbytes <= home.size
                shard = piece.index[1].start // 8
                assert np.array_equal(piece.data[0, : counts[shard]], rows[shard])
            with pytest.raises(ValueError, match="lies in part 0 of the pool, which GPU 2 does not hold"):
                lease.view(0, device=2)


def test_another_gpu_is_mapped_at_its_first_row_alone(monkeypatch, tmp_path):
    """one of two copies of a teacher, each on a GPU that trains on a part of its own"""
    mapped = []
    monkeypatch.setattr(bridge.pool_rows, "_mapped", lambda spec, block: mapped.append(block.gpu) or torch.zeros(8, 4))
    blocks = (Block(0, "a", ""), Block(1, "b", ""))
    spec = PoolSpec(str(tmp_path / "stamps"), 16, 4, "float32", parts=2, blocks=blocks)
    (tmp_path / "stamps").write_bytes(bytes(spec.bytes))
    rows = PoolRows(spec, 0, ["b"])
    rows.write(8, torch.ones(2, 4))
    assert mapped == ["b"]
    rows.write(0, torch.ones(2, 4)), rows.write(2, torch.ones(2, 4))
    assert mapped == ["b", "a"]


def test_gpu_memory_without_a_gpu_is_refused():
    assert gpus() == []
    with pytest.raises(EngineError, match="no NVIDIA driver answers"):
        HiddenPool.create(rows=8, width=16, dtype="float32", on=[[0]])
    with pytest.raises(ValueError, match="equally many GPUs"):
        HiddenPool.create(rows=8, width=16, dtype="float32", parts=2, on=[[0], [1, 2]])
