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

-- name: drop_schema
-- With what is in it: the logs and their functions. The shadow is gone before.
DROP SCHEMA IF EXISTS {schema} CASCADE
