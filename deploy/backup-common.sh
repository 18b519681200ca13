# Functions that backup.sh and restore.sh share. They use the PostgreSQL server and the data directory of
# compose.prod.yml, or those in DATABASE_URL and QUOTA_DATA_DIR.

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
    fail "write the password as in postgres://user:password@host/database, or set PGPASSFILE: it would be visible in the list of processes"
  fi
  if [ -n "$database" ] && [ -n "${QUOTA_DATA_DIR:-}" ]; then
    [ -r "$QUOTA_DATA_DIR" ] && [ -x "$QUOTA_DATA_DIR" ] || fail "cannot read QUOTA_DATA_DIR, $QUOTA_DATA_DIR"
    [ ! -e "$QUOTA_DATA_DIR/usage" ] || [ -r "$QUOTA_DATA_DIR/usage" ] || fail "cannot read $QUOTA_DATA_DIR/usage"
  fi
}

connect_compose() {
  if docker compose version > /dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
  compose+=(--file "$deploy/compose.prod.yml" --project-name "${PROJECT:-quota}")
  environment=${ENV_FILE:-$deploy/.env.prod}
  if [ -f "$environment" ]; then compose+=(--env-file "$environment"); fi
  container=$("${compose[@]}" ps --quiet postgres)
  [ -n "$container" ] || fail "PostgreSQL is not running: start it with \`${compose[*]} up --detach postgres\`, or set DATABASE_URL"
}

# Runs a PostgreSQL program on the database.
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

# Writes an archive with the directory `usage`, or an empty one.
archive_usage() {
  if [ -z "$database" ]; then
    local replica
    replica=$("${compose[@]}" ps --quiet quota | head -1)
    [ -n "$replica" ] || fail "no replica is running, so its volume cannot be read; start one"
    docker cp "$replica:/var/lib/quota/usage" -
  elif [ -d "${QUOTA_DATA_DIR:-}/usage" ]; then
    # While tar runs, servers may delete files whose usage records are in the database.
    tar --create --sparse --ignore-failed-read --warning=no-file-changed --warning=no-file-removed \
      --directory "$QUOTA_DATA_DIR" usage || [ $? = 1 ]
  else
    [ -n "${QUOTA_DATA_DIR:-}" ] || echo "warning: without QUOTA_DATA_DIR, usage that is not in the database yet is missing" >&2
    tar --create --files-from /dev/null
  fi
}

# Unpacks an archive that archive_usage wrote. Keeps existing directories, because their servers have written to them
# since.
restore_usage() {
  if [ -z "$database" ]; then
    "${compose[@]}" up --no-start quota
    local replica archive
    replica=$("${compose[@]}" ps --all --quiet quota | head -1)
    archive=$(mktemp)
    cat > "$archive"
    { docker cp "$replica:/var/lib/quota/usage" - 2> /dev/null || true; } | tar --list 2> /dev/null |
      { grep -oE '^usage/[^/]+' || true; } | sort --unique |
      while read -r directory; do tar --delete --file "$archive" "$directory" 2> /dev/null || true; done
    docker cp - "$replica:/var/lib/quota" < "$archive"
    rm "$archive"
  elif [ -n "${QUOTA_DATA_DIR:-}" ]; then
    local unpacked
    # The server's user could have created a link to have files written elsewhere.
    [ ! -L "$QUOTA_DATA_DIR/usage" ] || fail "$QUOTA_DATA_DIR/usage is a symbolic link"
    unpacked=$(mktemp --directory "$QUOTA_DATA_DIR/restore.XXXXXX")
    tar --extract --sparse --directory "$unpacked"
    if [ -d "$unpacked/usage" ]; then
      mkdir -p "$QUOTA_DATA_DIR/usage"
      for directory in "$unpacked/usage"/*; do
        [ -e "$directory" ] || continue
        [ -e "$QUOTA_DATA_DIR/usage/${directory##*/}" ] || mv "$directory" "$QUOTA_DATA_DIR/usage/"
      done
      # The server's user must be able to delete them.
      chown --recursive --reference "$QUOTA_DATA_DIR" "$QUOTA_DATA_DIR/usage"
    fi
    rm -rf "$unpacked"
  else
    echo "warning: without QUOTA_DATA_DIR, the usage in usage.tar is not restored" >&2
  fi
}
