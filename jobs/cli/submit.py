"""`python -m jobs submit VERB ...`: a verb as a job of a Ray cluster, through the cluster's job server.

A submission has a name made of what it would do, so whoever submits it again while it runs watches the same job.
The server runs a job once: another try is another job, of the next number.
"""

import asyncio
import contextlib
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from jobs.cli.options import STOPPED, Words
from jobs.cli.parse import parse_command
from jobs.telemetry import output
from pipeline import storage
from pipeline.datasets.signatures import RELEASE_KEY, public_text, read_release_keys, refuse_key_text

_log = logging.getLogger(__name__)
NEEDED = "RDM_NEEDS"  # names of the variables that a job is to find where it runs
_PACKAGES = ("pipeline", "model", "jobs")
# A runtime environment is kept and shown by the cluster: only what --env names goes along.
_PREFIXES = ("aws_", "wandb_", "mlflow_", "rdm_")  # of variables that are worth a line in the log when they stay here
_OF_HERE = frozenset({
    "aws_profile", "aws_default_profile", "aws_config_file", "aws_shared_credentials_file", "aws_ca_bundle",
    "wandb_dir", "wandb_cache_dir", "wandb_config_dir", "wandb_data_dir", "rdm_cache", NEEDED.casefold()})
_SECRET = re.compile("KEY|SECRET|TOKEN|PASS|PWD|CREDENTIAL|JWT|BEARER|COOKIE|SIGNATURE|PRIVATE|_SAS|DSN", re.IGNORECASE)
_STOP_S = 60  # what a driver is given to end in when its job is stopped; Ray's own 3 s are too few for a checkpoint
_PATIENCE_S = 300.0  # for a job server that does not answer
_SETTINGS = "settings.toml"
_OF_ALL_VERSIONS = {"rebuild", "versions", "rollback", "repair", "gc"}
_TALKATIVE = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk",
              "ray._private.runtime_env.packaging")


@dataclass(frozen=True)
class SubmitOptions:
    """Run a verb as a job of a Ray cluster: submit [flags] VERB .... Paths are those of the nodes."""

    examples: ClassVar = ("submit --wait embed mine --root s3://bucket/rdm",
                          "submit --address http://head:8265 --secret WANDB_API_KEY train myrun --dataset mine "
                          "--root s3://bucket/rdm")

    words: Annotated[tuple[str, ...], tyro.conf.Positional,
                     tyro.conf.arg(metavar="VERB ...", help="The verb with its options.")] = ()
    address: str = ""
    """URL of the cluster's dashboard, http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS or this
    machine."""
    wait: bool = False
    """Show the log, and exit as the verb exits: 0, 1, 2, or 130 if it was stopped. Ctrl-C does not stop the job."""
    retries: int = 0
    """With --wait: attempts after the first one fails or is lost. Invalid usage is not retried."""
    installed: bool = False
    """Send no code: the nodes have it, in an image."""
    env: Words = ()
    """Variable of this environment to pass to the job. No other one goes along. Repeat the flag for more."""
    secret: Words = ()
    """Name of a variable that the nodes must have. The job checks for it before it begins. Repeat the flag for
    more."""
    dry_run: bool = False
    """Print what would be submitted, and submit nothing."""


@dataclass(frozen=True)
class Submission:
    """What is asked of a cluster, whoever asks and however often."""

    name: str
    """The same for the same work: verb, what it is about, and a hash of its settings; an attempt adds its number."""
    words: tuple[str, ...]
    about: dict[str, str]
    variables: dict[str, str]
    config: str = ""
    """File of settings on this machine, which goes along."""


def run_submit(options: SubmitOptions) -> int:
    if not options.words or options.words[0] == "submit":
        raise ValueError("submit needs a verb\nhint: python -m jobs submit --wait embed NAME --root s3://...")
    _, inner = parse_command(options.words)
    submission = make_submission(options.words, inner, options)
    _check_work(options.words[0], inner)
    return run_submission(submission, options)


def _check_work(verb: str, inner: Any) -> None:
    """ValueError for what the job would refuse, as far as its settings tell, and its root if it is a folder here."""
    if verb == "pipeline":
        from jobs.cli.pipeline import check_pipeline
        check_pipeline(inner, here=False)
    elif verb == "rebuild":
        from jobs.cli.publish import check_rebuild
        check_rebuild(inner, here=False)
    elif verb == "train":
        from jobs.cli.model import check_train
        check_train(inner, here=False)


def make_submission(words: tuple[str, ...], inner: Any, options: SubmitOptions) -> Submission:
    """The submission of a verb whose `words` were parsed to `inner`; ValueError for what cannot work elsewhere."""
    sign = getattr(getattr(inner, "signing", None), "sign", "")
    refuse_key_text(sign)
    sources = getattr(getattr(inner, "shard", None), "source", ())
    for place in (inner.common.root, sign, getattr(inner, "out", ""), *sources):
        if storage.is_local(place) and place and not Path(storage.local_path(place)).is_absolute():
            raise ValueError(f"{place} is a folder of this machine, and the job's own folder does not outlive it\n"
                             f"hint: --root s3://bucket/..., or an absolute path that every node has")
    if any(map(_has_credentials, words)):
        raise ValueError("a URL in the command has a password or signature, or a parameter that may be one. The "
                         "cluster would keep and show it.\n"
                         "hint: let the nodes have the keys: --secret NAME tells that they must")
    if inner.common.config and _has_credentials(Path(inner.common.config).read_text(errors="replace")):
        raise ValueError(f"a URL in {inner.common.config} has a password or signature, or a parameter that may be one. "
                         f"The cluster would keep it.\nhint: let the nodes have the keys")
    from pipeline.stages.manifest import code_revision
    verb, config = words[0], inner.common.config
    if config:
        words = tuple(_SETTINGS if word == config else word.replace(f"--config={config}", f"--config={_SETTINGS}")
                      for word in words)
    about = {"verb": verb, "root": inner.common.root, "revision": code_revision(),
             "needs": ",".join(sorted(options.secret))} | _subject(verb, inner)
    parts = (verb, about.get("run") or about.get("dataset"), about.get("version"), _hash(verb, inner))
    name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part) for part in parts if part)
    return Submission(name, words, {key: value for key, value in about.items() if value},
                      variables(options.env, options.secret), config)


def _has_credentials(text: str) -> bool:
    return storage.redact_credentials(text) != text


def variables(named: Iterable[str], needed: Iterable[str]) -> dict[str, str]:
    """The variables of this environment for a job: those that are `named`, and no others.

    ValueError for a named one that is not set here, or is secret by its name (in capitals or not) or by its value. The
    job looks for those that are `needed` where it runs.
    """
    named, needed = sorted(set(named)), sorted(needed)
    passed = {name: public_text(read_release_keys()) if name == RELEASE_KEY else _public_value(name) for name in named}
    # The job would read versions that no one has signed.
    if RELEASE_KEY in os.environ and RELEASE_KEY not in named and RELEASE_KEY not in needed:
        raise ValueError(f"{RELEASE_KEY} is set here, and the job would not know it\n"
                         f"hint: --env {RELEASE_KEY} sends the public keys; or --secret {RELEASE_KEY}, if the nodes "
                         f"have it")
    known = {name.casefold() for name in (*named, *needed)}
    if stay := [name for name in sorted(os.environ) if name.casefold().startswith(_PREFIXES)
                and name.casefold() not in _OF_HERE | known]:
        _log.info("submit: %s stay here; --env NAME passes one that is no secret, and --secret NAME has the job check "
                  "that the nodes have it", ", ".join(stay))
    return passed | ({NEEDED: ",".join(needed)} if needed else {}) | {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}


def _public_value(name: str) -> str:
    if _SECRET.search(name):
        raise ValueError(f"--env {name}: is a secret by its name, which the cluster would keep and show\n"
                         f"hint: give it to the nodes, and --secret {name}")
    if name not in os.environ:
        raise ValueError(f"--env {name}: is not set here\nhint: set it, or leave --env {name} out")
    if _has_credentials(os.environ[name]):
        raise ValueError(f"--env {name}: its value has a password or signature, or a parameter that may be one, which "
                         f"the cluster would keep and show\nhint: give it to the nodes, and --secret {name}")
    return os.environ[name]


def check_needed() -> None:
    """ValueError if this is a job, and a variable is missing that whoever submitted it said the node has."""
    if missing := [name for name in os.environ.get(NEEDED, "").split(",") if name and not os.environ.get(name)]:
        raise ValueError(f"this node has no {', '.join(missing)} in its environment\n"
                         f"hint: infra/README.md tells how nodes get their secrets")


def run_submission(submission: Submission, options: SubmitOptions) -> int:
    """Submit, or join what runs already; with `wait` until it ended, with its exit code."""
    if options.retries and not options.wait:
        raise ValueError("--retries needs --wait: whoever waits tries again")
    if options.dry_run:
        output.print_json({"name": submission.name, "entrypoint": _entrypoint(submission), "metadata": submission.about,
                           "env_vars": submission.variables, "sends": _sent(submission, options)}, indent=1)
        return 0
    client = _client(options.address)
    number, info = _newest(client, submission)
    if info is not None and not info.status.is_terminal():
        _log.info("submit: %s-a%d runs already: %s", submission.name, number, _without_key(info.entrypoint))
    else:
        number = _start(client, submission, options, number + 1)
    if not options.wait:
        _say(f"{submission.name}-a{number}", number, _newest(client, submission)[1])
        return 0
    for retries_left in reversed(range(options.retries + 1)):
        info = _follow(client, submission, number)
        code = exit_code(info)
        # 2 is misuse, and somebody stopped what is STOPPED: neither gets better by another try.
        if code in {0, 2} or str(info and info.status) == "STOPPED" or not retries_left:
            break
        _log.warning("submit: %s-a%d ended with %d; it is tried again, %d more left", submission.name, number, code,
                     retries_left)
        number = _start(client, submission, options, number + 1)
    _say(f"{submission.name}-a{number}", number, info, code)
    return code


def exit_code(info: Any) -> int:
    """What the verb of a job ended with: 0, 1, 2, or 130 where it was stopped; 1 for what is none of its own codes.

    The server knows the code of a driver that ended by itself, not of one that it ended.
    """
    status = str(info.status) if info else "LOST"
    if status in {"SUCCEEDED", "STOPPED"}:
        return 0 if status == "SUCCEEDED" else STOPPED
    code = info.driver_exit_code if info else None
    if code in {1, 2, STOPPED}:
        return code
    reason = (info.message or str(info.error_type)) if info else "the cluster knows nothing of it: it was started anew"
    _log.error("submit: the driver ended with %s: %s", code, reason.strip().splitlines()[0])
    return 1


def _start(client: Any, submission: Submission, options: SubmitOptions, number: int) -> int:
    """Submit an attempt; whoever was quicker to submit the same one is joined."""
    from pipeline.stages.manifest import code_revision
    with tempfile.TemporaryDirectory(prefix="rdm-submit-") as scratch:
        folder = _folder(Path(scratch), submission, options)
        revision = {} if options.installed else {"RDM_REVISION": code_revision()}
        try:
            client.submit_job(submission_id=f"{submission.name}-a{number}", entrypoint=_entrypoint(submission),
                              metadata=submission.about | {"attempt": str(number)},
                              runtime_env={"env_vars": submission.variables | revision}
                              | ({"working_dir": str(folder)} if folder else {}))
            _log.info("submit: %s-a%d: %s", submission.name, number, _without_key(_entrypoint(submission)))
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise OSError(f"the cluster refused the job: {str(error).splitlines()[0]}") from None
            _log.info("submit: %s-a%d was submitted by somebody else meanwhile", submission.name, number)
    return number


def _follow(client: Any, submission: Submission, number: int) -> Any:
    """Copy the log of an attempt to stderr until it ended; what the server knows of it then, None for nothing."""
    from aiohttp import ClientError
    from ray.exceptions import RayError
    shown, alive = 0, time.monotonic()
    while True:
        with contextlib.suppress(ClientError, RayError, RuntimeError, OSError):  # what became of it is asked below
            shown = asyncio.run(_tail(client, f"{submission.name}-a{number}", shown))
        try:
            info = _jobs(client, submission).get(number)
            if info is None or info.status.is_terminal():
                return info
            alive = time.monotonic()
        except (RayError, RuntimeError, OSError) as error:
            if time.monotonic() - alive > _PATIENCE_S:
                raise OSError(f"the job server has not answered for {_PATIENCE_S:.0f} s: {error}\n"
                              f"hint: the job may go on; the same command watches it again") from None
        time.sleep(1)


async def _tail(client: Any, name: str, shown: int) -> int:
    """Show what is new of a log after `shown` characters; how much there is of it now."""
    seen = 0
    async for text in client.tail_job_logs(name):
        sys.stderr.write(output.plain_log(text[max(0, shown - seen):]))
        sys.stderr.flush()
        seen += len(text)
        shown = max(shown, seen)
    return shown


def _client(address: str) -> Any:
    """The client of a job server; ValueError if none answers, or it wants another token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # otherwise the one in the environment would win
    place = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    try:
        return JobSubmissionClient(place)
    except AuthenticationError:
        raise ValueError(f"the cluster at {place} wants another token\n"
                         f"hint: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE, or RAY_AUTH_TOKEN") from None
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no job server answers at {place}: {str(error).splitlines()[0]}\n"
                         f"hint: --address http://HEAD:8265, or a tunnel to it (infra/README.md)") from None


def _jobs(client: Any, submission: Submission) -> dict[int, Any]:
    """The attempts that the server knows, by their number."""
    attempt = re.compile(re.escape(submission.name) + r"-a(\d+)")
    matches = ((attempt.fullmatch(info.submission_id or ""), info) for info in client.list_jobs())
    return {int(match[1]): info for match, info in matches if match}


def _newest(client: Any, submission: Submission) -> tuple[int, Any]:
    return max(_jobs(client, submission).items(), default=(0, None), key=lambda pair: pair[0])


def _entrypoint(submission: Submission) -> str:
    return shlex.join(["python", "-m", "jobs", *submission.words])  # a shell takes it apart again


def _without_key(entrypoint: str) -> str:
    """A command for logs, without the path of the private key."""
    return re.sub(r"(--sign[ =])('[^']*'|\S+)", r"\1KEYFILE", entrypoint)


def _sent(submission: Submission, options: SubmitOptions) -> list[str]:
    return [*(() if options.installed else _PACKAGES), *((_SETTINGS,) if submission.config else ())]


def _folder(scratch: Path, submission: Submission, options: SubmitOptions) -> Path | None:
    """What the job is to find beside itself: this code, unless it is installed there, and the file of settings."""
    here = Path(__file__).resolve().parents[2]
    for name in () if options.installed else _PACKAGES:
        shutil.copytree(here / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
    if submission.config:
        shutil.copyfile(submission.config, scratch / _SETTINGS)
    return scratch if _sent(submission, options) else None


def _subject(verb: str, inner: Any) -> dict[str, str]:
    """What a verb is about, for people: run or dataset, its version, and what is there of it as far as can be seen."""
    if hasattr(inner, "run"):
        return {"run": inner.run} | ({"dataset": inner.dataset} if hasattr(inner, "dataset") else {})
    if not hasattr(inner, "dataset"):
        return {}
    from pipeline.datasets.dataset import Dataset
    dataset = Dataset.parse(inner.common.root, inner.dataset)
    if verb in _OF_ALL_VERSIONS:
        return {"dataset": dataset.name}
    subject = {"dataset": dataset.name, "version": dataset.version}
    # Whoever submits need not be let into the store, and would wait for minutes to find out.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if not storage.is_local(inner.common.root):
            return subject
        plan = storage.read_json(storage.join(dataset.folder("shards"), "plan.json"))
        subject["fingerprint"] = str(plan["fingerprint"])
    return subject


def _hash(verb: str, inner: Any) -> str:
    """Eight digits of the verb, its options and its settings. Those of the cluster are not part of them."""
    common = replace(inner.common, root=storage.normalize(inner.common.root), config="")
    document = asdict(replace(inner, common=common))
    for options in (document, document.get("settings", {})):
        options.pop("cluster", None)
    if "signing" in document:  # the path of the key goes into no name
        signing = document.pop("signing")
        document |= {name: bool(value) for name, value in signing.items() if value}
    return storage.digest([verb, document])[:8]


def _say(name: str, number: int, info: Any, code: int | None = None) -> None:
    output.print_json({"submission_id": name, "attempt": number, "status": str(info.status) if info else "LOST"}
                      | ({} if code is None else {"exit_code": code}))
