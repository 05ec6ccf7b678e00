"""Start the processes of a distributed test on this machine and collect what they said."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment() -> dict[str, str]:
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": found, "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    return {**os.environ, **ours}


def run_ranks(world_size: int, cases: list[dict[str, Any]], timeout: float = 240) -> None:
    """Run `tests.distributed.rank` on every rank, without torchrun: nobody stops a rank whose peer has failed."""
    common = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.rank", json.dumps(cases)],
            env=environment() | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outcomes = [process.communicate(timeout=timeout)[1] for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)  # faulthandler writes where each of them is
        outcomes = [process.communicate(timeout=20)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, outcomes, strict=True):
        assert process.returncode == 0, text


def torchrun(world_size: int, *words: object, module: str = "tsld_fx.cli", **variables: str) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node N -m tsld_fx.cli words...`, with more environment variables."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
    command += ["--master-port", str(free_port()), "-m", module, *map(str, words)]
    return subprocess.Popen(
        command, env=environment() | variables, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
