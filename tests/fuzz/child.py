"""A child process that reads damaged files under limits of memory and time, and is started again if it dies."""

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SECONDS = 20.0


class Broken(AssertionError):
    """A reader raised an unexpected error, died, or took too long."""


class Child:
    """The process, started when it is needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[str] | None = None

    def read(self, reader: str, data: bytes, name: str, companions: Sequence[Path] = ()) -> dict[str, str]:
        """The answer of a reader to a file with this name and these bytes; Broken if it breaks the law.

        A file is read, or refused by one sentence that names it.
        """
        path = self.folder / name
        path.write_bytes(data)
        process = self._process or self._start()
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps({"reader": reader, "files": [str(path), *map(str, companions)],
                                        "folder": str(self.folder)}) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        line = process.stdout.readline() if ready else ""
        if not line:
            self.close()
            raise Broken(f"{reader} of {name}: " + (f"the process ended with {process.returncode}" if ready else
                                                    f"no answer in {SECONDS:.0f} s"))
        answer = json.loads(line)
        if answer["result"] == "broken":
            self.close()  # it may hold memory still
            raise Broken(f"{reader} of {name}: {answer['text']}")
        if answer["result"] == "refused" and answer["kind"] != "BadImage":
            sentence = answer["text"].partition("\nhint:")[0]
            if Path(name).stem not in sentence and str(self.folder) not in sentence:
                raise Broken(f"{reader} of {name}: the refusal does not name the file: {answer['text']}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        # Each thread of a library reserves 64 MB of address space for its memory.
        environment = os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                                    "MKL_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system",
                                    "PYTHONPATH": str(REPOSITORY)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("readers.py"))], cwd=REPOSITORY, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"  # imports take long on a busy machine
        return self._process
