#!/usr/bin/env bash
# Restores a backup, which backup.sh has written, to an empty database.
#
#   deploy/restore.sh /var/backups/quota-2026-11-26T03-00-00          the installation of compose.prod.yml
#
#   DATABASE_URL_FILE=… QUOTA_DATA_DIR=/var/lib/quota deploy/restore.sh /var/backups/quota-2026-11-26T03-00-00
#                                                                     any other installation; requires pg_restore,
#                                                                     psql and tar
#
# No server may be running. Restore the secrets first, and start the servers afterward: they apply newer migrations, and
# write the backup's usage to the database. No usage is counted twice, even if the servers' own directories in
# QUOTA_DATA_DIR/usage still exist: their files are kept, and missing files are added from the backup. If the script is
# interrupted, run it again.
set -euo pipefail
umask 077
deploy=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=deploy/backup-common.sh
source "$deploy/backup-common.sh"

backup=${1:?"usage: restore.sh BACKUP"}
(cd "$backup" && sha256sum --check --quiet SHA256SUMS) || fail "the backup is damaged"
backup=$(cd "$backup" && pwd)

connect
if [ "$(query "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p', 'v', 'S')")" != 0 ]; then
  name=$(query "SELECT current_database()")
  fail "the database $name is not empty. To keep what is in it, rename it, and create a new one:
  ALTER DATABASE $name RENAME TO ${name}_before_restore;
  CREATE DATABASE $name;"
fi
# The database sessions of a server that has just stopped may take a moment to end.
for _ in 1 2 3 4 5 6 7 8 9 10; do
  others=$(query "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'")
  [ "$others" != 0 ] || break
  sleep 0.5
done
[ "$others" = 0 ] || fail "other sessions use the database ($others): stop all servers first"

# Roles belong to the database cluster, so they are not in the backup. This statement creates them as the first
# migration does.
query "DO \$\$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['quota_app', 'quota_system'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) THEN
            EXECUTE format('CREATE ROLE %I NOLOGIN NOINHERIT', name);
        END IF;
        IF NOT pg_has_role(current_user, name, 'MEMBER') THEN
            EXECUTE format('GRANT %I TO %I', name, current_user);
        END IF;
    END LOOP;
END \$\$"
# Restore the usage before the database: this script can be run again only while the database is empty.
restore_usage < "$backup/usage.tar"
postgres pg_restore --single-transaction --exit-on-error --no-owner < "$backup/quota.dump"
# Without this setting, ANALYZE warns about system tables that only a superuser may analyze.
query "SET client_min_messages = error; ANALYZE"

cat << END
Restored. All usage until at least this time is in the database, or will be written to it when a server starts:
  $(query "SELECT least(timestamptz '$(< "$backup/started_at")', min(coalesce(oldest_pending_at, reported_at))) FROM usage_shippers")
END
# Stripe recognizes a repeated report for a day. Backups of earlier versions don't contain the table. Row-level security
# would hide the rows from the tables' owner.
if [ "$(query "SELECT timestamptz '$(< "$backup/started_at")' < now() - interval '20 hours' AND to_regclass('public.billing_usage') IS NOT NULL")" = t ] &&
  [ "$(query "SET ROLE quota_system; SELECT EXISTS (SELECT FROM billing_usage)")" != f ]; then
  cat << END

WARNING: usage that was reported to Stripe after this backup would be reported, and charged, again. Before you start the
servers, turn billing off: set STRIPE_SECRET_KEY (or STRIPE_SECRET_KEY_FILE) to an empty string. Then follow the other
steps in docs/BILLING.md under "Restoring a backup".

END
fi
cat << END
Start the servers. A minute later, \`quota usage\` shows the replicas whose usage is still missing. If their disks are lost,
run \`quota usage forget DIRECTORY_ID\` for each of them.
END
