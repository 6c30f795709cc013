-- `runbook rehearse`: who waits for it, how long writers' statements take, and whether the database is what it was.

-- name: look
-- The longest that anybody waits now for a session of the runbook's, and the oldest statement under way that writes to one of
-- the tables; NULL where nobody does, or where this role may not see since when.
WITH ours AS (SELECT array_agg(pid) AS pids FROM pg_stat_activity WHERE application_name LIKE 'runbook %' AND datname = current_database())
SELECT extract(epoch FROM max(clock_timestamp() - l.waitstart) FILTER (WHERE NOT l.granted AND pg_blocking_pids(l.pid) && ours.pids))::float8 AS waited,
       extract(epoch FROM max(clock_timestamp() - a.query_start) FILTER (WHERE a.state = 'active' AND l.mode = 'RowExclusiveLock'
         AND (l.relation = {oid} OR l.relation IN (SELECT conrelid FROM pg_constraint WHERE contype = 'f' AND confrelid = {oid}))))::float8 AS statement
  FROM ours, pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE a.datname = current_database() AND a.application_name NOT LIKE 'runbook %'
   AND (NOT l.granted OR l.locktype = 'relation' AND l.mode = 'RowExclusiveLock')

-- name: slowest
-- Of each statement that writes: how often it ran, and how long at the longest, in seconds.
SELECT concat_ws(' ', userid, queryid, toplevel) AS statement, query, calls, max_exec_time / 1000 AS longest FROM {statistics}
 WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND query !~ '\mrunbook'
   AND query ~* '^\s*(insert|update|delete|merge|with|copy)\M'

-- name: objects
-- Whatever a migration makes or changes, but for the ledger: a line for each object, with its definition.
WITH own AS (SELECT oid, nspname, nspowner, nspacl FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname NOT IN ('information_schema', 'runbook')),
     relations AS (SELECT c.*, format('%I.%I', own.nspname, c.relname) AS name FROM pg_class c JOIN own ON own.oid = c.relnamespace)
SELECT format('schema %I', nspname) AS object, format('%s %s', nspowner::regrole, nspacl) AS definition FROM own
UNION ALL SELECT format('relation %s', name), format('%s %s %s %s %s', relkind, relowner::regrole, relacl, reloptions,
    CASE WHEN relkind IN ('i', 'I') THEN pg_get_indexdef(oid) WHEN relkind IN ('v', 'm') THEN pg_get_viewdef(oid) END) FROM relations
UNION ALL SELECT format('column %s.%I', r.name, a.attname), format('%s %s %s %s %s', format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
    a.attacl, pg_get_expr(d.adbin, d.adrelid))
  FROM relations r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN pg_attrdef d ON d.adrelid = r.oid AND d.adnum = a.attnum WHERE r.relkind NOT IN ('i', 'I')
UNION ALL SELECT format('constraint %I of %s', k.conname, r.name), pg_get_constraintdef(k.oid) FROM pg_constraint k JOIN relations r ON r.oid = k.conrelid
UNION ALL SELECT format('trigger %I of %s', t.tgname, r.name), format('%s %s', t.tgenabled, pg_get_triggerdef(t.oid))
  FROM pg_trigger t JOIN relations r ON r.oid = t.tgrelid WHERE NOT t.tgisinternal
UNION ALL SELECT format('function %s', p.oid::regprocedure), format('%s %s %s', p.proowner::regrole, p.proacl, md5(p.prosrc))
  FROM pg_proc p JOIN own ON own.oid = p.pronamespace
