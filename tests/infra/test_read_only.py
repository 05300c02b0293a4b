"""Ray starts, runs a task and runs a job of this project as the pods of infra/kubernetes do.

The root file system is read-only, /tmp and the home are empty folders, the user is 1000 and has no capability.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
# Puts the interpreter, its packages and this program where user 1000 may read them, and closes everything else.
PREPARE = """
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt && mkdir /mnt/python /mnt/packages /mnt/code
mount --bind {python} /mnt/python && mount --bind {packages} /mnt/packages && mount --bind {code} /mnt/code
mount -t tmpfs tmpfs /home && mkdir /home/rdm && mount -o remount,ro /home
mount -t tmpfs -o mode=700,uid=1000 tmpfs /home/rdm
mount -t tmpfs -o mode=1777 tmpfs /tmp
for folder in / /mnt /mnt/python /mnt/packages /mnt/code; do mount -o remount,bind,ro $folder; done
cd /home/rdm
exec setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs --bounding-set=-all "$@"
"""
PROGRAM = """
import os, subprocess, sys, time
for folder in ("/", "/usr", "/var", "/var/tmp", "/run", "/etc", "/mnt/code"):
    try:
        open(f"{folder}/file", "w")
    except OSError:
        continue
    raise SystemExit(f"{folder} can be written to")
from PIL import Image
os.mkdir("/home/rdm/images")
for name in ("red", "green", "blue"):
    Image.new("RGB", (64, 64), name).save(f"/home/rdm/images/{name}.png")
subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=6893", "--dashboard-port=8793",
                "--ray-client-server-port=9993", "--num-cpus=2", "--object-store-memory=100000000"],
               check=True, stdout=sys.stderr)
import ray
ray.init("127.0.0.1:6893", log_to_driver=False)

@ray.remote
def look():
    rights = [line.split() for line in open("/proc/self/status") if line.startswith("Cap")]
    return os.getuid(), {value for _, value in rights}
assert ray.get(look.remote()) == (1000, {"0" * 16})
from ray.job_submission import JobSubmissionClient
client = JobSubmissionClient("http://127.0.0.1:8793")
words = "-m jobs shard colors --source /home/rdm/images --root /tmp/root --image-size 32"
job = client.submit_job(entrypoint=f"{sys.executable} {words}")
while not client.get_job_status(job).is_terminal():
    time.sleep(1)
print(client.get_job_status(job).value, client.get_job_logs(job))
print(sorted(os.listdir("/tmp/root/datasets/colors/v1/shards")), flush=True)
os._exit(0)  # the processes of Ray end with the first process
"""


@pytest.mark.slow
@pytest.mark.ray
def test_ray_runs_on_a_read_only_root_without_capabilities() -> None:
    if os.getuid() != 0 or not all(map(shutil.which, ("unshare", "setpriv", "mount"))) or subprocess.run(
            ["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    prefix = Path(sys.base_prefix)
    prepare = PREPARE.format(python=prefix, packages=sysconfig.get_path("purelib"), code=REPOSITORY)
    interpreter = Path("/mnt/python") / Path(os.path.realpath(sys.executable)).relative_to(prefix)
    environment = {"HOME": "/home/rdm", "PATH": "/usr/bin:/bin", "PYTHONPATH": "/mnt/code:/mnt/packages",
                   "LD_LIBRARY_PATH": "/mnt/python/lib", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7" * 64,
                   "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "150"}
    command = ["unshare", "-m", "-p", "-f", "--mount-proc", "sh", "-e", "-c", prepare, "sh", interpreter, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith("SUCCEEDED"), done.stdout[-3000:] + done.stderr[-3000:]
    assert "manifest.json" in done.stdout.splitlines()[-1]
