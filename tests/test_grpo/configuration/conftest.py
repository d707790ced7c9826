"""`launched`: command lines through `launch`, each in a process of its own, with a task in place of training."""

import textwrap

import pytest
from paths import ROOT

SCRIPT = """
import sys
from grpo.configuration.launch import launch
from job_task import task

if __name__ == "__main__":
    sys.exit(launch("train", task))
"""


@pytest.fixture
def launched(entry_points, tmp_path, tmp_path_factory):
    """launched(*words, task=CODE): what comes of a command line in tmp_path. CODE is the body of `task(config)`. waits=False: the
    command, started."""

    def launch(*words, task="return 0", before="", waits=True):
        folder = tmp_path_factory.mktemp("task")
        imports = "import json\nfrom grpo.config import run_folder, to_dict\nfrom grpo.configuration.launch import typed_words\n"
        (folder / "job_task.py").write_text(f"{imports}\n\ndef task(config):\n{textwrap.indent(task, '    ')}\n")
        (folder / "launched.py").write_text(SCRIPT)
        command = entry_points.start("launched", *words, path=(folder, tmp_path), folder=tmp_path, before=before,
                                     PYTHONPATH=f"{ROOT}:{folder}:{tmp_path}")
        return command.wait() if waits else command

    return launch
