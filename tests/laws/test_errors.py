"""An error of a worker reaches the driver with its message."""

import importlib
import inspect
import pickle
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import jobs
import model
import pipeline
from pipeline.storage.lease import Holder

_HOLDER = Holder("host", "machine", 1, "100", exclusive=True)
_EXAMPLES: dict[Any, Any] = {str: "some text", int: 7, float: 1.5, Holder: _HOLDER}


def _error_classes() -> Iterator[type[BaseException]]:
    for package in (pipeline, model, jobs):
        for entry in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not entry.name.endswith("__main__"):
                module = importlib.import_module(entry.name)
                yield from (value for value in vars(module).values() if inspect.isclass(value)
                            and issubclass(value, BaseException) and value.__module__ == module.__name__)


@pytest.mark.parametrize("kind", list(_error_classes()), ids=lambda kind: kind.__name__)
def test_errors_keep_their_message_and_facts_between_processes(kind: type[BaseException]) -> None:
    owner = next((base for base in kind.__mro__ if "__init__" in vars(base) and base.__module__.partition(".")[0] in
                  {"pipeline", "model", "jobs"}), None)
    parameters = list(inspect.signature(owner.__init__).parameters.values())[1:] if owner else []
    error = kind(*(_EXAMPLES[parameter.annotation] for parameter in parameters) if owner else ("some text",))
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), vars(copy)) == (kind, str(error), vars(error))
