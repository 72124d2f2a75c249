#!/bin/sh
# Extract, train and benchmark as three jobs of a Ray cluster that runs, from any machine that reaches its dashboard.
#
#   ray get-auth-token --generate                                  # once; the same ~/.ray/auth_token on every node
#   RAY_AUTH_MODE=token ray start --head --dashboard-host 0.0.0.0  # on the others: ray start --address HEAD:6379
#   sh submit.sh http://HEAD:8265 s3://bucket/work http://mlflow:5000
#
# Give it again after a failure: what is done is left alone.
set -eu
head=$1 workspace=$2 mlflow=$3
export RAY_AUTH_MODE=token

submit() {
    ray job submit --address "$head" -- cafe -w "$workspace" "$@" --address auto
}

submit extract rafdb ferplus affectnet sfew mma --views 61
submit train --source rafdb --method cafe --num-workers 4 --gpu --mlflow-uri "$mlflow"
submit benchmark table1.toml --mlflow-uri "$mlflow"
