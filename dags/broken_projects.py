"""No DAG: the import error that the UI shows for this file tells what is wrong with a project's YAML.

An error raised by the other files would take the DAGs of all projects with it.
"""

from cv_factory_airflow.projects import broken_projects
from cv_factory_ops.errors import ConfigError

if broken := broken_projects():
    raise ConfigError("\n".join(str(error) for error in broken))
