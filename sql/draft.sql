-- What 00 asks of the server besides the catalog.

-- name: literal
-- A value as the key's type prints it: what the catalog and the rows will show. Fails for a value the type does not take.
SELECT CAST({value} AS {type})::text

-- name: values
SELECT {key}::text AS value, count(*) AS rows FROM ONLY {table} GROUP BY {key} ORDER BY 2 DESC, 1

-- name: rows
SELECT count(*) FROM ONLY {table}

-- name: free
-- What would be refused at the cut-over must be refused here.
SELECT relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = {schema} AND relname = ANY ({names})
