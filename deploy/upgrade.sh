#!/usr/bin/env bash
# Replaces the running replicas with replicas of a new image, without causing failed requests: starts the new replicas,
# waits until they are healthy, and then stops the old ones. Compose has no built-in rolling update. Set QUOTA_IMAGE in
# .env.prod afterward, or the next `up` starts the previous version again.
#
#   QUOTA_IMAGE=quota:0.2.0 deploy/upgrade.sh
#
# If a new replica does not become healthy, the old replicas keep running and the new ones are removed. If the script is
# interrupted, run it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

environment=${ENV_FILE:-.env.prod}
if docker compose version > /dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
project=${PROJECT:-$(sed -n 's/^COMPOSE_PROJECT_NAME=//p' "$environment" 2> /dev/null | tail -1 || true)}
compose+=(--file compose.prod.yml --project-name "${project:-quota}")
if [ -f "$environment" ]; then compose+=(--env-file "$environment"); fi

# Earlier versions turned billing on with this setting. Without the new settings, billing would be off.
if grep -qs '^QUOTA_BILLING=.' "$environment"; then
  echo "$environment: replace QUOTA_BILLING with STRIPE_SECRET_KEY_FILE and STRIPE_WEBHOOK_SECRET_FILE (see .env.prod.example)" >&2
  exit 1
fi

# A new version may need additional secrets. Existing secrets are kept.
./secrets.sh > /dev/null
old=$("${compose[@]}" ps --quiet quota)
replicas=$(wc -w <<< "$old")
if [ "$replicas" = 0 ]; then
  echo "no replica is running; start one with: ${compose[*]} up --detach" >&2
  exit 1
fi

# This file contains the number of replicas and the IDs of the old replicas, in case this run is interrupted. Without
# it, the next run would mistake this run's new replicas for old ones.
progress=.upgrade.${project:-quota}
if [ -f "$progress" ] && grep -qFf <(tail -n +2 "$progress") <<< "$old"; then
  replicas=$(head -1 "$progress")
  image=${QUOTA_IMAGE:-}
  if [ -z "$image" ] && [ -f "$environment" ]; then image=$(sed -n 's/^QUOTA_IMAGE=//p' "$environment" | tail -1); fi
  image=$(docker image inspect --format '{{.Id}}' "${image:-quota:local}" 2> /dev/null || true)
  # Replicas that the interrupted run started from another image are old too.
  old=$(for id in $old; do
    if grep -qF "$id" "$progress" || [ "$(docker inspect --format '{{.Image}}' "$id")" != "$image" ]; then echo "$id"; fi
  done)
else
  printf '%s\n' "$replicas" "$old" > "$progress"
fi

health() { docker inspect --format '{{.State.Health.Status}}' "$1"; }
is_old() { grep -q "$1" <<< "$old"; }

"${compose[@]}" up --detach --no-deps --no-recreate --scale quota=$(($(wc -w <<< "$old") + replicas)) quota
for id in $("${compose[@]}" ps --quiet quota); do
  is_old "$id" && continue
  for _ in $(seq 90); do
    [ "$(health "$id")" = healthy ] && break
    sleep 1
  done
  if [ "$(health "$id")" != healthy ]; then
    echo "$id did not become healthy; the old replicas keep running. The log of $id:" >&2
    docker logs --tail 20 "$id" >&2
    for new in $("${compose[@]}" ps --quiet quota); do
      is_old "$new" || { docker stop --time 30 "$new"; docker rm "$new"; } > /dev/null
    done
    rm -f "$progress"
    exit 1
  fi
done
for id in $old; do
  docker stop --time 30 "$id" > /dev/null
  docker rm "$id" > /dev/null
done
rm -f "$progress"
echo "upgraded $replicas replicas"
