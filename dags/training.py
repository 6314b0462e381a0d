"""Train a model, roll it out, make it the champion.

Each task is a stage, `cvf <stage>`, and can be repeated by hand with the same two arguments. The gate compares the
challenger with the champion on the locked test set; the alias moves only after the live endpoint has proved what it serves.
"""

from airflow.sdk import DAG

from cv_factory_airflow.projects import dag_settings, projects, training_stages

for path, config in projects():
    schedule = config.schedule.training
    with DAG(f"{config.project}_training", doc_md=__doc__, **dag_settings(path, config, schedule)):
        training_stages(config)
