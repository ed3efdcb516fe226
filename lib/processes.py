"""Work that several processes share: those of torchrun, which all run the same script, and pools of workers. And what
makes one process faster, or measures how fast it is."""

import contextlib
import ctypes
import multiprocessing
import os
import threading
import time
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from lib.common import RANK, WORLD_SIZE, UserError, tqdm


def join(device):
    """Joins the processes that torchrun has started, if there are any. Returns the device of this one."""
    if WORLD_SIZE > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        wait = timedelta(days=1)  # the others wait while the first one collects
        dist.init_process_group(backend, timeout=wait, rank=RANK, world_size=WORLD_SIZE)
    return torch.device(device)


def gather(value):
    """The `value` of every process in a list, in order. It waits until all have come here."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def share(function, items, title=None):
    """[function(item) for item in items], which the processes of torchrun share, with a progress bar if it has a title.
    UserError if some processes would be idle."""
    if WORLD_SIZE > len(items):
        raise UserError(f"there is work for {len(items)} processes, and not for {WORLD_SIZE}")
    mine = items[RANK::WORLD_SIZE]
    parts = gather([function(item) for item in (tqdm(mine, title, unit="group") if title else mine)])
    return [parts[i % WORLD_SIZE][i // WORLD_SIZE] for i in range(len(items))]


class Workers(ProcessPoolExecutor):
    """A pool of processes, each begun with `initializer(*initargs)`: `with Workers(...) as pool: pool.map(...)`."""

    def __init__(self, workers, initializer=None, initargs=()):
        spawn = multiprocessing.get_context("spawn")  # a forked copy of threads or of a renderer hangs
        super().__init__(workers, spawn, _begin_worker, (initializer, initargs))

    def map(self, function, items):
        """Yields `function(item)` in order. UserError if a worker process dies."""
        try:
            yield from super().map(function, items)
        except BrokenProcessPool:
            raise UserError("a worker process died (did the memory run out?): try fewer --workers") from None

    def __exit__(self, *_):
        self.shutdown(cancel_futures=True)


def _begin_worker(initializer, initargs):
    """Makes a worker end when its parent does, because otherwise it would wait for work for ever. Then prepares it."""
    parent, wait = multiprocessing.parent_process().sentinel, multiprocessing.connection.wait
    threading.Thread(target=lambda: (wait([parent]), os._exit(1)), daemon=True).start()
    if initializer:
        initializer(*initargs)


def use_threads(device, num_patches):
    """Lets torch compute with one thread if frames have one token. Two would be a third faster while nothing else runs
    on the machine. But beside another program they wait for each other, and take up to ten times as long."""
    if device.type == "cpu" and num_patches == 1:
        torch.set_num_threads(1)


def keep_freed_memory():
    """Tells glibc to keep freed memory. Planning on a CPU needs the same large blocks over and over, and new pages for
    them took a fifth of the time of imagining. Nothing changes where there is another C library."""
    with contextlib.suppress(OSError, AttributeError):
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            ctypes.CDLL("libc.so.6").mallopt(option, value)


def per_second(calls, seconds=3.0):
    """How many times a second each of `calls` {name: function} can be made. They take turns, so that whatever else the
    machine does slows all of them, and the median of a function's turns counts."""
    times, end = {name: [] for name in calls}, time.perf_counter() + seconds * len(calls)
    for call in calls.values():
        call()  # the first time is not like the others
    while time.perf_counter() < end or not all(times.values()):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: 1 / np.median(passed) for name, passed in times.items()}
