-- The example: a clinic's database as its application (Drizzle on node-postgres) would have made it.

-- name: find_database
SELECT 1 FROM pg_database WHERE datname = 'clinic'

-- name: create_database
CREATE DATABASE clinic

-- name: drop_database
DROP DATABASE IF EXISTS clinic WITH (FORCE)

-- name: data_directory
SHOW data_directory

-- name: lock
SELECT pg_advisory_xact_lock(hashtext('load the clinic'))

-- name: state
-- Whether there is neither a clinic nor a migration of one; how many users were loaded.
SELECT to_regclass('public.users') IS NULL AND to_regnamespace('runbook') IS NULL,
  substring(shobj_description(oid, 'pg_database') FROM '^The clinic of (\d+) users')
FROM pg_database WHERE datname = current_database()

-- name: role
-- Roles belong to the whole server: another database may have made it already, or be making it now.
DO $$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'clinic_app') THEN
    CREATE ROLE clinic_app NOLOGIN;
  END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
  NULL;
END
$$

-- name: schema
CREATE TABLE users (
  id uuid DEFAULT gen_random_uuid() NOT NULL,
  email varchar(255) NOT NULL,
  password varchar(255) NOT NULL,
  first_name varchar(100) NOT NULL,
  last_name varchar(100) NOT NULL,
  phone varchar(20),
  role varchar(50) DEFAULT 'user',
  is_active boolean DEFAULT true NOT NULL,
  created_at timestamp with time zone DEFAULT now() NOT NULL,
  updated_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE doctors (
  id uuid DEFAULT gen_random_uuid() NOT NULL,
  name varchar(255) NOT NULL,
  specialty varchar(100) NOT NULL,
  phone varchar(20),
  created_at timestamp with time zone DEFAULT now() NOT NULL
);

CREATE TABLE appointments (
  id uuid DEFAULT gen_random_uuid() NOT NULL,
  user_id uuid NOT NULL,
  doc_id uuid NOT NULL,
  status varchar(20) DEFAULT 'scheduled' NOT NULL,
  scheduled_at timestamp with time zone NOT NULL,
  notes text,
  created_at timestamp with time zone DEFAULT now() NOT NULL
)

-- name: users
-- Everything follows from the row's number, ids too (a version 4 uuid made of its md5). Of each 1,000 users 949 have
-- the role user, 50 doctor, 1 admin; the first two are users. No name, address, number or password is anybody's.
INSERT INTO users
SELECT overlay(overlay(md5('user ' || n) PLACING '4' FROM 13) PLACING 'a' FROM 17)::uuid,
  format('%s.sample%s@clinic.example', lower(first_name), n),
  '$2b$12$' || left(md5('salt ' || n) || md5('hash ' || n), 53),
  first_name,
  'Sample-' || n,
  CASE WHEN n % 7 > 0 THEN '+1-555-01' || lpad((n % 100)::text, 2, '0') END,
  CASE WHEN n % 1000 = 0 THEN 'admin' WHEN n % 20 = 10 THEN 'doctor' ELSE 'user' END,
  n % 9 > 0,
  created_at,
  created_at + n % 90 * interval '1 day'
FROM (
  SELECT n, timestamptz '2023-01-01 08:00:00+00' + n % 900 * interval '1 day' + n % 86400 * interval '1 s' AS created_at,
    (ARRAY['Alex', 'Bo', 'Charlie', 'Dana', 'Eden', 'Frankie', 'Gray', 'Harper', 'Indigo', 'Jules', 'Kim', 'Lou', 'Max'])
      [n % 13 + 1] AS first_name
  FROM generate_series(1, {users}) AS n
) AS person

-- name: doctors
-- One for every twenty users.
INSERT INTO doctors
SELECT overlay(overlay(md5('doctor ' || n) PLACING '4' FROM 13) PLACING 'a' FROM 17)::uuid,
  'Dr Sample-' || n,
  (ARRAY['General practice', 'Cardiology', 'Dermatology', 'Neurology', 'Paediatrics', 'Surgery'])[n % 6 + 1],
  '+1-555-01' || lpad((n % 100)::text, 2, '0'),
  timestamptz '2022-06-01 08:00:00+00' + n % 200 * interval '1 day'
FROM generate_series(1, ({users} + 19) / 20) AS n

-- name: appointments
-- Two for every user.
INSERT INTO appointments
SELECT overlay(overlay(md5('appointment ' || n) PLACING '4' FROM 13) PLACING 'a' FROM 17)::uuid,
  overlay(overlay(md5('user ' || (n + 1) / 2) PLACING '4' FROM 13) PLACING 'a' FROM 17)::uuid,
  overlay(overlay(md5('doctor ' || n % (({users} + 19) / 20) + 1) PLACING '4' FROM 13) PLACING 'a' FROM 17)::uuid,
  (ARRAY['scheduled', 'completed', 'completed', 'completed', 'cancelled', 'no_show'])[n % 6 + 1],
  created_at + (n % 30 + 1) * interval '1 day',
  CASE WHEN n % 5 = 0 THEN 'Sample note ' || n END,
  created_at
FROM (
  SELECT n, timestamptz '2025-07-01 09:00:00+00' + n % 150 * interval '1 day' + n % 32 * interval '15 min' AS created_at
  FROM generate_series(1, {users} * 2) AS n
) AS visit

-- name: keys
-- After the rows: one sort instead of a million look-ups.
ALTER TABLE users
  ADD CONSTRAINT users_pkey PRIMARY KEY (id),
  ADD CONSTRAINT users_email_key UNIQUE (email);
CREATE INDEX users_is_active_idx ON users (is_active);
CREATE INDEX users_created_at_idx ON users (created_at);

ALTER TABLE doctors ADD CONSTRAINT doctors_pkey PRIMARY KEY (id);

ALTER TABLE appointments
  ADD CONSTRAINT appointments_pkey PRIMARY KEY (id),
  ADD CONSTRAINT appointments_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
  ADD CONSTRAINT appointments_doc_id_fkey FOREIGN KEY (doc_id) REFERENCES doctors (id);
CREATE INDEX appointments_user_id_idx ON appointments (user_id);
CREATE INDEX appointments_doc_id_idx ON appointments (doc_id)

-- name: view
CREATE VIEW active_users AS
SELECT id, email, first_name, last_name, role, created_at FROM users WHERE is_active;

CREATE FUNCTION set_updated_at() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.updated_at := now();
  RETURN NEW;
END
$$;

CREATE TRIGGER users_set_updated_at BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION set_updated_at()

-- name: grants
GRANT SELECT, INSERT, UPDATE, DELETE ON users, doctors, appointments TO clinic_app;
GRANT SELECT ON active_users TO clinic_app

-- name: finish
-- The note tells a later start how many users it would find, whatever has been written since.
DO $$
BEGIN
  EXECUTE format('COMMENT ON DATABASE %I IS %L', current_database(), 'The clinic of ' || {users} || ' users.');
END
$$;
ANALYZE
