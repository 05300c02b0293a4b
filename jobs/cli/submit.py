"""`python -m jobs submit VERB ...`: a verb as a job of a Ray cluster, through the cluster's job server.

The name of a submission is derived from its work. The same command submitted again watches the running job.
The server runs a job once: each retry is a new job with the next number.
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
from jobs.cli.parse import ABOUT_ALL_VERSIONS, check_names, parse_command
from jobs.cluster.job_server import connect_job_server, raise_refusal
from jobs.telemetry import heartbeat, logs, output
from pipeline import storage
from pipeline.releases.signatures import RELEASE_KEY, public_text, read_release_keys, refuse_key_text

_log = logging.getLogger(__name__)
NEEDED = "RDM_NEEDS"  # names of the variables that the node of a job must have
_PACKAGES = ("pipeline", "model", "jobs")
# The cluster stores and shows a runtime environment, so a job gets only the variables of --env.
_PREFIXES = ("aws_", "wandb_", "mlflow_", "rdm_")  # the log names such variables if they are not passed
_OF_HERE = frozenset({
    "aws_profile", "aws_default_profile", "aws_config_file", "aws_shared_credentials_file", "aws_ca_bundle",
    "wandb_dir", "wandb_cache_dir", "wandb_config_dir", "wandb_data_dir", "rdm_cache", NEEDED.casefold()})
_SECRET = re.compile("KEY|SECRET|TOKEN|PASS|PWD|CREDENTIAL|JWT|BEARER|COOKIE|SIGNATURE|PRIVATE|_SAS|DSN", re.IGNORECASE)
_STOP_S = 60  # grace period of a stopped driver; the 3 s of Ray are too short for a checkpoint
_PATIENCE_S = 300.0  # for a job server that does not answer
_SETTINGS = "settings.toml"


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
    """Variable of this environment to pass to the job. No other one is passed. Repeat the flag for more."""
    secret: Words = ()
    """Name of a variable that the nodes must have. The job checks for it before it begins. Repeat the flag for
    more."""
    dry_run: bool = False
    """Print what would be submitted, and submit nothing."""


@dataclass(frozen=True)
class Submission:
    """A verb to run on a cluster. It is equal for equal work, for each user and each attempt."""

    name: str
    """The same for the same work: verb, run or dataset, and a hash of the settings. An attempt adds its number."""
    words: tuple[str, ...]
    about: dict[str, str]
    variables: dict[str, str]
    config: str = ""
    """File of settings on this machine, to send with the job."""


def run_submit(options: SubmitOptions) -> int:
    if not options.words or options.words[0] == "submit":
        raise ValueError("submit needs a verb\nhint: python -m jobs submit --wait embed NAME --root s3://...")
    _, inner = parse_command(options.words)  # the job may be the first to see the root
    check_names(options.words[0], inner)
    submission = make_submission(options.words, inner, options)
    _check_work(options.words, inner, mention=not options.wait)
    return run_submission(submission, options)


def _check_work(words: tuple[str, ...], inner: Any, *, mention: bool) -> None:
    """ValueError if the job would reject its settings, or its root if that is a local folder.

    `mention`: name settings of the demo. The job does so too, in the log that `--wait` shows.
    """
    verb = words[0]
    if verb == "pipeline":
        from jobs.cli.pipeline import check_pipeline
        check_pipeline(inner, here=False, mention=mention)
    elif verb == "rebuild":
        from jobs.checks.verbs import can_read
        from jobs.cli.publish import check_rebuild
        published = can_read(inner.common.root, here=False)
        check_rebuild(parse_command(words, read_root=published)[1], here=False, mention=mention)
    elif verb == "train":
        from jobs.cli.model import check_train
        check_train(inner, here=False, mention=mention)


def make_submission(words: tuple[str, ...], inner: Any, options: SubmitOptions) -> Submission:
    """The submission of a verb whose `words` were parsed to `inner`; ValueError if it only works on this machine."""
    sign = getattr(getattr(inner, "signing", None), "sign", "")
    refuse_key_text(sign)
    sources = getattr(getattr(inner, "shard", None), "source", ())
    for place in (inner.common.root, sign, getattr(inner, "out", ""), *sources):
        if storage.is_local(place) and place and not Path(storage.local_path(place)).is_absolute():
            raise ValueError(f"{place} is a relative path, and the working folder of a job is temporary\n"
                             f"hint: --root s3://bucket/..., or an absolute path that every node has")
    if any(map(_has_credentials, words)):
        raise ValueError("a URL in the command has a password or signature, or a parameter that may be one. The "
                         "cluster would keep and show it.\n"
                         "hint: give the keys to the nodes; --secret NAME checks that they have them")
    if inner.common.config and _has_credentials(Path(inner.common.config).read_text(errors="replace")):
        raise ValueError(f"a URL in {inner.common.config} has a password or signature, or a parameter that may be one. "
                         f"The cluster would keep it.\nhint: give the keys to the nodes")
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
    """The variables to pass to a job: only the `named` ones of this environment.

    ValueError if a named variable is not set here, or if its name (in any case) or its value looks secret. The job
    checks that its node has the `needed` ones.
    """
    named, needed = sorted(set(named)), sorted(needed)
    passed = {name: public_text(read_release_keys()) if name == RELEASE_KEY else _public_value(name) for name in named}
    # Without the keys, the job would accept unsigned versions.
    if RELEASE_KEY in os.environ and RELEASE_KEY not in named and RELEASE_KEY not in needed:
        raise ValueError(f"{RELEASE_KEY} is set here, but the job would not have it\n"
                         f"hint: --env {RELEASE_KEY} sends the public keys. Use --secret {RELEASE_KEY} if the nodes "
                         f"have it.")
    known = {name.casefold() for name in (*named, *needed)}
    if stay := [name for name in sorted(os.environ) if name.casefold().startswith(_PREFIXES)
                and name.casefold() not in _OF_HERE | known]:
        _log.info("submit: %s are not passed to the job. --env NAME passes a public one. --secret NAME checks that the "
                  "node has it", ", ".join(stay))
    return passed | ({NEEDED: ",".join(needed)} if needed else {}) | {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_S)}


def _public_value(name: str) -> str:
    if _SECRET.search(name):
        raise ValueError(f"--env {name}: its name looks secret, and the cluster would store and show its value\n"
                         f"hint: give it to the nodes, and --secret {name}")
    if name not in os.environ:
        raise ValueError(f"--env {name}: is not set here\nhint: set it, or leave --env {name} out")
    if _has_credentials(os.environ[name]):
        raise ValueError(f"--env {name}: its value looks secret (a password or a signature). The cluster would store "
                         f"and show it.\nhint: give it to the nodes, and --secret {name}")
    return os.environ[name]


def check_needed() -> None:
    """ValueError if this is a job, and the node lacks a variable that `--secret` named."""
    if missing := [name for name in os.environ.get(NEEDED, "").split(",") if name and not os.environ.get(name)]:
        raise ValueError(f"this node has no {', '.join(missing)} in its environment\n"
                         f"hint: docs/guides/operate/cluster.md describes how nodes get their secrets")


def run_submission(submission: Submission, options: SubmitOptions) -> int:
    """Submit a job, or join the running one. With `wait`: return its exit code after it has ended."""
    if options.retries and not options.wait:
        raise ValueError("--retries needs --wait: the waiting command retries the job")
    if options.dry_run:
        output.print_json({"name": submission.name, "entrypoint": _entrypoint(submission), "metadata": submission.about,
                           "env_vars": submission.variables, "sends": _sent(submission, options)}, indent=1)
        return 0
    client = connect_job_server(options.address)
    number, info = _newest(client, submission)
    if info is not None and not info.status.is_terminal():
        _log.info("submit: %s-a%d runs already: %s", submission.name, number, _without_key(info.entrypoint))
    else:
        number = _start(client, submission, options, number + 1)
    if not options.wait:
        _say(f"{submission.name}-a{number}", number, _newest(client, submission)[1])
        return 0
    for retries_left in reversed(range(options.retries + 1)):
        try:
            with heartbeat.doing("submit: waiting for the job"):
                info = _follow(client, submission, number)
        except KeyboardInterrupt:
            _log_left(f"{submission.name}-a{number}", options)
            return STOPPED
        code = exit_code(info)
        # A retry does not help after invalid usage (2), and a user stopped a job that is STOPPED.
        if code in {0, 2} or str(info and info.status) == "STOPPED" or not retries_left:
            break
        _log.warning("submit: %s-a%d ended with %d; retrying, %d retries left", submission.name, number, code,
                     retries_left)
        number = _start(client, submission, options, number + 1)
    _say(f"{submission.name}-a{number}", number, info, code)
    return code


def _log_left(name: str, options: SubmitOptions) -> None:
    """Log that the command stopped, and its job did not."""
    retries = ", without further retries" if options.retries else ""
    address = f"--address {options.address} " if options.address else ""
    logs.log_exit(f"stopped waiting; the job {name} continues on the cluster{retries}\n"
                  f"hint: the same command shows its log again; `ray job stop {address}{name}` stops it",
                  logging.WARNING, exit=STOPPED)


def exit_code(info: Any) -> int:
    """The exit code of the verb of a job: 0, 1, 2, or 130 if it was stopped. Any other code becomes 1.

    The server knows the code of a driver only if it did not stop the driver itself.
    """
    status = str(info.status) if info else "LOST"
    if status in {"SUCCEEDED", "STOPPED"}:
        return 0 if status == "SUCCEEDED" else STOPPED
    code = info.driver_exit_code if info else None
    if code in {1, 2, STOPPED}:
        return code
    reason = (info.message or str(info.error_type)) if info else "the cluster does not know it: it was restarted"
    _log.error("submit: the driver ended with %s: %s", code, (reason.strip().splitlines() or [status])[0])
    return 1


def _start(client: Any, submission: Submission, options: SubmitOptions, number: int) -> int:
    """Submit an attempt, or join it if another command has submitted it."""
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
                raise_refusal(error)
            _log.info("submit: another command has submitted %s-a%d", submission.name, number)
    return number


def _follow(client: Any, submission: Submission, number: int) -> Any:
    """Copy the log of an attempt to stderr until it ends. Returns its state on the server, None if it is unknown."""
    from aiohttp import ClientError
    from ray.exceptions import RayError
    shown, alive = 0, time.monotonic()
    while True:
        with contextlib.suppress(ClientError, RayError, RuntimeError, OSError):  # the state is read below
            shown = asyncio.run(_tail(client, f"{submission.name}-a{number}", shown))
        try:
            info = _jobs(client, submission).get(number)
            if info is None or info.status.is_terminal():
                return info
            alive = time.monotonic()
        except (RayError, RuntimeError, OSError) as error:
            if time.monotonic() - alive > _PATIENCE_S:
                raise OSError(f"the job server has not answered for {_PATIENCE_S:.0f} s: {error}\n"
                              f"hint: the job may still run; run the same command again to watch it") from None
        time.sleep(1)


async def _tail(client: Any, name: str, shown: int) -> int:
    """Show a log after its first `shown` characters, in whole lines. Returns its length in characters.

    A piece of a log may end inside a line, or inside the sequence of a color.
    """
    seen, rest = 0, ""
    async for text in client.tail_job_logs(name):
        lines, newline, rest = (rest + text[max(0, shown - seen):]).rpartition("\n")
        seen += len(text)
        _write_log(lines + newline)
    if output.plain_log(rest).strip():
        _write_log(f"{rest}\n")
    return max(shown, seen)


def _write_log(text: str) -> None:
    sys.stderr.write(output.plain_log(text))
    sys.stderr.flush()


def _jobs(client: Any, submission: Submission) -> dict[int, Any]:
    """The attempts that the server knows, by number."""
    attempt = re.compile(re.escape(submission.name) + r"-a(\d+)")
    matches = ((attempt.fullmatch(info.submission_id or ""), info) for info in client.list_jobs())
    return {int(match[1]): info for match, info in matches if match}


def _newest(client: Any, submission: Submission) -> tuple[int, Any]:
    return max(_jobs(client, submission).items(), default=(0, None), key=lambda pair: pair[0])


def _entrypoint(submission: Submission) -> str:
    return shlex.join(["python", "-m", "jobs", *submission.words])  # the server runs it in a shell


def _without_key(entrypoint: str) -> str:
    """A command for logs, without the path of the private key."""
    return re.sub(r"(--sign[ =])('[^']*'|\S+)", r"\1KEYFILE", entrypoint)


def _sent(submission: Submission, options: SubmitOptions) -> list[str]:
    return [*(() if options.installed else _PACKAGES), *((_SETTINGS,) if submission.config else ())]


def _folder(scratch: Path, submission: Submission, options: SubmitOptions) -> Path | None:
    """The working folder of the job: this code, unless the nodes have it, and the file of settings."""
    here = Path(__file__).resolve().parents[2]
    for name in () if options.installed else _PACKAGES:
        shutil.copytree(here / name, scratch / name, ignore=shutil.ignore_patterns("__pycache__"))
    if submission.config:
        shutil.copyfile(submission.config, scratch / _SETTINGS)
    return scratch if _sent(submission, options) else None


def _subject(verb: str, inner: Any) -> dict[str, str]:
    """The run or dataset of a verb, as metadata: name, and of a version that the user names its local fingerprint.

    Without a version some verbs work on v1, others on the version that is published when the job begins.
    """
    if hasattr(inner, "run"):
        return {"run": inner.run} | ({"dataset": inner.dataset} if hasattr(inner, "dataset") else {})
    if not hasattr(inner, "dataset"):
        return {}
    from pipeline.datasets.dataset import Dataset
    dataset = Dataset.parse(inner.common.root, inner.dataset)
    if verb in ABOUT_ALL_VERSIONS or "@" not in inner.dataset:
        return {"dataset": dataset.name}
    subject = {"dataset": dataset.name, "version": dataset.version}
    # The submitting machine may have no access to the store, and the timeout takes minutes.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if not storage.is_local(inner.common.root):
            return subject
        plan = storage.read_json(storage.join(dataset.folder("shards"), "plan.json"))
        subject["fingerprint"] = str(plan["fingerprint"])
    return subject


def _hash(verb: str, inner: Any) -> str:
    """Eight hexadecimal digits that depend on the verb, its options and its settings, except those of the cluster."""
    common = replace(inner.common, root=storage.normalize(inner.common.root), config="")
    document = asdict(replace(inner, common=common))
    for options in (document, document.get("settings", {})):
        options.pop("cluster", None)
    if "signing" in document:  # the name does not depend on the path of the key
        signing = document.pop("signing")
        document |= {name: bool(value) for name, value in signing.items() if value}
    return storage.digest([verb, document])[:8]


def _say(name: str, number: int, info: Any, code: int | None = None) -> None:
    output.print_json({"submission_id": name, "attempt": number, "status": str(info.status) if info else "LOST"}
                      | ({} if code is None else {"exit_code": code}))
