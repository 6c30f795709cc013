-- Waiting for others: who they are, and for how long.

-- name: blockers
-- Who stands before this backend in the queue of a lock. A prepared transaction blocks as pid 0.
SELECT b.pid, coalesce(a.usename, '') AS "user", coalesce(a.application_name, '') AS application,
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::int AS age_s, coalesce(a.state, a.backend_type, '') AS state,
       coalesce(a.query, '') AS query,
       CASE WHEN b.pid = 0 THEN (
         SELECT string_agg(DISTINCT quote_literal(p.gid), ', ') FROM pg_prepared_xacts p
           JOIN pg_locks x ON x.pid IS NULL AND x.locktype = 'transactionid' AND x.transactionid = p.transaction
           JOIN pg_locks h ON h.pid IS NULL AND h.virtualtransaction = x.virtualtransaction
           JOIN pg_locks w ON w.pid = {pid} AND NOT w.granted AND w.relation = h.relation AND w.database = h.database) END AS gid,
       (SELECT w.mode || ' on ' || coalesce(w.relation::regclass::text, w.locktype) FROM pg_locks w WHERE w.pid = {pid} AND NOT w.granted LIMIT 1) AS lock
  FROM (SELECT DISTINCT unnest(pg_blocking_pids({pid})) AS pid) b LEFT JOIN pg_stat_activity a ON a.pid = b.pid

-- name: waiting
SELECT pid FROM pg_stat_activity WHERE pid = ANY ({pids}::int[]) AND wait_event_type = 'Lock'

-- name: at_work
-- What our sessions have done for some seconds: an action's own statement, or the indexes that its workers build.
SELECT coalesce(p.relid::regclass || ': ' || p.phase
                || coalesce(' ' || 100 * nullif(p.tuples_done, 0) / nullif(p.tuples_total, 0) || ' %', ' ' || 100 * p.blocks_done / nullif(p.blocks_total, 0) || ' %', ''),
                substr(a.application_name, 9)) || ', ' || extract(epoch FROM clock_timestamp() - a.query_start)::int || ' s' AS text
  FROM pg_stat_activity a LEFT JOIN pg_stat_progress_create_index p ON p.pid = a.pid
 WHERE a.pid = ANY ({pids}::int[]) AND a.state = 'active' AND a.query_start < clock_timestamp() - interval '3 s'
   AND (p.pid IS NOT NULL OR a.application_name <> 'runbook worker') ORDER BY a.pid

-- name: now
SELECT clock_timestamp()::text AS since, pg_snapshot_xmin(pg_current_snapshot())::xid::text AS oldest

-- name: hidden_transactions
-- Of sessions whose state this role may not see: all that are open.
SELECT l.virtualxid AS transaction FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
 WHERE l.locktype = 'virtualxid' AND l.pid <> pg_backend_pid() AND a.datname = current_database() AND a.backend_type IS NULL

-- name: old_snapshots
-- Sessions whose snapshot is older than transaction {horizon}: to them the shadow is empty. One that began after {since} is
-- newer, even when an older transaction still runs elsewhere and keeps its xmin low; but not below {oldest}, by which one that was
-- exported is known.
SELECT a.pid, coalesce(a.usename, '') AS "user", coalesce(a.application_name, '') AS application,
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::int AS age_s, coalesce(a.state, '') AS state,
       coalesce(a.query, '') AS query, NULL AS gid
  FROM pg_stat_activity a
 WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.application_name NOT LIKE 'runbook %'
   AND (a.backend_type = 'client backend' AND a.backend_xmin IS NOT NULL AND age(a.backend_xmin) >= age({horizon}::text::xid)
        AND (a.xact_start <= {since}::timestamptz OR age(a.backend_xmin) > age({oldest}::text::xid))
        OR EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.virtualxid = ANY ({hidden}::text[])))

-- name: look_anew
-- Within a transaction pg_stat_activity stays what it was when it was first read.
SELECT pg_stat_clear_snapshot()

-- name: late_snapshots
-- Transactions that hold a snapshot from an earlier statement: REPEATABLE READ ones. One whose statement waits for this lock
-- looks alike when it has touched another table before, so that now and then it is taken for one.
SELECT a.pid, coalesce(a.usename, '') AS "user", coalesce(a.application_name, '') AS application,
       coalesce(extract(epoch FROM clock_timestamp() - a.xact_start), 0)::int AS age_s, coalesce(a.state, '') AS state,
       coalesce(a.query, '') AS query, NULL AS gid
  FROM pg_stat_activity a
 WHERE a.datname = current_database() AND a.pid <> pg_backend_pid() AND a.application_name NOT LIKE 'runbook %'
   AND a.backend_type = 'client backend' AND a.backend_xmin IS NOT NULL
   AND (a.state LIKE 'idle in transaction%' OR a.query_start - a.xact_start > interval '1 ms'
        AND EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid AND l.locktype = 'relation' AND l.granted))

-- name: horizon
-- The id of this transaction; snapshots that do not see it are older.
SELECT pg_current_xact_id()::xid

-- name: wraparound
SELECT p.pid FROM pg_stat_progress_vacuum p JOIN pg_stat_activity a USING (pid)
 WHERE p.relid = {oid} AND a.query LIKE '%to prevent wraparound%'

-- name: deadlock_timeout
SELECT setting::int FROM pg_settings WHERE name = 'deadlock_timeout'

-- name: evict
-- No reader or writer waits for this lock; autovacuum yields to it after deadlock_timeout.
LOCK TABLE {tables} IN SHARE UPDATE EXCLUSIVE MODE

-- name: toasted
SELECT n.nspname AS schema, c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.reltoastrelid <> 0 AND c.oid IN (SELECT unnest({tables}::regclass[])
       UNION SELECT p.relid FROM unnest({tables}::regclass[]) t, pg_partition_tree(t) p) ORDER BY c.oid

-- name: evict_toast
-- LOCK TABLE takes no TOAST table, of which autovacuum takes care by itself. This one has no such option: nothing changes.
ALTER TABLE {table} RESET (toast.fillfactor)

-- name: lock_ours
-- Before the application is kept out: autovacuum yields here, too, and a reader is waited for.
LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE

-- name: tables_in
SELECT n.nspname AS schema, c.relname AS name FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = ANY ({schemas}::text[]) AND c.relkind = 'r' AND NOT c.relispartition ORDER BY 1, 2

-- name: lock
-- Each table's strongest lock at once: a weaker one first would be a deadlock with a session that read and then writes.
-- One statement for all of them, which statement_timeout bounds as a whole.
DO {block}

-- name: lock_table
LOCK TABLE {table} IN {mode} MODE;

-- name: lock_view
-- LOCK TABLE would ask whether the view's owner may lock the tables below it. This changes nothing, and locks the view alone.
EXECUTE (SELECT format('ALTER VIEW %s OWNER TO %I', oid::regclass, pg_get_userbyid(relowner)) FROM pg_class WHERE oid = {view}::regclass);
