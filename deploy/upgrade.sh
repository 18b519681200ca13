#!/usr/bin/env bash
# Replaces the running replicas with replicas of a new image or with new settings, without causing failed requests:
# applies migrations, starts the new replicas, waits until they are healthy, and then stops the old ones. Compose has no
# built-in rolling update: `up` stops all replicas whose settings have changed at the same time.
#
#   deploy/upgrade.sh                           applies the settings in deploy/.env.prod, or in the file in ENV_FILE
#   QUOTA_IMAGE=quota:0.2.0 deploy/upgrade.sh   upgrades to this image. Set QUOTA_IMAGE in .env.prod afterward, or the
#                                               next `up` starts the previous version again
#
# The number of new replicas is QUOTA_REPLICAS. Caddy, PostgreSQL and Redis are not restarted.
#
# If a new replica does not become healthy, the old replicas keep running and the new ones are removed. If the script is
# interrupted, run it again. Replicas that are stopped when the script starts are removed.
set -euo pipefail

fail() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# Without the settings, replicas would start with the defaults, for example without billing.
environment=${ENV_FILE:-$(dirname "${BASH_SOURCE[0]}")/.env.prod}
[ -f "$environment" ] || fail "there is no file $environment; set ENV_FILE to the file with the settings"
environment=$(realpath "$environment")
cd "$(dirname "${BASH_SOURCE[0]}")"
if docker compose version > /dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
project=${PROJECT:-$(sed -n 's/^COMPOSE_PROJECT_NAME=//p' "$environment" | tail -1)}
compose+=(--file "$PWD/compose.prod.yml" --project-name "${project:-quota}" --env-file "$environment")

# Earlier versions turned billing on with this setting. Without the new settings, billing would be off.
if grep -q '^QUOTA_BILLING=.' "$environment"; then
  fail "$environment: replace QUOTA_BILLING with STRIPE_SECRET_KEY_FILE and STRIPE_WEBHOOK_SECRET_FILE (see .env.prod.example)"
fi

# A new version may need additional secrets. Existing secrets are kept.
./secrets.sh > /dev/null

# Prints the IDs of all replicas, including stopped ones: when Compose scales, it counts and starts these too. The list
# of Compose also contains the containers of `compose run`, which are not replicas.
list_replicas() {
  local id all
  all=$("${compose[@]}" ps --all --quiet quota) || return
  for id in $all; do
    [ "$(inspect '{{index .Config.Labels "com.docker.compose.oneoff"}}' "$id")" = True ] || echo "$id"
  done
}
inspect() { docker inspect --format "$1" "$2"; }
health() { inspect '{{.State.Health.Status}}' "$1"; }
is_old() { [[ " ${old[*]} " == *" $1 "* ]]; }

all=$(list_replicas)
running=() stopped=()
for id in $all; do
  case $(inspect '{{.State.Status}}' "$id") in
    created | exited | dead) stopped+=("$id") ;;
    *) running+=("$id") ;;
  esac
done
if [ ${#running[@]} = 0 ]; then
  fail "no replica is running; start one with: ${compose[*]} up --detach"
fi
# Compose reads the settings from the environment and the file, and knows their defaults.
config=$("${compose[@]}" config)
setting() { sed -n "/^  quota:\$/,/^  [^ ]/s/^ *$1: //p" <<< "$config"; }
image=$(setting image)
replicas=$(setting replicas)
[[ $replicas =~ ^[1-9][0-9]*$ ]] || fail "QUOTA_REPLICAS must be at least 1"
# Identifies the settings, including those in files, and the secrets.
fingerprint=$({ echo "$config"; sha256sum secrets/*; } | sha256sum | cut -d ' ' -f 1)
image_id() { docker image inspect --format '{{.Id}}' "$image"; }

# A replica does not serve requests while it applies migrations, and a long migration would exceed the time limit below.
# Migrations are safe while the previous version is still running.
"${compose[@]}" run --rm --no-deps -T quota migrate < /dev/null ||
  fail "the migrations failed; no replica was started or stopped"

# This file contains the number of replicas before the upgrade, the fingerprint of the new settings, and the IDs of the
# old replicas, in case this run is interrupted. Without it, the next run would mistake this run's new replicas for old
# ones.
progress=.upgrade.${project:-quota}
old=() new=() kept=0
if [ -f "$progress" ] && grep -qFf <(tail -n +2 "$progress") <<< "$all"; then
  read -r before interrupted < "$progress"
  expected=$(image_id 2> /dev/null || true)
  if [ "$interrupted" != "$fingerprint" ]; then expected=; fi
  for id in "${running[@]}"; do
    # Replicas that the interrupted run started with another image or other settings are old too.
    if grep -qF "$id" "$progress" || [ "$(inspect '{{.Image}}' "$id")" != "$expected" ] || [ "$kept" = "$replicas" ]; then
      old+=("$id")
    else
      kept=$((kept + 1))
    fi
  done
else
  before=${#running[@]}
  old=("${running[@]}")
fi
if [ "$before" != "$replicas" ]; then
  echo "$before replicas were running; after the upgrade, there will be $replicas (QUOTA_REPLICAS)"
fi
printf '%s\n' "$before $fingerprint" "${old[@]}" > "$progress.new"
mv "$progress.new" "$progress"

# Stopped replicas serve no requests. Compose would start them again, instead of starting new ones.
for id in ${stopped[@]+"${stopped[@]}"}; do docker rm "$id" > /dev/null; done
"${compose[@]}" up --detach --no-deps --no-recreate --scale quota=$((${#old[@]} + replicas)) quota ||
  fail "not all new replicas could be started; the old replicas keep running. Solve the problem, and run this script again"
all=$(list_replicas)
for id in $all; do is_old "$id" || new+=("$id"); done
for id in ${new[@]+"${new[@]}"}; do
  for _ in $(seq 90); do
    [ "$(health "$id")" = healthy ] && break
    sleep 1
  done
done
# A replica may have failed while others were starting.
for id in ${new[@]+"${new[@]}"}; do
  if [ "$(health "$id")" != healthy ]; then
    echo "$id is not healthy. Its log:" >&2
    docker logs --tail 20 "$id" >&2 || true
    if [ ${#old[@]} -lt "$before" ]; then
      fail "the new replicas were not removed, because an interrupted run has already stopped old ones; solve the problem, and run this script again"
    fi
    for it in "${new[@]}"; do { docker stop --time 30 "$it" && docker rm "$it"; } > /dev/null; done
    rm -f "$progress"
    fail "the old replicas keep running, and the new ones were removed"
  fi
done
if [ ${#new[@]} != "$replicas" ]; then
  fail "there are ${#new[@]} new replicas instead of $replicas; the old replicas keep running. Run this script again"
fi
for id in "${old[@]}"; do
  docker stop --time 30 "$id" > /dev/null
  docker rm "$id" > /dev/null
done
rm -f "$progress"

all=$(list_replicas)
expected=$(image_id)
wrong=()
for id in $all; do
  [ "$(inspect '{{.Image}}' "$id") $(health "$id")" = "$expected healthy" ] || wrong+=("$id")
done
if [ ${#wrong[@]} != 0 ] || [ "$(wc -w <<< "$all")" != "$replicas" ]; then
  fail "the upgrade is not complete: there are $(wc -w <<< "$all") replicas instead of $replicas, and these are not healthy or do not run $image: ${wrong[*]:-none}. Run this script again"
fi
echo "$replicas replicas run $image with the current settings"
