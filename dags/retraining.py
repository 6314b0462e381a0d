"""Train again, on the project's own data and on the captured requests whose labels have arrived.

The drift monitor triggers it; a person can as well. The stages are those of the training: `training.warm_start` and
`data.pseudo_labels` say how it begins and what it may learn from. A refused challenger leaves champion and endpoint
as they are.
"""

from airflow.sdk import DAG

from cv_factory_airflow.projects import dag_settings, projects, training_stages

for path, config in projects():
    with DAG(f"{config.project}_retraining", doc_md=__doc__, **dag_settings(path, config)):
        training_stages(config, settings={"data.include_captures": True})
