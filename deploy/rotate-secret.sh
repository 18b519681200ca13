#!/usr/bin/env bash
# Rotates QUOTA_SECRET. The first three steps do not sign anyone out. After each step, restart all replicas, one after
# the other, before you run the next step. With compose.prod.yml, `deploy/upgrade.sh` restarts them.
#
#   deploy/rotate-secret.sh prepare     creates a new secret, which replicas accept but do not use yet
#   deploy/rotate-secret.sh switch      uses the new secret; the old one is still accepted. Keep a copy of the old one
#                                       as long as backups from before the rotation
#   deploy/rotate-secret.sh finish      stops accepting the old secret. Before this step, wait QUOTA_SESSION_DAYS days
#
#   deploy/rotate-secret.sh leaked      replaces the secret. Restart all replicas immediately: until then, they still
#                                       accept the leaked secret. All users have to sign in again, and webhooks need new
#                                       signing secrets
#   deploy/rotate-secret.sh status      prints the step that was run last
#
# The files quota_secret and quota_secret_previous are in deploy/secrets, or in the directory in SECRETS, such as
# /etc/quota/secrets. When no rotation is in progress, both contain the same secret.
set -euo pipefail
folder=${SECRETS:-$(dirname "${BASH_SOURCE[0]}")/secrets}
current=$folder/quota_secret
previous=$folder/quota_secret_previous
# A copy of the old secret, which exists only until `switch` is complete.
old_copy=$folder/.quota_secret.old

fail() {
  echo "rotate-secret.sh: $*" >&2
  exit 1
}
random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }
# Writes a file atomically, with the owner and mode of quota_secret.
write() {
  local new
  new=$(mktemp "$folder/.quota_secret.XXXXXX")
  printf '%s' "$2" > "$new"
  chown --reference "$current" "$new"
  chmod --reference "$current" "$new"
  sync "$new"
  mv "$new" "$1"
}

[ -s "$current" ] || fail "there is no $current"
[ -e "$previous" ] || write "$previous" "$(< "$current")"
# The step that was run last.
if [ -e "$folder/.rotation" ]; then step=$(< "$folder/.rotation"); else step=none; fi
expect() {
  [ "$step" = "$1" ] || fail "this step comes after \`$1\`, and the last step was \`$step\`"
}
# Webhook signing secrets in earlier backups are encrypted with the old secret, which `finish` overwrites.
remind() {
  echo "keep a copy of the old secret as long as backups from before the rotation, which cannot be fully restored without it"
}

case "${1:-}" in
  prepare)
    case "$step" in none | finish | leaked) ;; *) fail "a rotation is in progress; the last step was \`$step\`" ;; esac
    rm -f "$old_copy"
    write "$previous" "$(random)"
    ;;
  switch)
    expect prepare
    # If this step is interrupted, run it again: the copy contains the old secret until the other two files are written.
    [ -e "$old_copy" ] || write "$old_copy" "$(< "$current")"
    old=$(< "$old_copy")
    new=$(< "$current")
    [ "$new" != "$old" ] || new=$(< "$previous")
    write "$current" "$new"
    write "$previous" "$old"
    # Remove the copy last. If it were removed before `switch` is recorded, running an interrupted step again would
    # switch back to the old secret.
    write "$folder/.rotation" switch
    remind
    rm -f "$old_copy"
    ;;
  finish)
    expect switch
    remind
    write "$previous" "$(< "$current")"
    ;;
  leaked)
    rm -f "$old_copy"
    write "$current" "$(random)"
    write "$previous" "$(< "$current")"
    ;;
  status)
    echo "$step"
    exit
    ;;
  *) fail "usage: rotate-secret.sh prepare|switch|finish|leaked|status" ;;
esac
write "$folder/.rotation" "$1"
if [ "$1" = leaked ]; then
  echo "done: $1. Now restart all replicas at once"
else
  echo "done: $1. Now restart all replicas, one after the other"
fi
