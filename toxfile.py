"""What tox.ini cannot say: the plugins are the folders of plugins/, and several environments share one directory."""

from __future__ import annotations

from pathlib import Path

from tox.config.sets import ConfigSet
from tox.plugin import impl
from tox.tox_env.api import ToxEnv
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner
from tox.tox_env.register import ToxEnvRegister

PLUGINS = sorted(path.parent for path in Path(__file__).parent.glob("plugins/*/pyproject.toml"))


class SharedRunner(VirtualEnvRunner):
    """Runs environments of the same `env_dir` and `deps`. tox itself makes the directory anew for each name."""

    @staticmethod
    def id() -> str:
        return "shared"

    def _setup_env(self) -> None:
        own = {"name": self.conf.name, "type": type(self).__name__}
        with self.cache.compare(own, ToxEnv.__name__):
            pass
        super()._setup_env()


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    register.add_run_env(SharedRunner)


@impl
def tox_add_core_config(core_conf: ConfigSet) -> None:
    core_conf.add_constant(
        "plugins", "the plugins as editable requirements", "\n".join(f"-e {path}" for path in PLUGINS)
    )
