-- The clinic's users partitioned by role as an engineer does it by hand, the application being stopped:
-- psql -X -v ON_ERROR_STOP=1 -1 -f offline.sql. The benchmark measures the notebooks against it.

LOCK TABLE users, appointments IN ACCESS EXCLUSIVE MODE;

-- Back up.
CREATE TABLE users_backup AS SELECT * FROM users;

-- The partitioned table: no index before it is full.
CREATE TABLE users_partitioned (LIKE users INCLUDING ALL EXCLUDING INDEXES) PARTITION BY LIST (role);
ALTER TABLE users_partitioned ALTER COLUMN role SET NOT NULL;
CREATE TABLE users_patients PARTITION OF users_partitioned FOR VALUES IN ('user');
CREATE TABLE users_doctors PARTITION OF users_partitioned FOR VALUES IN ('doctor');
CREATE TABLE users_admins PARTITION OF users_partitioned FOR VALUES IN ('admin');

-- Restore: under the lock, users is what users_backup is, and warmer.
INSERT INTO users_partitioned SELECT * FROM users;

-- Swap the names.
ALTER TABLE appointments DROP CONSTRAINT appointments_user_id_fkey;
ALTER TABLE users RENAME TO users_retired;
ALTER TABLE users_retired RENAME CONSTRAINT users_pkey TO users_retired_pkey;
ALTER TABLE users_partitioned RENAME TO users;

-- Keys and indexes.
ALTER TABLE users ADD CONSTRAINT users_pkey PRIMARY KEY (id, role);
CREATE UNIQUE INDEX users_patients_email_key ON users_patients (email);
CREATE UNIQUE INDEX users_doctors_email_key ON users_doctors (email);
CREATE UNIQUE INDEX users_admins_email_key ON users_admins (email);
CREATE INDEX users_patients_is_active_idx ON users_patients (is_active);
CREATE INDEX users_doctors_is_active_idx ON users_doctors (is_active);
CREATE INDEX users_admins_is_active_idx ON users_admins (is_active);
CREATE INDEX users_patients_created_at_idx ON users_patients (created_at);
CREATE INDEX users_doctors_created_at_idx ON users_doctors (created_at);
CREATE INDEX users_admins_created_at_idx ON users_admins (created_at);
ANALYZE users;

-- The role of each appointment's user; most have the default.
ALTER TABLE appointments ADD COLUMN user_role varchar(50) DEFAULT 'user' NOT NULL;
UPDATE appointments SET user_role = users.role
FROM users
WHERE users.id = appointments.user_id AND users.role <> 'user';
ALTER TABLE appointments ADD CONSTRAINT appointments_user_id_fkey
    FOREIGN KEY (user_id, user_role) REFERENCES users (id, role) ON UPDATE CASCADE ON DELETE CASCADE;

-- What the rename left behind.
CREATE OR REPLACE VIEW active_users AS
    SELECT id, email, first_name, last_name, role, created_at FROM users WHERE is_active;
CREATE TRIGGER users_set_updated_at BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION set_updated_at();
GRANT SELECT, INSERT, UPDATE, DELETE ON users TO clinic_app;

ANALYZE appointments;
