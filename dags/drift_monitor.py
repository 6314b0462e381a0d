"""Compare what the endpoint is asked with what the model was trained on; retrain where that is decided.

The sensor waits, without keeping a worker busy, for a full window of captured requests. The report and the decision with
its reason are stored in any case; too few requests are "not enough data", never "no drift". A person who wants a retraining
triggers this DAG with a reason: that is a stored decision too. One that is decided in quiet hours waits for their end.
"""

from datetime import timedelta

from airflow.providers.standard.operators.python import ShortCircuitOperator
from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.providers.standard.sensors.date_time import DateTimeSensor
from airflow.sdk import DAG, Param, chain

from cv_factory_airflow.assets import drift_check
from cv_factory_airflow.operators import DecideOperator, DriftOperator
from cv_factory_airflow.projects import dag_settings, projects
from cv_factory_airflow.sensors import CaptureWindowSensor

REASON = Param(
    "", type="string", title="Reason", description="Retrain for this reason, whatever the rules say; empty: they decide"
)


def wants_retraining(decision: dict[str, bool]) -> bool:
    return decision["retrain"]


for path, config in projects():
    settings = dag_settings(path, config, config.schedule.drift_monitor)
    with DAG(f"{config.project}_drift_monitor", doc_md=__doc__, **settings | {"params": settings["params"] | {"why": REASON}}):
        quiet_hours = DateTimeSensor(
            task_id="wait_for_end_of_quiet_hours",
            target_time="{{ ti.xcom_pull(task_ids='decide')['not_before'] }}",
            mode="reschedule",
            poke_interval=300,
            timeout=timedelta(days=1, hours=1).total_seconds(),
        )
        chain(
            CaptureWindowSensor(task_id="wait_for_requests"),
            DriftOperator(task_id="drift", outlets=[drift_check(config.project)]),
            decide := DecideOperator(
                task_id="decide", why="{{ params.why }}", by="{{ dag_run.triggering_user_name or 'somebody in Airflow' }}"
            ),
            ShortCircuitOperator(task_id="wants_retraining", python_callable=wants_retraining, op_args=[decide.output]),
            quiet_hours,
            TriggerDagRunOperator(
                task_id="retrain",
                trigger_dag_id=f"{config.project}_retraining",
                trigger_run_id="{{ ti.xcom_pull(task_ids='decide')['retraining'] }}",
                conf="{{ params | tojson }}",  # type: ignore[arg-type]  # JSON text, which it parses
                skip_when_already_exists=True,  # a second try after a crash finds the run that the first one triggered
            ),
        )
