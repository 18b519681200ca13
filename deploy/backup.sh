#!/usr/bin/env bash
# Writes a backup of a running installation to a new directory, quota-YEAR-MONTH-DAYTHOUR-MINUTE-SECOND, in the given
# directory.
#
#   deploy/backup.sh /var/backups                   the installation of compose.prod.yml
#
#   DATABASE_URL_FILE=/etc/quota/secrets/database_url QUOTA_DATA_DIR=/var/lib/quota deploy/backup.sh /var/backups
#                                                   any other installation; requires pg_dump, pg_restore, psql and tar.
#                                                   You can set DATABASE_URL instead of DATABASE_URL_FILE
#
#   KEEP=14 deploy/backup.sh /var/backups           then also deletes the oldest backups in the directory, so that 14
#                                                   are left. By default, no backup is deleted. Use a separate directory
#                                                   for each installation
#
# The backup contains the database, and the usage in the data directory that was not in the database yet. It contains
# all usage up to the start of the backup, unless replicas have separate data directories with a backlog. The backup
# does not contain the secrets, so keep a copy of them elsewhere. Redis does not need a backup.
#
# Because of row-level security, not even the owner of the tables can read all rows. Connect as a superuser, or as a
# role with BYPASSRLS and pg_read_all_data.
set -euo pipefail
umask 077
deploy=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=deploy/backup-common.sh
source "$deploy/backup-common.sh"

folder=${1:?"usage: backup.sh FOLDER"}
keep=${KEEP:-}
[[ $keep =~ ^([1-9][0-9]*)?$ ]] || fail "KEEP, $keep, is not a number of backups"
mkdir -p "$folder"
# Delete what killed runs left behind, unless another backup is in progress. The lock is released when this script and
# all commands that it has started have ended.
exec {lock}> "$folder/.backup.lock"
if flock -n -E 75 "$lock"; then
  rm -rf "$folder"/quota-????-??-??T??-??-??.partial
elif [ $? = 75 ]; then
  fail "another backup to $folder is in progress"
else
  echo "warning: cannot lock $folder/.backup.lock, so the files of interrupted backups are not deleted" >&2
fi

name=quota-$(date -u +%Y-%m-%dT%H-%M-%S)
partial=$folder/$name.partial
mkdir "$partial"
trap 'rm -rf "$partial"' EXIT

connect
sees_all=$(query "SELECT rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = current_user")
if [ "$sees_all" != t ]; then
  fail "the role $(query "SELECT current_user") cannot read the rows of all tenants; connect as a superuser or a role with BYPASSRLS"
fi
[ "$(query "SELECT to_regclass('public.api_keys') IS NOT NULL")" = t ] || fail "this is not a Quota database"

query "SELECT now()" > "$partial/started_at"
# Copy the usage before the database: usage that is written to the database in between is then in both the archive and
# the dump, and a restore does not count such usage twice. In the other order, it would be in neither.
archive_usage > "$partial/usage.tar"
postgres pg_dump --format custom --no-owner > "$partial/quota.dump"
postgres pg_restore --list < "$partial/quota.dump" > /dev/null

(cd "$partial" && sha256sum started_at usage.tar quota.dump > SHA256SUMS)
sync "$partial"/* "$partial"
mv "$partial" "$folder/$name"
trap - EXIT
echo "$folder/$name"

if [ -n "$keep" ]; then
  sync "$folder"
  # The names sort by time. Even if the clock was set back, the new backup is kept.
  backups=()
  for backup in "$folder"/quota-????-??-??T??-??-??; do
    [ "$backup" = "$folder/$name" ] || backups+=("$backup")
  done
  for ((i = 0; i <= ${#backups[@]} - keep; i++)); do rm -rf "${backups[i]}"; done
fi
