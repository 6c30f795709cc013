-- The ledger: what was planned, done and seen. It lies in the target database, so that any machine can go on.

-- name: exists
-- NULL where somebody else's table has its name.
SELECT CASE WHEN to_regclass('runbook.migration') IS NULL
              THEN CASE WHEN coalesce(to_regclass('runbook.action'), to_regclass('runbook.record'), to_regclass('runbook.copied_range')) IS NULL THEN false END
            WHEN EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('runbook.migration') AND attname = 'plan_hash') THEN true END

-- name: create
CREATE TABLE IF NOT EXISTS runbook.migration (
  id         integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  source     text NOT NULL,
  source_oid oid NOT NULL,
  plan       jsonb NOT NULL,
  plan_hash  text NOT NULL,
  state      text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'replaced', 'rolled back', 'finished')),
  filenode   bigint,  -- the file of the source that the copy was begun from
  triggers   text,    -- the log's triggers as they were switched on
  created_at timestamptz NOT NULL DEFAULT now());
CREATE UNIQUE INDEX IF NOT EXISTS migration_open ON runbook.migration (source) WHERE state = 'open';
CREATE TABLE IF NOT EXISTS runbook.action (
  id          integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  migration   integer NOT NULL REFERENCES runbook.migration,
  step        text NOT NULL,
  action      text NOT NULL,
  state       text NOT NULL DEFAULT 'started' CHECK (state IN ('started', 'done', 'failed', 'undone')),
  started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
  finished_at timestamptz,
  operator    text NOT NULL,
  sentence    text,
  rows        bigint,
  evidence    jsonb);
CREATE INDEX IF NOT EXISTS action_migration ON runbook.action (migration, step, action);
CREATE TABLE IF NOT EXISTS runbook.copied_range (
  migration   integer NOT NULL REFERENCES runbook.migration,
  first_block bigint NOT NULL,
  last_block  bigint NOT NULL,
  rows        bigint NOT NULL,
  PRIMARY KEY (migration, first_block));
CREATE TABLE IF NOT EXISTS runbook.record (
  id        integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  migration integer REFERENCES runbook.migration,
  folder    text NOT NULL,
  head      text NOT NULL,
  sealed_at timestamptz NOT NULL DEFAULT clock_timestamp())

-- name: last_migration
SELECT m.id, m.source, m.source_oid, m.plan, m.plan_hash, m.state FROM runbook.migration m
 WHERE m.source = {source} ORDER BY (m.state = 'open') DESC, m.id DESC LIMIT 1

-- name: open_by_name
SELECT source FROM runbook.migration WHERE state = 'open' AND {table} IN (source, substr(source, strpos(source, '.') + 1))

-- name: open_by_oid
SELECT source FROM runbook.migration m WHERE state = 'open' AND source_oid = {oid}::bigint::oid AND source <> {source}
   AND to_regclass(format('%I.%I', plan -> 'table' ->> 'schema_name', plan -> 'table' ->> 'name')) IS NULL
   AND EXISTS (SELECT FROM runbook.action a WHERE a.migration = m.id AND a.step <> 'plan')

-- name: moved
-- The name under which a table was partitioned that has another since: it is known by its partitions.
SELECT source FROM runbook.migration m WHERE state IN ('open', 'finished') AND source <> {source}
   AND to_regclass(format('%I.%I', plan -> 'table' ->> 'schema_name', plan -> 'table' ->> 'name')) IS NULL
   AND EXISTS (SELECT FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN jsonb_array_elements(plan -> 'partitions') p ON p ->> 'name' = c.relname
                WHERE i.inhparent = {oid})
 ORDER BY id DESC LIMIT 1

-- name: replace_open
UPDATE runbook.migration SET state = 'replaced' WHERE source = {source} AND state = 'open'

-- name: insert_migration
INSERT INTO runbook.migration (source, source_oid, plan, plan_hash) VALUES ({source}, {oid}, {plan}, {hash}) RETURNING id

-- name: script_migration
-- In the database where the script runs.
UPDATE runbook.migration SET state = 'replaced' WHERE source = {source} AND state = 'open' AND id <> {migration};
INSERT INTO runbook.migration (id, source, source_oid, plan, plan_hash) OVERRIDING SYSTEM VALUE
  VALUES ({migration}, {source}, {source_text}::regclass, {plan}, {hash}) ON CONFLICT (id) DO NOTHING;
SELECT setval(pg_get_serial_sequence('runbook.migration', 'id'), max(id)) FROM runbook.migration

-- name: script_action
INSERT INTO runbook.action (migration, step, action, state, finished_at, operator, sentence, evidence)
  VALUES ({migration}, {step}, {action}, 'done', clock_timestamp(), 'psql as ' || current_user, {sentence}, {evidence})

-- name: set_state
UPDATE runbook.migration SET state = {state} WHERE id = {migration}

-- name: begin_action
INSERT INTO runbook.action (migration, step, action, operator, evidence)
VALUES ({migration}, {step}, {action}, {operator}, jsonb_build_object('wal_from', pg_current_wal_insert_lsn())) RETURNING id

-- name: end_action
-- With the WAL that was written meanwhile, by whomever.
UPDATE runbook.action
   SET state = {state}, finished_at = clock_timestamp(), sentence = {sentence}, rows = {rows},
       evidence = {evidence}::jsonb || jsonb_build_object('wal_from', evidence -> 'wal_from',
         'wal_written', pg_current_wal_insert_lsn() - (evidence ->> 'wal_from')::pg_lsn)
 WHERE id = {id}

-- name: note_locked
-- For how many seconds, in all, the action kept everybody else from what it locked.
UPDATE runbook.action SET evidence = jsonb_build_object('locked_s', {seconds}::float8) || coalesce(evidence, '{{}}')
 WHERE id = {id} AND state = 'done'

-- name: fail_action
-- Only where it is not done: a commit may have arrived although its answer did not.
UPDATE runbook.action SET state = 'failed', finished_at = clock_timestamp(), sentence = {sentence} WHERE id = {id} AND state = 'started'

-- name: swapped
-- Open migrations of these tables that are past their cut-over.
SELECT m.source FROM runbook.migration m WHERE m.source = ANY ({tables}) AND m.state = 'open'
   AND EXISTS (SELECT FROM runbook.action a WHERE a.migration = m.id AND (a.step, a.action, a.state) = ('cutover', 'swap', 'done')) ORDER BY 1

-- name: finished_action
SELECT a.sentence, a.rows, a.evidence, a.finished_at, a.operator FROM runbook.action a
 WHERE a.migration = {migration} AND a.step = {step} AND a.action = {action} AND a.state = 'done'
 ORDER BY a.id DESC LIMIT 1

-- name: undo
-- A step that was taken back is no longer done; what was seen stays in the history.
UPDATE runbook.action SET state = 'undone' WHERE migration = {migration} AND step = ANY ({steps}) AND state = 'done'

-- name: withdraw
-- What does not hold, or no longer, is not done, whatever was seen before.
UPDATE runbook.action SET state = 'undone' WHERE migration = {migration} AND step = {step} AND action = {action} AND state = 'done'

-- name: history
SELECT a.step, a.action, a.state, a.started_at, a.finished_at, a.rows, a.sentence, a.operator,
       (a.evidence ->> 'wal_written')::float8 AS wal_bytes, (a.evidence ->> 'locked_s')::float8 AS locked_s
  FROM runbook.action a WHERE a.migration = {migration} ORDER BY a.id

-- name: steps
-- Of each step the check that was passed last, else what was tried last.
SELECT s.step, CASE WHEN a.action = 'check' AND a.state = 'done' THEN 'done' WHEN a.id IS NULL THEN '' ELSE a.action || ': ' || a.state END AS state,
       coalesce(to_char(a.finished_at AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS "UTC"'), '') AS when, coalesce(a.operator, '') AS by
  FROM unnest({steps}::text[]) WITH ORDINALITY s (step, n) LEFT JOIN LATERAL (
       SELECT * FROM runbook.action a WHERE a.migration = {migration} AND a.step = s.step
        ORDER BY (a.action = 'check' AND a.state = 'done') DESC, a.id DESC LIMIT 1) a ON true ORDER BY s.n

-- name: now
-- Which steps are left, and what there is to undo: bytes of what the migration keeps, and for how long the swap locked names.
SELECT m.state, (SELECT array_agg(s.step ORDER BY s.n) FROM unnest({steps}::text[]) WITH ORDINALITY s (step, n)
                  WHERE NOT EXISTS (SELECT FROM runbook.action a
                                     WHERE a.migration = m.id AND a.step = s.step AND a.action = 'check' AND a.state = 'done')) AS left,
       w.id IS NOT NULL AS swapped, (w.evidence ->> 'locked_s')::float8 AS locked_s,
       coalesce((SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c
                  WHERE c.relnamespace = to_regnamespace({staging_text}) AND c.relkind = 'r'), 0)::bigint AS staging,
       coalesce(pg_total_relation_size(to_regclass({backup_text})), 0)::bigint AS backup,
       EXISTS (SELECT FROM runbook.action a WHERE a.migration = m.id AND (a.step, a.action, a.state) = ('foreign_keys', 'columns', 'done')) AS columns_added
  FROM runbook.migration m LEFT JOIN LATERAL (
       SELECT * FROM runbook.action a WHERE a.migration = m.id AND a.step = 'cutover' AND a.action = 'swap' AND a.state = 'done'
        ORDER BY a.id DESC LIMIT 1) w ON true
 WHERE m.id = {migration}

-- name: overview
-- What was begun and is claimed by no session any more was broken off.
SELECT m.id AS migration, m.source AS "table", m.state, a.step, a.action,
       CASE WHEN a.state = 'started' AND NOT EXISTS (
                 SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND l.granted
                    AND l.classid::bigint = hashtext('runbook')::bigint & 4294967295 AND l.objid::bigint = m.source_oid::bigint & 4294967295)
            THEN 'broken off' ELSE a.state END AS action_state, a.started_at, a.finished_at, a.rows, a.sentence,
       m.plan_hash
  FROM runbook.migration m LEFT JOIN LATERAL (
       SELECT * FROM runbook.action a WHERE a.migration = m.id ORDER BY a.id DESC LIMIT 1) a ON true
 WHERE m.state <> 'replaced' ORDER BY m.id

-- name: begin_record
-- Before it is sealed: after a kill in between the run is known here all the same.
INSERT INTO runbook.record (migration, folder, head) VALUES ({migration}, {folder}, '') RETURNING id

-- name: end_record
UPDATE runbook.record SET head = {head}, sealed_at = clock_timestamp() WHERE id = {id}

-- name: plans
SELECT plan_hash FROM runbook.migration

-- name: heads
SELECT folder, head FROM runbook.record ORDER BY id

-- name: claim
-- Session-level: it lives exactly as long as the connection of the run that took it.
SELECT pg_try_advisory_lock(hashtext({purpose}), {source_oid}::int) AS granted

-- name: claimant
SELECT l.pid, a.usename AS "user", a.application_name AS application, a.client_addr::text AS host, a.backend_start AS since
  FROM pg_locks l LEFT JOIN pg_stat_activity a USING (pid)
 WHERE l.locktype = 'advisory' AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
   AND l.classid::bigint = hashtext({purpose})::bigint & 4294967295 AND l.objid::bigint = {source_oid}::bigint & 4294967295
   AND l.granted

-- name: remember_triggers
UPDATE runbook.migration SET triggers = {triggers} WHERE id = {migration}

-- name: remember_filenode
UPDATE runbook.migration SET filenode = {filenode} WHERE id = {migration}

-- name: standing
-- With all that is done, each as step.action.
SELECT m.state, ARRAY(SELECT DISTINCT a.step || '.' || a.action FROM runbook.action a WHERE a.migration = m.id AND a.state = 'done') AS done
  FROM runbook.migration m WHERE m.id = {migration}

-- name: remembered
SELECT filenode, triggers, state FROM runbook.migration WHERE id = {migration}

-- name: last_id
SELECT max(id) FROM runbook.migration

-- name: whole
-- A migration as the record keeps it: the plan, and every action with its evidence, failed ones too.
SELECT jsonb_build_object(
         'migration', to_jsonb(m),
         'actions', coalesce((SELECT jsonb_agg(to_jsonb(a) - 'migration' ORDER BY a.id) FROM runbook.action a WHERE a.migration = m.id), '[]'),
         'records', coalesce((SELECT jsonb_agg(to_jsonb(r) - 'migration' ORDER BY r.id) FROM runbook.record r WHERE r.migration = m.id), '[]'))
  FROM runbook.migration m WHERE m.id = {migration}
