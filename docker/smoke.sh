#!/bin/sh
# Builds the images, starts the whole compose project, and uses it as a client would: compile a task
# from text, generate, restart the server, kill Redis, look at Prometheus and Grafana, tear down.
# Needs a Docker engine with compose, and curl. Usage: docker/smoke.sh [--cuda]
# Ports: SERVER_PORT, PROMETHEUS_PORT, GRAFANA_PORT. KEEP=1 leaves everything running.
# TORCH and PIP_ARGS are build arguments (see .env.example); every wait is bounded.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
SERVER_PORT=${SERVER_PORT:-18000}
PROMETHEUS_PORT=${PROMETHEUS_PORT:-19090}
GRAFANA_PORT=${GRAFANA_PORT:-13000}
api=http://127.0.0.1:$SERVER_PORT
task=smoke
device=cpu
case "${1:-}" in
  --cuda) device=cuda ;;
  '') ;;
  *) echo "usage: $0 [--cuda]" >&2; exit 2 ;;
esac

say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
secret() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }

# compose SECONDS ARGUMENTS...
compose() {
  limit=$1
  shift
  if [ "$device" = cuda ]; then
    set -- -f "$here/compose.cuda.yaml" "$@"
  fi
  timeout "$limit" docker compose --project-name prefixd-smoke --env-file "$work/env" \
    -f "$here/compose.yaml" "$@"
}

# retry SECONDS COMMAND...: until the command succeeds
retry() {
  left=$1
  shift
  until "$@"; do
    left=$((left - 1))
    [ "$left" -gt 0 ] || return 1
    sleep 1
  done
}

request() { curl --silent --show-error --fail-with-body --max-time 120 "$@"; }
post() { request --header 'content-type: application/json' --data "$2" "$api$1"; }

cleanup() {
  status=$?
  trap - EXIT INT TERM
  if [ "$status" -ne 0 ]; then
    compose 30 ps --all || true
    compose 30 logs --no-color --tail 60 || true
  fi
  if [ "${KEEP:-}" = 1 ]; then
    echo "left running; its settings: $work/env"
  else
    compose 180 down --volumes --remove-orphans || true
    rm -rf "$work"
  fi
  exit "$status"
}

generate() {
  answer=$(post "/v1/tasks/$task/generate" \
    '{"inputs": "The capital of France is", "parameters": {"max_new_tokens": 8}}') \
    || fail "generate: $answer"
  text=$(printf '%s' "$answer" | sed -nE 's/.*"generated_text": ?"(([^"\\]|\\.)*)".*/\1/p')
  [ -n "$text" ] || fail "no text was generated: $answer"
  printf '%s' "$text"
}

same_text() {
  again=$(generate) || exit 1
  [ "$again" = "$first" ] || fail "$1: the task says \"$again\", it said \"$first\""
}

target_is_up() {
  request --get "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query" \
    --data-urlencode 'query=sum(up{job="prefixd"})' | grep -q '"1"\]'
}

counted() {
  request --get "http://127.0.0.1:$PROMETHEUS_PORT/api/v1/query" \
    --data-urlencode 'query=sum(vllm:generation_tokens_total) > 0' | grep -q '"value"'
}

for tool in docker curl timeout; do
  command -v "$tool" >/dev/null || fail "$tool is not installed"
done
docker compose version >/dev/null 2>&1 || fail "docker has no compose plugin"
docker info >/dev/null 2>&1 || fail "no Docker engine answers: is the daemon running, may you use it?"

work=$(mktemp -d)
trap cleanup EXIT
trap 'exit 130' INT TERM
grafana_password=$(secret)
cat >"$work/env" <<EOF
REDIS_PASSWORD=$(secret)
GRAFANA_PASSWORD=$grafana_password
SERVER_PORT=$SERVER_PORT
PROMETHEUS_PORT=$PROMETHEUS_PORT
GRAFANA_PORT=$GRAFANA_PORT
EOF

say "build ($device)"
compose 3600 build || fail "the image does not build"

say "start"
compose 900 up --detach --wait --wait-timeout 840 || fail "not every service became healthy"
request "$api/readyz" >/dev/null || fail "/readyz does not answer 200 on $api"

say "compile a task from text"
answer=$(post "/v1/tasks/$task/compile" '{"text": "You answer in one short sentence."}') \
  || fail "compile: $answer"

say "generate"
first=$(generate) || exit 1
echo "   $first"

say "stop the server: it drains and exits with 0"
container=$(compose 30 ps --quiet prefixd)
compose 120 stop prefixd
code=$(docker inspect --format '{{.State.ExitCode}}' "$container")
[ "$code" = 0 ] || fail "the server exited with $code on SIGTERM"

say "start it again: the task is still there"
compose 900 up --detach --wait --wait-timeout 840 prefixd || fail "the server did not come back"
same_text "after a restart"

say "kill Redis and start everything anew: the task is still there"
compose 60 kill --signal KILL redis
compose 900 up --detach --wait --wait-timeout 840 || fail "Redis or the server did not come back"
compose 120 restart prefixd
compose 900 up --detach --wait --wait-timeout 840 prefixd || fail "the server did not come back"
same_text "after killing Redis"

say "Prometheus reads the server"
retry 90 target_is_up || fail "Prometheus has no target of job prefixd that is up"
retry 90 counted || fail "Prometheus has not seen the generated tokens"

say "Grafana has the dashboard"
request --user "admin:$grafana_password" \
  "http://127.0.0.1:$GRAFANA_PORT/api/dashboards/uid/prefixd" | grep -q '"title":"prefixd"' \
  || fail "Grafana has no dashboard with the uid prefixd"

say "all good"
