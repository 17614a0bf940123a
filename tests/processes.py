"""Processes that start at once: forked from one that has imported the packages, as importing them takes seconds.

They are as those of a shell otherwise: with arguments, an environment, an output, an exit status, and killed the same.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import sys
import threading
from collections.abc import Mapping, Sequence

import torch

_METHODS = multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if "forkserver" in _METHODS else "spawn")
CONTEXT.set_forkserver_preload(["pm_models.cli", "pm_models.export", "onnxscript", "onnxruntime"])


class Started:
    """``pm-vit`` with these arguments, or a script with these; with the methods of :class:`subprocess.Popen`."""

    def __init__(self, *arguments: object, script: str | None = None, environment: Mapping[str, object] | None = None):
        readers, writers = zip(*(CONTEXT.Pipe(duplex=False) for _ in range(2)), strict=True)
        words = [str(argument) for argument in arguments]
        self._process = CONTEXT.Process(target=_run, args=(script, words, environment or {}, writers))
        self._process.start()
        for writer in writers:
            writer.close()
        self._texts = ["", ""]
        self._threads = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in enumerate(readers)]
        for thread in self._threads:
            thread.start()
        self.pid = self._process.pid

    def _read(self, index: int, reader: object) -> None:
        with open(reader.fileno(), encoding="utf-8", errors="replace", closefd=False) as stream:
            self._texts[index] = stream.read()
        reader.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to standard output and standard error, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"the process did not end within {timeout} s")
        for thread in self._threads:
            thread.join()
        return tuple(self._texts)


def launch(processes: int, *arguments: object, script: str | None = None) -> list[Started]:
    """Processes of one group on the CPU, told of it by the variables that torchrun sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    return [
        Started(*arguments, script=script, environment={"RANK": rank, "LOCAL_RANK": rank, **group})
        for rank in range(processes)
    ]


def _run(script: str | None, arguments: Sequence[str], environment: Mapping[str, object], writers: Sequence) -> None:
    for descriptor, writer in enumerate(writers, start=1):
        os.dup2(writer.fileno(), descriptor)
        writer.close()
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    gc.freeze()  # as for the tests themselves
    multiprocessing.set_start_method(_METHODS[0], force=True)  # the system's own, for processes that it starts
    if script is None:
        from pm_models.cli import main

        sys.exit(main(arguments))
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
