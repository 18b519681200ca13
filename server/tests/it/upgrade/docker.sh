#!/usr/bin/env bash
# A stand-in for `docker` with Compose v2. Keeps the state of each container in a directory in $STATE/containers, and
# logs the calls that change something to $STATE/calls. Like Compose v2:
#
# - `ps` lists only running containers, unless it is called with --all. It then also lists the containers of `run`.
# - `up --scale` also counts stopped containers. It removes the containers with the highest numbers if there are too
#   many, and starts the others.
#
# A container of the image in $STATE/unhealthy does not become healthy. If $STATE/interrupt contains a command, the
# script that calls it is killed after this command.
set -euo pipefail
containers=$STATE/containers
mkdir -p "$containers"

log() { echo "$*" >> "$STATE/calls"; }
interrupt_after() {
  [ "$(cat "$STATE/interrupt" 2> /dev/null)" = "$1" ] || return 0
  rm "$STATE/interrupt"
  kill -KILL "$PPID"
}
# Prints the IDs of all containers of the service that are not from `run`, in the order of their numbers.
replicas() {
  local it
  for it in "$containers"/*/; do
    [ -e "$it/number" ] && echo "$(< "$it/number") $(basename "$it")"
  done | sort -n | cut -d ' ' -f 2
}
create() {
  local created id
  created=$(($(cat "$STATE/created" 2> /dev/null || echo 0) + 1))
  echo "$created" > "$STATE/created"
  id=$(printf '%064x' "$created")
  mkdir "$containers/$id"
  echo "$image" > "$containers/$id/image"
  echo "$status" > "$containers/$id/status"
  cp "$environment" "$containers/$id/environment"
  echo "$id"
}

compose() {
  environment=/dev/null
  while [[ $1 == --* ]]; do
    [ "$1" != --env-file ] || environment=$2
    shift 2
  done
  local setting=${QUOTA_IMAGE:-$(sed -n 's/^QUOTA_IMAGE=//p' "$environment")}
  image=${setting:-quota:local}
  local command=$1 all='' count='' id number=1 seen=0
  shift
  case $command in
    config)
      setting=${QUOTA_REPLICAS:-$(sed -n 's/^QUOTA_REPLICAS=//p' "$environment")}
      printf 'name: quota\nservices:\n  caddy:\n    image: caddy\n  quota:\n    deploy:\n      replicas: %s\n' "${setting:-2}"
      printf '    image: %s\n  redis:\n    image: redis\n' "$image"
      ;;
    ps)
      [[ $* != *--all* ]] || all=1
      for id in "$containers"/*/; do
        if [ ! -e "$id/status" ]; then
          continue
        elif [ -n "$all" ] || { [ -e "$id/number" ] && [ "$(< "$id/status")" = running ]; }; then
          basename "$id"
        fi
      done
      ;;
    up)
      log "up $*"
      while [ $# != 0 ]; do
        [ "$1" != --scale ] || count=${2#quota=}
        shift
      done
      for id in $(replicas); do
        number=$(($(< "$containers/$id/number") + 1))
        seen=$((seen + 1))
        if [ "$seen" -gt "$count" ]; then
          rm -r "${containers:?}/$id"
        else
          echo running > "$containers/$id/status"
        fi
      done
      for ((; seen < count; seen++)); do
        status=running
        echo "$number" > "$containers/$(create)/number"
        number=$((number + 1))
      done
      interrupt_after up
      ;;
    run)
      log "run $* of $image"
      [ "$(cat "$STATE/unmigratable" 2> /dev/null)" != "$image" ]
      ;;
    *) exit 1 ;;
  esac
}

case $1 in
  compose)
    shift
    [ "$1" = version ] || compose "$@"
    ;;
  image) echo "sha256:${*: -1}" ;;
  inspect)
    it=$containers/${*: -1}
    [ -d "$it" ] || exit 1
    case $3 in
      *Health*) if [ "$(< "$it/image")" = "$(cat "$STATE/unhealthy" 2> /dev/null)" ]; then echo starting; else echo healthy; fi ;;
      *oneoff*) if [ -e "$it/number" ]; then echo False; else echo True; fi ;;
      *.State.Status*) cat "$it/status" ;;
      *.Image*) echo "sha256:$(< "$it/image")" ;;
      *) exit 1 ;;
    esac
    ;;
  stop)
    log "$*"
    echo exited > "$containers/${*: -1}/status"
    interrupt_after stop
    ;;
  rm)
    log "$*"
    rm -r "${containers:?}/${*: -1}"
    ;;
  logs) ;;
  *) exit 1 ;;
esac
