-- 07 and 08: the application's real statements.

-- name: statistics
-- Where the extension is; NULL where it is not.
SELECT quote_ident(n.nspname) || '.pg_stat_statements' AS view FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
 WHERE e.extname = 'pg_stat_statements'

-- name: statements
-- Texts without their constants, but for the runbook's own, which say so; those of other users are only seen with pg_read_all_stats.
SELECT calls, query FROM {statistics} s
 WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND query !~ '\mrunbook'
   AND query ~* '^\s*(/\*.*?\*/\s*)*\(*\s*(select|insert|update|delete|merge|with|values|table)\M'
 ORDER BY total_exec_time DESC LIMIT 1000

-- name: path
SELECT set_config('search_path', {path}, true)

-- name: own_path
SELECT current_setting('search_path')

-- name: view_of
SELECT pg_get_viewdef({view}::regclass) AS text

-- name: redirect
CREATE TEMP VIEW {name} AS {text}

-- name: parameters
SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = 'runbook_query'
