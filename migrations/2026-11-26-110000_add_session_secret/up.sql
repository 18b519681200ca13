-- Nullable and without a default: the previous version inserts sessions without this column, and keeps refreshing
-- sessions that have a value in it.
ALTER TABLE sessions ADD COLUMN secret_id bytea;
-- NOT VALID: the column is NULL in every existing row, and checking the rows would read the table under an exclusive
-- lock.
ALTER TABLE sessions
    ADD CONSTRAINT sessions_secret_id_length CHECK (octet_length(secret_id) = 16) NOT VALID;
COMMENT ON COLUMN sessions.secret_id IS
    'A value derived from the QUOTA_SECRET that the session was last used with. NULL in sessions of earlier versions, which belong to server_secrets.first_session_secret_id';

ALTER TABLE server_secrets ADD COLUMN first_session_secret_id bytea;
ALTER TABLE server_secrets
    ADD CONSTRAINT server_secrets_first_session_secret_id_length
        CHECK (octet_length(first_session_secret_id) = 16) NOT VALID;
COMMENT ON COLUMN server_secrets.first_session_secret_id IS
    'The secret in use when sessions started to record their secret, in the form of sessions.secret_id. Sessions without a recorded secret are refreshed only while this secret is accepted';
GRANT UPDATE (first_session_secret_id) ON server_secrets TO quota_system;
