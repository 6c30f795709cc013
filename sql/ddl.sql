-- Statements that several steps share: what each changes, its caller says.

-- name: add_constraint
ALTER TABLE {table} ADD CONSTRAINT {constraint} {definition}

-- name: validate
-- SHARE UPDATE EXCLUSIVE: readers and writers go on.
ALTER TABLE {table} VALIDATE CONSTRAINT {constraint}

-- name: drop_constraint
ALTER TABLE IF EXISTS {table} DROP CONSTRAINT IF EXISTS {constraint}

-- name: own
ALTER TABLE {table} OWNER TO {owner}

-- name: comment
COMMENT ON TABLE {table} IS {comment}

-- name: rename
ALTER TABLE {table} RENAME TO {to}

-- name: analyze
ANALYZE {table}

-- name: drop
DROP TABLE IF EXISTS {table}

-- name: create_schema
CREATE SCHEMA {schema}

-- name: create_schema_if_none
CREATE SCHEMA IF NOT EXISTS {schema}

-- name: close_schema
-- Default privileges on schemas would open all that comes to lie in it. What its owner grants later stays.
DO $close$
DECLARE
  stranger text;
BEGIN
  FOR stranger IN SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END
                    FROM pg_catalog.pg_namespace n CROSS JOIN LATERAL aclexplode(n.nspacl) a
                   WHERE n.nspname = {schema_name} AND a.grantee <> n.nspowner
                     AND NOT EXISTS (SELECT FROM pg_catalog.pg_class c WHERE c.relnamespace = n.oid) LOOP
    EXECUTE 'REVOKE ALL ON SCHEMA ' || quote_ident({schema_name}) || ' FROM ' || stranger;
  END LOOP;
END $close$

-- name: drop_schema
-- With what is in it: the logs and their functions. The shadow is gone before.
DROP SCHEMA IF EXISTS {schema} CASCADE
