"""The threat suite: attacks of hostile code on the sandbox (attacks.py has them), as this user and as another."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

sys.path.insert(0, str(Path(__file__).parent))
import attacks  # noqa: E402

ATTACKS = attacks.KNOWN | attacks.OWN
ANOTHER = 12345  # a user's number that nobody has
PYTHONS = (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3")


def children() -> set[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat=,args="], capture_output=True, text=True).stdout
    return {
        int(line.split()[0])
        for line in listed.splitlines()
        if "zygote.py" in line and str(os.getpid()) in line.split()[:2]
    }


@pytest.fixture(scope="module")
def came(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "keep").write_text("kept")
    before = len(os.listdir("/proc/self/fd"))
    found = attacks.run_all(str(folder))
    found["left"] = {
        "files": sorted(os.listdir(folder)),
        "kept": (folder / "keep").read_text(),
        "descriptors": len(os.listdir("/proc/self/fd")) - before,
        "processes": children(),
    }
    return found


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_stopped_or_harmless(came, name):
    assert came[name] in ATTACKS[name][1]


def test_the_attacks_leave_no_file_descriptor_or_process(came):
    assert came["left"] == {"files": ["keep"], "kept": "kept", "descriptors": 0, "processes": set()}


def test_there_are_as_many_attacks_as_promised():
    assert len(attacks.KNOWN) >= 38 and len(attacks.OWN) >= 20


def python_of_another_user() -> str | None:
    """A Python that another user can start, if this user may start it for one."""
    if os.getuid() != 0:
        return None
    for python in PYTHONS:
        if shutil.which(python) is not None:
            try:
                code = f"import sys; assert sys.version_info >= (3, 11); open({str(ROOT / 'grpo/sandbox/pool.py')!r})"
                done = subprocess.run(
                    [python, "-c", code], user=ANOTHER, group=ANOTHER, extra_groups=[], capture_output=True
                )
            except PermissionError:
                continue
            if done.returncode == 0:
                return python
    return None


def test_as_another_user_the_attacks_are_stopped_too(tmp_path_factory):
    python = python_of_another_user()
    if python is None:
        pytest.skip("takes root, a Python that another user may start, and a checkout that it may read")
    folder = tmp_path_factory.mktemp("attacked-by-another")
    (folder / "keep").write_text("kept")
    for path in (folder, folder.parent, folder.parent.parent):
        path.chmod(0o755)
    os.chown(folder, ANOTHER, ANOTHER)
    os.chown(folder / "keep", ANOTHER, ANOTHER)
    done = subprocess.run(
        [python, str(Path(attacks.__file__)), str(folder)],
        user=ANOTHER,
        group=ANOTHER,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["user"] == ANOTHER and result["capabilities"] == ["0" * 16] * 2
    assert {name: came for name, came in result["came"].items() if came not in ATTACKS[name][1]} == {}
    assert os.listdir(folder) == ["keep"] and (folder / "keep").read_text() == "kept"
    listed = subprocess.run(["ps", "-u", str(ANOTHER), "-o", "pid="], capture_output=True, text=True).stdout
    assert listed.split() == []
