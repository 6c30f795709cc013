-- 04: the role column on every referencing table, logged and filled in.

-- name: create_log
-- Holds the referenced key of every row whose reference may have to be corrected.
CREATE TABLE {reference_log} WITH (autovacuum_enabled = off) AS SELECT {reference_key_aliases} FROM {reference} r WHERE false;
ALTER TABLE {reference_log} REPLICA IDENTITY FULL

-- name: create_log_function
CREATE FUNCTION {reference_function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO {reference_log} SELECT DISTINCT {n_columns} FROM added n WHERE ROW({n_columns}) IS NOT NULL;
  RETURN NULL;
END $$

-- name: create_row_log_function
CREATE FUNCTION {reference_function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  INSERT INTO {reference_log} SELECT {new_columns} WHERE {new_present};
  RETURN NULL;
END $$

-- name: add_column
-- ACCESS EXCLUSIVE for an instant; a constant default rewrites nothing.
ALTER TABLE {reference} ADD COLUMN {role_column} {role_type} {default} {not_null}

-- name: switch_on
-- The WHEN clause keeps the runbook's own corrections out of the log.
CREATE TRIGGER {insert_trigger} AFTER INSERT ON {reference} REFERENCING NEW TABLE AS added
  FOR EACH STATEMENT EXECUTE FUNCTION {reference_function}();
CREATE TRIGGER {update_trigger} AFTER UPDATE ON {reference} REFERENCING NEW TABLE AS added
  FOR EACH STATEMENT WHEN (current_setting('runbook.correcting', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION {reference_function}()

-- name: switch_on_rows
-- On a partitioned table: triggers of statements there do not see what is written to a partition directly.
CREATE TRIGGER {insert_trigger} AFTER INSERT ON {reference} FOR EACH ROW EXECUTE FUNCTION {reference_function}();
CREATE TRIGGER {update_trigger} AFTER UPDATE ON {reference}
  FOR EACH ROW WHEN (current_setting('runbook.correcting', true) IS DISTINCT FROM 'on') EXECUTE FUNCTION {reference_function}()

-- name: always_on
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {insert_trigger};
ALTER TABLE {table} ENABLE ALWAYS TRIGGER {update_trigger}

-- name: tables
-- Those that hold its rows now: partitions come and go. By pg_inherits, for which nothing is locked.
WITH RECURSIVE tree AS (
  SELECT to_regclass({reference_text})::oid AS oid UNION ALL
  SELECT i.inhrelid FROM tree t JOIN pg_class p ON p.oid = t.oid AND p.relkind = 'p' JOIN pg_inherits i ON i.inhparent = p.oid)
SELECT n.nspname::text AS schema, c.relname::text AS name, k.convalidated AS validated
  FROM tree JOIN pg_class c USING (oid) JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_constraint k ON k.conrelid = c.oid AND k.conname = {constraint_text}
 WHERE c.relkind = 'r' ORDER BY 1, 2

-- name: heirs
-- Tables that inherit from it and are no partitions: its foreign keys and triggers do not reach them, its columns do.
SELECT format('%I.%I', n.nspname, c.relname) AS name, format('%I.%I', o.nspname, p.relname) AS parent
  FROM pg_class p JOIN pg_namespace o ON o.oid = p.relnamespace JOIN pg_inherits i ON i.inhparent = p.oid
  JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE p.oid = to_regclass({reference_text}) AND p.relkind = 'r' ORDER BY 1

-- name: gained
-- Whether 04 came to the end of its columns, and nothing has taken them away since.
SELECT EXISTS (SELECT FROM runbook.action a WHERE a.migration = {migration} AND (a.step, a.action) = ('foreign_keys', 'columns') AND a.state IN ('done', 'undone')
   AND NOT EXISTS (SELECT FROM runbook.action b WHERE b.migration = a.migration AND (b.step, b.action, b.state) = ('rollback', 'clean', 'done') AND b.id > a.id))

-- name: partitioned
SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass({reference_text})

-- name: keyed
SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass({reference_text}) AND conname = {constraint_text})

-- name: trigger_states
-- The log's triggers on the table and its partitions: what differs from what was remembered may have gone unlogged.
WITH RECURSIVE tree AS (
  SELECT to_regclass({reference_text})::oid AS oid UNION ALL
  SELECT i.inhrelid FROM tree t JOIN pg_class p ON p.oid = t.oid AND p.relkind = 'p' JOIN pg_inherits i ON i.inhparent = p.oid)
SELECT jsonb_object_agg(tree.oid, (SELECT string_agg(concat_ws(' ', tgname, tgenabled, g.xmin), ', ' ORDER BY tgname) FROM pg_trigger g
                                    WHERE g.tgrelid = tree.oid AND g.tgname IN ({insert_text}, {update_text}))) AS states
  FROM tree WHERE oid IS NOT NULL

-- name: switch_off
DROP TRIGGER IF EXISTS {insert_trigger} ON {reference};
DROP TRIGGER IF EXISTS {update_trigger} ON {reference}

-- name: require_role
-- A composite key passes when any of its columns is NULL: (999, NULL) would refer to nobody.
ALTER TABLE {reference} ADD CONSTRAINT {check_name} CHECK ({required}) NOT VALID

-- name: require_all
-- The validated check proves it: nothing is scanned, ACCESS EXCLUSIVE is held for an instant.
ALTER TABLE {reference} ALTER COLUMN {role_column} SET NOT NULL, DROP CONSTRAINT {check_name}

-- name: checked
SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = to_regclass({reference_text}) AND conname = {check_text})

-- name: blocks
SELECT pg_relation_size({reference_text}::regclass) / current_setting('block_size')::bigint AS blocks

-- name: collect_places
-- The column begins with the most frequent value; only rows that refer to other values are touched. Where these lie, and what
-- they need, is read once: a row that is written meanwhile is in the logs.
CREATE UNLOGGED TABLE {places} AS
SELECT r.ctid AS place, {reference_key_aliases}, {s_key} AS value FROM {reference} r JOIN {source} s ON {r_is_s}
 WHERE {s_key} IS DISTINCT FROM {frequent} AND r.{role_column} IS DISTINCT FROM {s_key}

-- name: one_of_every_index
-- A column of every index, which an update may set to what it is and nobody notices: no trigger is for it.
SELECT DISTINCT ON (i.indexrelid) a.attname AS name
  FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = ANY ((i.indkey::int2[])[0 : i.indnkeyatts - 1])
 WHERE i.indrelid = {reference_text}::regclass AND a.attgenerated = '' AND a.attidentity <> 'a'
   AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = i.indrelid AND NOT t.tgisinternal AND a.attnum = ANY (t.tgattr::int2[]))
 ORDER BY i.indexrelid, a.attnum

-- name: fill_places
-- Some of them, each by its address: no scan and no lookup. The key is compared again, for another row may lie there by
-- now. With a lock_timeout of some milliseconds it never waits for the application, and gives way to fill_free_places
-- where somebody holds a row. An index none of whose columns is set counts as unchanged, and on every full page of it
-- PostgreSQL looks for old versions of the row that could go: there are none yet, and it took half of all the time.
UPDATE {reference} w SET {assignments} FROM {places} k
 WHERE k.ctid >= {first}::tid AND k.ctid < {last}::tid AND w.ctid = k.place AND {w_is_k} AND w.{role_column} IS DISTINCT FROM k.value

-- name: fill_free_places
-- Rows that somebody holds are skipped, so that the application neither waits nor gets a deadlock; the check that
-- follows finds them.
WITH target AS (
  SELECT w.ctid AS place, k.value FROM {places} k JOIN {reference} w ON w.ctid = k.place AND {w_is_k}
   WHERE k.ctid >= {first}::tid AND k.ctid < {last}::tid AND w.{role_column} IS DISTINCT FROM k.value
     FOR NO KEY UPDATE OF w SKIP LOCKED)
UPDATE {reference} r SET {role_column} = target.value FROM target WHERE r.ctid = target.place

-- name: fill_all
-- The log has then what others wrote, and nothing else.
BEGIN;
SET LOCAL runbook.correcting = 'on';
UPDATE {reference} r SET {role_column} = {s_key} FROM {source} s WHERE {r_is_s} AND r.{role_column} IS DISTINCT FROM {s_key};
COMMIT

-- name: collect_logged
-- The same of the rows that the log knows of, where these are many.
CREATE UNLOGGED TABLE {places} AS
SELECT r.ctid AS place, {reference_key_aliases}, {s_key} AS value FROM {reference} r JOIN {source} s ON {r_is_s}
 WHERE r.{role_column} IS DISTINCT FROM {s_key} AND EXISTS (SELECT FROM {reference_log} k WHERE {s_is_rk})

-- name: forget_right
-- Keys none of whose rows is wrong in this snapshot: whatever makes one wrong later is logged anew. Each key is looked at once,
-- however often it is there: many rows may have it.
DELETE FROM {reference_log} WHERE ctid = ANY (ARRAY(
  SELECT unnest(k.places) FROM (SELECT array_agg(k.ctid) AS places, {k_columns} FROM {reference_log} k GROUP BY {k_columns}) k
   WHERE NOT EXISTS (
     SELECT FROM {reference} w JOIN {source} v ON {w_is_v} WHERE {w_is_k} AND w.{role_column} IS DISTINCT FROM {v_key})))

-- name: correct_some
-- READ COMMITTED, so many rows and no more, and those that somebody holds are skipped: the application waits for nothing long.
UPDATE {reference} r SET {role_column} = {s_key}
  FROM {source} s
 WHERE {r_is_s} AND r.{role_column} IS DISTINCT FROM {s_key}
   AND r.ctid = ANY (ARRAY(
       SELECT w.ctid FROM (SELECT DISTINCT * FROM {reference_log}) k
         JOIN {reference} w ON {w_is_k} JOIN {source} v ON {w_is_v}
        WHERE w.{role_column} IS DISTINCT FROM {v_key} LIMIT {size} FOR NO KEY UPDATE OF w SKIP LOCKED))

-- name: stuck
-- Rows that the log knows of, that nobody holds, and that are wrong still: they are ours now.
SELECT coalesce(array_agg(ctid), '{{}}')::text AS rows FROM (
  SELECT w.ctid FROM (SELECT DISTINCT * FROM {reference_log}) k JOIN {reference} w ON {w_is_k} JOIN {source} v ON {w_is_v}
   WHERE w.{role_column} IS DISTINCT FROM {v_key} LIMIT 1000 FOR NO KEY UPDATE OF w SKIP LOCKED) stuck

-- name: correct_stuck
UPDATE {reference} r SET {role_column} = {s_key} FROM {source} s
 WHERE {r_is_s} AND r.{role_column} IS DISTINCT FROM {s_key} AND r.ctid = ANY ({rows}::tid[])

-- name: still_stuck
-- In the same transaction: those that the update did not touch, and those that it gave another value than it was told.
SELECT count(*) FROM (SELECT DISTINCT * FROM {reference_log}) k JOIN {reference} w ON {w_is_k} JOIN {source} v ON {w_is_v}
 WHERE w.{role_column} IS DISTINCT FROM {v_key} AND (w.ctid = ANY ({rows}::tid[]) OR w.xmin = pg_current_xact_id()::xid)

-- name: correct_last
-- Under the cut-over's locks nobody writes any more: every key of the log at once.
UPDATE {reference} r SET {role_column} = {s_key}
  FROM {source} s JOIN (SELECT DISTINCT * FROM {reference_log}) k ON {s_is_rk}
 WHERE {r_is_s} AND r.{role_column} IS DISTINCT FROM {s_key}

-- name: to_correct
SELECT count(*) FROM (SELECT FROM {reference} r, {source} s JOIN (SELECT DISTINCT * FROM {reference_log}) k ON {s_is_rk}
 WHERE {r_is_s} AND r.{role_column} IS DISTINCT FROM {s_key} LIMIT {size}) x

-- name: clear_log
DELETE FROM {reference_log}

-- name: log_length
SELECT count(*) FROM {reference_log}

-- name: hand_over
-- Keys of rows that are referenced with another partition key than theirs. Comparing them with the shadow is not enough:
-- one that changed and changed back may have been corrected in between.
INSERT INTO {reference_log} SELECT {s_referenced} FROM {source} s JOIN (SELECT DISTINCT {keys} FROM {log}) k ON {s_is_k}
 WHERE EXISTS (SELECT FROM {reference} r WHERE {r_is_s} AND r.{role_column} IS DISTINCT FROM {s_key})

-- name: pass_on
-- Rows of the table itself that stand in the shadow with another role than that of the row that they refer to.
INSERT INTO {log} SELECT {s_pk} FROM {source} s JOIN (SELECT DISTINCT {keys} FROM {log}) k ON {s_is_rk}
 WHERE EXISTS (SELECT FROM {shadow} d WHERE {d_is_s}
                  AND d.{role_column} IS DISTINCT FROM (SELECT v.{key} FROM ONLY {source} v WHERE {s_refers_v}))

-- name: add_own_column
ALTER TABLE {shadow} ADD COLUMN {role_column} {role_type};
ALTER TABLE {shadow} ADD CONSTRAINT {check_name} CHECK ({required})

-- name: wrong
-- Rows whose role is not their row's, but for those of which a log knows, that of the table or that of the row they refer to. The old
-- foreign key is still in force, so whoever is not among the minority is of the most frequent value: only the minority is hashed.
SELECT count(*) FROM {reference} w LEFT JOIN (SELECT {s_referenced}, {s_key} AS {key} FROM {source} s WHERE {s_key} IS DISTINCT FROM {frequent}) v
    ON {w_is_v}
 WHERE w.{role_column} IS DISTINCT FROM coalesce(v.{key}, {frequent}) AND ROW({w_columns}) IS NOT NULL
   AND NOT EXISTS (SELECT FROM {reference_log} k WHERE {w_is_k})
   AND NOT EXISTS (SELECT FROM {source} s JOIN {log} k ON {s_is_k} WHERE {w_is_s})

-- name: orphans
-- The query by which the rows are found that a foreign key refuses, and whether we may ask it.
SELECT format('SELECT * FROM %s%s r WHERE (%s) IS NOT NULL AND NOT EXISTS (SELECT FROM %s%s s WHERE %s)', CASE c.relkind WHEN 'r' THEN 'ONLY ' END, k.conrelid::regclass,
              r.columns, CASE f.relkind WHEN 'r' THEN 'ONLY ' END, k.confrelid::regclass, s.same) AS query,
       has_table_privilege(k.conrelid, 'SELECT') AND has_table_privilege(k.confrelid, 'SELECT') AND NOT row_security_active(k.confrelid) AS readable
  FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_class f ON f.oid = k.confrelid
 CROSS JOIN LATERAL (SELECT string_agg(format('r.%I', a.attname), ', ' ORDER BY u.n) AS columns FROM unnest(k.conkey) WITH ORDINALITY u(number, n)
                       JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.number) r
 CROSS JOIN LATERAL (  -- by the key's own operators, wherever they are
       SELECT string_agg(CASE os.nspname WHEN 'pg_catalog' THEN format('s.%I %s r.%I', b.attname, o.oprname, a.attname)
                              ELSE format('s.%I OPERATOR(%I.%s) r.%I', b.attname, os.nspname, o.oprname, a.attname) END, ' AND ' ORDER BY u.n) AS same
         FROM ROWS FROM (unnest(k.conkey), unnest(k.confkey), unnest(k.conpfeqop)) WITH ORDINALITY u(own, theirs, op, n)
         JOIN pg_attribute a ON a.attrelid = k.conrelid AND a.attnum = u.own JOIN pg_attribute b ON b.attrelid = k.confrelid AND b.attnum = u.theirs
         JOIN pg_operator o ON o.oid = u.op JOIN pg_namespace os ON os.oid = o.oprnamespace) s
 WHERE k.contype = 'f' AND (n.nspname, c.relname, k.conname) = ({schema}, {table}, {constraint})

-- name: count
SELECT count(*) FROM ({search}) found

-- name: log_wrong
INSERT INTO {reference_log} SELECT DISTINCT {w_columns} FROM {reference} w JOIN {source} v ON {w_is_v}
 WHERE w.{role_column} IS DISTINCT FROM {v_key}

-- name: drop_column
ALTER TABLE IF EXISTS {reference} DROP COLUMN IF EXISTS {role_column}

-- name: add_key
ALTER TABLE IF EXISTS {reference} ADD CONSTRAINT {constraint} {definition} NOT VALID

-- name: drop_default
ALTER TABLE {reference} ALTER COLUMN {role_column} DROP DEFAULT

-- name: create_fill
-- Gives a row the key of the row that it refers to, when the writer did not know of the column; one that was given is never
-- corrected, the foreign key refuses a wrong one. FOR KEY SHARE waits for a concurrent change of it and sees its result; a row
-- that moved to another partition meanwhile is looked for again. Where there is none to refer to, the foreign key refuses.
-- That an update names the column only its list of columns tells: the trigger for that list fires first, and passes it on. What
-- another trigger assigned stands in no list: the fill trigger has none, and compares. ALWAYS: a session in replica mode is helped, too.
CREATE FUNCTION {named_function}() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  PERFORM set_config({named_setting}, 'on', true);
  RETURN NEW;
END $$;
CREATE TRIGGER {named_trigger} BEFORE UPDATE OF {role_column} ON {reference} FOR EACH ROW EXECUTE FUNCTION {named_function}();
CREATE FUNCTION {fill_function}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  attempts integer := 0;
BEGIN
  IF TG_OP = 'UPDATE' AND current_setting({named_setting}, true) = 'on' THEN
    PERFORM set_config({named_setting}, 'off', true);
  ELSE
    {itself}
    IF TG_OP = 'UPDATE' AND ROW({new_columns})::record *<> ROW({old_columns})::record THEN
      NEW.{role_column} := NULL;
    END IF;
  END IF;
  IF NEW.{role_column} IS NOT NULL OR NOT ({new_present}) THEN
    RETURN NEW;
  END IF;
  LOOP
    BEGIN
      SELECT {s_key} INTO NEW.{role_column} FROM {source} s WHERE {s_is_new} FOR KEY SHARE;
      EXIT;
    EXCEPTION WHEN serialization_failure THEN
      attempts := attempts + 1;
      IF attempts > 20 THEN
        RAISE;
      END IF;
    END;
  END LOOP;
  IF NEW.{role_column} IS NULL THEN
    {unknown}
  END IF;
  {note};
  RETURN NEW;
END $$;
CREATE TRIGGER {fill_trigger} BEFORE INSERT OR UPDATE ON {reference} FOR EACH ROW EXECUTE FUNCTION {fill_function}();
ALTER TABLE {reference} ENABLE ALWAYS TRIGGER {named_trigger};
ALTER TABLE {reference} ENABLE ALWAYS TRIGGER {fill_trigger};
DO $do$  -- on 14 and 15 ALWAYS on a partitioned table does not reach its partitions
DECLARE
  leaf regclass;
BEGIN
  FOR leaf IN SELECT relid FROM pg_partition_tree($name${reference}$name$) WHERE isleaf AND level > 0 LOOP
    EXECUTE 'ALTER TABLE ' || leaf || $alter$ ENABLE ALWAYS TRIGGER {named_trigger}$alter$;
    EXECUTE 'ALTER TABLE ' || leaf || $alter$ ENABLE ALWAYS TRIGGER {fill_trigger}$alter$;
  END LOOP;
END $do$

-- name: note_fill
-- Who still needs it is counted until 91.
INSERT INTO {filled} (referencing) VALUES (TG_TABLE_NAME);

-- name: drop_fill
DROP TRIGGER IF EXISTS {fill_trigger} ON {reference};
DROP TRIGGER IF EXISTS {named_trigger} ON {reference};
DROP FUNCTION IF EXISTS {fill_function}();
DROP FUNCTION IF EXISTS {named_function}()

-- name: create_filled
CREATE TABLE IF NOT EXISTS {filled} (referencing name NOT NULL, at timestamptz NOT NULL DEFAULT now())

-- name: state
SELECT {table_text} AS "table", coalesce(sum(n), 0)::bigint AS rows, coalesce(sum(n) FILTER (WHERE value IS NULL), 0)::bigint AS without,
       string_agg(value || ': ' || to_char(n, 'FM999,999,999'), ', ' ORDER BY n DESC) AS "rows per value"
  FROM (SELECT {role_column}::text AS value, count(*) AS n FROM {reference} GROUP BY {role_column}) v
