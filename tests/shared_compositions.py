"""What Hydra has composed from the files of configs/ is kept for all command lines of this process and of those forked from it:
the files do not change while tests run, and composing them is the longest part of reading a command line."""

import os

from grpo.configuration.launch import CONFIG_DIR, Loader

SHARED: dict[tuple, object] = {}


def share() -> None:
    make, load = Loader.__init__, Loader.load_configuration

    def init(self, search_path):
        make(self, search_path)
        if {entry.path for entry in search_path.get_path()} == {"pkg://hydra.conf", str(CONFIG_DIR), "structured://"}:
            self.composed = SHARED

    def load_configuration(self, *arguments, **keywords):
        cfg = load(self, *arguments, **keywords)
        cfg.hydra.runtime.cwd = os.getcwd()  # all that depends on more than the files
        return cfg

    Loader.__init__, Loader.load_configuration = init, load_configuration
