# Functions that backup.sh and restore.sh share. By default, they use the PostgreSQL server and the data directory of
# compose.prod.yml. To use others, set DATABASE_URL (or DATABASE_URL_FILE) and QUOTA_DATA_DIR.

fail() {
  echo "${0##*/}: $*" >&2
  exit 1
}

# Decides how to reach PostgreSQL.
connect() {
  database=${DATABASE_URL:-}
  if [ -n "${DATABASE_URL_FILE:-}" ]; then database=$(< "$DATABASE_URL_FILE"); fi
  if [ -z "$database" ]; then
    connect_compose
  elif [[ $database =~ ^(postgres(ql)?://[^:/@]+):([^@]*)@(.*)$ ]]; then
    # Everyone on this machine can see the arguments of a command, so the password is passed in the environment.
    database="${BASH_REMATCH[1]}@${BASH_REMATCH[4]}"
    PGPASSWORD=$(printf '%b' "${BASH_REMATCH[3]//%/\\x}")
    export PGPASSWORD
  elif [[ $database =~ [pP][aA][sS][sS][wW][oO][rR][dD][[:space:]]*= || $database =~ ^[a-z]+://[^/?]*:[^/?]*@ ]]; then
    fail "write the password as in postgres://user:password@host/database, or set PGPASSFILE: otherwise, the password would be visible in the list of processes"
  fi
  verify_certificate
  if [ -n "$database" ] && [ -n "${QUOTA_DATA_DIR:-}" ]; then
    [ -r "$QUOTA_DATA_DIR" ] && [ -x "$QUOTA_DATA_DIR" ] || fail "cannot read QUOTA_DATA_DIR, $QUOTA_DATA_DIR"
    [ ! -e "$QUOTA_DATA_DIR/usage" ] || [ -r "$QUOTA_DATA_DIR/usage" ] || fail "cannot read $QUOTA_DATA_DIR/usage"
  fi
}

# With sslmode=require, Quota verifies PostgreSQL's certificate with the machine's root certificates, and verifies the
# host name in the certificate. PostgreSQL's own programs verify both only with sslmode=verify-full.
verify_certificate() {
  local require="(^|[?&[:space:]])sslmode[[:space:]]*=[[:space:]]*'?require'?(&|[[:space:]]|\$)"
  local before after separator=' ' certificates
  while [[ $database =~ $require ]]; do
    before=${database%%"${BASH_REMATCH[0]}"*}${BASH_REMATCH[1]}
    after=${BASH_REMATCH[2]}${database#*"${BASH_REMATCH[0]}"}
    [[ $database != *://* ]] || separator='&'
    certificates=
    if [[ $database != *sslrootcert* ]]; then certificates="${separator}sslrootcert=$(root_certificates)"; fi
    database="${before}sslmode=verify-full$certificates$after"
  done
}

# Prints the path of the file with the root certificates that the server trusts.
root_certificates() {
  local file
  # PostgreSQL's programs can read root certificates only from a file.
  [ -z "${SSL_CERT_DIR:-}" ] || [ -n "${SSL_CERT_FILE:-}" ] ||
    fail "set SSL_CERT_FILE to a file with the certificates in SSL_CERT_DIR"
  for file in ${SSL_CERT_FILE:+"$SSL_CERT_FILE"} /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt \
    /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem; do
    [[ $file =~ ^[A-Za-z0-9/._-]+$ ]] || fail "the name of the file with root certificates, $file, contains characters other than letters, digits, /, ., _ and -"
    if [ -r "$file" ]; then
      echo "$file"
      return
    fi
    [ -z "${SSL_CERT_FILE:-}" ] || fail "cannot read SSL_CERT_FILE, $SSL_CERT_FILE"
  done
  fail "cannot find the machine's root certificates, which sslmode=require needs: set SSL_CERT_FILE"
}

connect_compose() {
  if docker compose version > /dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
  environment=${ENV_FILE:-$deploy/.env.prod}
  [ -z "${ENV_FILE:-}" ] || [ -f "$environment" ] || fail "there is no file $environment (ENV_FILE)"
  local project=${PROJECT:-$(sed -n 's/^COMPOSE_PROJECT_NAME=//p' "$environment" 2> /dev/null | tail -1 || true)}
  compose+=(--file "$deploy/compose.prod.yml" --project-name "${project:-quota}")
  if [ -f "$environment" ]; then compose+=(--env-file "$environment"); fi
  container=$("${compose[@]}" ps --quiet postgres)
  [ -n "$container" ] || fail "PostgreSQL is not running: start it with \`${compose[*]} up --detach postgres\`, or set DATABASE_URL"
}

# Prints the ID of one replica.
first_replica() {
  local replicas
  # Don't use `head` here: it exits after the first line, and Compose then fails.
  replicas=$("${compose[@]}" ps "$@" --quiet quota)
  echo "${replicas%%$'\n'*}"
}

# Runs a client program of PostgreSQL, connected to the database.
postgres() {
  if [ -n "$database" ]; then
    "$@" --dbname "$database"
  else
    docker exec --interactive "$container" "$@" --username quota --dbname quota
  fi
}

query() {
  postgres psql --no-psqlrc --quiet --tuples-only --no-align --set ON_ERROR_STOP=1 --command "$1"
}

# Writes an archive of the directory `usage`. Without Compose, the archive is empty if there is no such directory.
archive_usage() {
  if [ -z "$database" ]; then
    local replica
    replica=$(first_replica)
    [ -n "$replica" ] || fail "no replica is running, so its volume cannot be read; start one"
    docker cp "$replica:/var/lib/quota/usage" -
  elif [ -d "${QUOTA_DATA_DIR:-}/usage" ]; then
    # While tar runs, servers may delete or reuse files whose usage records are in the database. This is not an error.
    tar --create --sparse --ignore-failed-read --warning=no-file-changed --warning=no-file-removed \
      --directory "$QUOTA_DATA_DIR" usage || [ $? = 1 ]
  else
    [ -n "${QUOTA_DATA_DIR:-}" ] || echo "warning: without QUOTA_DATA_DIR, usage that is not in the database yet is missing from the backup" >&2
    tar --create --files-from /dev/null
  fi
}

# Runs a command as the owner of the data directory if the script runs as root. The server's user can replace files in
# this directory with links at any time. Therefore, commands that write there must have only the rights of this user.
as_owner() {
  local user group
  read -r user group < <(stat --format '%u %g' "$QUOTA_DATA_DIR")
  if [ "$EUID" = 0 ] && [ "$user" != 0 ]; then
    setpriv --reuid "$user" --regid "$group" --clear-groups -- "$@"
  else
    "$@"
  fi
}

# Unpacks an archive that archive_usage wrote. Adds the archive's segments to the existing ones, to which servers may
# have written since the backup. The database contains the ID of each segment and the position up to which the segment
# has been read, so no record is counted twice. After an interruption, the function can be run again.
restore_usage() {
  if [ -z "$database" ]; then
    "${compose[@]}" up --no-start quota
    local replica archive
    replica=$(first_replica --all)
    archive=$(mktemp)
    cat > "$archive"
    # Skip files that already exist with the same name and size. If an existing file is smaller, it was copied only in
    # part, so replace it.
    local existing archived
    existing=$({ docker cp "$replica:/var/lib/quota/usage" - 2> /dev/null || true; } | list_files)
    archived=$(list_files < "$archive")
    comm -12 <(sort <<< "$existing") <(sort <<< "$archived") | cut --delimiter ' ' --fields 2- | { grep . || true; } |
      xargs --no-run-if-empty --delimiter '\n' tar --delete --file "$archive"
    docker cp - "$replica:/var/lib/quota" < "$archive"
    rm "$archive"
  elif [ -n "${QUOTA_DATA_DIR:-}" ]; then
    as_owner bash -c "$(declare -f merge_usage); set -euo pipefail; umask 077; merge_usage" ||
      fail "cannot write the usage to $QUOTA_DATA_DIR. The database was not changed: solve the problem, and run this again"
  else
    echo "warning: without QUOTA_DATA_DIR, the usage in usage.tar is not restored" >&2
  fi
}

# Lists the size and name of each file in an archive.
list_files() {
  { tar --list --verbose 2> /dev/null || true; } | { grep '^-' || true; } | awk '{ print $3, $6 }'
}

# Extracts an archive next to the existing segments, and moves the missing segments to their places. A segment gets its
# final name only once the segment is complete.
merge_usage() {
  local segment target
  # Delete directories that interrupted runs left behind.
  rm -rf "$QUOTA_DATA_DIR"/restore.??????
  unpacked=$(mktemp --directory "$QUOTA_DATA_DIR/restore.XXXXXX")
  trap 'rm -rf "$unpacked"' EXIT
  tar --extract --sparse --no-same-owner --directory "$unpacked"
  for segment in "$unpacked"/usage/*/*; do
    # Earlier versions wrote files that match the last two patterns.
    case $segment in *.segment | */rejected/* | *.refused | */refused/*) ;; *) continue ;; esac
    target=$QUOTA_DATA_DIR/${segment#"$unpacked/"}
    [ ! -e "$target" ] || continue
    mkdir -p "${target%/*}"
    mv --no-target-directory "$segment" "$target"
  done
}
