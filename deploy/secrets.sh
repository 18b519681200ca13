#!/usr/bin/env bash
# Creates the secrets that compose.prod.yml reads, in deploy/secrets or in the given directory. Keeps existing files.
set -euo pipefail
folder=${1:-$(dirname "${BASH_SOURCE[0]}")/secrets}

# Containers read these files as different users, so the files are world-readable. The directory is private, so that
# other users of this machine cannot read the files.
mkdir -p "$folder"
chmod 700 "$folder"
random() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; }
# Writes a file atomically, unless it exists. Only the files for which the content is empty may be empty: an interrupted
# run of an earlier version may have left others empty, and Redis has no password if redis.conf is empty.
write() {
  local file=$folder/$1 new=$folder/.$1.new
  if [ -s "$file" ] || { [ -z "$2" ] && [ -e "$file" ]; }; then
    echo "kept     $file"
  else
    printf '%s' "$2" > "$new"
    chmod 644 "$new"
    sync "$new"
    mv "$new" "$file"
    echo "created  $file"
  fi
}
# Such a run may also have left these URLs with an empty password.
if grep -qsxF 'postgres://quota:@postgres/quota' "$folder/database_url"; then rm "$folder/database_url"; fi
if grep -qsxF 'redis://:@redis' "$folder/redis_url"; then rm "$folder/redis_url"; fi

write postgres_password "$(random)"
write database_url "postgres://quota:$(cat "$folder/postgres_password")@postgres/quota"
write redis.conf "requirepass $(random)
"
write redis_url "redis://:$(sed -n 's/^requirepass //p' "$folder/redis.conf")@redis"
write quota_secret "$(random)"
# The same secret as in quota_secret, except while rotate-secret.sh is rotating it.
write quota_secret_previous "$(cat "$folder/quota_secret")"
# For billing, write Stripe's two secrets to these files, and uncomment their settings in .env.prod.
write stripe_secret_key ""
write stripe_webhook_secret ""
# For email, write the URL of the mail server to this file, and uncomment its setting in quota.env.
write smtp_url ""
