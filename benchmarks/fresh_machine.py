"""README's first command on a machine that has nothing yet: how long the installation takes, and then the first answer.

    python benchmarks/fresh_machine.py

In a new directory: a clone of what is committed, a new virtual environment, the installation as README has it. The answer
then comes with a new home directory and without network, twice: the second start finds the compiled programs of the first.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]


def main() -> None:
    first = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert first is not None
    environment, install, ask = (shlex.split(part) for part in first[1].split("&&"))
    with tempfile.TemporaryDirectory() as place:
        clone, home = pathlib.Path(place) / "clone", pathlib.Path(place) / "home"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        seconds = timed(environment, clone)[0] + timed(install, clone)[0]
        print(f"installation: {seconds:.1f} s", flush=True)
        offline = ["unshare", "--net", "--map-root-user"] if shutil.which("unshare") else []
        for which in ("first", "second"):
            seconds, answer = timed([*offline, *ask], clone, HOME=str(home))
            print(f"{which} answer: {seconds:.1f} s: {answer.strip()}", flush=True)


def timed(command: list[str], place: pathlib.Path, **more: str) -> tuple[float, str]:
    begin = time.perf_counter()
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=place, env=kept | more, check=True, stdout=subprocess.PIPE, text=True)
    return time.perf_counter() - begin, done.stdout


if __name__ == "__main__":
    main()
