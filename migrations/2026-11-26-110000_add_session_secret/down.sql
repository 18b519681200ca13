REVOKE UPDATE (first_session_secret_id) ON server_secrets FROM quota_system;
ALTER TABLE server_secrets DROP COLUMN first_session_secret_id;
ALTER TABLE sessions DROP COLUMN secret_id;
