"""A directory that is replaced is the old or the new one, wherever the process is killed."""

import os
import subprocess
import sys

import pytest

from qwen_dist.errors import CheckpointError
from qwen_dist.storage.staging import StagingDirectory

# Replaces the directory; the process ends at the n-th operation on files that Python reports to its audit hooks.
KILLED = """
import os, sys
from qwen_dist.storage.staging import StagingDirectory

def replace(target, value):
    staging = StagingDirectory(target)
    with staging.created():
        for name in ("a", "b", "c/d"):
            staging.write(name, value * 1000)
        staging.commit()

target, count, last = sys.argv[1], 0, 10**9
def end(event, arguments):
    global count
    count += event in ("open", "ctypes.dlopen", "ctypes.dlsym") or event.startswith(("os.", "shutil."))
    if count > last:
        os._exit(9)

replace(target, b"1")
with open(f"{target}/card.md", "w") as file:
    file.write("mine")
for last in range(1000):
    child = os.fork()
    if not child:
        sys.addaudithook(end)
        replace(target, b"2")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    contents = {name: open(f"{target}/{name}", "rb").read() for name in ("a", "b", "c/d")}
    value = contents["a"][:1]
    assert value in b"12" and set(contents.values()) == {value * 1000} and open(f"{target}/card.md").read() == "mine"
    print(last, code, value.decode())
    if code == 0:
        break
    replace(target, b"1")
print(*sorted(os.listdir(os.path.dirname(target))))
"""


def test_killed_at_every_step(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "x"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *steps, names = done.stdout.splitlines()
    values = [line.split()[2] for line in steps]
    assert len(steps) > 30 and values[0] == "1" and values == sorted(values)
    assert values.count("2") > 5  # the old one is removed after the new one has its name
    assert names == "x"


def test_a_directory_that_is_not_ours_stays(tmp_path):
    (tmp_path / ".x.saving").mkdir()
    (tmp_path / ".x.saving" / "diary.txt").touch()
    staging = StagingDirectory(tmp_path / "x")
    with pytest.raises(CheckpointError, match="was not made by qwen-dist"), staging.created():
        pass
    assert sorted(os.listdir(tmp_path)) == [".x.saving"] and os.listdir(tmp_path / ".x.saving") == ["diary.txt"]
