"""Every setting of the platform and its default: one YAML file is one project.

``load`` reads a file into :class:`ProjectConfig`; wrong fields are reported as ``file: path: what was given; what is
allowed``. Choices are discriminated unions on ``kind``. Relative paths are relative to ``CVF_HOME`` (default: the working
directory).
"""

from cv_factory_ops.config.project import ProjectConfig, as_uri, home, load
from cv_factory_ops.config.tree import explain

__all__ = ["ProjectConfig", "as_uri", "explain", "home", "load"]
