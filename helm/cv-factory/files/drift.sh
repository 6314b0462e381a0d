# One drift check and its decision. JOB is the same for each try of a job, so what is done is not done again.
run="$RUNS/cron.$JOB"
cvf drift --config "$PROJECT" --run "$run"
cvf decide --config "$PROJECT" --run "$run"
