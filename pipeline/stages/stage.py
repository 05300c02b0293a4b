"""The base class of all stages, and the fingerprint of a stage."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline import storage
from pipeline.hardware import devices
from pipeline.stages import progress
from pipeline.stages.decoder_pool import DecoderPool
from pipeline.stages.documents import FORMAT
from pipeline.stages.types import Claim, Item, Output, StageFailed
from pipeline.storage.hashing import digest


class Stage(ABC):
    """A step from sealed folders to another; holds its settings and where it writes, nothing else.

    Subclasses add `plan`, `process` and, where needed, `setup` (once per worker) and `finish`
    (once, on the driver, when every record is there).
    """

    name: ClassVar[str]
    workers_need_gpu: ClassVar[bool] = False
    most_gpus: ClassVar[int] = 1  # that one worker can use
    shares_gpus: ClassVar[bool] = True  # whether two workers may have parts of one GPU
    precision = ""  # of its tensors, for records; known once a worker is set up
    device = ""  # for records, if the work was done by other processes
    record_info: ClassVar[dict[str, Any]] = {}  # shape of what `finish` needs of each record's `info` (documents.py)
    by_choice: ClassVar[frozenset[str]] = frozenset()  # reasons that settings ask for: no failures
    optional_inputs: ClassVar[frozenset[str]] = frozenset()  # a plan from before they were sealed stays valid
    growing_inputs: ClassVar[frozenset[str]] = frozenset()  # a plan stays valid when they grow, as readers apply them
    decodes: ClassVar[bool] = False  # whether other nodes can decode images for it
    decode: "DecoderPool | None" = None  # the decoders on other nodes, in a worker that has some

    host_limits: Any = None  # the `HostLimits` of pipeline/downloads, in the process that keeps them

    def __init__(self, root: str, folder: str, config: Any) -> None:
        self.root = storage.normalize(root)
        self.path = folder
        self.folder = storage.join(self.root, folder)
        self.config = config
        self.claim: Claim | None = None  # set when the driver claims the folder; goes to the workers with the stage
        self.on_progress: Callable[[], None] | None = None  # called at each word of a worker in this process
        self.report_progress = progress.ProgressReporter(self.folder, "")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"on_progress": None, "host_limits": None}

    @property
    def downloads(self) -> bool:
        """Whether its workers send requests to hosts, whose limits they must share."""
        return False

    @property
    def command(self) -> str:
        """The command line that would finish this stage, for hints."""
        return f"python -m jobs {self.name}"

    @property
    def replacement(self) -> str:
        """The command line that makes this stage again, in place of what is there, for hints."""
        return f"{self.command} --overwrite"

    @property
    def alternative(self) -> str:
        """How to keep what is there and still get what is wanted, for hints."""
        return "write to another version (name@v2)"

    def section(self) -> dict[str, Any]:
        """The settings that the result depends on, as JSON."""
        assert is_dataclass(self.config) and not isinstance(self.config, type)
        return json.loads(json.dumps(asdict(self.config)))

    def summary(self) -> dict[str, Any]:
        """Facts about the source, for `--dry-run`."""
        return {}

    def inputs(self) -> dict[str, dict[str, Any]]:
        """The inputs of the stage: name -> {"path": stage folder below the root or "", "digest": ...}."""
        return {}

    @abstractmethod
    def plan(self) -> Iterable[Item]:
        """The items, the same for the same inputs; runs on the driver and writes nothing.

        The driver takes them one by one, so their files need not be in memory together.
        """

    def rows(self, item: Item) -> int:
        """Number of rows of an item, for progress. 0: unknown."""
        return int(item.inputs.get("count", 0))

    def items_to_retry(self, items: Sequence[Item], done: Sequence[dict[str, Any]]) -> Iterable[Item]:
        """More items, for another try at the rows that failed in the `done` records of `items`."""
        raise ValueError(f"{self.name} cannot try failed rows again")

    def setup(self) -> None:  # noqa: B027 (most stages load nothing)
        """Load what every item needs, once per worker."""

    @abstractmethod
    def process(self, item: Item, scratch: Path) -> Output:
        """Make the files of one item below the folder `scratch`."""

    def check_device(self) -> None:
        """DeviceUnavailable if this process reserved a GPU for the stage and cannot use it."""
        if self.workers_need_gpu:
            devices.choose_device()

    def together(self, gpu: bool | None = None) -> int:
        """Number of items that a worker takes together, if that saves work. gpu: workers have one; None: check here."""
        return 1

    def process_together(self, work: Sequence[tuple[Item, Path]]) -> Generator[Output | Exception, None, None]:
        """`process` for each of several items with its folder, in order. An exception takes the place of its output."""
        for item, scratch in work:
            try:
                output: Output | Exception = self.process(item, scratch)
            except StageFailed:  # the driver's own, from `on_progress`
                raise
            except Exception as error:
                output = error
            yield output

    def finish(self, records: Sequence[dict[str, Any]], scratch: Path) -> Output:
        """Files and facts that need all items, for the manifest."""
        return Output()

    def after_seal(self) -> None:  # noqa: B027 (most stages have nothing to do)
        """Work of the driver after the manifest is written."""


def fingerprint(stage: Stage, inputs: dict[str, dict[str, Any]] | None = None) -> str:
    """Hash of format version, stage name, settings and inputs: who may write into a folder."""
    return digest([FORMAT, stage.name, stage.section(), inputs if inputs is not None else stage.inputs()])
