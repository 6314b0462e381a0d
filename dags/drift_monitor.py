"""Compare what the endpoint is asked with what the model was trained on; retrain where that is decided.

The sensor waits, without keeping a worker busy, for a full window of captured requests. The report and the decision with
its reason are stored in any case; too few requests are "not enough data", never "no drift".
"""

from airflow.providers.standard.operators.python import ShortCircuitOperator
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import DAG, chain

from cv_factory_airflow.operators import DecideOperator, DriftOperator
from cv_factory_airflow.projects import dag_settings, projects
from cv_factory_airflow.sensors import CaptureWindowSensor


def wants_retraining(decision: dict[str, bool]) -> bool:
    return decision["retrain"]


for path, config in projects():
    schedule = config.schedule.drift_monitor
    with DAG(f"{config.project}_drift_monitor", doc_md=__doc__, **dag_settings(path, config, schedule)):
        chain(
            CaptureWindowSensor(task_id="wait_for_requests"),
            DriftOperator(task_id="drift"),
            decide := DecideOperator(task_id="decide"),
            ShortCircuitOperator(task_id="wants_retraining", python_callable=wants_retraining, op_args=[decide.output]),
            TriggerDagRunOperator(
                task_id="retrain",
                trigger_dag_id=f"{config.project}_retraining",
                trigger_run_id="drift__{{ run_id }}",
                conf="{{ params | tojson }}",  # type: ignore[arg-type]  # JSON text, which it parses
                skip_when_already_exists=True,  # a second try after a crash finds the run that the first one triggered
            ),
        )
