"""Run the champion over a batch of studies: the folder in `batch.path`, or the project's own source."""

from airflow.sdk import DAG

from cv_factory_airflow.operators import PredictOperator
from cv_factory_airflow.projects import dag_settings, projects

for path, config in projects():
    with DAG(
        f"{config.project}_batch_inference", doc_md=__doc__, **dag_settings(path, config, config.schedule.batch_inference)
    ):
        PredictOperator(task_id="predict")
