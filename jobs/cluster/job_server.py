"""The job server of a cluster: its client, and its refusals in plain words."""

import logging
import os
from typing import Any, NoReturn

from pipeline import storage

_TALKATIVE = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk",
              "ray._private.runtime_env.packaging")
_NO_AGENT = "No available agent"  # the answer of a dashboard whose agent did not start


def connect_job_server(address: str) -> Any:
    """The client of a job server; ValueError if it does not answer or rejects the token."""
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # the environment would override an argument
    place = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    try:
        return JobSubmissionClient(place)
    except AuthenticationError:
        raise ValueError(f"the cluster at {place} rejected the token\n"
                         f"hint: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE; `ray start` reads the token "
                         f"from ~/.ray/auth_token, infra/one-machine.sh up prints its file") from None
    except (OSError, RuntimeError) as error:
        raise ValueError(f"no job server answers at {place}: {storage.first_line(error)}\n"
                         f"hint: --address http://HEAD:8265, or a tunnel to it (docs/guides/operate/kubernetes.md)"
                         ) from None


def raise_refusal(error: RuntimeError) -> NoReturn:
    """OSError for a job that the server did not take, with what helps."""
    if _NO_AGENT in str(error):
        raise OSError("the cluster refused the job: the agent on its head does not answer. Another Ray of that machine "
                      "may use its port, 52365\n"
                      "hint: end the other Ray and start the head again, or see docs/guides/operate/cluster.md"
                      ) from None
    raise OSError(f"the cluster refused the job: {storage.first_line(error)}\n"
                  f"hint: compare the versions of Ray here and on the head; dashboard_JobHead.log there has the reason"
                  ) from None
